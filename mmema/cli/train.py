"""Train a model from any config of MMYOLO, MMDetection or another library on MMEngine.

mmema's names may stand in it bare.

tools/train.py configs/digits/yolov5_n_digits.py --work-dir work_dirs/digits
"""

from __future__ import annotations

import os
import sys
import time

from . import common as cli


def main(argv=None):
    args = parse_args(argv)
    cli.check_arguments(args)
    cli.import_stack()
    config = cli.load_config(args)
    cli.need(config, 'train_dataloader', 'train_cfg', 'optim_wrapper')
    if args.amp:
        use_amp(config)
    if args.resume is not None:
        resume(config, args.resume)
    elif not config.get('resume') and os.path.exists(last_checkpoint_file(config)):
        cli.note(
            f'{config.work_dir} holds an earlier run; this one begins anew and writes over its '
            'checkpoints (--resume goes on with it)'
        )
    runner = cli.build_runner(config)
    cli.build_loop(runner, 'train')
    cli.build_loop(runner, 'val')
    train(runner)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument('config', help='file of the config')
    cli.add_common_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='mixed precision (needs a GPU)')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CKPT',
        help='go on from the last checkpoint of the work dir, or from CKPT',
    )
    return parser.parse_args(argv)


def use_amp(config):
    from mmengine.device import get_device

    kind = config.optim_wrapper.get('type', 'OptimWrapper')
    kind = kind if isinstance(kind, str) else kind.__name__
    kind = kind.rsplit('.', 1)[-1]
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        cli.die(f'--amp works with optim_wrapper.type OptimWrapper, the config has {kind}')
    device = get_device()
    if device in ('cpu', 'mps'):
        cli.die(f'--amp needs a GPU: MMEngine trains in one precision on {device}; leave --amp out')
    if kind == 'OptimWrapper':
        config.optim_wrapper.type = 'AmpOptimWrapper'
        config.optim_wrapper.setdefault('loss_scale', 'dynamic')


def last_checkpoint_file(config):
    """Return the path of the file in which MMEngine keeps the name of the latest checkpoint."""
    return os.path.join(config.work_dir, 'last_checkpoint')


def resume(config, checkpoint):
    if checkpoint == 'auto':
        checkpoint = latest_checkpoint(config)
    config.resume = True
    config.load_from = checkpoint
    if '://' not in checkpoint:  # else MMEngine's backends read it
        check_resumable(config, checkpoint)


def check_resumable(config, checkpoint):
    cli.check_file(checkpoint)
    if os.path.isdir(checkpoint):  # of a sharded run: read without its tensors
        from ..checkpoints.probe import structure

        content = structure(checkpoint)
    else:
        content = cli.read_checkpoint(checkpoint)
    needed = ('state_dict', 'meta', 'optimizer')
    missing = [key for key in needed if key not in content]
    if missing:
        cli.die(
            f'{checkpoint} has no {", ".join(missing)}, so a run cannot go on from it; to begin a '
            f'new one with its weights: --cfg-options load_from={checkpoint}'
        )
    for key in needed:
        if not isinstance(content[key], dict):
            kind = type(content[key]).__name__
            cli.die(f'{checkpoint} is no checkpoint of a run: its {key} is a {kind}, not a dict')
    epochs, done = config.train_cfg.get('max_epochs'), content['meta'].get('epoch', 0)
    if epochs is not None and done >= epochs:
        cli.note(
            f'{checkpoint} is the end of a finished run ({done} of {epochs} epochs); to train on '
            f'from its weights, begin a run with --cfg-options load_from={checkpoint}'
        )


def latest_checkpoint(config):
    from ..checkpoints.resume import checkpoint_to_resume

    with cli.run_errors():
        found = checkpoint_to_resume(config.work_dir)
    if found is None:
        cli.die(
            f'--resume finds no checkpoint in {config.work_dir}: name one (--resume FILE), or the '
            'folder (--work-dir), or leave --resume out to begin anew'
        )
    cli.note(f'goes on from {found}')
    return found


def train(runner):
    from . import summary

    begin = time.monotonic()
    try:
        with cli.run_errors():
            runner.train()
    except KeyboardInterrupt:
        cli.note(
            f'interrupted after {runner.epoch} epochs, {runner.iter} iterations; --resume with '
            f'--work-dir {runner.work_dir} goes on from its last checkpoint, if it has one'
        )
        sys.exit(130)
    summary.report(runner, time.monotonic() - begin)
