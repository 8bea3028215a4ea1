"""A wheel built from the sources has all that the package needs where there is no checkout."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import make_digits
import pytest
import runs
import wheels
from mmengine.config import Config
from tool_runs import ROOT

import mmema
from mmema.cli import main as commands

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """The wheel that ``python -m build`` makes of a source archive that it has made."""
    source = wheels.copy_sources(tmp_path_factory.mktemp('source'))
    wheels.python('-m', 'build', '--no-isolation', source, folder=source)
    (file,) = (source / 'dist').glob('*.whl')
    return file


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """A folder with the installed wheel."""
    target = tmp_path_factory.mktemp('target')
    wheels.python(*wheels.PIP_INSTALL, '--target', target, wheel, folder=target)
    return target


def test_it_holds_configs_tools_and_mark_of_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {'mmema/py.typed', 'mmema/cli/main.py'} <= names
    in_checkout = {
        f'mmema/.mim/{file.relative_to(ROOT)}'
        for folder in ('configs', 'tools')
        for file in (ROOT / folder).rglob('*.py')
    }
    left_out = {f'mmema/.mim/tools/{name}.py' for name in ('bootstrap', 'make_digits')}
    assert {name for name in names if '/.mim/' in name} == in_checkout - left_out
    assert not [name for name in names if name.startswith('tests') or name.endswith('.pyc')]


def test_its_metadata_names_no_mmengine_but_as_an_extra(installed):
    (about,) = importlib.metadata.distributions(name='mmema', path=[str(installed)])
    assert about.version == mmema.__version__
    needed = [one for one in about.requires if 'extra ==' not in one]
    assert sorted(needed) == ['numpy', 'torch>=2.0']
    assert 'mmengine<1.0,>=0.8; extra == "mmengine"' in about.requires


def test_its_commands_are_those_of_the_checkout_and_run_without_it(installed, tmp_path):
    runner = runs.make_runner(tmp_path / 'run', epochs=1)
    runner.train()
    file = tmp_path / 'run' / 'epoch_1.pth'

    def run(*arguments):
        return wheels.python(*arguments, folder=tmp_path, PYTHONPATH=str(installed))

    script = installed / 'bin' / 'mmema'
    shown = wheels.call(script, 'inspect', file, folder=tmp_path, PYTHONPATH=str(installed))
    assert 'made by          MMEngine' in shown
    out = run('-m', 'mmema', 'export', file, '-o', 'raw.pth', '--weights', 'raw', '--exact-name')
    assert out == f'raw weights of {file}: raw.pth\n'
    assert (tmp_path / 'raw.pth').is_file()


def test_its_digits_are_in_the_folder_of_the_run(installed, tmp_path):
    config = Config.fromfile(installed / 'mmema/.mim/configs/digits/yolov5_n_digits.py')
    assert config.train_dataloader.dataset.data_root == 'data/digits/'
    assert config.val_evaluator.ann_file == 'data/digits/annotations/val.json'


@pytest.mark.extensive
def test_openmim_trains_and_tests_with_it(installed, tmp_path):
    pytest.importorskip('mmyolo')
    mim = shutil.which('mim', path=Path(sys.executable).parent) or pytest.skip('needs openmim')
    make_digits.make_digits(tmp_path / 'data' / 'digits', train=8, val=4, test=4)
    options = ['train_dataloader.batch_size=4', 'train_dataloader.num_workers=0']
    options += ['train_dataloader.persistent_workers=False', 'train_cfg.max_epochs=1']
    options += ['train_cfg.val_interval=1', 'default_hooks.checkpoint.interval=1']

    def run(command, *arguments):
        call = [mim, command, 'mmema', 'yolov5_n_digits.py', *arguments]
        out = wheels.call(*call, folder=tmp_path, PYTHONPATH=str(installed))
        called = f'{installed}/mmema/.mim/tools/{command}.py {installed}/mmema/.mim/configs/digits/'
        assert called in out
        return out

    run('train', '--work-dir', 'w', '--cfg-options', *options)
    assert (tmp_path / 'w' / 'epoch_1.pth').is_file()
    assert 'coco/bbox_mAP' in run('test', '--checkpoint', 'w/epoch_1.pth')


def test_a_command_that_is_none_names_those_there_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['mmema', 'inspct', 'x.pth'])
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert end.value.code == 2
    line = 'mmema: no command inspct; there are train, test, plot, inspect, export'
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize('folder', ['tools', 'benchmarks', 'tests'])
def test_no_script_hides_a_module_of_the_standard_library(folder):
    """Python finds what lies beside a script first: a statistics.py there broke Debian's Python."""
    assert not {file.stem for file in (ROOT / folder).glob('*.py')} & sys.stdlib_module_names


def test_the_citation_is_of_this_version():
    assert f'\nversion: {mmema.__version__}\n' in (ROOT / 'CITATION.cff').read_text()


@pytest.mark.parametrize('name', commands.COMMANDS)
def test_every_command_has_a_tool_that_says_how_it_is_called(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['mmema', name, '--help'])
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert not end.value.code
    assert capsys.readouterr().out.startswith(f'usage: mmema {name} ')


@pytest.mark.parametrize(
    ('before', 'line'),
    [
        (
            "import sys; sys.modules['mmengine'] = None",
            'ModuleNotFoundError: mmema needs MMEngine, which is not installed: pip install '
            'mmengine, or its maintained fork: pip install onedl-mmengine',
        ),
        (
            'import mmengine; mmengine.__version__ = "0.7.4"',
            'ImportError: mmema needs MMEngine 0.8 or later, found 0.7.4',
        ),
    ],
)
def test_importing_it_without_mmengine_is_one_clear_line(before, line):
    code = f'{before}\nimport mmema'
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, '-c', code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.stderr.splitlines()[-1] == line
