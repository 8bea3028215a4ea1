"""Evaluate a checkpoint with any config of MMYOLO, MMDetection, MMPretrain or MMSegmentation.

What is evaluated is the file's ``state_dict``: in a checkpoint of a run with EMAHook these are the
EMA weights, the ones whose metric the training log shows.

tools/test.py configs/digits/yolov5_n_digits.py work_dirs/digits/epoch_30.pth
"""

from __future__ import annotations

import sys

from . import common as cli


def main(argv=None):
    args = parse_args(argv)
    cli.check_arguments(args)
    cli.import_stack()
    config = cli.load_config(args)
    cli.need(config, 'test_dataloader', 'test_cfg', 'test_evaluator')
    weights = read_weights(args.checkpoint)
    config.load_from = args.checkpoint
    config.resume = False  # a resumed EMAHook would take `ema_state_dict`, which holds raw weights
    runner = cli.build_runner(config)
    if weights is not None:
        check_weights(runner, weights, args.checkpoint)
    cli.build_loop(runner, 'test')
    if args.out:
        runner.test_loop.evaluator.metrics.append(dump_of(config)(out_file_path=args.out))
    with cli.run_errors():
        metrics = runner.test()
    report(runner, metrics, args)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument('config', help='file of the config')
    parser.add_argument('checkpoint', help='file of the checkpoint, or its address')
    cli.add_common_arguments(parser)
    parser.add_argument('--out', metavar='FILE.pkl', help='also write all predictions to a file')
    args = parser.parse_args(argv)
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out takes the name of a .pkl file, got {args.out}')
    return args


def read_weights(checkpoint):
    if '://' in checkpoint:  # MMEngine fetches it
        return None
    content = cli.read_checkpoint(checkpoint)
    if 'state_dict' not in content:
        cli.die(
            f'{checkpoint} has no state_dict, it holds: {", ".join(map(str, list(content)[:5]))}'
        )
    weights = content['state_dict']
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        cli.die(
            f'{checkpoint} is no checkpoint: its state_dict is a {type(weights).__name__}, '
            'not tensors by name'
        )
    return weights


def check_weights(runner, weights, checkpoint):
    """Refuse weights of another model; MMEngine would evaluate what is left at random."""
    if not hasattr(runner.model, 'named_parameters'):  # FlexibleRunner builds it later
        runner.model = runner.strategy.build_model(runner.model)
    weights = {plain(name): tensor for name, tensor in weights.items()}
    parameters = {plain(name): tensor for name, tensor in runner.model.named_parameters()}
    wrong = [
        name
        for name, tensor in parameters.items()
        if name not in weights or weights[name].shape != tensor.shape
    ]
    if wrong:
        cli.die(
            f'{checkpoint} does not fit the model of the config: {len(wrong)} of '
            f'{len(parameters)} parameters are missing or of another shape, such as {wrong[0]}'
        )


def plain(name):
    """Return a name without the prefix that a wrapper for several GPUs adds."""
    return name[7:] if name.startswith('module.') else name


def dump_of(config):
    """Return the class of MMEngine, or for a detector of MMDetection, that writes predictions."""
    if {'mmdet', 'mmyolo'}.isdisjoint(cli.libraries_of(config)):
        from mmengine.evaluator import DumpResults

        return DumpResults
    from mmdet.evaluation import DumpDetResults

    return DumpDetResults


def report(runner, metrics, args):
    from mmengine.dist import is_main_process

    if not is_main_process():
        return
    print(f'\n{args.checkpoint}:')
    for name, value in metrics.items():
        print(f'  {name:<20} {value}')
    if args.out:
        print(f'  predictions          {args.out}')
    sys.stdout.flush()
