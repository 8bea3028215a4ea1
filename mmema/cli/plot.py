"""Draw the schedule of a config's EMA over the run, before any training, or that of a run after it.

mmema plot configs/digits/yolov5_n_digits.py -o plan.png
mmema plot configs/digits/yolov5_n_digits.py --work-dir work_dirs/digits -o run.png

The picture shows the momentum (and the horizon, interval / momentum) of each average, the learning
rate, restarts and pipeline switches of the main one, and how much of it in the end each epoch's
weights make up; after a run also the metrics of all weights.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import Runner

from ..averaged import MomentumAveragedModel
from ..averages.config import AverageConfig, class_of
from ..averages.units import blend_interval, settle_average
from ..checkpoints.formats import CheckpointError
from ..hooks.restart import EMARestartHook
from ..messages import RunError
from ..posthoc.facts import facts_in
from ..posthoc.records import History, history_in
from ..restartable import STOCK_EQUIVALENTS, Restartable
from ..restarts import profile
from ..restarts.controller import check_rule
from ..restarts.planner import plan
from ..restarts.rule import RestartRule
from ..run import MAIN, RunFacts, facts_in_config, the_ema_hook, watched_metric
from ..run.batch import base_of
from ..run.checkpoints import checkpoints_in
from ..run.config import hooks_in, is_by_epoch, kind_of
from ..run.horizons import RAW, updates_of_horizon
from ..run.metrics import main_names, prefixes_in
from ..run.record import epochs_until, iteration_of_epoch
from ..run.scalars import read_scalars
from . import common as cli

COLORS = ('orange', 'green', 'purple', 'brown', 'pink', 'olive', 'cyan', 'gray')
HOOKS_OF_AVERAGES = ('EMAHook', 'EMARestartHook')
MOST_BLOCKS = 100  # a run by iterations is cut into at most so many


def main(argv=None):
    args = parse_args(argv)
    cli.import_stack()
    config = cli.load_config(args)
    cli.need(config, 'train_cfg', 'optim_wrapper')
    init_default_scope(config.get('default_scope', 'mmengine'))
    run = run_in(config, args.iters_per_epoch, args.processes)
    end = run.facts.end('epoch' if run.facts.by_epoch else 'iter')
    if not 0 <= args.begin < end:
        cli.die(f'--from must be at least 0 and below the end of the run, {end}, got {args.begin}')
    if args.from_run:
        curves = of_scalars(run, args.from_run)
    else:
        with cli.one_line('the run cannot be planned', *cli.CONFIG_ERRORS):
            curves = of_config(run)
    output = args.output or f'{Path(args.config).stem}_ema.png'
    try:
        draw(curves, run, output, args.begin)
    except (OSError, ValueError) as error:  # no such folder, no such format
        cli.die(f'cannot write {output}: {error}')
    print(f'{output}: {curves.title}')


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument('config', help='file of the config')
    parser.add_argument('-o', '--output', metavar='PNG', help='(default: <config>_ema.png)')
    parser.add_argument(
        '--work-dir',
        dest='from_run',
        metavar='D',
        help='draw the scalars of the run in this folder, which had an EMAMonitorHook',
    )
    parser.add_argument(
        '--iters-per-epoch',
        type=int,
        metavar='N',
        help='length of an epoch of one process; needed where the training data are not here',
    )
    parser.add_argument(
        '--processes',
        type=int,
        default=1,
        metavar='N',
        help='processes of the run, where base_batch_size or auto_scale_lr asks (default: 1)',
    )
    parser.add_argument(
        '--from',
        dest='begin',
        type=int,
        default=0,
        metavar='E',
        help='draw from this epoch (iteration of a run by iterations) to the end (default: 0)',
    )
    parser.add_argument('--cfg-options', nargs='+', action='extend', default=[], metavar='K=V')
    args = parser.parse_args(argv)
    if args.iters_per_epoch is not None and args.iters_per_epoch < 1:
        parser.error(f'--iters-per-epoch must be at least 1, got {args.iters_per_epoch}')
    if args.processes < 1:
        parser.error(f'--processes must be at least 1, got {args.processes}')
    args.work_dir, args.launcher, args.local_rank = None, 'none', 0
    return args


class Run(NamedTuple):
    """What a config tells of its run: facts, the averages, and the rules of their restarts."""

    config: dict
    facts: RunFacts
    averages: dict[str, AverageConfig]  # by name; the main one is 'ema'
    rules: dict[str, list[RestartRule]]  # of each average
    base: int | None  # the batch size at which momentum and gamma were tuned, if there is one
    batch: int | None  # the batch size of an update

    @property
    def block(self) -> int:
        """Iterations whose shares are drawn as one bar."""
        return self.facts.epoch_length or -(-self.facts.iterations // MOST_BLOCKS)


def run_in(config, iters_per_epoch, processes=1):
    """Return the run of a config."""
    length = 'max_epochs' if is_by_epoch(config) else 'max_iters'
    if config.train_cfg.get(length) is None:
        cli.die(f'{config.filename} has no train_cfg.{length}')
    by_epoch = length == 'max_epochs'
    epoch_length = (iters_per_epoch or length_of_epoch(config)) if by_epoch else 1
    with cli.one_line(config.filename, *cli.CONFIG_ERRORS):
        settings = [hook for hook in hooks_in(config) if kind_of(hook) in HOOKS_OF_AVERAGES]
        hooks = [HOOKS.build({k: v for k, v in own.items() if k != 'priority'}) for own in settings]
        ema_hook = the_ema_hook(hooks)
        facts = facts_in_config(config, epoch_length)
    stock = dict(ema_hook.ema_cfg)
    stock = {MAIN: AverageConfig(stock.pop('type'), stock)}
    averages = getattr(ema_hook, 'configs', stock)
    rules = {name: [one.rule] if one.rule else [] for name, one in averages.items()}
    rules[MAIN] = [hook.rule for hook in hooks if isinstance(hook, EMARestartHook)]
    ladder = getattr(ema_hook, 'ladder', None)
    if ladder is not None:  # the main average is one of its rungs, the first one to be chosen
        with cli.one_line(config.filename, *cli.CONFIG_ERRORS):
            ladder.fit(facts)
        others = [n for n, one in averages.items() if one.blends_of_gamma is None]
        averages = {name: averages[name] for name in (*ladder.rungs, *others)}
        rules.update(dict.fromkeys(ladder.rungs, rules[MAIN]))
        averages = {MAIN: averages[ladder.chosen], **averages}
    base = None
    if hasattr(ema_hook, 'base_batch_size'):  # not MMEngine's hook
        strategy = config.get('strategy') or {}
        scale_lr = config.get('auto_scale_lr') or strategy.get('auto_scale_lr')
        base = ema_hook.base_batch_size or base_of(scale_lr)
    batch = (config.get('train_dataloader') or {}).get('batch_size')
    batch = batch and batch * processes * facts.accumulation
    return Run(config, facts, averages, rules, base, batch)


def length_of_epoch(config):
    ask = 'give the length of an epoch of one process with --iters-per-epoch N'
    if config.get('train_dataloader') is None:
        cli.die(f'{config.filename} has no train_dataloader; {ask}')
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports each step
            return len(Runner.build_dataloader(config.train_dataloader))
    except FileNotFoundError as error:
        cli.die(f'no {error.filename or error}; {ask}')
    except Exception as error:  # a missing package, a damaged file: the length is all we need
        cli.die(f'train_dataloader cannot be built ({type(error).__name__}: {error}); {ask}')


# --- before the run -----------------------------------------------------------------------------


def of_config(run):
    plans = {name: planned(run, name) for name in run.averages}
    restarts, values = plans['ema']
    at, rates = iterations_of(run.facts, len(values)), learning_rates(run.config, run.facts)
    return SimpleNamespace(
        title=f'{Path(run.config.filename).name}, planned',
        momenta={name: (at, momenta) for name, (_, momenta) in plans.items()},
        lr_at=range(len(rates)),
        lr=rates,
        all_momenta=values,
        update_at=at,
        restarts=[restart.iteration for restart in restarts],
        parts=[],
        metric=None,
        metrics={},
        chosen=[],
    )


def iterations_of(facts, updates):
    """Return the iterations at which the first so many updates take place."""
    return np.array([facts.iteration_of(update) for update in range(updates)])


def planned(run, name):
    """Return the restarts of an average and the momentum of each update."""
    facts, rules = run.facts, run.rules[name]
    try:
        ema = averaged_model(run, name)
        check_rules(rules, ema)
        restarts = plan(rules, facts)
    except RunError as error:
        raise RunError(f'{name}: {error}') from None
    begin = facts.update_of(facts.begin)
    return restarts, profile.momenta(ema, facts.updates, restarts, begin)


def averaged_model(run, name):
    """Return an average of one layer with the momentum that the run would give it."""
    config = run.averages[name]
    kind = class_of(config.ema_type)
    if kind is None or not issubclass(kind, MomentumAveragedModel):
        stock = str(config.ema_type).rsplit('.', 1)[-1]
        if stock not in STOCK_EQUIVALENTS:
            cli.die(f'ema_type {config.ema_type!r} is not known here; mmema has its own classes')
        if run.rules[name]:
            cli.die(f'{stock} cannot be restarted, which EMARestartHook wants')
        kind = STOCK_EQUIVALENTS[stock]
    arguments = {**config.of_model, 'type': kind, 'device': None}
    ema = MODELS.build(arguments, default_args=dict(model=torch.nn.Linear(1, 1)))
    if run.base and not run.batch:
        raise RunError(
            'base_batch_size needs the batch size of the run, but the config has no '
            'train_dataloader.batch_size. Set it.'
        )
    text = settle_average(ema, config, run.base, run.batch, run.facts)
    if text:
        cli.note(f'note: {name}: {text}')
    return ema


def check_rules(rules, ema):
    """Check that an average can be restarted so; notes name the parts that are left out."""
    if rules and not isinstance(ema, Restartable):
        cli.die(f'{type(ema).__name__} cannot be restarted, which EMARestartHook wants')
    for rule in rules:
        check_rule(rule, ema)
        if rule.plateau:
            cli.note('note: restarts on a plateau cannot be known before the run')
        if rule.source != 'model':
            cli.note(
                f'note: the shares do not show the effect of source={rule.source!r} on the weights'
            )


def learning_rates(config, facts):
    """Return the rate of each iteration: the run's own schedulers are stepped as the run does."""
    settings = copy.deepcopy(config.optim_wrapper)
    if 'optimizer' not in settings:
        cli.die('optim_wrapper has several optimizers, or none; the plan takes one')
    for key in ('constructor', 'paramwise_cfg', 'loss_scale', 'dtype'):
        settings.pop(key, None)
    settings['type'] = 'OptimWrapper'  # the plan needs no mixed precision
    settings['optimizer'].pop('batch_size_per_gpu', None)  # of YOLOv5's constructor
    wrapper = build_optim_wrapper(torch.nn.Linear(1, 1), settings)
    length = facts.epoch_length or facts.iterations
    epochs = facts.iterations // length
    schedulers = config.get('param_scheduler') or []
    built = [
        PARAM_SCHEDULERS.build(
            {'end': epochs if each.get('by_epoch', True) else facts.iterations, **each},
            default_args=dict(optimizer=wrapper, epoch_length=length),
        )
        for each in (schedulers if isinstance(schedulers, list) else [schedulers])
    ]
    default = dict(type='ParamSchedulerHook')
    hook = config.get('default_hooks', {}).get('param_scheduler', default) or default
    hook = HOOKS.build({k: v for k, v in hook.items() if k != 'priority'})
    # All that such hooks ask of a Runner.
    time = SimpleNamespace(
        epoch=0,
        iter=0,
        optim_wrapper=wrapper,
        param_schedulers=built,
        train_dataloader=range(length),
    )
    group, rates = wrapper.optimizer.param_groups[0], []
    hook.before_train(time)
    warnings.filterwarnings('ignore', 'Detected call of `scheduler.step')  # nothing is optimized
    for epoch in range(epochs):
        time.epoch = epoch
        for index in range(length):
            hook.before_train_iter(time, index)
            rates.append(float(group['lr']))
            hook.after_train_iter(time, index)
            time.iter += 1
        hook.after_train_epoch(time)
    return rates


