"""What the commands share: one clear line for what the user can mend, and the config."""

from __future__ import annotations

import argparse
import difflib
import gc
import importlib
import inspect
import os
import re
import sys
import traceback
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

USAGE = 2  # exit status of a call that has to be changed; argparse's own
CONFIG_ERRORS = (AssertionError, AttributeError, ImportError, KeyError, TypeError, ValueError)

SETUP = (
    'run `make setup` in the mmema checkout and use what is in its .venv/bin, or install what is '
    'missing (docs/stacks.md tells versions that work together)'
)


def run(main):
    """Run a tool and destroy the process group of a distributed job at its end.

    A group that is left over aborts the process while Python shuts down. After an error the
    process ends at once instead: an orderly end would wait for ranks that may be dead, or that wait
    for this one; its closed connections tell them.
    """
    status = 0
    try:
        main()
    except BaseException as error:
        if not in_process_group():
            raise
        if isinstance(error, SystemExit):
            status = error.code or 0
        else:
            traceback.print_exc()
            status = 1
    if in_process_group():
        if status:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        gc.collect()  # a DistributedDataParallel must not be the last to hold its group
        sys.modules['torch'].distributed.destroy_process_group()


def in_process_group():
    torch = sys.modules.get('torch')
    return bool(torch and torch.distributed.is_available() and torch.distributed.is_initialized())


def die(message):
    """End the program with one line that says what is wrong and what to do."""
    note(' '.join(str(message).split()))
    sys.exit(USAGE)


def note(message):
    print(f'{_called}: {message}', file=sys.stderr, flush=True)


_called = 'mmema'  # the name of the program, with which its messages begin


def called_as(name):
    """Let messages and helps begin with this name of the program."""
    global _called
    _called = name


