"""What the commands share, called in this process; the other files call the commands."""

import argparse
import decimal
import os
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from tool_runs import CONFIG
from tool_runs import refusal as refusal_of

from mmema.cli import common as cli
from mmema.cli import train
from mmema.messages import RunError

pytest.importorskip('mmyolo')


@pytest.fixture
def refusal(capsys):
    """Return a function that calls another and gives the line with which it ends the program."""

    def call(function, *arguments):
        with pytest.raises(SystemExit) as stop:
            function(*arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return call


def arguments(config, options=()):
    return argparse.Namespace(
        config=str(config),
        cfg_options=list(options),
        work_dir=None,
        launcher='none',
        local_rank=0,
    )


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('model = dict(', "SyntaxError: '(' was never closed"),
        ('model = dict(type=foo)', "NameError: name 'foo' is not defined"),
        ('_base_ = ["none.py"]', 'No such file'),
    ],
)
def test_refuses_a_broken_config(tmp_path, refusal, text, reason):
    path = tmp_path / 'broken.py'
    path.write_text(text)
    line = refusal(cli.load_config, arguments(path))
    assert f'{path} cannot be read: ' in line
    assert reason in line


def test_refuses_a_part_of_a_config(tmp_path, refusal):
    path = tmp_path / 'part.py'
    path.write_text('model = dict(type="YOLODetector")')
    config = cli.load_config(arguments(path))
    line = refusal(cli.need, config, 'train_dataloader', 'train_cfg')
    assert f'{path} has no train_dataloader, train_cfg' in line


def test_work_dir_is_named_after_the_config(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text('x = 1')
    assert cli.load_config(arguments(path)).work_dir == './work_dirs/mine'
    path.write_text('work_dir = "there"')
    assert cli.load_config(arguments(path)).work_dir == 'there'


@pytest.mark.parametrize(
    ('option', 'reason'),
    [
        ('trian_cfg.max_epochs=1', "the config has no 'trian_cfg'; did you mean train_cfg?"),
        ('custom_hooks.9.momentum=1', 'Index 9 exceeds the length'),
        ('train_cfg.max_epochs.x=1', 'train_cfg.max_epochs.x=1'),
        ('optim_wrapper.x=[1,(2]', 'Imbalanced brackets'),
    ],
)
def test_refuses_a_bad_option(refusal, option, reason):
    line = refusal(cli.merge_options, Config.fromfile(CONFIG), [option])
    assert reason in line
    assert len(line) < 400


def test_options_reach_dicts_and_lists():
    config = Config.fromfile(CONFIG)
    options = ['train_cfg.max_epochs=3', 'custom_hooks.0.gamma=7', 'load_from=a.pth']
    cli.merge_options(config, options)
    assert config.train_cfg.max_epochs == 3
    assert config.custom_hooks[0].gamma == 7
    assert config.custom_hooks[0].type == 'EMAHook'
    assert config.load_from == 'a.pth'


@pytest.mark.parametrize(
    ('option', 'remark'),
    [
        ('digits_epochs=3', 'warning: --cfg-options digits_epochs sets a variable'),
        ('train_cfg.max_epohcs=3', "'max_epohcs' is new in the config; did you mean max_epochs?"),
        ('train_cfg.max_epochs=3', ''),
        ('load_from=x.pth', ''),
    ],
)
def test_remarks_on_options_that_may_be_misspelt(capsys, option, remark):
    cli.merge_options(Config.fromfile(CONFIG), [option])
    printed = capsys.readouterr().err
    assert remark in printed
    assert bool(printed) == bool(remark)


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        ([1], 'it holds a list, not a dict'),
        ({'x': decimal.Decimal(1)}, 'it holds decimal.Decimal'),
    ],
)
def test_refuses_what_is_no_checkpoint(tmp_path, refusal, content, reason):
    path = str(tmp_path / 'odd.pth')
    torch.save(content, path)
    line = refusal(cli.read_checkpoint, path)
    assert path in line
    assert reason in line


def test_a_hostile_file_is_called_what_it_is(tmp_path, refusal):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'owned'),)

    path = str(tmp_path / 'hostile.pth')
    torch.save({'state_dict': Hostile()}, path)
    line = refusal(cli.read_checkpoint, path)
    assert f'{path}: it holds {os.mkdir.__module__}.mkdir, and reading more than' in line
    assert 'cut short' not in line
    assert not (tmp_path / 'owned').exists()


@pytest.mark.parametrize('key', ['state_dict', 'meta', 'optimizer'])
def test_refuses_to_resume_from_odd_contents(tmp_path, refusal, key):
    path = str(tmp_path / 'odd.pth')
    content = {'state_dict': {}, 'meta': {'epoch': 1}, 'optimizer': {}}
    config = Config(dict(train_cfg=dict(max_epochs=2)))
    torch.save(content, path)
    check = train.check_resumable
    check(config, path)
    torch.save({**content, key: 'x'}, path)
    line = refusal(check, config, path)
    assert f'{path} is no checkpoint of a run: its {key} is a str, not a dict' in line