# --- after the run ------------------------------------------------------------------------------


def of_scalars(run, folder):
    cli.check_folder(folder)
    scalars = read_scalars(folder)
    for note in scalars.notes:
        cli.note(f'note: {note}')
    train = [point for point in scalars.train if 'ema_momentum' in point and 'ema_steps' in point]
    if not train:
        cli.die(
            f"the run in {folder} wrote no EMA scalars: add dict(type='mmema.EMAMonitorHook') to "
            'its custom_hooks and a LocalVisBackend to its visualizer'
        )
    at = np.array([point['step'] for point in train])
    updates = np.array([run.facts.update_of(iteration) for iteration in at])
    momentum = np.array([point['ema_momentum'] for point in train])
    steps = np.array([point['ema_steps'] for point in train])
    counts = np.array([point.get('ema_restarts', 0) for point in train])
    momenta = {'ema': (at, momentum)}
    for name in run.averages:
        points = [(p['step'], p[key]) for p in train if (key := f'ema_{name}_momentum') in p]
        if points:
            momenta[name] = tuple(map(np.array, zip(*points)))
    metric, metrics = metric_curves(run.config, scalars)
    last, parts = last_record(folder), []
    if last is not None:
        history, parts, restarts = last
    else:
        values = between(updates, momentum, steps, counts)
        values[left_out(values, updates, steps, run)] = 0
        history = History(values, iterations_of(run.facts, len(values)))
        restarts = [at * run.facts.accumulation for at in restarts_of(updates, steps, counts)]
    return SimpleNamespace(
        title=f'{folder}, as it ran to iteration {at[-1]}',
        momenta=momenta,
        lr_at=at,
        lr=[point.get('lr', float('nan')) for point in train],
        all_momenta=history.momenta,
        update_at=history.at,
        restarts=restarts,
        parts=parts,
        metric=metric,
        metrics=metrics,
        chosen=scalars.curve('ema_chosen'),
    )


