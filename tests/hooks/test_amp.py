"""Mixed precision with MMEngine's AmpOptimWrapper and a real GradScaler, which need a GPU.

The same with stand-ins on a CPU: ``test_ema.py`` and ``test_restart.py``.
"""

import pytest
import torch
from marks import ON_GPU
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from runs import EMA, ema_of, make_runner

SGD = dict(type='SGD', lr=0.05, momentum=0.9)


@OPTIM_WRAPPERS.register_module()
class Overflowing(AmpOptimWrapper):
    """Mixed precision in which the gradients of some iterations are infinite."""

    def __init__(self, overflow=(), **kwargs):
        super().__init__(**kwargs)
        self.overflow = overflow

    def backward(self, loss, **kwargs):
        super().backward(loss * torch.inf if self._inner_count in self.overflow else loss, **kwargs)


def amp(**settings):
    return dict(type='Overflowing', optimizer=SGD, **settings)


@ON_GPU
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_steps_that_the_scaler_skips_are_no_updates(source, tmp_path, dtype):
    wrapper = amp(overflow=(1, 2, 6), dtype=dtype, loss_scale=dict(init_scale=4.0))
    runner = make_runner(
        tmp_path, ema=dict(EMA, type='mmema.EMAHook'), epochs=2, optim_wrapper=wrapper
    )
    runner.train()
    assert next(runner.model.parameters()).device.type == source
    assert int(ema_of(runner).steps) == 5
    assert all(tensor.isfinite().all() for tensor in ema_of(runner).module.parameters())


@ON_GPU
def test_source_best_puts_the_scaler_back(source, tmp_path):
    hook = dict(type='mmema.EMARestartHook', milestones=[4], source='best')
    script = {1: 0.1, 2: 0.5, 3: 0.3, 4: 0.2, 5: 0.1, 6: 0.1}
    wrapper = amp(loss_scale=dict(init_scale=1.0, growth_interval=1))  # doubled by each step
    runner = make_runner(tmp_path, hook, script=script, optim_wrapper=wrapper)
    runner.train()
    assert runner.optim_wrapper.loss_scaler.get_scale() == 2.0 ** (8 + 8)  # best at 8, 8 more
