"""Every stock model, in the order of `Runner.train()`, against the float64 reference."""

import gc

import pytest
import torch
from zoo import MMDET, MMYOLO, ONE_OF_EACH, build, deviation, follow, layer_types

from mmema import RestartableExpMomentumEMA

ALL = [('mmyolo', name) for name in MMYOLO] + [('mmdet', name) for name in MMDET]
# These run with the fast tests, too; docs/models.md has the numbers of all.
QUICK = [
    'yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py',
    'yolox/yolox_nano_fast_8xb32-300e-rtmdet-hyp_coco.py',
]


def marks_of(name):
    if name in QUICK:
        return []
    return [pytest.mark.slow] if name in ONE_OF_EACH else [pytest.mark.slow, pytest.mark.extensive]


@pytest.mark.parametrize(
    'library, name',
    [pytest.param(*case, marks=marks_of(case[1]), id='/'.join(case)) for case in ALL],
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
    assert set(ONE_OF_EACH) < {name for _, name in ALL}


@pytest.mark.extensive
def test_make_test_has_one_model_for_each_set_of_layer_types():
    found = {}
    for library, name in ALL:
        found.setdefault(layer_types(build(library, name)), []).append(name)
    chosen = [[name for name in names if name in ONE_OF_EACH] for names in found.values()]
    assert [len(names) for names in chosen] == [1] * len(found)
    assert len(ONE_OF_EACH) == len(found) == 38