def last_record(folder):
    """Return the history of the main average in the last checkpoint, parts and restarts of the run.

    None where no file has a record.
    """
    saved, _ = checkpoints_in(folder)
    try:
        facts = facts_in(saved[-1].file) if saved else None
        record = facts.averages[MAIN].record if facts and MAIN in facts.averages else None
        if record is None:
            return None
        events = [event for event in record.events if event['what'] == 'restart']
        restarts = [event['iteration'] for event in events if 'iteration' in event]
        return history_in(record, facts, MAIN), facts.parts, restarts
    except CheckpointError as error:
        cli.note(f'note: the shares are estimated from the scalars: {error}')
        return None


def interval_of(run, name):
    """Return the interval at which an average is blended in the run."""
    config = run.averages[name]
    if config.auto_interval:
        return blend_interval(updates_of_horizon(config.horizon, run.facts))
    return config.arguments.get('interval', 1)


def left_out(values, updates, steps, run):
    """Return which updates ``interval`` leaves out, by the counters that were logged."""
    interval = interval_of(run, MAIN)
    number = np.arange(len(values))
    after = np.minimum(np.searchsorted(updates, number, side='right'), len(updates) - 1)
    # The counter logged after an update is that of the next one, which has its index.
    counters = steps[after] - (updates[after] - number)
    return (counters % interval != 0) & (values != 1)


