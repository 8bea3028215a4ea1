"""Stock averages go wrong: the numbers that the README gives, each from the stock class itself."""

import math
from copy import deepcopy

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from torch import nn
from zoo import build, deviation, follow

from mmema import RestartableExpMomentumEMA

pytest.importorskip('mmyolo')
from mmdet.models.layers import ExpMomentumEMA as MMDetEMA
from mmyolo.models.layers import ExpMomentumEMA as MMYOLOEMA

RTMDET = 'rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py'


def test_the_shared_heads_of_rtmdet_are_blended_once_for_each_level():
    # Three levels share their layers: three names, and a momentum of 0.1 becomes 1 - 0.9 ** 3.
    model = build('mmyolo', RTMDET)
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    averages, reference = follow(model, MMYOLOEMA, MMDetEMA, RestartableExpMomentumEMA)
    mmyolo, mmdet, ours = (deviation(a, reference, parameters) for a in averages)
    assert 0.07 < mmyolo < 0.11 and 0.07 < mmdet < 0.11
    assert ours < 1e-6
    far = [n for n in parameters if deviation(averages[0], reference, [n]) > 1e-3]
    assert far and all(name.startswith('bbox_head.') for name in far)


def test_the_batch_norm_statistics_of_mmyolos_class_stand_still():
    # update_buffers=False is its default: `self.src_buffers = model.buffers()` is used up at once.
    model = nn.BatchNorm1d(1)
    emas = MMYOLOEMA(model), RestartableExpMomentumEMA(model)
    for value in range(1, 51):
        model.running_mean.fill_(value)
        for ema in emas:
            ema.update_parameters(model)
    assert [ema.module.running_mean.item() for ema in emas] == [1.0, 50.0]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_sixteen_bit_average_stands_still(dtype):
    model = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.ones_(model.weight)
    stock = [MMYOLOEMA(model, 2e-4, 1e-2), ExponentialMovingAverage(model, 2e-4)]
    ours = RestartableExpMomentumEMA(model, 2e-4, 1e-2)
    for ema in (*stock, ours):
        ema.update_parameters(model)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(5000):
        for ema in (*stock, ours):
            ema.update_parameters(model)
    assert [ema.module.weight.item() for ema in stock] == [1.0, 1.0]
    assert ours.module.weight.item() == pytest.approx(1.632, abs=5e-4)  # 2 - (1 - 2e-4) ** 5000


class DFineEMA:
    """Average as D-FINE and DEIM have it: the decay of the constructor is captured."""

    def __init__(self, model, decay=0.9999, warmups=1000):
        self.module, self.updates, self.decay = deepcopy(model), 0, decay
        self.decay_fn = lambda updates: decay * (1 - math.exp(-updates / warmups))

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        decay = self.decay_fn(self.updates)
        for average, source in zip(self.module.parameters(), model.parameters()):
            average.mul_(decay).add_(source, alpha=1 - decay)


def test_the_restart_of_dfine_has_no_effect():
    # Peterande/D-FINE issue 331: `ema_restart_decay` is assigned, and nothing reads it.
    model = nn.Linear(1, 1, bias=False)
    restarted, left_alone = DFineEMA(model), DFineEMA(model)
    ours = RestartableExpMomentumEMA(model, 1e-4, 1000)
    for step in range(20_000):
        if step == 15_000:
            restarted.decay = 0.99
            ours.restart(steps=None, momentum=0.01)
        nn.init.constant_(model.weight, step / 1000)
        restarted.update(model)
        left_alone.update(model)
        ours.update_parameters(model)
    assert torch.equal(restarted.module.weight, left_alone.module.weight)
    assert 20 - left_alone.module.weight.item() > 5  # thousands of updates behind
    assert 20 - ours.module.weight.item() == pytest.approx(0.1, abs=0.005)  # 1 / 0.01 updates
