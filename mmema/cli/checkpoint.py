"""Look into a checkpoint, export an average or the raw weights, take over averages of other codes.

mmema inspect work_dirs/digits/epoch_50.pth
mmema export work_dirs/digits/epoch_50.pth --weights ema -o yolov5_n_digits.pth
mmema best work_dirs/digits -o digits_best.pth
mmema convert dfine/last.pth -o dfine_mmema.pth
"""

from __future__ import annotations

from . import common as cli


def main(argv=None):
    args = parse_args(argv)
    commands = {'inspect': inspect, 'export': export, 'best': best, 'convert': convert}
    with cli.checkpoint_errors():
        commands[args.command](args)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    one = commands.add_parser('inspect', help='who made it, and what is where in it')
    add_file(one)

    two = commands.add_parser('export', help='write one set of weights to a file for inference')
    add_file(two)
    two.add_argument(
        '--weights',
        metavar='NAME',
        default='ema',
        help='ema, raw or another average of the run (default: ema)',
    )
    add_export(two)

    best = commands.add_parser('best', help='write the best weights of a whole run to a file')
    best.add_argument('folder', metavar='WORK_DIR', help='the folder of the run')
    best.add_argument(
        '--metric', metavar='M', help='coco/bbox_mAP ... (default: of save_best, else the first)'
    )
    best.add_argument(
        '--rule', choices=['greater', 'less'], help='which is better (default: as in the config)'
    )
    add_trust(best)
    add_export(best)

    three = commands.add_parser('convert', help='write a checkpoint that an MMEngine run resumes')
    add_file(three)
    add_output(three, '.pth or .pt')
    three.add_argument('--steps', type=int, metavar='N', help='updates, if the file does not say')
    return parser.parse_args(argv)


def add_file(parser):
    parser.add_argument('file', help='the checkpoint')
    add_trust(parser)


def add_trust(parser):
    parser.add_argument(
        '--trust',
        action='store_true',
        help='read files with any object in them, as those of YOLOv5; can run code in the file',
    )


def add_export(parser):
    add_output(parser, '.pth or .safetensors; the file is called name-<8 digits of its sha256>')
    parser.add_argument('--exact-name', action='store_true', help='leave the hash out of the name')


def add_output(parser, text):
    parser.add_argument('-o', '--output', required=True, metavar='OUT', help=text)
    parser.add_argument('--force', action='store_true', help='replace an existing file')


def inspect(args):
    from ..checkpoints.report import inspect

    lines = inspect(args.file, args.trust).lines()
    width = max(len(label) for label, _ in lines)
    print(f'{args.file}')
    for label, text in lines:
        print(f'  {label:<{width}}  {text}'.rstrip())


def export(args):
    from ..checkpoints.export import export

    exact = args.exact_name
    out = export(args.file, args.output, args.weights, args.force, args.trust, not exact)
    print(f'{"EMA" if args.weights == "ema" else args.weights} weights of {args.file}: {out}')


def best(args):
    from ..checkpoints.export import export
    from .best import find_best

    metric, best, compared = find_best(args.folder, args.metric, args.rule, args.trust)
    (unit, number), file = best.time, best.saved.file
    record = {'metric': metric, 'score': best.score, unit: number}
    exact = args.exact_name
    out = export(file, args.output, best.weights, args.force, args.trust, not exact, record)
    print(f'{metric} {best.score:.4g}: {best.weights} weights, {unit} {number}; best of {compared}')
    print(f'{best.weights} weights of {file}: {out}')


def convert(args):
    from ..checkpoints.convert import convert

    notes = convert(args.file, args.output, args.steps, args.force, args.trust)
    print(f'{args.file} converted: {args.output}')
    for note in notes:
        print(f'  note: {note}')
