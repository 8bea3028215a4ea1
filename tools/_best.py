"""The best weights of a run by a logged metric: over all averages and all saved checkpoints."""

import math
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import _cli as cli
from _scalars import read_points


class Saved(NamedTuple):
    """A checkpoint of a run, without its tensors."""

    file: Path
    run: str  # the experiment's name, which ends with the folder of the log
    config: str
    epoch: int
    iteration: int
    epoch_length: int
    weights: list  # names of the sets of weights in it

    @property
    def time(self):
        """The epoch that it ends, or its iteration: unit and number."""
        ends_epoch = self.iteration == self.epoch * self.epoch_length
        return ('epoch', self.epoch) if ends_epoch else ('iter', self.iteration)


class Scored(NamedTuple):
    """A set of weights in a checkpoint, with its score."""

    score: float
    weights: str
    saved: Saved


def find_best(folder, metric=None, rule=None):
    """Return metric, best :class:`Scored` and the number of those compared; errors are one line."""
    folder = Path(folder)
    validations = read_points(folder)[1]
    if not validations:
        cli.die(
            f'no validation in {folder}/*/vis_data/scalars.json: it takes the folder of a run '
            'with validations and a LocalVisBackend in its visualizer'
        )
    checkpoints = saved_in(folder)
    if not checkpoints:
        cli.die(f'no checkpoint of a run in {folder}')
    raw, watched = settings_of(checkpoints[-1].config)
    prefixes = {'raw': f'{raw}/'}
    prefixes.update({name: f'{name}/' for saved in checkpoints for name in saved.weights[2:]})
    metric, rule = chosen_metric(validations, prefixes, watched, metric, rule)
    less = is_less_better(metric, rule)

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
    best = (min if less else max)(scored, key=lambda one: one.score)
    names = [metric, *(prefix + metric for prefix in prefixes.values())]
    gone = [(one.point[n], n, one) for one in validations for n in names if is_score(one.point, n)]
    score, name, at = (min if less else max)(gone, key=lambda one: one[0])
    if score != best.score:
        cli.note(
            f'note: no checkpoint is left of the best, {name} {score:.4g} at step '
            f'{at.point["step"]}'
        )
    return metric, best, len({(one.saved.iteration, one.weights) for one in scored})


def saved_in(folder):
    """Return the checkpoints of a run in the order of time; those cut short are named."""
    from mmema.checkpoints.probe import is_whole, structure

    note = folder / 'last_checkpoint'
    last = Path(note.read_text().strip()) if note.is_file() else note
    folders = {folder.resolve(): folder}
    if not (folder / last.name).is_file():  # they have a folder of their own: out_dir
        folders.setdefault(last.parent.resolve(), last.parent)
    found = []
    for file in sorted(file for place in folders.values() for file in place.glob('*.pth')):
        if not is_whole(file):
            cli.note(f'note: {file} is cut short and left out')
            continue
        content = structure(file)
        with suppress(KeyError, TypeError, AttributeError):  # other files, exported ones
            meta, info = content['meta'], content['message_hub']['runtime_info']
            # Where there is no average, `state_dict` has the raw weights.
            weights = ['ema', 'raw', *content.get('ema_also', {})]
            weights = weights if 'ema_state_dict' in content else ['raw']
            name, config = meta['experiment_name'], meta.get('cfg', '')
            epoch, iteration = int(meta['epoch']), int(meta['iter'])
            length = info['max_iters'] // info['max_epochs']
            found.append(Saved(file, name, config, epoch, iteration, length, weights))
    return sorted(found, key=lambda saved: saved.iteration)


def settings_of(config):
    """Return from a config's text the prefix of raw metrics, and save_best names with rules."""
    from mmema.run.config import read_config

    config = read_config(config)
    prefix = (config.get('val_cfg') or {}).get('prefix', 'raw')
    return prefix.strip('/'), watched_by((config.get('default_hooks') or {}).get('checkpoint'))


def watched_by(hook):
    """Return the metrics in the settings of a CheckpointHook, each with its rule or None."""
    names, rules = (hook or {}).get('save_best') or [], (hook or {}).get('rule')
    names = [names] if isinstance(names, str) else names
    rules = rules if isinstance(rules, list) else [rules] * len(names)
    return dict(zip(names, rules))


def chosen_metric(validations, prefixes, watched, metric, rule):
    """Return the metric that is asked for, else that of save_best, else the first; and its rule."""
    known = {}  # in the order of the log
    for one in validations:
        known.update(dict.fromkeys(without_prefix(name, prefixes) for name in one.point))
    names = [name for name in known if name not in ('step', 'time', 'data_time')]
    if not names:
        cli.die('the validations of the run logged no metric')
    rules = {without_prefix(name, prefixes): rule for name, rule in watched.items()}
    metric = metric or next((name for name in rules if name != 'auto'), names[0])
    if metric not in names:
        cli.die(f'no metric {metric} was logged; there are {", ".join(names)}')
    return metric, rule or rules.get(metric)


def without_prefix(name, prefixes):
    return next((name[len(p) :] for p in prefixes.values() if name.startswith(p)), name)


def is_less_better(metric, rule):
    from mmema.run import less_is_better

    less = less_is_better(metric, rule)
    if less is None:
        cli.die(f'is more of {metric} better? Give --rule greater or --rule less')
    return less


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


def is_score(point, name):
    return math.isfinite(point.get(name, math.nan))
