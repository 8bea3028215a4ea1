"""MMEngine's own tests for its averages and its EMAHook, with our classes in the place of theirs.

They are not copied here. Name a checkout of MMEngine 0.10.7 to run them:

    MMENGINE_SOURCE=../mmengine python -m pytest tests/upstream

What each of them asserts is asserted of our classes in tests/test_averaged.py, test_restartable.py,
test_swap.py and hooks/test_ema.py, too. docs/upstream.md says why some are left out.
"""

import importlib.util
import os
from pathlib import Path

import pytest
from mmengine.registry import HOOKS

import mmema

SOURCE = os.environ.get('MMENGINE_SOURCE')
if SOURCE is None:
    pytest.skip('MMENGINE_SOURCE names no checkout of MMEngine', allow_module_level=True)

LEFT_OUT = {
    # An after-hook without a before-hook puts the averaged weights in, as after an exception (10);
    # the average holds the trained weights meanwhile, so it is rounded in 16 bits (14).
    'test_before_val_epoch',
    'test_after_val_epoch',
    'test_before_test_epoch',
    'test_after_test_epoch',
    # Of an average that is not MMEngine's exponential one.
    'test_averaged_model_all_devices',
    'test_swa_mixed_device',
    'test_swa_state_dict',
    # Not of 0.10.7: MMEngine's own class does not pass it.
    'test_load_from_state_dict',
}


def module_at(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem + '_upstream', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_left_out(case):
    """Return a test case of its own; what is left out is not collected."""
    return type(case.__name__, (case,), {name: None for name in LEFT_OUT if hasattr(case, name)})


def asserting(cls, words):
    """Return our class with the kind and the words of MMEngine's errors; ours say more."""

    class Asserting(cls):
        def __init__(self, *args, **kwargs):
            try:
                super().__init__(*args, **kwargs)
            except ValueError as error:
                raise AssertionError(f'{words}: {error}') from error

    return Asserting


averages = module_at(Path(SOURCE) / 'tests/test_model/test_averaged_model.py')
averages.ExponentialMovingAverage = asserting(
    mmema.RestartableConstantEMA, 'momentum must be in range'
)
averages.MomentumAnnealingEMA = asserting(
    mmema.RestartableAnnealingEMA, 'gamma must be greater than 0'
)
hooks = module_at(Path(SOURCE) / 'tests/test_hooks/test_ema_hook.py')
hooks.EMAHook = mmema.EMAHook
hooks.ExponentialMovingAverage = mmema.RestartableExpMomentumEMA

TestAveragedModel = without_left_out(averages.TestAveragedModel)
TestEMAHook = without_left_out(hooks.TestEMAHook)


@pytest.fixture(autouse=True)
def our_hook_under_the_bare_name(monkeypatch):
    monkeypatch.setitem(HOOKS.module_dict, 'EMAHook', mmema.EMAHook)
