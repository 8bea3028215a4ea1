"""The best of many averages of a run, by evaluation on the validation set."""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import _cli as cli
from _best import is_less_better, is_score, watched_by
from _weights import Evaluator, last_stage, training_batches


class Row(NamedTuple):
    """A line of the table."""

    label: str
    off: str  # relative error of the profile
    score: str


def choose(args, files):
    """Evaluate all candidates of a run, print a table, and write the best one."""
    from mmema.posthoc.candidates import candidates
    from mmema.posthoc.profiles import stored_profiles

    cli.import_stack()
    config = read(args.config, args.cfg_options)
    report_on = args.report_config and read(args.report_config, [])
    test_set = annotations(config, 'test')
    stored, notes = stored_profiles(files)
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
        own = test_set and test_set != annotations(config, 'val')
        how = f'tools/test.py {args.config} {out}' if own else '--report-config CONFIG'
        print(f'Chosen on the validation set, so report it on another one: {how}')


def read(file, options):
    if not Path(file).is_file():
        cli.die(f'no config file {file} (seen from {Path.cwd()}){cli.similar_files(Path(file))}')
    given = SimpleNamespace(
        config=file, cfg_options=options, work_dir=None, launcher='none', local_rank=0
    )
    return cli.load_config(given)


def annotations(config, split):
    """Return the file of boxes of a split, as far as the config tells it."""
    dataset = (config.get(f'{split}_dataloader') or {}).get('dataset') or {}
    return dataset.get('ann_file')


def could_be_made(all_of_them, notes):
    """Yield the candidates that the checkpoints can make; add a note about the others."""
    from mmema.checkpoints.formats import CheckpointError

    left = []
    for candidate in all_of_them:
        try:
            yield candidate._replace(off=candidate.nearest())
        except CheckpointError as error:
            left.append(f'{candidate.label} ({str(error).split(":")[0]})')
    if left:
        notes.append(f'left out, since the checkpoints cannot make them: {"; ".join(left)}')


def evaluate_all(args, config, makeable, folder):
    """Return the metric, the best (candidate, what was made, score), and the rows of the table."""
    if args.batches:
        cli.need(config, 'train_dataloader')
        last_stage(config)
    evaluator = Evaluator(config, 'val', folder, 'validation')
    evaluator.expect(len(makeable))
    batches = []
    if args.batches:
        batches = [*training_batches(config, evaluator.runner.seed, args.batches)]
    named, rule = watched(config)
    metric, best, rows = args.metric or named, None, []
    rule = args.rule or (rule if metric == named else None)
    for candidate in makeable:
        made = candidate.made(args.trust)
        metrics, state = evaluator.metrics(made.state, candidate.label, batches)
        metric = metric or next(iter(metrics), None)
        if metrics and metric not in metrics:
            evaluator.close()
            cli.die(f'no metric {metric} was measured; there are {", ".join(metrics)}')
        score = metrics[metric] if metric and is_score(metrics, metric) else None
        off = '' if candidate.off is None else f'{candidate.off:.1%}'
        rows.append(Row(candidate.label, off, '-' if score is None else f'{score:.4f}'))
        if score is None:
            continue
        better = best is None or (
            score < best[2] if is_less_better(metric, rule) else score > best[2]
        )
        if better:
            best = candidate, made._replace(state=state), float(score)
    evaluator.close()
    if best is None:
        cli.die('no candidate got a metric: nothing was detected by any of them')
    return metric, best, rows


def watched(config):
    """Return metric and rule by which the config's best checkpoint is chosen; None if by none."""
    watched = watched_by(config.get('default_hooks', {}).get('checkpoint'))
    return next((pair for pair in watched.items() if pair[0] != 'auto'), (None, None))


def as_stored(makeable, trust):
    """Return label and state of the main average as it is stored, or of the first weights."""
    return [(f'{makeable[0].label} as stored', makeable[0].made(trust).state)]


def table(metric, rows, best):
    lines = [('average', 'profile off', metric)]
    lines += [
        (f'* {row.label}' if row.label == best else f'  {row.label}', *row[1:]) for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return '\n'.join(
        '  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def report(config, states, metric):
    with tempfile.TemporaryDirectory() as folder:
        evaluator = Evaluator(config, 'test', folder, 'report')
        evaluator.expect(len(states))
        found = [(label, evaluator.metrics(state, label)[0]) for label, state in states]
        evaluator.close()
    for label, metrics in found:
        score = f'{metrics[metric]:.4f}' if metric in metrics else '-'
        print(f'{metric} on the test set of {Path(config.filename).name}: {score}  {label}')