def between(at, momentum, steps, counts):
    """Return the momentum of every update, from those that were logged: interpolated.

    A restart is never crossed, and a copy, where the counter was 0, is exact.
    """
    values = np.empty(at[-1])
    begin = 0
    for count in np.unique(counts):
        known = counts == count
        end = at[known][-1]
        # The value logged after update `at` is that of the next one, whose index is `at`.
        values[begin:end] = np.interp(np.arange(begin, end), at[known], momentum[known])
        copied = at[known][0] - steps[known][0]
        if begin <= copied < end:
            values[begin : copied + 1] = 1
        begin = end
    return values


def restarts_of(at, steps, counts):
    """Return the updates before which restarts came: exact for hard ones, else the last point."""
    restarts = []
    for i in range(1, len(at)):
        if counts[i] != counts[i - 1]:
            hard = at[i] - steps[i]
            restarts.append(int(hard if at[i - 1] <= hard < at[i] else at[i - 1]))
    return restarts


def metric_curves(config, scalars):
    """Return the metric that the run watches, and its (time, value) by the name of the weights."""
    prefixes = prefixes_in(config)
    names = main_names(scalars.names, prefixes.values())
    metric = watched_metric(hooks_in(config), names, prefixes.values()).metric
    curves = {n: scalars.curve(f'{p}{metric}') for n, p in {'ema': '', **prefixes}.items()}
    return metric, {name: curve for name, curve in curves.items() if curve}


# --- the picture --------------------------------------------------------------------------------


