#!/usr/bin/env python3
"""Draw the schedule of a config's EMA over the run, before any training, or that of a run after it.

tools/plot_ema.py configs/digits/yolov5_n_digits.py -o plan.png
tools/plot_ema.py configs/digits/yolov5_n_digits.py --work-dir work_dirs/digits -o run.png

The picture shows the momentum (and the horizon, interval / momentum) of each average, the learning
rate, restarts and pipeline switches of the main one, and how much of it in the end each epoch's
weights make up; after a run also the metrics of all weights.
"""

import argparse
import contextlib
import copy
import inspect
import io
import warnings
from pathlib import Path
from types import SimpleNamespace

import _cli as cli
from _scalars import read_points

COLORS = ('orange', 'green', 'purple', 'brown', 'pink', 'olive', 'cyan', 'gray')
MOST_BLOCKS = 100  # a run by iterations is cut into at most so many


def main():
    args = parse_args()
    cli.import_stack()
    config = cli.load_config(args)
    cli.need(config, 'train_cfg', 'optim_wrapper')
    from mmengine.registry import init_default_scope

    init_default_scope(config.get('default_scope', 'mmengine'))
    run = Run(config, args.iters_per_epoch, args.processes)
    end = run.max_epochs if run.by_epoch else run.max_iters
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


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    args = parser.parse_args()
    if args.iters_per_epoch is not None and args.iters_per_epoch < 1:
        parser.error(f'--iters-per-epoch must be at least 1, got {args.iters_per_epoch}')
    if args.processes < 1:
        parser.error(f'--processes must be at least 1, got {args.processes}')
    args.work_dir, args.launcher, args.local_rank = None, 'none', 0
    return args


class Loader(SimpleNamespace):
    """Stand-in for the training data: their length and batch size."""

    def __init__(self, length, batch_size):
        super().__init__(length=length, batch_size=batch_size, batch_sampler=None)

    def __len__(self):
        return self.length