@pytest.mark.parametrize('size', [0, 1, 1000, 3000, -1])
def test_refuses_a_checkpoint_cut_short(tmp_path, refusal, size):
    path = tmp_path / 'cut.pth'
    torch.save({'state_dict': {'x': torch.zeros(1000)}}, path)
    assert cli.read_checkpoint(str(path))['state_dict']['x'].shape == (1000,)
    path.write_bytes(path.read_bytes()[:size])
    assert f'{path}: it is damaged, cut short or no checkpoint at all' in refusal(
        cli.read_checkpoint, str(path)
    )


@pytest.mark.parametrize(
    ('error', 'text'),
    [
        (KeyError('X is not in the hook registry'), 'X is not in the hook registry'),
        (AssertionError(), 'AssertionError'),
        (ImportError('no mmrotate'), 'no mmrotate'),
    ],
)
def test_an_error_is_one_line_or_a_traceback(refusal, monkeypatch, error, text):
    def build():
        with cli.one_line('the config cannot be built', *cli.CONFIG_ERRORS):
            raise error

    assert f'the config cannot be built: {text} (MMEMA_TRACEBACK=1' in refusal(build)
    monkeypatch.setenv('MMEMA_TRACEBACK', '1')
    with pytest.raises(type(error)):
        build()


def test_other_errors_keep_their_traceback():
    with pytest.raises(ValueError, match='a bug'), cli.run_errors():
        raise ValueError('a bug')


def test_a_refused_run_is_one_line(refusal):
    def train():
        with cli.run_errors():
            raise RunError('patience must be at least 1, got 0')

    assert 'cannot work as configured: patience must be at least 1, got 0' in refusal(train)


# --- packages that a config asks for and that are not installed ---------------------------------


def stock(library, name):
    module = pytest.importorskip(library)
    return Path(module.__file__).parent / '.mim' / 'configs' / name


def test_a_stock_config_that_asks_for_albumentations(tmp_path, monkeypatch):
    config = stock('mmyolo', 'yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py')
    monkeypatch.setattr('mmdet.datasets.transforms.transforms.albumentations', None)
    assert refusal_of('train', config, '--work-dir', 'w', folder=tmp_path) == (
        'mmema train: albumentations is not installed (MMEMA_TRACEBACK=1 shows where)'
    )


def test_a_metric_that_asks_for_a_package_is_told_with_its_librarys_own_words(refusal):
    text = 'Package lvis is not installed. Please run "pip install git+https://x/lvis-api.git".'

    def build():
        with cli.one_line('the config cannot be built'):
            raise RuntimeError(text)

    assert refusal(build).endswith(f': {text[:-1]} (MMEMA_TRACEBACK=1 shows where)')


def test_a_module_that_is_not_there(refusal):
    def run():
        with cli.run_errors():
            import no_such_package.part  # noqa: F401

    assert 'no_such_package is not installed (pip install no_such_package)' in refusal(run)


@pytest.mark.parametrize(
    ('module', 'package'),
    [('cv2', 'opencv-python-headless'), ('PIL.Image', 'pillow'), ('yaml', 'pyyaml')],
)
def test_a_module_is_named_by_its_package(refusal, module, package):
    def run():
        with cli.run_errors():
            raise ModuleNotFoundError(name=module)

    module = module.partition('.')[0]
    assert f'{module} is not installed (pip install {package}) (' in refusal(run)


# --- libraries ----------------------------------------------------------------------------------


def test_a_config_names_its_libraries_in_types_scopes_and_its_default():
    config = Config(
        dict(
            default_scope='mmseg',
            model=dict(type='mmema.X', backbone=dict(type='mmyolo.YOLOv5CSPDarknet')),
            custom_hooks=[dict(type='EMAHook', ema_type='mmdet.ExpMomentumEMA')],
            train_dataloader=dict(dataset=dict(type='X', _scope_='mmpretrain')),
            part_for_other_configs=dict(type='mmpose.X'),
            load_from='mmocr.pth',
        )
    )
    config.work_dir = 'work_dirs/mmrotate'
    assert cli.libraries_of(config) == ['mmdet', 'mmpretrain', 'mmseg', 'mmyolo']
    assert cli.libraries_of(Config(dict(model=dict(type='Net')))) == []


@pytest.mark.parametrize(
    ('library', 'way'),
    [('mmyolo', 'run `make setup` in'), ('mmpose', ': install mmpose beside mmcv; docs/stacks.md')],
)
def test_a_library_that_is_missing(refusal, monkeypatch, library, way):
    monkeypatch.setitem(sys.modules, library, None)
    line = refusal(cli.import_libraries, Config(dict(default_scope=library)))
    assert library in line and way in line


def test_libraries_that_do_not_fit_together(refusal, monkeypatch, tmp_path):
    (tmp_path / 'mmpose.py').write_text('raise AssertionError("MMCV==9 is incompatible")')
    monkeypatch.syspath_prepend(tmp_path)
    line = refusal(cli.import_libraries, Config(dict(default_scope='mmpose')))
    assert 'packages do not fit together: MMCV==9 is incompatible' in line


def test_other_errors_of_a_run_keep_their_traceback():
    with pytest.raises(RuntimeError, match='out of memory'), cli.run_errors():
        raise RuntimeError('CUDA out of memory')
