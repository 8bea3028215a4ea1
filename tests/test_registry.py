"""Names resolve: with the scope and no import, bare once mmema is imported, in every scope."""

import subprocess
import sys

import forks
import pytest

from mmema import RestartableExpMomentumEMA

pytestmark = pytest.mark.slow  # these start processes

START = """
import sys
import torch
from mmengine.registry import MODELS, DefaultScope


def build(name, scope=None):
    if scope:
        DefaultScope.get_instance(scope, scope_name=scope)
    ema = MODELS.build(dict(type=name), default_args=dict(model=torch.nn.Linear(1, 1)))
    print(type(ema).__module__, type(ema).__name__)


assert 'mmema' not in sys.modules
"""
NAME = 'RestartableExpMomentumEMA'
OURS = f'{RestartableExpMomentumEMA.__module__} {NAME}'
SCOPES = [None, 'mmdet', 'mmyolo']


def run(folder, code):
    """Run code in a fork that has the libraries but not mmema; return the lines it prints."""
    (folder / 'code.py').write_text(START + code)
    process = forks.start(folder / 'code.py', folder=folder, out=folder / 'out')
    assert process.wait() == 0, (folder / 'out').read_text()
    return (folder / 'out').read_text().splitlines()


@pytest.mark.parametrize('scope', SCOPES)
def test_scoped_name_needs_no_import(tmp_path, scope):
    lines = run(tmp_path, f"build('mmema.{NAME}', {scope!r})")
    assert lines[-1] == OURS


@pytest.mark.parametrize('scope', SCOPES)
def test_bare_name_after_import(tmp_path, scope):
    lines = run(tmp_path, f'import mmema\nbuild({NAME!r}, {scope!r})')
    assert lines[-1] == OURS


LIBRARIES = """
build('ExpMomentumEMA', 'mmyolo')
build('ExpMomentumEMA', 'mmdet')
build('mmema.ExpMomentumEMA', 'mmyolo')
"""
THEIRS = [
    'mmyolo.models.layers.ema ExpMomentumEMA',
    'mmdet.models.layers.ema ExpMomentumEMA',
    'mmema.averaged ExpMomentumEMA',
]


def test_bare_names_of_the_libraries_stay_theirs(tmp_path):
    assert run(tmp_path, f'import mmema{LIBRARIES}')[-3:] == THEIRS


def test_in_a_new_interpreter_that_imports_the_libraries_after_mmema():
    code = f"{START}build('mmema.{NAME}')\nbuild({NAME!r})\nassert 'mmdet' not in sys.modules"
    code += f"{LIBRARIES}build({NAME!r}, 'mmyolo')"
    command = [sys.executable, '-W', 'ignore', '-c', code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=forks.LIMIT)
    assert done.returncode == 0, done.stderr[-800:]
    built = [line for line in done.stdout.splitlines() if line.endswith('EMA')]
    assert built == [OURS, OURS, *THEIRS, OURS]


STRATEGIES = """
import mmema
from mmengine.registry import STRATEGIES
from mmengine._strategy import DeepSpeedStrategy

assert not [name for name in sys.modules if name.startswith('mmema.sharded')]
assert STRATEGIES.get('DeepSpeedStrategy') is DeepSpeedStrategy
try:
    STRATEGIES.build(dict(type={name!r}, shard=3))
except TypeError as error:
    print(error)
assert STRATEGIES.get('mmema.FullyShardStrategy') is mmema.FullyShardStrategy
assert STRATEGIES.get('mmema.DeepSpeedStrategy') is mmema.DeepSpeedStrategy
assert mmema.DeepSpeedStrategy.__module__ == 'mmema.sharded.zero'
"""


@pytest.mark.parametrize('name', ['mmema.FullyShardStrategy', 'FullyShardStrategy'])
def test_strategies_are_imported_where_a_run_names_one(tmp_path, name):
    lines = run(tmp_path, STRATEGIES.format(name=name))
    assert 'shard must be a list of strings, got 3' in lines[-1]
