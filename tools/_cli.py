"""What the command-line tools share: one clear line for what the user can mend, and the config."""

import argparse
import difflib
import inspect
import os
import sys
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

PROGRAM = Path(sys.argv[0]).name
USAGE = 2  # exit status of a call that has to be changed; argparse's own


def die(message):
    """End the program with one line that says what is wrong and what to do."""
    print(f'{PROGRAM}: {" ".join(str(message).split())}', file=sys.stderr, flush=True)
    sys.exit(USAGE)


def note(message):
    print(f'{PROGRAM}: {message}', file=sys.stderr, flush=True)


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
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
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
    """Import all that the tools need, or say what is missing."""
    warnings.filterwarnings('ignore', message='.*pkg_resources')  # of MMEngine and its like
    try:
        import mmcv  # noqa: F401
        import mmdet  # noqa: F401
        import mmengine  # noqa: F401
        import mmyolo  # noqa: F401

        import mmema  # noqa: F401  # its names resolve bare, and torch loads MMEngine's checkpoints
    except ImportError as error:
        die(
            f'{error} (with {sys.executable}): run `make setup` in the mmema checkout and start '
            'this tool with its .venv/bin/python, or install what is missing'
        )
    except AssertionError as error:  # mmdet and mmyolo refuse an mmcv of another version
        die(f'the installed OpenMMLab packages do not fit together: {error}')


def load_config(args):
    """Return the config of the file and the options, with work_dir and launcher set."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    from mmengine.config import Config

    path = Path(args.config)
    try:
        config = Config.fromfile(path)
    except Exception as error:  # whatever happens in there, the file is what has to change
        die(f'{path} cannot be read: {type(error).__name__}: {error}')
    merge_options(config, args.cfg_options)
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
    from mmengine.runner import Runner

    first, _, rest = key.partition('.')
    known = set(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'}
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


@contextmanager
def config_errors():
    """Turn an error that the config makes into one line; every other keeps its traceback.

    It is the config's where MMEngine's registry finds no such type or argument, where the
    constructor that it calls refuses what it is given, or where a hook of ours refuses the run at
    its start.
    """
    import mmema

    try:
        yield
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, TypeError) and error.__context__ is not None:
            error = error.__context__  # MMEngine's call_hook raises another one instead
        frames = traceback.extract_tb(error.__traceback__)
        last = frames[-1]
        built = any(Path(frame.filename).name == 'build_functions.py' for frame in frames)
        starts = any(frame.name in ('before_run', 'before_train') for frame in frames)
        ours = Path(mmema.__file__).parent in Path(last.filename).parents
        refused = last.name in ('__init__', 'build_from_cfg')
        if not (built and refused or (built or starts) and ours):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        text = str(text).split(' More details can be found')[0] or type(error).__name__
        place = '' if last.name == 'build_from_cfg' else f' ({last.filename}:{last.lineno})'
        die(f'the config cannot be built: {text}{place}')


def build_runner(config):
    from mmdet.utils import setup_cache_size_limit_of_dynamo
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner
    from mmyolo.utils import is_metainfo_lower

    setup_cache_size_limit_of_dynamo()
    try:
        is_metainfo_lower(config)
    except AssertionError as error:
        die(error)
    with config_errors():
        return RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)


def build_loop(runner, kind):
    """Build a loop of the runner and its data now, so that missing data is one line."""
    settings = runner.cfg.get(f'{kind}_dataloader')
    if settings is None:
        return
    if isinstance(settings, list):  # several sets: MMEngine builds them itself
        settings = settings[0]
    where = f'{kind}_dataloader.dataset'
    try:
        with config_errors():
            loop = getattr(runner, f'{kind}_loop')
    except (FileNotFoundError, NotADirectoryError) as error:
        if error.filename is None:
            raise
        die(missing_data(error.filename, where))
    except Exception as error:
        # Whatever goes wrong while annotations are read, these are what has to change.
        frames = traceback.extract_tb(error.__traceback__)
        reading = ('load_data_list', '_serialize_data')
        if not any(frame.name in reading or 'pycocotools' in frame.filename for frame in frames):
            raise
        die(
            f'the annotations of {where} ({annotations(settings)}) cannot be used, they may be '
            f'empty, cut short or of another format: {type(error).__name__}: {error}'
        )
    dataset = loop.dataloader.dataset
    if len(dataset) == 0:
        die(f'{where} is empty: no picture of {annotations(settings)} passes its filter')
    check_picture(dataset, where)


def check_picture(dataset, where):
    """Look for the first and the last picture, so that a wrong folder is found at once."""
    while not hasattr(dataset, 'get_data_info'):  # the wrappers of mmdet
        dataset = getattr(dataset, 'dataset', None)
        if dataset is None:
            return
    for index in (0, len(dataset) - 1):
        path = dataset.get_data_info(index).get('img_path')
        if isinstance(path, str) and '://' not in path and not os.path.exists(path):
            die(missing_data(path, where))


def missing_data(path, where):
    digits = (
        'make the digits with tools/make_digits.py data/digits, or ' if 'digits' in path else ''
    )
    return (
        f'no {path} (seen from {Path.cwd()}), which {where} or its evaluator names: {digits}'
        f'name the place with --cfg-options {where}.data_root=...'
    )


def annotations(settings):
    dataset = settings.get('dataset', {})
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return os.path.join(str(dataset.get('data_root') or ''), str(dataset.get('ann_file', '')))


def check_file(path):
    if os.path.isfile(path):
        return
    folder = os.path.dirname(path) or '.'
    there = ', '.join(sorted(file.name for file in Path(folder).glob('*.pth')))
    die(f'no checkpoint file {path}' + (f'; {folder} holds {there}' if there else ''))


def read_checkpoint(path):
    """Load a checkpoint on the CPU, or say in one line what is wrong with the file."""
    import torch

    check_file(path)
    try:
        checkpoint = torch.load(path, map_location='cpu')
    except Exception as error:
        if 'GLOBAL ' in str(error):
            unknown = str(error).split('GLOBAL ')[-1].split(' ')[0]
            die(
                f'{path} holds objects of {unknown}, which torch does not load from a file that it '
                'does not trust; if you do: TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 in the environment'
            )
        reason = str(error).split('\n')[0].split('. ')[0]
        die(
            f'{path} cannot be loaded, it may be cut short or no checkpoint at all '
            f'({os.path.getsize(path)} bytes; {type(error).__name__}: {reason})'
        )
    if not isinstance(checkpoint, dict):
        die(f'{path} is no checkpoint: it holds a {type(checkpoint).__name__}, not a dict')
    return checkpoint