def draw(curves, run, path, begin=0):
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    time = times_of(curves, run.facts)
    rows = 3 + bool(curves.metrics) + bool(curves.chosen)
    figure, axes = plt.subplots(
        rows, 1, figsize=(9, 2.3 * rows + 1.2), sharex=True, layout='constrained'
    )
    draw_momenta(axes[0], curves, run, time)
    axes[1].plot(time(curves.lr_at), curves.lr, color='tab:green')
    axes[1].set(ylabel='learning rate', ylim=(0, None))
    draw_shares(axes[2], curves, run, time)
    if curves.metrics:
        draw_metrics(axes[3], curves, run)
    if curves.chosen:
        draw_choice(axes[-1], curves, run)
    for axis in axes:
        mark(axis, curves, run, time)
        axis.grid(alpha=0.3)
    axes[0].set_xlim(begin, run.facts.end('epoch' if run.facts.by_epoch else 'iter'))
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_title(curves.title, fontsize=10)
    axes[-1].set_xlabel('epoch' if run.facts.by_epoch else 'iteration')
    labels = {}
    for axis in (*axes[3:], axes[0]):
        labels.update({label: line for line, label in zip(*axis.get_legend_handles_labels())})
    figure.legend(
        labels.values(), labels, loc='outside lower center', ncols=5, fontsize=8, frameon=False
    )
    figure.align_ylabels(axes)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def style_of(name, run):
    """Return how the curves of these weights are drawn, in all panels; the main ones on top."""
    if name == 'ema':
        return dict(label='EMA', color='tab:blue', linewidth=2, zorder=4)
    if name == 'raw':
        return dict(label='raw', color='black', linewidth=2, linestyle='--', zorder=3)
    lap, number = divmod(list(run.averages).index(name) - 1, len(COLORS))
    line = ('-', '--', ':', '-.')[lap % 4]
    return dict(label=name, color=f'tab:{COLORS[number]}', linewidth=1.2, linestyle=line)


def draw_momenta(axis, curves, run, time):
    interval = interval_of(run, MAIN)

    def inverse(values):
        with np.errstate(divide='ignore'):
            return interval / np.asarray(values, dtype=float)

    low = 1
    for name, (at, momenta) in curves.momenta.items():
        used = momenta > 0  # 0 is an update that `interval` leaves out
        axis.plot(time(at[used]), momenta[used], **style_of(name, run))
        low = min(low, momenta[used].min())
    axis.set(ylabel='momentum', yscale='log', ylim=(low / 2, 2))
    horizon = axis.secondary_yaxis('right', functions=(inverse, inverse))
    others = {interval_of(run, name) for name in run.averages} - {interval}
    horizon.set_ylabel('horizon of EMA (updates)' if others else 'horizon (updates)')


def times_of(curves, facts):
    """Return the function from iterations to epochs, whose length may have changed in the run."""
    parts = curves.parts or [{'iteration': 0, 'epoch': 0, 'epoch_length': facts.epoch_length or 1}]
    if not facts.by_epoch:
        return np.asarray
    return np.vectorize(lambda iteration: epochs_until(parts, iteration), otypes=[float])


def shares_of_blocks(curves, run):
    """Return the first iteration of each bar, and the share of the weights in it, in percent."""
    each = np.zeros(curves.update_at[-1] + 1)
    each[curves.update_at] = 100 * profile.shares(curves.all_momenta)
    if curves.parts and run.facts.by_epoch:
        epochs = math.ceil(epochs_until(curves.parts, len(each)))
        first = [iteration_of_epoch(curves.parts, epoch) for epoch in range(epochs)]
    else:
        first = np.arange(0, len(each), run.block)
    return first, np.add.reduceat(each, first)


def draw_shares(axis, curves, run, time):
    first, share = shares_of_blocks(curves, run)
    left = time(first)
    width = np.diff(left, append=left[-1] + (1 if run.facts.by_epoch else run.block))
    axis.bar(left, share, width=width, align='edge', color='tab:purple', alpha=0.8)
    unit = 'epoch' if run.facts.by_epoch else f'{run.block} iterations'
    axis.set(ylabel=f'share of each {unit}\nin the final EMA (%)', ylim=(0, None))


def draw_metrics(axis, curves, run):
    for name, curve in curves.metrics.items():
        axis.plot(*zip(*curve), marker='o', markersize=3, **style_of(name, run))
    axis.set(ylabel=curves.metric)


def draw_choice(axis, curves, run):
    """Draw which weights of a ladder were chosen at each validation."""
    rungs = [name for name, one in run.averages.items() if one.blends_of_gamma is not None]
    names = [RAW, *(name for name in rungs if name != MAIN)]
    axis.step(*zip(*curves.chosen), where='post', color='tab:blue', marker='o', markersize=3)
    axis.set(ylabel='chosen', ylim=(-0.5, len(names) - 0.5))
    axis.set_yticks(range(len(names)), names)


def mark(axis, curves, run, time):
    for number, at in enumerate(curves.restarts):
        label = '' if number else f'EMA restart{"s" if len(curves.restarts) > 1 else ""}'
        axis.axvline(
            float(time(at)), color='tab:red', linestyle='--', linewidth=1.2, label=label or None
        )
    for name, epochs in run.facts.switches.items():
        for epoch in epochs:
            # Wide and pale, since a restart often stands at the same place.
            axis.axvline(
                epoch, color='tab:orange', alpha=0.4, linewidth=5, label=f'{name} switches'
            )
