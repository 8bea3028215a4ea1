"""The best of many averages of a run, by evaluation on the validation set."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from ..messages import aligned
from ..run.metrics import is_score, prefixes_in
from ..run.switches import use_last_pipeline
from . import common as cli
from .best import metric_to_compare
from .weights import Evaluator, training_batches


class Row(NamedTuple):
    """A line of the table."""

    label: str
    off: str  # relative error of the profile
    score: str


def choose(args, files):
    """Evaluate all candidates of a run, print a table, and write the best one."""
    from ..posthoc.candidates import candidates
    from ..posthoc.profiles import stored_profiles

    cli.import_stack()
    config = read(args.config, args.cfg_options)
    report_on = args.report_config and read(args.report_config, [])
    test_set = annotation_file(config, 'test')
    stored, notes = stored_profiles(files, args.trust)
    restarts = args.restart_at
    if restarts is None:
        switches = stored[-1].facts.run.switches.values()
        restarts = [epoch for epochs in switches for epoch in epochs if epoch > 0]
    makeable = [*could_be_made(candidates(stored, sorted(set(restarts))), notes)]
    for note in notes:
        cli.note(f'note: {note}')
    with tempfile.TemporaryDirectory() as folder:
        metric, best, rows = evaluate_all(args, config, makeable, folder)
    candidate, made, score = best
    print(table(metric, rows, candidate.label))
    record = {'metric': metric, 'score': score, 'candidates': len(rows), **made.meta['mmema']}
    made = made._replace(meta={**made.meta, 'mmema': {**record, 'recipe': candidate.label}})
    out = made.write(args.output, args.force)
    print(f'best: {candidate.label}, {metric} {score:.4g} on the validation set: {out}')
    if report_on:
        report(report_on, [(candidate.label, made.state), *as_stored(makeable, args.trust)], metric)
    else:
        own = test_set and test_set != annotation_file(config, 'val')
        how = f'mmema test {args.config} {out}' if own else '--report-config CONFIG'
        print(f'Chosen on the validation set, so report it on another one: {how}')


def read(file, options):
    if not Path(file).is_file():
        cli.die(f'no config file {file} (seen from {Path.cwd()}){cli.similar_files(Path(file))}')
    given = SimpleNamespace(
        config=file, cfg_options=options, work_dir=None, launcher='none', local_rank=0
    )
    return cli.load_config(given)


def annotation_file(config, split):
    """Return the file of boxes of a split, as far as the config tells it."""
    dataset = (config.get(f'{split}_dataloader') or {}).get('dataset') or {}
    return dataset.get('ann_file')


def could_be_made(all_of_them, notes):
    """Yield the candidates that the checkpoints can make; add a note about the others."""
    from ..checkpoints.formats import CheckpointError

    left = []
    for candidate in all_of_them:
        try:
            yield candidate.solved()
        except CheckpointError as error:
            left.append(f'{candidate.label} ({str(error).split(":")[0]})')
    if left:
        notes.append(f'left out, since the checkpoints cannot make them: {"; ".join(left)}')


class Best(NamedTuple):
    """The best candidate so far."""

    candidate: object
    made: object
    score: float


def evaluate_all(args, config, makeable, folder):
    """Return the metric, the best of the candidates, and the rows of the table."""
    if args.batches:
        cli.need(config, 'train_dataloader', 'train_cfg')
        use_last_pipeline(config)
    prefixes = prefixes_in(config).values()
    watched, best, rows = None, None, []
    with Evaluator(config, 'val', folder, 'validation', len(makeable)) as evaluator:
        batches = []
        if args.batches:
            batches = [*training_batches(config, evaluator.runner.seed, args.batches)]
        for candidate in makeable:
            made = candidate.made(args.trust)
            metrics, state = evaluator.metrics(made.state, candidate.label, batches)
            if metrics:  # none where nothing was detected
                names = list(metrics)
                watched = metric_to_compare(config, names, prefixes, args.metric, args.rule)
            scored = metrics and is_score(metrics, watched.metric)
            score = float(metrics[watched.metric]) if scored else None
            off = f'{candidate.fit.error:.1%}' if candidate.fit else ''
            rows.append(Row(candidate.label, off, '-' if score is None else f'{score:.4f}'))
            if score is None:
                continue
            if best is None or (score < best.score if watched.less else score > best.score):
                best = Best(candidate, made._replace(state=state), score)
    if best is None:
        cli.die('no candidate got a metric: nothing was detected by any of them')
    return watched.metric, best, rows


def as_stored(makeable, trust):
    """Return label and state of the main average as it is stored, or of the first weights."""
    return [(f'{makeable[0].label} as stored', makeable[0].made(trust).state)]


def table(metric, rows, best):
    lines = [('average', 'profile off', metric)]
    lines += [
        (f'* {row.label}' if row.label == best else f'  {row.label}', *row[1:]) for row in rows
    ]
    return aligned(lines)


def report(config, states, metric):
    with tempfile.TemporaryDirectory() as folder, Evaluator(
        config, 'test', folder, 'report', len(states)
    ) as evaluator:
        found = [(label, evaluator.metrics(state, label)[0]) for label, state in states]
    for label, metrics in found:
        score = f'{metrics[metric]:.4f}' if metric in metrics else '-'
        print(f'{metric} on the test set of {Path(config.filename).name}: {score}  {label}')
