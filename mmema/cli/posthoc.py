"""Make averages from the checkpoints of a training: restarted, of another horizon, plain means.

mmema posthoc restart run/epoch_280.pth run/epoch_300.pth -o restarted.pth
mmema posthoc fit run --momentum 0.001 --restart-at 280 -o short.pth --plot fit.png
mmema posthoc mean run/epoch_29?.pth --weights raw -o mean.pth
mmema posthoc choose run --config CONFIG -o best.pth
"""

from __future__ import annotations

from pathlib import Path

from . import common as cli


def main(argv=None):
    args = parse_args(argv)
    with cli.checkpoint_errors():
        args.run(args)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    one = commands.add_parser('restart', help='as if restarted at an earlier checkpoint')
    one.add_argument('before', metavar='BEFORE', help='the checkpoint at which it is restarted')
    one.add_argument('after', metavar='AFTER', help='the later checkpoint of the same run')
    one.add_argument('--weights', default='ema', metavar='NAME', help='ema or a name in also')
    add_given(one)
    add_output(one)
    one.set_defaults(run=restart)

    two = commands.add_parser('fit', help='of another horizon or with a restart, from a whole run')
    two.add_argument('folder', metavar='WORK_DIR', help='the folder of the run')
    two.add_argument('--momentum', type=float, metavar='M', help='of the wanted average')
    two.add_argument('--gamma', type=float, metavar='G', help='its warm-up (default: debiased)')
    two.add_argument(
        '--restart-at',
        type=int,
        metavar='EPOCH',
        help='where it begins, as a milestone of EMARestartHook (an iteration in a run by those)',
    )
    two.add_argument(
        '--uniform', type=int, metavar='FROM', help='instead the plain mean from this epoch on'
    )
    two.add_argument('--plot', metavar='PNG', help='draw the wanted and the fitted profile')
    two.add_argument('--trust', action='store_true', help=TRUST)
    add_output(two, 'replace an existing file, and take a fit that is off by more than 10 %%')
    two.set_defaults(run=fit)

    three = commands.add_parser('mean', help='the plain mean of checkpoints')
    three.add_argument('files', nargs='+', metavar='FILE', help='the checkpoints')
    three.add_argument(
        '--weights', default='raw', metavar='NAME', help='raw, ema or a name in also (default: raw)'
    )
    three.add_argument('--trust', action='store_true', help=TRUST)
    add_output(three)
    three.set_defaults(run=mean)

    four = commands.add_parser('choose', help='the best of many such averages, by evaluation')
    four.add_argument('folder', metavar='WORK_DIR', help='the folder of the run')
    four.add_argument(
        '--config', required=True, metavar='CONFIG', help='whose validation set is evaluated on'
    )
    four.add_argument('--metric', metavar='M', help='(default: of save_best, else the first)')
    four.add_argument(
        '--rule', choices=['greater', 'less'], help='which is better (default: as in the config)'
    )
    four.add_argument(
        '--restart-at',
        type=int,
        nargs='+',
        metavar='EPOCH',
        help='where averages may begin (default: where the run switched its pipeline)',
    )
    four.add_argument(
        '--batches',
        type=int,
        default=0,
        metavar='N',
        help="measure BatchNorm's statistics of each on so many training batches (default: 0)",
    )
    four.add_argument(
        '--report-config', metavar='CONFIG', help='evaluate the chosen one on its test set'
    )
    four.add_argument('--cfg-options', nargs='+', action='extend', default=[], metavar='K=V')
    four.add_argument('--trust', action='store_true', help=TRUST)
    add_output(four)
    four.set_defaults(run=choose)
    return check(parser, parser.parse_args(argv))


TRUST = 'read files with any object in them; can run code in the file'


def add_given(parser):
    group = parser.add_argument_group('what the checkpoints do not say')
    group.add_argument('--ema-type', metavar='T', help='such as ExpMomentumEMA')
    group.add_argument('--momentum', type=float, metavar='M')
    group.add_argument('--gamma', type=float, metavar='G')
    group.add_argument('--interval', type=int, metavar='N')
    parser.add_argument('--trust', action='store_true', help=TRUST)


def add_output(parser, force='replace an existing file'):
    parser.add_argument('-o', '--output', required=True, metavar='OUT', help='.pth or .safetensors')
    parser.add_argument('--force', action='store_true', help=force)


