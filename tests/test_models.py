"""Every stock model, in the order of `Runner.train()`, against the float64 reference."""

import gc

import pytest
import torch
from zoo import MMDET, MMYOLO, build, deviation, follow

from mmema import RestartableExpMomentumEMA

# These run with the fast tests, too; docs/models.md has the numbers of all.
QUICK = [
    'yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py',
    'yolox/yolox_nano_fast_8xb32-300e-rtmdet-hyp_coco.py',
]
ALL = [('mmyolo', name) for name in MMYOLO] + [('mmdet', name) for name in MMDET]


@pytest.mark.parametrize(
    'library, name',
    [
        pytest.param(*case, marks=() if case[1] in QUICK else pytest.mark.slow, id='/'.join(case))
        for case in ALL
    ],
)
def test_every_tensor_follows_the_reference(library, name):
    model = build(library, name)
    (average,), reference = follow(model, RestartableExpMomentumEMA)
    assert any(not torch.equal(average[name], tensor) for name, tensor in model.named_parameters())
    assert deviation(average, reference, reference) < 1e-6
    del model, average, reference
    gc.collect()


def test_the_list_has_each_model_once():
    assert len(set(ALL)) == len(ALL) == 91