class Run(SimpleNamespace):
    """Stand-in for a Runner, without a model and without data: length, hooks, accumulation."""

    def __init__(self, config, iters_per_epoch, processes=1):
        from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

        from mmema.averages.config import AverageConfig
        from mmema.restarts.facts import facts_of
        from mmema.run import ema_hook_of

        super().__init__(config=config, iter=0, epoch=0)
        train_cfg = config.train_cfg
        self.by_epoch = train_cfg.get('by_epoch', train_cfg.get('type') != 'IterBasedTrainLoop')
        key = 'max_epochs' if self.by_epoch else 'max_iters'
        if train_cfg.get(key) is None:
            cli.die(f'{config.filename} has no train_cfg.{key}')
        if self.by_epoch:
            self.max_epochs = train_cfg.max_epochs
            self.epoch_length = iters_per_epoch or length_of_epoch(config)
            self.max_iters = self.max_epochs * self.epoch_length
        else:
            self.max_epochs = 1
            self.max_iters = self.epoch_length = train_cfg.max_iters
        batch = (config.get('train_dataloader') or {}).get('batch_size')
        self.train_dataloader = Loader(self.epoch_length, batch and batch * processes)
        self.auto_scale_lr = config.get('auto_scale_lr')
        # A loop that is asked for its class only.
        loop = EpochBasedTrainLoop if self.by_epoch else IterBasedTrainLoop
        self.train_loop = object.__new__(loop)
        counts = config.optim_wrapper.get('accumulative_counts', 1)
        # As MMEngine's wrappers, it steps at the last iteration, too.
        self.optim_wrapper = SimpleNamespace(_accumulative_counts=counts, should_update=None)
        with cli.one_line(config.filename, *cli.CONFIG_ERRORS):
            self.hooks = [hook for hook in map(stand_in, config.get('custom_hooks') or []) if hook]
            self.ema_hook = ema_hook_of(self)
            self.facts = facts_of(self, self.ema_hook)
            stock = dict(self.ema_hook.ema_cfg)
            stock = {'': AverageConfig(stock.pop('type'), stock)}
            configs = getattr(self.ema_hook, '_configs', stock)
        self.averages = {name or 'ema': average for name, average in configs.items()}

    @property
    def block(self):
        """Iterations whose shares are drawn as one bar."""
        return self.epoch_length if self.by_epoch else -(-self.max_iters // MOST_BLOCKS)


def stand_in(settings):
    """Return the hook of a config if it concerns the EMA; a switch only as its moment.

    A real switch hook builds its pipelines, for which transforms may be missing here.
    """
    from mmengine.registry import HOOKS

    from mmema.restarts.rule import FOLLOWED

    name = str(settings.get('type', '')).rsplit('.', 1)[-1]
    if name in ('EMAHook', 'EMARestartHook'):
        return HOOKS.build({k: v for k, v in settings.items() if k != 'priority'})
    if name not in FOLLOWED:
        return None
    with HOOKS.switch_scope_and_registry(None) as registry:  # of the config's scope
        kind = registry.get(settings['type'])
    if kind is None:
        cli.die(f'custom_hooks has a hook of an unknown type {settings["type"]!r}')
    hook = object.__new__(kind)
    for key, parameter in inspect.signature(kind.__init__).parameters.items():
        setattr(hook, key, settings.get(key, parameter.default))
    if name == 'SwitchRecipeHook':  # which keeps its recipes by the numbers of their epochs
        hook.schedule = {recipe['action_epoch']: recipe for recipe in hook.schedule}
    return hook


def length_of_epoch(config):
    from mmengine.runner import Runner

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
    facts = run.facts
    plans = {name: planned(run, name, config) for name, config in run.averages.items()}
    restarts, values = plans['ema']
    at, rates = iterations_of(facts, len(values)), learning_rates(run)
    return SimpleNamespace(
        title=f'{Path(run.config.filename).name}, planned',
        momenta={name: (at, momenta) for name, (_, momenta) in plans.items()},
        lr_at=range(len(rates)),
        lr=rates,
        all_momenta=values,
        restarts=[restart.iteration for restart in restarts],
        metric=None,
        metrics={},
    )


def iterations_of(facts, updates):
    """Return the iterations at which the first so many updates take place."""
    import numpy as np

    return np.array([facts.iteration_of(update) for update in range(updates)])


def planned(run, name, config):
    """Return the restarts of an average and the momentum of each update."""
    from mmema.hooks.restart import EMARestartHook
    from mmema.messages import RunError
    from mmema.restarts.planner import plan
    from mmema.restarts.profile import momenta

    facts = run.facts
    rules = [config.rule] if config.rule else []
    if name == 'ema':
        rules = [hook.rule for hook in run.hooks if isinstance(hook, EMARestartHook)]
    try:
        ema = averaged_model(run, name, config, rules)
        check_rules(rules, ema)
        restarts = plan(rules, facts)
    except RunError as error:
        raise RunError(f'{name}: {error}') from None
    return restarts, momenta(ema, facts.updates, restarts, facts.update_of(facts.begin))


def averaged_model(run, name, config, rules):
    """Return an average with the momentum that the run would give it."""
    from mmengine.registry import MODELS
    from torch import nn

    from mmema.averaged import MomentumAveragedModel
    from mmema.averages.config import class_of
    from mmema.averages.units import auto_scale_base, settle
    from mmema.restartable import STOCK_EQUIVALENTS

    kind = class_of(config.ema_type)
    if kind is None or not issubclass(kind, MomentumAveragedModel):
        stock = str(config.ema_type).rsplit('.', 1)[-1]
        if stock not in STOCK_EQUIVALENTS:
            cli.die(f'ema_type {config.ema_type!r} is not known here; mmema has its own classes')
        if rules:
            cli.die(f'{stock} cannot be restarted, which EMARestartHook wants')
        kind = STOCK_EQUIVALENTS[stock]
    arguments = dict(config.arguments, type=kind, device=None)
    ema = MODELS.build(arguments, default_args=dict(model=nn.Linear(1, 1)))
    if hasattr(run.ema_hook, 'base_batch_size'):  # not MMEngine's hook
        base = run.ema_hook.base_batch_size or auto_scale_base(run)
        text = settle(run, ema, config.horizon, base, run.facts)
        if text:
            cli.note(f'note: {name}: {text}')
    return ema


def check_rules(rules, ema):
    """Check that an average can be restarted so; notes name the parts that are left out."""
    from mmema.restartable import Restartable
    from mmema.restarts.live import check_rule

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


def learning_rates(run):
    """Return the rate of each iteration: the run's own schedulers are stepped as the run does."""
    import torch
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import HOOKS, PARAM_SCHEDULERS

    settings = copy.deepcopy(run.config.optim_wrapper)
    if 'optimizer' not in settings:
        cli.die('optim_wrapper has several optimizers, or none; the plan takes one')
    for key in ('constructor', 'paramwise_cfg', 'loss_scale', 'dtype'):
        settings.pop(key, None)
    settings['type'] = 'OptimWrapper'  # the plan needs no mixed precision
    settings['optimizer'].pop('batch_size_per_gpu', None)  # of YOLOv5's constructor
    run.optim_wrapper = build_optim_wrapper(torch.nn.Linear(1, 1), settings)
    schedulers = run.config.get('param_scheduler') or []
    run.param_schedulers = [
        PARAM_SCHEDULERS.build(
            {'end': end_of(scheduler, run), **scheduler},
            default_args=dict(optimizer=run.optim_wrapper, epoch_length=run.epoch_length),
        )
        for scheduler in (schedulers if isinstance(schedulers, list) else [schedulers])
    ]
    default = dict(type='ParamSchedulerHook')
    hook = run.config.get('default_hooks', {}).get('param_scheduler', default) or default
    hook = HOOKS.build({k: v for k, v in hook.items() if k != 'priority'})
    group = run.optim_wrapper.optimizer.param_groups[0]
    rates = []
    hook.before_train(run)
    warnings.filterwarnings('ignore', 'Detected call of `scheduler.step')  # nothing is optimized
    while run.epoch < run.max_epochs:
        for index in range(run.epoch_length):
            hook.before_train_iter(run, index)
            rates.append(float(group['lr']))
            hook.after_train_iter(run, index)
            run.iter += 1
        hook.after_train_epoch(run)
        run.epoch += 1
    return rates


def end_of(scheduler, run):
    return run.max_epochs if scheduler.get('by_epoch', True) else run.max_iters


# --- after the run ------------------------------------------------------------------------------


def of_scalars(run, folder):
    import numpy as np

    train, validations = read_points(Path(folder))
    train = [point for point in train if 'ema_momentum' in point and 'ema_steps' in point]
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
    points = [validation.point for validation in validations]
    metric, metrics = metric_curves(points, run.config.get('val_cfg') or {}, run.averages)
    return SimpleNamespace(
        title=f'{folder}, as it ran to iteration {at[-1]}',
        momenta=momenta,
        lr_at=at,
        lr=[point.get('lr', float('nan')) for point in train],
        all_momenta=between(updates, momentum, steps, counts),
        restarts=[at * run.facts.accumulation for at in restarts_of(updates, steps, counts)],
        metric=metric,
        metrics=metrics,
    )


def between(at, momentum, steps, counts):
    """Return the momentum of every update, from those that were logged: interpolated.

    A restart is never crossed, and a copy, where the counter was 0, is exact.
    """
    import numpy as np

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


def metric_curves(points, val_cfg, averages=()):
    """Return the metric's name and its (time, value) by the name of the weights."""
    prefixes = {'raw': val_cfg.get('prefix', 'raw').strip('/') + '/'}
    prefixes.update({name: f'{name}/' for name in averages if name != 'ema'})
    others = tuple(prefixes.values())
    names = [name for p in points for name in p if '/' in name and not name.startswith(others)]
    metric = next((name for name in names if 'mAP' in name), names[0] if names else None)
    curves = {}
    for name, prefix in {'ema': '', **prefixes}.items():
        key = f'{prefix}{metric}'
        curve = sorted((point['step'], point[key]) for point in points if key in point)
        if curve:
            curves[name] = curve
    return metric, curves


# --- the picture --------------------------------------------------------------------------------


def draw(curves, run, path, begin=0):
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    scale = run.epoch_length if run.by_epoch else 1
    rows = 4 if curves.metrics else 3
    figure, axes = plt.subplots(
        rows, 1, figsize=(9, 2.3 * rows + 1.2), sharex=True, layout='constrained'
    )
    draw_momenta(axes[0], curves, run, scale)
    axes[1].plot([at / scale for at in curves.lr_at], curves.lr, color='tab:green')
    axes[1].set(ylabel='learning rate', ylim=(0, None))
    draw_shares(axes[2], curves, run, scale)
    if curves.metrics:
        draw_metrics(axes[3], curves, run)
    for axis in axes:
        mark(axis, curves, run, scale)
        axis.grid(alpha=0.3)
    axes[0].set_xlim(begin, run.max_iters / scale)
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_title(curves.title, fontsize=10)
    axes[-1].set_xlabel('epoch' if run.by_epoch else 'iteration')
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


def draw_momenta(axis, curves, run, scale):
    import numpy as np

    interval = run.averages['ema'].arguments.get('interval', 1)

    def inverse(values):
        with np.errstate(divide='ignore'):
            return interval / np.asarray(values, dtype=float)

    low = 1
    for name, (at, momenta) in curves.momenta.items():
        used = momenta > 0  # 0 is an update that `interval` leaves out
        axis.plot(at[used] / scale, momenta[used], **style_of(name, run))
        low = min(low, momenta[used].min())
    axis.set(ylabel='momentum', yscale='log', ylim=(low / 2, 2))
    horizon = axis.secondary_yaxis('right', functions=(inverse, inverse))
    others = {average.arguments.get('interval', 1) for average in run.averages.values()} - {
        interval
    }
    horizon.set_ylabel('horizon of EMA (updates)' if others else 'horizon (updates)')


def draw_shares(axis, curves, run, scale):
    import numpy as np

    from mmema.restarts.profile import share_of_blocks, shares

    at = iterations_of(run.facts, len(curves.all_momenta))
    each = np.zeros(at[-1] + 1)
    each[at] = 100 * shares(curves.all_momenta)
    share = share_of_blocks(each, run.block)
    left = np.arange(len(share)) * run.block / scale
    axis.bar(left, share, width=run.block / scale, align='edge', color='tab:purple', alpha=0.8)
    unit = 'epoch' if run.by_epoch else f'{run.block} iterations'
    axis.set(ylabel=f'share of each {unit}\nin the final EMA (%)', ylim=(0, None))


def draw_metrics(axis, curves, run):
    for name, curve in curves.metrics.items():
        axis.plot(*zip(*curve), marker='o', markersize=3, **style_of(name, run))
    axis.set(ylabel=curves.metric)


def mark(axis, curves, run, scale):
    for number, at in enumerate(curves.restarts):
        label = '' if number else f'EMA restart{"s" if len(curves.restarts) > 1 else ""}'
        axis.axvline(
            at / scale, color='tab:red', linestyle='--', linewidth=1.2, label=label or None
        )
    for name, epochs in run.facts.switches.items():
        for epoch in epochs:
            # Wide and pale, since a restart often stands at the same place.
            axis.axvline(
                epoch, color='tab:orange', alpha=0.4, linewidth=5, label=f'{name} switches'
            )


if __name__ == '__main__':
    main()
