"""One NaN in the source: named, counted, and kept out of the average."""

import math

import pytest
import torch
from reference import ReferenceEMA, assert_close, blended_names, tensors_of
from torch import nn
from toys import Toy, seeded, shake

from mmema import RestartableExpMomentumEMA
from mmema.update.finite import flags, names_of_non_finite

BAD = pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])


@BAD
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_flags_of_every_dtype(dtype, bad):
    good = torch.full((300, 300), 1000.0, dtype=dtype)  # its float16 norm would overflow
    poisoned = good.clone()
    poisoned[7, 7] = bad
    empty = torch.empty(0, dtype=dtype)
    assert [bool(flag) for flag in flags([good, poisoned, empty])] == [True, False, True]


def test_names():
    model = Toy()
    assert names_of_non_finite(model) == []
    nn.init.constant_(model.norm.running_var, math.nan)
    nn.init.constant_(model.conv.weight, math.inf)
    assert names_of_non_finite(model) == ['conv.weight', 'tied.weight', 'norm.running_var']


@BAD
@pytest.mark.parametrize('update_buffers', [False, True])
@pytest.mark.parametrize('when', [0, 2])
def test_the_guard_skips_a_poisoned_tensor_for_that_update(
    update_buffers, when, bad, warnings_seen
):
    # ultralytics 24615: one NaN in the model, and the average is NaN for ever.
    model, generator = Toy(), seeded(0)
    ema = RestartableExpMomentumEMA(
        model, 0.1, 3, update_buffers=update_buffers, skip_non_finite=True
    )
    reference = ReferenceEMA(tensors_of(model), blended_names(model, update_buffers), 0.1, 3)
    poisoned = ('norm.weight', 'norm.running_var')
    for step in range(6):
        shake(model, generator)
        seen = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}
        if step in (when, when + 2):
            with torch.no_grad():
                model.norm.weight[1] = model.norm.running_var[0] = bad
        before = {name: reference.average[name] for name in poisoned}
        ema.update_parameters(model)
        reference.update(seen)
        if step in (when, when + 2):
            reference.average.update(before)  # skipped, the others are not
        with torch.no_grad():
            for name in poisoned:
                tensors_of(model)[name].copy_(seen[name])
        assert_close(tensors_of(ema.module), reference.average, rtol=1e-5)
    assert ema.skipped == {'norm.weight': 2, 'norm.running_var': 2}
    assert warnings_seen.text.count("'norm.weight', 'norm.running_var'") == 1
    assert int(ema.steps) == 6


def test_counts_outlive_a_changed_model():
    model = Toy()
    ema = RestartableExpMomentumEMA(model, skip_non_finite=True)
    for _ in range(2):
        model.conv.bias = nn.Parameter(torch.full((3,), math.nan))
        ema.update_parameters(model)
    assert ema.skipped == {'conv.bias': 2}


def test_the_guard_changes_no_bit_where_all_is_finite():
    model, generator = Toy(), seeded(1)
    emas = [RestartableExpMomentumEMA(model, 0.1, 3, skip_non_finite=on) for on in (False, True)]
    for _ in range(5):
        shake(model, generator)
        for ema in emas:
            ema.update_parameters(model)
    for name, tensor in tensors_of(emas[0].module).items():
        assert torch.equal(tensor, tensors_of(emas[1].module)[name]), name
    assert emas[1].skipped == {}


def test_without_waiting_the_average_is_the_same():
    # What is done on an accelerator: every tensor is chosen there, no flag is read.
    model, generator = Toy(), seeded(1)
    ema, twin = (RestartableExpMomentumEMA(model, 0.1, 3, skip_non_finite=True) for _ in range(2))
    for step in range(5):
        shake(model, generator)
        if step == 3:
            nn.init.constant_(model.norm.bias, math.nan)
        for average, on_cpu in ((ema, True), (twin, False)):
            average._mirror_of(model)
            average._guard_of(average._pairing).on_cpu = on_cpu
            average.update_parameters(model)
        nn.init.zeros_(model.norm.bias)
    assert twin.skipped == ema.skipped == {'norm.bias': 1}
    for name, tensor in tensors_of(ema.module).items():
        torch.testing.assert_close(tensor, tensors_of(twin.module)[name])


def test_without_the_guard_a_nan_goes_in():
    model = Toy()
    ema = RestartableExpMomentumEMA(model)
    ema.update_parameters(model)
    nn.init.constant_(model.norm.weight, math.nan)
    ema.update_parameters(model)
    assert ema.module.norm.weight.isnan().all()
