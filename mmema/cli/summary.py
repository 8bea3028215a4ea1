"""The end of a training run in a few lines, and its curve as a picture."""

from __future__ import annotations

import os
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook
from mmengine.runner import EpochBasedTrainLoop

from ..restarts.rewind import best_files
from ..run import watched_metric
from ..run.metrics import main_names, prefixes_of
from ..run.scalars import read_scalars


def report(runner, seconds):
    """Print the metric of the run and where its files are; draw its curve."""
    if not is_main_process():
        return
    scalars = read_scalars(runner.work_dir)
    rows = [('trained', duration(seconds))]
    weights = weights_in_use(runner)
    prefixes = prefixes_of(runner.val_loop)
    names = main_names(scalars.names, prefixes.values())
    watched = watched_metric(runner.hooks, names, prefixes.values())
    name = watched.metric
    points = scalars.curve(name)
    raw = scalars.curve(f'{prefixes["raw"]}{name}') if 'raw' in prefixes else []
    for label, curve in ((weights, points), ('raw weights', raw)):
        if curve:
            rows.append((f'{name} of the {label}', best_and_last(runner, curve, watched.best)))
    for best in best_files(runner):
        if os.path.exists(best):  # a folder, of a sharded run
            rows.append(('best checkpoint', shorten(best)))
    mark = os.path.join(runner.work_dir, 'last_checkpoint')
    if os.path.isfile(mark):
        rows.append(('last checkpoint', shorten(Path(mark).read_text().strip())))
    rows.append(('log', shorten(os.path.join(runner.log_dir, f'{runner.timestamp}.log'))))
    path = os.path.join(runner.work_dir, 'curve.png')
    if scalars.train:
        rows.append(('curve', shorten(path)))
    width = max(len(label) for label, _ in rows)
    print('\n' + '\n'.join(f'{label:<{width}}  {value}' for label, value in rows), flush=True)
    if scalars.train:
        draw(path, scalars.train, points, (name, step_unit(runner), weights), raw)


def weights_in_use(runner):
    averaged = any(isinstance(hook, EMAHook) for hook in runner.hooks)
    return 'EMA weights' if averaged else 'weights'


def best_and_last(runner, points, better):
    unit = step_unit(runner)
    step, best = better(points, key=lambda point: point[1])
    return f'best {best:.3f} ({unit} {step}), last {points[-1][1]:.3f} ({unit} {points[-1][0]})'


def step_unit(runner):
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
