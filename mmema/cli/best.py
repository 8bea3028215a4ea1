"""The best weights of a run by a logged metric: over all averages and all saved checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..checkpoints.formats import CheckpointError
from ..run import watched_metric
from ..run.checkpoints import Saved, checkpoints_in
from ..run.config import hooks_in, read_config
from ..run.metrics import is_score, main_names, prefixes_in
from ..run.scalars import read_scalars
from . import common as cli


class Scored(NamedTuple):
    """A set of weights in a checkpoint, with its score."""

    score: float
    weights: str
    saved: Saved


def find_best(folder, metric=None, rule=None):
    """Return metric, best :class:`Scored` and the number of those compared; errors are one line."""
    folder = Path(folder)
    cli.check_folder(folder)
    scalars = read_scalars(folder)
    validations = scalars.validations
    if not validations:
        cli.die(
            f'no validation in {folder}/*/vis_data/scalars.json: it takes the folder of a run '
            'with validations and a LocalVisBackend in its visualizer'
        )
    checkpoints, notes = checkpoints_in(folder)
    for note in (*scalars.notes, *notes):
        cli.note(f'note: {note}')
    if not checkpoints:
        cli.die(f'no checkpoint of a run in {folder}')
    config = read_config(checkpoints[-1].config)
    also = dict.fromkeys(name for saved in checkpoints for name in saved.weights[2:])
    prefixes = prefixes_in(config, also)
    names = main_names(scalars.names, prefixes.values())
    watched = metric_to_compare(config, names, prefixes.values(), metric, rule)
    metric = watched.metric

    scored, left = [], []
    for saved in checkpoints:
        found = scores_of(saved, validations, metric, prefixes)
        scored += found
        left += [] if found else [saved.file.name]
    if not scored:
        logged = ', '.join(sorted({str(one.point['step']) for one in validations})[:5])
        cli.die(
            f'no checkpoint in {folder} is of a validation with {metric}; validations were logged '
            f'at step {logged} (if 0: set log_metric_by_epoch=False of the LoggerHook)'
        )
    if left:
        cli.note(f'note: left out, since no {metric} was logged: {", ".join(left)}')
    best = watched.best(scored, key=lambda one: one.score)
    names = [metric, *(prefix + metric for prefix in prefixes.values())]
    gone = [(one.point[n], n, one) for one in validations for n in names if is_score(one.point, n)]
    score, name, at = watched.best(gone, key=lambda one: one[0])
    if score != best.score:
        cli.note(
            f'note: no checkpoint is left of the best, {name} {score:.4g} at step '
            f'{at.point["step"]}'
        )
    return metric, best, len({(one.saved.iteration, one.weights) for one in scored})


def metric_to_compare(config, names, prefixes, metric, rule):
    """Return the metric that is asked for, or that the run watches.

    Raises:
        CheckpointError: If it was not measured, or nobody knows whether less of it is better.
    """
    if not names:
        raise CheckpointError('the validations of the run logged no metric')
    watched = watched_metric(hooks_in(config), names, prefixes, metric, rule)
    if watched.metric not in names:
        raise CheckpointError(
            f'no metric {watched.metric} was measured; there are {", ".join(names)}'
        )
    if watched.less is None:
        raise CheckpointError(
            f'is more of {watched.metric} better? Give --rule greater or --rule less'
        )
    return watched


def scores_of(saved, validations, metric, prefixes):
    """Return all weights of a checkpoint that a validation at its iteration has scored."""
    scores = {}
    for one in validations:
        same_run = saved.run.endswith(one.part)  # an older run may have been in the same folder
        if same_run and one.iteration(saved.epoch_length) == saved.iteration:
            main = saved.weights[0]
            for weights, prefix in {**prefixes, main: ''}.items():
                if is_score(one.point, prefix + metric) and weights in saved.weights:
                    scores[weights] = one.point[prefix + metric]
    return [Scored(scores[name], name, saved) for name in saved.weights if name in scores]