def check(parser, args):
    if args.command == 'fit':
        if (args.momentum is None) == (args.uniform is None):
            parser.error('fit takes either --momentum M or --uniform FROM')
        if args.uniform is not None and not args.gamma is args.restart_at is None:
            parser.error('--uniform FROM is a mean: it takes neither --gamma nor --restart-at')
    return args


def show(made, output, force):
    lines = [*made.lines, ('written', made.write(output, force))]
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        print(f'{label:<{width}}  {text}')


def restart(args):
    from ..posthoc.derive import restart
    from ..posthoc.history import Given

    given = Given(args.ema_type, args.momentum, args.gamma, args.interval)
    made = restart(args.before, args.after, args.weights, given, args.trust)
    show(made, args.output, args.force)


def fit(args):
    from ..posthoc.derive import fit
    from ..posthoc.profiles import blends_of, exponential, stored_profiles, uniform

    files = facts_of_run(args.folder, args.trust)
    stored, notes = stored_profiles(files, args.trust)
    for note in notes:
        cli.note(f'note: {note}')
    total, blends = stored[-1].total, blends_of(stored)
    start = files[-1].iteration_of((args.restart_at if args.uniform is None else args.uniform) or 0)
    with cli.one_line('fit', TypeError, ValueError):
        if args.uniform is None:
            wanted = exponential(args.momentum, args.gamma, start, total, blends)
        else:
            wanted = uniform(start, total, blends)
    record = {
        key: value
        for key in ('momentum', 'gamma', 'restart_at', 'uniform')
        if (value := getattr(args, key)) is not None
    }
    made, found = fit(stored, wanted, record, args.force, args.trust)
    show(made, args.output, args.force)
    if args.plot:
        plot(args.plot, wanted, found, files)


def mean(args):
    from ..posthoc.derive import mean

    show(mean(args.files, args.weights, args.trust), args.output, args.force)


def choose(args):
    from . import choose as choosing

    out = Path(args.output)
    if out.exists() and not args.force:
        cli.die(f'{out} exists; --force replaces it')
    choosing.choose(args, facts_of_run(args.folder, args.trust))


def facts_of_run(folder, trust=False):
    """Return the facts of the checkpoints of a run, in the order of time, one of each iteration.

    It is the run of the last checkpoint; files of others in its folder are left out.
    """
    from ..checkpoints.formats import CheckpointError
    from ..posthoc.facts import check_same_run, facts_in
    from ..run.checkpoints import checkpoints_in

    cli.check_folder(folder)
    checkpoints, notes = checkpoints_in(folder)
    for note in notes:
        cli.note(f'note: {note}')
    *others, last = [saved.file for saved in checkpoints] or [None]
    if last is None:
        cli.die(f'no checkpoint of a run in {folder}')
    last, files = facts_in(last, trust), {}
    for file in others:
        facts = facts_in(file, trust)
        if facts.iteration == last.iteration:  # as the best checkpoint, under two names
            continue
        try:
            check_same_run(facts, last)
        except CheckpointError as error:
            cli.note(f'note: {file.name} is left out: {error}')
        else:
            files.setdefault(facts.iteration, facts)
    return [*files.values(), last]


def plot(path, wanted, found, files):
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    import numpy as np

    run = files[-1].run
    at = (np.arange(len(wanted)) + 1) / (run.epoch_length or 1)
    figure, axis = plt.subplots(figsize=(9, 3.6), layout='constrained')
    axis.plot(at, wanted, color='tab:gray', linewidth=4, alpha=0.5, label='wanted')
    label = f'fitted, {found.error:.1%} off'
    axis.plot(at, found.profile, color='tab:blue', linewidth=1, label=label)
    for number, file in enumerate(files):
        label = None if number else 'checkpoints'
        axis.axvline(
            file.iteration / (run.epoch_length or 1),
            color='tab:orange',
            linewidth=0.8,
            alpha=0.6,
            label=label,
        )
    axis.set(
        xlabel='epoch' if run.by_epoch else 'iteration',
        ylabel='share of each update',
        xlim=(0, at[-1]),
    )
    axis.grid(alpha=0.3)
    axis.legend(loc='upper left')
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        cli.die(f'cannot write {path}: {error}')
    print(f'picture: {path}')
