"""Measure the BatchNorm statistics of the weights in a checkpoint on training data.

mmema recalibrate configs/digits/yolov5_n_digits.py mean.pth -o measured.pth --batches 100

Every running mean and variance becomes the plain mean of its values over the batches, and over the
ranks under torchrun (--launcher pytorch), as EMARecalibrateHook has it. Where the config switches
the pipeline, the data go through that of the last stage.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path

from . import common as cli


def main(argv=None):
    args = parse_args(argv)
    cli.check_arguments(args)
    out = Path(args.output)
    if out.exists() and not args.force:
        cli.die(f'{out} exists; --force replaces it')
    cli.import_stack()
    config = cli.load_config(args)
    cli.need(config, 'train_dataloader', 'train_cfg')
    with cli.checkpoint_errors():
        measure(args, config, out)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument('config', help='file of the config')
    parser.add_argument('checkpoint', help='file of the checkpoint')
    parser.add_argument('-o', '--output', required=True, metavar='OUT', help='.pth or .safetensors')
    parser.add_argument('--force', action='store_true', help='replace an existing file')
    parser.add_argument(
        '--weights', metavar='NAME', help='ema, raw or a name in also (default: ema, else raw)'
    )
    parser.add_argument(
        '--batches',
        type=int,
        default=100,
        metavar='N',
        help='training batches, for each rank; fewer if the set has fewer (default: 100)',
    )
    parser.add_argument(
        '--mode',
        default='tensor',
        help="mode of the model's forward; 'loss' for models that reach some layers only there",
    )
    parser.add_argument(
        '--trust', action='store_true', help='read a file with any object in it; can run its code'
    )
    cli.add_common_arguments(parser)
    args = parser.parse_args(argv)
    if args.batches < 1:
        parser.error(f'--batches must be at least 1, got {args.batches}')
    if '://' in args.checkpoint:
        parser.error(f'the checkpoint must be a file, got {args.checkpoint}')
    return args


def measure(args, config, out):
    import torch
    from mmengine.dist import get_world_size, is_main_process

    from ..checkpoints.export import compact, write_weights
    from ..checkpoints.files import load
    from ..checkpoints.formats import CheckpointError
    from ..hooks.recalibrate import measure_statistics
    from ..run.switches import use_last_pipeline
    from .weights import (
        load_into,
        training_batches,
        with_statistics_of,
        without_averages,
    )

    found = load(args.checkpoint, args.trust)
    sets = found.sets()
    name = args.weights or next(iter(sets))
    if name not in sets:
        raise CheckpointError(f'{args.checkpoint} has no {name} weights; it has {", ".join(sets)}')
    stage = use_last_pipeline(config)
    without_averages(config)
    for split in ('val', 'test'):
        for part in ('dataloader', 'cfg', 'evaluator'):
            config.pop(f'{split}_{part}', None)
    config.update(load_from=None, resume=False)
    runner = cli.build_runner(config)
    load_into(runner.model, sets[name], args.checkpoint)
    model = getattr(runner.model, 'module', runner.model)
    context = nullcontext
    if 'Amp' in str(config.optim_wrapper.get('type')) and torch.cuda.is_available():
        context = partial(torch.autocast, 'cuda')  # the weights saw such statistics in training
    batches = training_batches(config, runner.seed, args.batches)
    measured = measure_statistics(model, batches, args.mode, context)
    if not measured.statistics:
        cli.die(
            f'no BatchNorm with running statistics got data in forward(mode={args.mode!r}); '
            f'{measured.others} were left as they are. Try --mode loss'
        )
    if not is_main_process():
        return
    measured.copy_to(model)
    ranks = get_world_size()
    about = {'weights': name, 'steps': found.also.get(name, found).steps, **found.exported}
    about['recalibrated'] = f'{measured.batches} batches, {ranks} rank{"s" if ranks > 1 else ""}'
    state = compact(with_statistics_of(model, sets[name]))
    out = write_weights(out, state, {**found.meta, 'mmema': about}, args.force)
    print(
        f'{name} weights of {args.checkpoint}: {len(measured.statistics)} BatchNorm layers '
        f'measured on {about["recalibrated"]}, with {stage}: {out}'
    )
    if measured.others:
        cli.note(
            f'note: {measured.others} more keep theirs: no data reached them in '
            f'forward(mode={args.mode!r}), or what came was not finite'
        )
