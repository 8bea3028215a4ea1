"""A NaN in the source: named, counted, and kept out of the average."""

import math
import re

import pytest
import torch
from marks import BUFFERS, since_torch_2_1
from reference import ReferenceEMA, assert_close, blended_names, tensors_of
from test_cost import Calls, detector_like
from torch import nn
from toys import Toy, seeded, shake

from mmema import RestartableExpMomentumEMA
from mmema.update import guard
from mmema.update.finite import are_finite, names_of_non_finite

BAD = pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])


@BAD
@pytest.mark.parametrize(
    'dtype',
    [
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        pytest.param(torch.complex64, marks=since_torch_2_1('overflows in the magnitude')),
    ],
)
def test_finite_tensors_of_every_dtype(dtype, bad):
    most = torch.finfo(dtype).max  # a norm of squares would overflow
    good = torch.full((300, 300), most, dtype=dtype)
    poisoned = good.clone()
    poisoned[7, 7] = bad
    assert are_finite([good, poisoned, good[:1]]).tolist() == [True, False, True]


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


@pytest.mark.parametrize('in_main_memory', [True, False])
def test_a_tensor_that_is_not_due_is_not_left_out(in_main_memory):
    model = Toy()
    ema = RestartableExpMomentumEMA(model, interval=3, skip_non_finite=True)
    ema.update_parameters(model)
    ema._follower._guard._in_main_memory = in_main_memory
    for tensor in (model.norm.weight, model.norm.running_var):  # blended, and copied
        nn.init.constant_(tensor, math.nan)
    for _ in range(3):  # the third is due
        ema.update_parameters(model)
    assert ema.skipped == {'norm.weight': 1, 'norm.running_var': 3}


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


@BUFFERS
@pytest.mark.parametrize('when', [0, 3])
def test_the_choice_on_a_device_gives_the_same_average(when, update_buffers, monkeypatch):
    # On an accelerator every tensor is chosen there, and no number is read.
    monkeypatch.setattr(guard, '_MOST', 8)  # so that there are several groups
    model, generator = Toy(), seeded(1)
    settings = dict(update_buffers=update_buffers, skip_non_finite=True)
    ema, on_device = (RestartableExpMomentumEMA(model, 0.1, 3, **settings) for _ in range(2))
    on_device.update_parameters(model)
    assert len(on_device._follower._guard._groups) > 2
    on_device._follower._guard._in_main_memory = False
    on_device.restart()
    for step in range(5):
        shake(model, generator)
        if step == when:
            nn.init.constant_(model.norm.bias, math.nan)
        for average in (ema, on_device):
            average.update_parameters(model)
        nn.init.zeros_(model.norm.bias)
    assert on_device.skipped == ema.skipped == {'norm.bias': 1}
    for name, tensor in tensors_of(ema.module).items():
        torch.testing.assert_close(tensor, tensors_of(on_device.module)[name])


@since_torch_2_1('has no fused norm for the device of this test, meta')
@BUFFERS
def test_the_choice_on_a_device_takes_few_operators(update_buffers):
    # It was made tensor by tensor in Python: some ten operators for each.
    def operators(blocks):
        model = detector_like(blocks).to('meta')
        ema = RestartableExpMomentumEMA(model, update_buffers=update_buffers, skip_non_finite=True)
        for _ in range(2):
            ema.update_parameters(model)
        with Calls() as calls:
            ema.update_parameters(model)
        return [name for name in calls.names if not VIEWS.match(name)]

    assert len(operators(80)) == len(operators(5)) <= 35


# Views are bookkeeping of the program; they launch nothing.
VIEWS = re.compile(r'aten\.(view|narrow|_unsafe_view|slice|detach|alias|empty)')


def test_without_the_guard_a_nan_goes_in():
    model = Toy()
    ema = RestartableExpMomentumEMA(model)
    ema.update_parameters(model)
    nn.init.constant_(model.norm.weight, math.nan)
    ema.update_parameters(model)
    assert ema.module.norm.weight.isnan().all()