def parser(description):
    """Return a parser of arguments whose help keeps the lines of the description."""
    return argparse.ArgumentParser(
        prog=_called,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_errors():
    """Turn the refusal of a run that cannot work as configured into one line."""
    from ..messages import RunError

    return one_line('the run cannot work as configured', RunError)


def checkpoint_errors():
    """Turn what the library says of a checkpoint into one line."""
    from ..checkpoints.formats import CheckpointError

    return one_line(None, CheckpointError)


@contextmanager
def one_line(failed, *kinds):
    """Turn errors of these kinds into one line; MMEMA_TRACEBACK=1 shows where they come from.

    So is a package that is not installed.
    """
    try:
        yield
    except Exception as error:
        missing = missing_package(error)
        if os.environ.get('MMEMA_TRACEBACK') or not (missing or isinstance(error, kinds)):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        text = missing or str(text) or type(error).__name__
        if failed is None:
            die(text)
        die(f'{"" if missing else f"{failed}: "}{text} (MMEMA_TRACEBACK=1 shows where)')


def missing_package(error):
    """Return what an error says about a package that is not installed, or None."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        module = error.name.partition('.')[0]
        return f'{module} is not installed (pip install {PACKAGES.get(module, module)})'
    # What a library says that needs a package for a part of it.
    told = isinstance(error, (ImportError, RuntimeError)) and 'install' in str(error)
    return str(error).rstrip('. ') if told else None


# Modules whose package has another name.
PACKAGES = {
    'cv2': 'opencv-python-headless',
    'mmcv': 'mmcv, compiled for your torch: see docs/stacks.md',
    'mmseg': 'mmsegmentation',
    'PIL': 'pillow',
    'skimage': 'scikit-image',
    'sklearn': 'scikit-learn',
    'yaml': 'pyyaml',
}


def add_common_arguments(parser):
    parser.add_argument(
        '--work-dir',
        metavar='D',
        help='folder for logs and checkpoints (default: work_dir of the config, else '
        './work_dirs/<name of the config>)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        default=[],
        metavar='K=V',
        help='settings that replace those of the config: train_cfg.max_epochs=10 '
        'train_dataloader.batch_size=8; a list as "k=[1,2]", an element of one as '
        'custom_hooks.0.momentum=1e-4',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='pytorch' if 'TORCHELASTIC_RUN_ID' in os.environ else 'none',
        help='who starts the ranks (default: pytorch under torchrun, else none)',
    )
    # torchrun sets LOCAL_RANK; torch.distributed.launch passes the option, in either spelling.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def check_arguments(args):
    """Refuse what needs no library to be seen wrong; those take seconds to import."""
    path = Path(args.config)
    if not path.is_file():
        die(f'no config file {path} (seen from {Path.cwd()}){similar_files(path)}')
    for option in args.cfg_options:
        key, equals, _ = option.partition('=')
        if not (equals and key):
            die(f'--cfg-options takes key=value without spaces, got {option!r}')
    checkpoint = getattr(args, 'checkpoint', None) or args.resume
    if checkpoint and checkpoint != 'auto' and '://' not in checkpoint:
        check_file(checkpoint)


def import_stack():
    """Import what every run needs, or say what is missing; a config says what else it needs."""
    warnings.filterwarnings('ignore', message='.*pkg_resources')  # of MMEngine and its like
    with suppress(ImportError):  # a run of MMEngine alone does without
        importlib.import_module('mmcv')


def import_libraries(config):
    """Import the OpenMMLab libraries that a config names, or say what is missing."""
    for name in libraries_of(config):
        try:
            importlib.import_module(name)
        except ImportError as error:
            die(f'{error} (with {sys.executable}): {way_to(name)}')
        except AssertionError as error:  # they refuse an mmcv of another version
            die(f'the installed OpenMMLab packages do not fit together: {error}')


def libraries_of(config):
    """Return the OpenMMLab libraries whose names stand in a config, such as mmdet of mmdet.Pad."""
    from mmengine.config.utils import MODULE2PACKAGE

    found = {config.get('default_scope')}

    def walk(value):
        if isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(inner, str) and (key == '_scope_' or re.search('(^|_)type$', key)):
                    found.add(inner.partition('.')[0])
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for inner in value:
                walk(inner)

    walk([config[key] for key in runner_arguments() & set(config)])
    return sorted(found & set(MODULE2PACKAGE))


def way_to(library):
    """Say how a library, named by its module or its package, is installed."""
    from mmengine.config.utils import MODULE2PACKAGE

    if library in ('mmdet', 'mmyolo'):
        return SETUP
    package = MODULE2PACKAGE.get(library, library)
    return f'install {package} beside mmcv; docs/stacks.md tells versions that work together'


def load_config(args):
    """Return the config of the file and the options, with work_dir and launcher set.

    The libraries that it names are imported.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    from mmengine.config import Config

    path = Path(args.config)
    try:
        config = Config.fromfile(path)
    except Exception as error:  # whatever happens in there, the file is what has to change
        # Of _base_ = 'mmdet::...'.
        way = f' (with {sys.executable}): {SETUP}' if 'is not installed' in str(error) else ''
        die(f'{path} cannot be read: {type(error).__name__}: {error}{way}')
    merge_options(config, args.cfg_options)
    import_libraries(config)
    config.launcher = args.launcher
    if args.work_dir is not None:
        config.work_dir = args.work_dir
    elif config.get('work_dir') is None:
        config.work_dir = os.path.join('./work_dirs', path.stem)
    return config


def need(config, *keys):
    """Refuse a config that lacks a part; those under ``_base_`` hold a few parts only."""
    missing = [key for key in ('model', *keys) if config.get(key) is None]
    if missing:
        die(f'{config.filename} has no {", ".join(missing)}: is it a part for other configs?')


def similar_files(path):
    names = [file.name for file in path.parent.glob('*.py')] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f'; did you mean {path.parent / close[0]}?' if close else ''


def merge_options(config, options):
    """Put ``k=v`` options into a config; a misspelt name is found here, not an hour later."""
    from mmengine.config import DictAction

    for option in options:
        check_key(config, option.partition('=')[0])
    if not options:
        return
    parser = argparse.ArgumentParser()
    parser.add_argument('--options', nargs='+', action=DictAction)
    try:
        config.merge_from_dict(parser.parse_args(['--options', *options]).options)
    except Exception as error:
        reason = str(error).split(' of list')[0]
        die(f'--cfg-options {" ".join(options)}: {type(error).__name__}: {reason}')


def check_key(config, key):
    """Refuse a first name that nothing would read, and mention a later one that is new."""
    first, _, rest = key.partition('.')
    known = runner_arguments()
    if first not in config and first not in known:
        close = difflib.get_close_matches(first, known | set(config), n=1)
        hint = f'; did you mean {close[0]}?' if close else ''
        die(f'--cfg-options {key}: the config has no {first!r}{hint}')
    if first in config and first not in known and not rest and not first.startswith('tta_'):
        note(
            f'warning: --cfg-options {key} sets a variable that the config file has already used; '
            'name the place that uses it, such as train_cfg.max_epochs'
        )
    inside = config.get(first)
    for name in rest.split('.') if rest else ():
        if isinstance(inside, dict) and name in inside:
            inside = inside[name]
        elif isinstance(inside, (list, tuple)) and name.isdigit() and int(name) < len(inside):
            inside = inside[int(name)]
        else:
            close = difflib.get_close_matches(name, inside if isinstance(inside, dict) else (), n=1)
            hint = f'; did you mean {close[0]}?' if close else ''
            note(f'note: --cfg-options {key}: {name!r} is new in the config{hint}')
            return


def runner_arguments():
    """Return the names in a config that MMEngine's Runner reads."""
    from mmengine.runner import Runner

    return set(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'}


def build_runner(config):
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    libraries = libraries_of(config)
    if 'mmdet' in libraries or 'mmyolo' in libraries:
        from mmdet.utils import setup_cache_size_limit_of_dynamo

        setup_cache_size_limit_of_dynamo()
    join_ranks_on_cpu(config)
    with one_line('the config cannot be built', *CONFIG_ERRORS):
        if 'mmyolo' in libraries:
            from mmyolo.utils import is_metainfo_lower

            is_metainfo_lower(config)
        return RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)


def join_ranks_on_cpu(config):
    """Make the process group and the wrapper of the model where MMEngine would ask for GPUs."""
    import torch
    from mmengine.device import get_device

    launcher = config.get('launcher', 'none')
    if launcher == 'none' or get_device() != 'cpu':
        return
    if not in_process_group():
        if launcher != 'pytorch':
            die(f'--launcher {launcher} needs GPUs; on CPUs start the ranks by torchrun')
        torch.distributed.init_process_group('gloo')
    if 'runner_type' not in config and config.get('model_wrapper_cfg') is None:
        config.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=config.get('find_unused_parameters', False),
        )


