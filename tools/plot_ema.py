#!/usr/bin/env python3
"""Draw the schedule of a config's EMA over the run, before any training, or that of a run after it.

tools/plot_ema.py configs/digits/yolov5_n_digits.py -o plan.png
tools/plot_ema.py configs/digits/yolov5_n_digits.py --work-dir work_dirs/digits -o run.png

The picture shows the momentum (and the horizon, interval / momentum), the learning rate, restarts
and pipeline switches, and how much of the final average each epoch's weights make up.
"""

import argparse
import contextlib
import copy
import inspect
import io
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import _cli as cli

# MMEngine's and the others' classes, and ours with the same schedule.
TWINS = {
    'ExpMomentumEMA': 'ExpMomentumEMA',
    'ExponentialMovingAverage': 'RestartableConstantEMA',
    'MomentumAnnealingEMA': 'RestartableAnnealingEMA',
}
MOST_BLOCKS = 100  # a run by iterations is cut into at most so many


def main():
    args = parse_args()
    cli.import_stack()
    config = cli.load_config(args)
    cli.need(config, 'train_cfg', 'optim_wrapper')
    from mmengine.registry import init_default_scope

    init_default_scope(config.get('default_scope', 'mmengine'))
    run = Run(config, args.iters_per_epoch)
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
    args.work_dir, args.launcher, args.local_rank = None, 'none', 0
    return args


class Run(SimpleNamespace):
    """Stand-in for a Runner, without a model and without data: length, hooks, accumulation."""

    def __init__(self, config, iters_per_epoch):
        from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

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
        self.train_dataloader = range(self.epoch_length)
        # A loop that is asked for its class only.
        loop = EpochBasedTrainLoop if self.by_epoch else IterBasedTrainLoop
        self.train_loop = object.__new__(loop)
        counts = config.optim_wrapper.get('accumulative_counts', 1)
        self.optim_wrapper = SimpleNamespace(_accumulative_counts=counts)
        with cli.one_line(config.filename, *cli.CONFIG_ERRORS):
            self.hooks = [hook for hook in map(stand_in, config.get('custom_hooks') or []) if hook]
            self.ema_hook = ema_hook_of(self)
            self.facts = facts_of(self, self.ema_hook)

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
    kind = class_of(HOOKS, settings['type'])
    if kind is None:
        cli.die(f'custom_hooks has a hook of an unknown type {settings["type"]!r}')
    hook = object.__new__(kind)
    for key, parameter in inspect.signature(kind.__init__).parameters.items():
        setattr(hook, key, settings.get(key, parameter.default))
    return hook


def class_of(registry, name):
    """Return the class of a name in the scope of the config, or None."""
    with registry.switch_scope_and_registry(None) as scoped:
        return scoped.get(name)


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
    from mmema.restarts.profile import momenta

    ema, facts = averaged_model(run.ema_hook), run.facts
    restarts = planned_restarts(run, ema)
    values = momenta(ema, facts.updates, restarts, facts.update_of(facts.begin))
    rates = learning_rates(run)
    return SimpleNamespace(
        title=f'{Path(run.config.filename).name}, planned',
        at=iterations_of(facts, len(values)),
        momentum=values,
        lr_at=range(len(rates)),
        lr=rates,
        all_momenta=values,
        restarts=[restart.iteration for restart in restarts],
        metrics={},
    )


def iterations_of(facts, updates):
    """Return the iterations at which the first so many updates take place."""
    import numpy as np

    return np.array([facts.iteration_of(update) for update in range(updates)])


def averaged_model(hook):
    from mmengine.registry import MODELS
    from torch import nn

    import mmema
    from mmema.averaged import MomentumAveragedModel

    settings = dict(hook.ema_cfg)
    name = settings['type'].rsplit('.', 1)[-1]
    kind = class_of(MODELS, settings['type'])
    if kind is None or not issubclass(kind, MomentumAveragedModel):
        if name not in TWINS:
            cli.die(f'ema_type {settings["type"]!r} is not known here; mmema has its own classes')
        kind = getattr(mmema, TWINS[name])
    settings.update(type=kind, device=None)
    return MODELS.build(settings, default_args=dict(model=nn.Linear(1, 1)))


