"""Names resolve: with the scope and no import, bare once mmema is imported, in every scope."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # each starts an interpreter that imports the libraries

BUILD = """
from mmengine.registry import MODELS, DefaultScope
import torch
{before}
model = torch.nn.Linear(1, 1)
scope = {scope!r}
if scope:
    DefaultScope.get_instance('test', scope_name=scope)
ema = MODELS.build(dict(type={name!r}), default_args=dict(model=model))
print(type(ema).__module__, type(ema).__name__)
"""


def built(name, scope=None, before=''):
    """Build in a fresh interpreter, which has imported nothing before."""
    code = BUILD.format(name=name, scope=scope, before=before)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-800:]
    return done.stdout.decode().splitlines()[-1]


SCOPES = [None, 'mmdet', 'mmyolo']


@pytest.mark.parametrize('scope', SCOPES)
def test_scoped_name_needs_no_import(scope):
    if scope:
        pytest.importorskip(scope)
    name = 'RestartableExpMomentumEMA'
    assert built(f'mmema.{name}', scope) == f'mmema.averaged {name}'


@pytest.mark.parametrize('scope', SCOPES)
def test_bare_name_after_import(scope):
    if scope:
        pytest.importorskip(scope)
    name = 'RestartableExpMomentumEMA'
    assert built(name, scope, 'import mmema') == f'mmema.averaged {name}'


def test_bare_names_of_the_libraries_stay_theirs():
    pytest.importorskip('mmyolo')
    before = 'import mmema'
    assert built('ExpMomentumEMA', 'mmyolo', before) == 'mmyolo.models.layers.ema ExpMomentumEMA'
    assert built('ExpMomentumEMA', 'mmdet', before) == 'mmdet.models.layers.ema ExpMomentumEMA'
    assert built('mmema.ExpMomentumEMA', 'mmyolo') == 'mmema.averaged ExpMomentumEMA'
