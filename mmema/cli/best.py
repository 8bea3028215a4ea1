"""The best weights of a run by a logged metric: over all averages and all saved checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..checkpoints.formats import CheckpointError
from ..posthoc.facts import facts_in
from ..run import watched_metric
from ..run.checkpoints import Saved, checkpoints_in
from ..run.config import hooks_in, is_by_epoch, kind_of, read_config
from ..run.metrics import is_score, main_names, prefixes_in
from ..run.record import epochs_until
from ..run.scalars import read_scalars
from . import common as cli


class Scored(NamedTuple):
    """A set of weights in a checkpoint, with its score."""

    score: float
    weights: str
    saved: Saved
    time: tuple[str, int]  # the epoch that it ends, or its iteration: unit and number


def find_best(folder, metric=None, rule=None, trust=False):
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

    parts, scored, left = parts_of(checkpoints, trust), [], []
    for saved in checkpoints:
        found = scores_of(saved, validations, parts, metric, prefixes)
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


def parts_of(checkpoints, trust=False):
    """Return the parts of the runs in a folder, a start or a resume each, by the folder of its log.

    They are those of the records in the last files of each part. Where there are none, the first
    iteration of a part is worked out from its files; a part of which they do not tell is left out.
    """
    parts = {}
    for last in {saved.run: saved for saved in checkpoints}.values():
        if last.has_record:
            try:
                recorded = facts_in(last.file, trust).parts
            except CheckpointError as error:
                cli.note(f'note: the record is left out: {error}')
            else:
                parts.update(
                    (part['log'], {'run': recorded[0]['log'], **part}) for part in recorded
                )
    for run in {saved.run for saved in checkpoints}:
        log = '_'.join(run.split('_')[-2:])  # MMEngine's timestamp
        worked_out = log not in parts and part_of([s for s in checkpoints if s.run == run])
        if worked_out:
            parts[log] = {'run': log, **worked_out}
    return parts


def part_of(saved):
    """Return what checkpoints without a record tell of the part that wrote them; None if nothing.

    Where it was resumed after epochs of another length, or from the middle of one, its epochs begin
    elsewhere than at the multiples of their length.
    """
    config, length = read_config(saved[0].config), saved[0].epoch_length
    if not is_by_epoch(config):
        return {'iteration': 0, 'epoch': 0, 'epoch_length': None}
    hooks = [hook for hook in hooks_in(config) if kind_of(hook) == 'CheckpointHook']
    first = {one.iteration - one.epoch * length for one in saved}
    if first == {0} or all(hook.get('by_epoch', True) for hook in hooks):
        # FlexibleRunner saves a best checkpoint with an epoch that is one too high.
        return {'iteration': max(first), 'epoch': 0, 'epoch_length': length}
    return None


def scores_of(saved, validations, parts, metric, prefixes):
    """Return all weights of a checkpoint that a validation at its iteration has scored."""
    scores, time = {}, None
    for one in validations:
        part = parts.get(one.part)
        if part is None or one.iteration(part) != saved.iteration:
            continue
        # An older run may have been in the same folder. A resumed one may begin with the validation
        # that the part before was stopped before.
        own = next((log for log in parts if saved.run.endswith(log)), None)
        catches_up = part['iteration'] == saved.iteration and own in parts
        if own != one.part and not (catches_up and parts[own]['run'] == part['run']):
            continue
        time = time_of(part, saved.iteration)
        for weights, prefix in {**prefixes, saved.weights[0]: ''}.items():
            if is_score(one.point, prefix + metric) and weights in saved.weights:
                scores[weights] = one.point[prefix + metric]
    return [Scored(scores[name], name, saved, time) for name in saved.weights if name in scores]


def time_of(part, iteration):
    """Return the epoch of a part that an iteration ends, or the iteration: unit and number."""
    epoch = part['epoch_length'] and epochs_until([part], iteration)
    ends_epoch = epoch is not None and epoch == int(epoch)
    return ('epoch', int(epoch)) if ends_epoch else ('iter', iteration)
