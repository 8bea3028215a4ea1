"""The end of a training run in a few lines, and its curve as a picture."""

from __future__ import annotations

import json
import os
from pathlib import Path


def report(runner, seconds):
    """Print the metric of the run and where its files are; draw its curve."""
    from mmengine.dist import is_main_process

    if not is_main_process():
        return
    losses, metrics = read_scalars(Path(runner.log_dir) / 'vis_data' / 'scalars.json')
    rows = [('trained', duration(seconds))]
    weights = weights_in_use(runner)
    name, greater = watched_metric(runner, metrics)
    prefix = getattr(runner.val_loop, 'prefix', 'raw') + '/'  # of an EMAValLoop
    chosen = name
    name = name[len(prefix) :] if name and name.startswith(prefix) else name
    points = [(point['step'], point[name]) for point in metrics if name in point]
    if points:
        text = best_and_last(runner, points, greater, resumed=chosen == name)
        rows.append((f'{name} of the {weights}', text))
    raw_name = f'{prefix}{name}'
    raw = [(point['step'], point[raw_name]) for point in metrics if raw_name in point]
    if raw:
        text = best_and_last(runner, raw, greater, resumed=chosen == raw_name)
        rows.append((f'{name} of the raw weights', text))
    best = runner.message_hub.runtime_info.get('best_ckpt')
    if best and os.path.exists(best):  # a folder, of a sharded run
        rows.append(('best checkpoint', shorten(best)))
    mark = os.path.join(runner.work_dir, 'last_checkpoint')
    if os.path.isfile(mark):
        rows.append(('last checkpoint', shorten(Path(mark).read_text().strip())))
    rows.append(('log', shorten(os.path.join(runner.log_dir, f'{runner.timestamp}.log'))))
    path = os.path.join(runner.work_dir, 'curve.png')
    if losses:
        rows.append(('curve', shorten(path)))
    width = max(len(label) for label, _ in rows)
    print('\n' + '\n'.join(f'{label:<{width}}  {value}' for label, value in rows), flush=True)
    if losses:
        draw(path, losses, points, (name, step_unit(runner), weights), raw)


def read_scalars(path):
    """Return the training and the validation points that MMEngine has written, as lists of dicts.

    Both lists are empty where the config has no LocalVisBackend, which writes the file.
    """
    losses, metrics = [], []
    if path.is_file():
        for line in path.read_text().splitlines():
            point = json.loads(line)
            (losses if 'loss' in point else metrics).append(point)
    return losses, metrics


def watched_metric(runner, metrics):
    """Return the name of the metric that chooses the best checkpoint, and whether more is better.

    Without a best checkpoint it is the first metric that was measured.
    """
    for hook in runner.hooks:
        names = [name for name in getattr(hook, 'key_indicators', []) if name != 'auto']
        if names:
            return names[0], hook.rules[0] != 'less'
    from ..run import less_is_better

    names = [name for point in metrics for name in point if '/' in name]
    return (names[0], not less_is_better(names[0])) if names else (None, True)


def weights_in_use(runner):
    from mmengine.hooks import EMAHook

    averaged = any(isinstance(hook, EMAHook) for hook in runner.hooks)
    return 'EMA weights' if averaged else 'weights'


def best_and_last(runner, points, greater, resumed=True):
    unit = step_unit(runner)
    better = max if greater else min
    step, best = better(points, key=lambda point: point[1])
    text = f'best {best:.3f} ({unit} {step}), last {points[-1][1]:.3f} ({unit} {points[-1][0]})'
    earlier = runner.message_hub.runtime_info.get('best_score')
    if resumed and earlier is not None and better(earlier, best) != best:
        text += f'; best before it was resumed {earlier:.3f}'
    return text


def step_unit(runner):
    from mmengine.runner import EpochBasedTrainLoop

    return 'epoch' if isinstance(runner.train_loop, EpochBasedTrainLoop) else 'iteration'


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes} min {seconds} s'


def shorten(path):
    """Return the path as a person in this folder would type it."""
    relative = os.path.relpath(path)
    return path if relative.startswith('..') else relative


def draw(path, losses, points, labels, raw=()):
    """Draw the metric over epochs and the losses over iterations."""
    import matplotlib

    name, unit, weights = labels

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2 if points else 1, figsize=(11, 4), squeeze=False)
    axes = list(axes[0])
    if points:
        steps, values = zip(*points)
        left = axes.pop(0)
        left.plot(steps, values, marker='o', color='tab:blue', label=weights)
        if raw:
            left.plot(
                *zip(*raw), marker='s', ms=4, ls='--', color='tab:orange', label='raw weights'
            )
            left.legend(loc='lower right')
        left.annotate(
            f'{values[-1]:.3f}',
            (steps[-1], values[-1]),
            (-4, 7),
            ha='right',
            textcoords='offset points',
        )
        left.set(
            xlabel=unit, ylabel=name, title='validation' if raw else f'validation of the {weights}'
        )
        left.margins(y=0.12)
        left.set_ylim(bottom=0)
        left.xaxis.get_major_locator().set_params(integer=True)
    for key in sorted(key for key in losses[-1] if 'loss' in key):
        known = [(point['step'], point[key]) for point in losses if key in point]
        axes[0].plot(*zip(*known), label=key, linewidth=2 if key == 'loss' else 1)
    axes[0].set(xlabel='iteration', ylabel='loss', title='training', ylim=(0, None))
    axes[0].legend()
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.margins(x=0.03)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