def build_loop(runner, kind):
    """Build a loop of the runner and its data now, so that missing data is one line."""
    settings = runner.cfg.get(f'{kind}_dataloader')
    if settings is None:
        return
    dataset = settings.dataset
    while 'dataset' in dataset:  # the wrappers of mmdet
        dataset = dataset.dataset
    file = os.path.join(dataset.get('data_root') or '', dataset.get('ann_file', ''))
    where = f'{kind}_dataloader.dataset ({file}, seen from {Path.cwd()})'
    errors = (*CONFIG_ERRORS, IndexError, OSError)
    with one_line(f'{kind}_cfg, {kind}_evaluator or {where} cannot be used', *errors):
        dataset = getattr(runner, f'{kind}_loop').dataloader.dataset
        if len(dataset) == 0:
            raise ValueError('no picture passes its filter')
        while not hasattr(dataset, 'get_data_info') and hasattr(dataset, 'dataset'):
            dataset = dataset.dataset
        for index in (0, len(dataset) - 1) if hasattr(dataset, 'get_data_info') else ():
            path = dataset.get_data_info(index).get('img_path')
            if isinstance(path, str) and '://' not in path and not os.path.exists(path):
                raise FileNotFoundError(f'no picture {path}')


def check_folder(path):
    if not os.path.isdir(path):
        die(f'no folder {path}')


def check_file(path):
    if os.path.isfile(path) or os.path.isdir(path):
        return
    folder = os.path.dirname(path) or '.'
    from ..checkpoints.probe import checkpoint_files

    there = ', '.join(file.name for file in checkpoint_files(folder))
    die(f'no checkpoint file {path}' + (f'; {folder} holds {there}' if there else ''))


def read_checkpoint(path):
    """Return the content of a checkpoint that MMEngine will load, or say what is wrong with it."""
    from ..checkpoints.files import content_of
    from ..checkpoints.formats import CheckpointError
    from ..checkpoints.torch_load import HAS_ALLOW_LIST

    check_file(path)
    try:
        # Before torch 2.6 MMEngine loads any object, and torch has no list of allowed classes.
        checkpoint = content_of(path, trust=not HAS_ALLOW_LIST)
    except CheckpointError as error:
        die(error)
    if not isinstance(checkpoint, dict):
        die(f'{path} is no checkpoint: it holds a {type(checkpoint).__name__}, not a dict')
    return checkpoint