def planned_restarts(run, ema):
    """Return the plan of the run's restart hooks; notes name the parts that it leaves out."""
    from mmema.hooks.restart import EMARestartHook, check_rule
    from mmema.restartable import Restartable
    from mmema.restarts.planner import plan

    rules = [hook.rule for hook in run.hooks if isinstance(hook, EMARestartHook)]
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
    return plan(rules, run.facts)


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
    return SimpleNamespace(
        title=f'{folder}, as it ran to iteration {at[-1]}',
        at=at,
        momentum=momentum,
        lr_at=at,
        lr=[point.get('lr', float('nan')) for point in train],
        all_momenta=between(updates, momentum, steps, counts),
        restarts=[at * run.facts.accumulation for at in restarts_of(updates, steps, counts)],
        metrics=metric_curves(validations, run.config.get('val_cfg') or {}),
    )


def read_points(folder):
    """Return training and validation points of all parts of a run, a resumed one included."""
    if not folder.is_dir():
        cli.die(f'no folder {folder}')
    train, validations = {}, []
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        begin = True
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                point = json.loads(line)
            except json.JSONDecodeError:
                cli.note(f'note: line {number} of {path} is cut short and left out')
                continue
            if 'loss' not in point:
                validations.append((max(train, default=0), point))
                continue
            if begin:  # an earlier part was done again from here on
                train = {at: p for at, p in train.items() if at < point['step']}
                validations = [(at, p) for at, p in validations if at < point['step']]
                begin = False
            train[point['step']] = point
    return list(train.values()), [point for _, point in validations]


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


def metric_curves(validations, val_cfg):
    prefix = val_cfg.get('prefix', 'raw') + '/'
    names = [name for point in validations for name in point if '/' in name]
    raw = [name for name in names if name.startswith(prefix)]
    names = [name for name in names if name not in raw]
    name = next((name for name in names if 'mAP' in name), names[0] if names else None)
    curves = {}
    for label, key in ((f'{name} EMA', name), (f'{name} raw', f'{prefix}{name}')):
        curve = [(point['step'], point[key]) for point in validations if key in point]
        if curve:
            curves[label] = sorted(curve)
    return curves


# --- the picture --------------------------------------------------------------------------------


def draw(curves, run, path, begin=0):
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    scale = run.epoch_length if run.by_epoch else 1
    rows = 4 if curves.metrics else 3
    figure, axes = plt.subplots(rows, 1, figsize=(9, 2.3 * rows + 0.8), sharex=True)
    draw_momentum(axes[0], curves, scale, run.ema_hook.ema_cfg.get('interval', 1))
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
    axes[-1].set_xlabel('epoch' if run.by_epoch else 'iteration')
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].set_title(curves.title, fontsize=10, pad=24 if labels else 6)
    if labels:
        axes[0].legend(
            handles,
            labels,
            loc='lower center',
            bbox_to_anchor=(0.5, 1.0),
            ncols=3,
            fontsize=8,
            frameon=False,
        )
    figure.align_ylabels(axes)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_momentum(axis, curves, scale, interval):
    import numpy as np

    def inverse(values):
        with np.errstate(divide='ignore'):
            return interval / np.asarray(values, dtype=float)

    used = curves.momentum > 0  # 0 is an update that `interval` leaves out
    axis.plot(curves.at[used] / scale, curves.momentum[used], color='tab:blue')
    low = curves.momentum[used].min()
    axis.set(ylabel='momentum', yscale='log', ylim=(low / 2, 2))
    horizon = axis.secondary_yaxis('right', functions=(inverse, inverse))
    horizon.set_ylabel('horizon (updates)')


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
    axis.set(ylabel=f'share of each {unit}\nin the final average (%)', ylim=(0, None))


def draw_metrics(axis, curves, run):
    for (label, curve), style in zip(curves.metrics.items(), ('o-', 's--')):
        axis.plot(*zip(*curve), style, markersize=4, label=label)
    axis.set(ylabel='metric', ylim=(0, None))
    axis.legend(fontsize=8, loc='lower right')


def mark(axis, curves, run, scale):
    for number, at in enumerate(curves.restarts):
        label = '' if number else ('restart' if len(curves.restarts) == 1 else 'restarts')
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
