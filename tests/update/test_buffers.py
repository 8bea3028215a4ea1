"""Buffers that no blend preserves, and buffers that change: copied in any case."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from mmema import RestartableConstantEMA, averaged_weights
from mmema.update.finite import are_finite, names_of_non_finite

GUARD = pytest.mark.parametrize('guard', [False, True])
BLENDED = pytest.mark.parametrize('update_buffers', [False, True])


def average_of(model, **settings):
    return RestartableConstantEMA(model, momentum=0.1, **settings)


def with_buffer(name, value):
    model = nn.Linear(2, 2)
    model.register_buffer(name, value)
    return model


@GUARD
@BLENDED
def test_a_mask_stays_bit_equal(guard, update_buffers, warnings_seen):
    model = with_buffer('mask', torch.tensor([0.0, -math.inf, math.inf]))
    ema = average_of(model, update_buffers=update_buffers, skip_non_finite=guard)
    for _ in range(3):
        ema.update_parameters(model)
    assert torch.equal(ema.module.mask, model.mask)
    assert ema.skipped == {}
    assert not warnings_seen.text


def test_a_mask_that_is_filled_before_the_first_update():
    # As in init_weights, which comes after the average is made.
    model = with_buffer('mask', torch.zeros(2))
    ema = average_of(model, update_buffers=True)
    model.mask[1] = -math.inf
    for _ in range(3):
        ema.update_parameters(model)
    assert ema.module.mask.tolist() == [0, -math.inf]


def test_an_infinite_statistic_is_no_mask():
    model = nn.BatchNorm1d(1)
    ema = average_of(model, update_buffers=True, skip_non_finite=True)
    nn.init.constant_(model.running_var, math.inf)
    ema.update_parameters(model)
    nn.init.constant_(model.running_var, 2)
    ema.update_parameters(model)  # 1 + 0.1 (2 - 1): blended again
    assert ema.module.running_var.item() == pytest.approx(1.1)
    assert ema.skipped == {'running_var': 1}


def test_a_tensor_that_is_left_out_stays_what_it_is():
    # Blended with itself, even times zero, an infinity is NaN.
    model = nn.Linear(1, 2, bias=False)
    ema = average_of(model, skip_non_finite=True)
    ema.update_parameters(model)
    ema.module.weight[0] = -math.inf
    nn.init.constant_(model.weight, math.inf)
    ema.update_parameters(model)
    assert ema.module.weight[0].item() == -math.inf
    assert ema.skipped == {'weight': 1}


@GUARD
def test_a_constant_stays_bit_equal(guard):
    value = torch.tensor([0.1, 1e30, 1e-40, -7.3])
    model = with_buffer('constant', value.clone())
    ema = average_of(model, update_buffers=True, skip_non_finite=guard)
    for _ in range(50):
        ema.update_parameters(model)
    assert torch.equal(ema.module.constant, value)


def turned(model, angle):
    """Point the unit vectors of a spectral norm in another direction."""
    unit = torch.tensor([math.cos(angle), math.sin(angle)])
    for name, buffer in model.named_buffers():
        if name.endswith(('_u', '_v')):
            buffer.copy_(unit)


@pytest.mark.parametrize('make', [parametrizations.spectral_norm, spectral_norm])
def test_unit_vectors_keep_their_length(make):
    model = make(nn.Linear(2, 2))
    ema = average_of(model, update_buffers=True)
    for angle in (0.0, math.pi / 2):
        turned(model, angle)
        ema.update_parameters(model)
    vectors = [b for name, b in ema.module.named_buffers() if name.endswith(('_u', '_v'))]
    assert len(vectors) == 2  # a blend would be (0.9, 0.1)
    for vector in vectors:
        torch.testing.assert_close(vector, torch.tensor([0.0, 1.0]))


def test_a_mask_of_pruning_stays_of_zeros_and_ones():
    model = nn.Linear(4, 1)
    with torch.no_grad():
        prune.l1_unstructured(model, 'weight', amount=0.25)
    ema = average_of(model, update_buffers=True)
    ema.update_parameters(model)
    model.weight_mask.copy_(1 - model.weight_mask)
    ema.update_parameters(model)
    assert sorted(ema.module.weight_mask.view(-1).tolist()) == [0, 0, 0, 1]


def test_observers_and_fake_quantization_are_copied():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch.ao is going to be torchao
        from torch.ao.quantization import FakeQuantize, MinMaxObserver

        model = nn.Sequential(nn.Linear(1, 1), FakeQuantize(MinMaxObserver))
        ema = average_of(model, update_buffers=True)
        for size in (1.0, 3.0):
            model[1](torch.tensor([0.0, size]))
            ema.update_parameters(model)
    own, observer = ema.module[1], model[1]
    assert own.activation_post_process.max_val.item() == 3  # a blend: 1.2
    assert torch.equal(own.scale, observer.scale)
    assert torch.equal(own.zero_point, observer.zero_point)


def test_more_buffers_are_named_with_exclude():
    model = with_buffer('codebook', torch.zeros(1))
    ema = average_of(model, update_buffers=True, exclude=['codebook'])
    for value in (1.0, 2.0):
        model.codebook.fill_(value)
        ema.update_parameters(model)
    assert ema.module.codebook.item() == 2


@GUARD
@BLENDED
def test_a_buffer_that_changes_its_shape_is_made_anew(guard, update_buffers):
    model = with_buffer('cache', torch.zeros(2))
    model.register_buffer('grid', torch.zeros(2, dtype=torch.float16))
    ema = average_of(model, update_buffers=update_buffers, skip_non_finite=guard)
    weight = model.weight.detach().clone()
    for size in (2, 3, 1):
        model.cache, model.grid = torch.full((size,), float(size)), torch.full((size, 1), 1.0)
        nn.init.constant_(model.weight, size)
        ema.update_parameters(model)
        assert torch.equal(ema.module.cache, model.cache)
        assert ema.module.grid.shape == (size, 1)
    # 2, then 0.9 * 2 + 0.1 * 3 = 2.1, then 0.9 * 2.1 + 0.1 = 1.99
    assert weight.shape == ema.module.weight.shape
    torch.testing.assert_close(ema.module.weight, torch.full((2, 2), 1.99))


def test_a_cache_that_comes_and_goes():
    model = with_buffer('cache', None)
    ema = average_of(model)
    model.cache = torch.ones(3, dtype=torch.bfloat16)
    ema.update_parameters(model)
    assert ema.module.cache.tolist() == [1, 1, 1] and ema.module.cache.dtype == torch.float32
    model.cache = None
    ema.update_parameters(model)
    assert ema.module.cache is None


def test_a_swap_after_a_cache_has_grown():
    model = with_buffer('cache', torch.zeros(2))
    ema = average_of(model)
    ema.update_parameters(model)
    nn.init.constant_(model.weight, 5)
    model.cache = torch.ones(3)
    with averaged_weights(model, ema):
        assert model.cache.tolist() == [1, 1, 1] and not (model.weight == 5).any()
    assert model.cache.tolist() == [1, 1, 1] and bool((model.weight == 5).all())
    ema.update_parameters(model)


def test_a_state_with_a_buffer_of_another_shape():
    model = with_buffer('cache', torch.zeros(2))
    ema = average_of(model)
    model.cache = torch.ones(3)
    ema.update_parameters(model)
    fresh = average_of(with_buffer('cache', torch.zeros(2)))
    fresh.load_state_dict(ema.state_dict())
    assert fresh.module.cache.tolist() == [1, 1, 1] and int(fresh.steps) == 1
    wrong = {**ema.state_dict(), 'module.weight': torch.zeros(3, 3)}
    with pytest.raises(RuntimeError, match='size mismatch for module.weight'):
        fresh.load_state_dict(wrong)


@pytest.mark.skipif(not hasattr(torch, 'float8_e4m3fn'), reason='torch has no eight-bit floats')
@GUARD
@BLENDED
def test_eight_bits(guard, update_buffers):
    values = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    model = with_buffer('table', values.clone())
    model.scale = nn.Parameter(values.clone())
    ema = average_of(model, update_buffers=update_buffers, skip_non_finite=guard)
    assert names_of_non_finite(ema.module) == []
    for factor in (1, 2):
        for tensor in (model.table, model.scale.data):
            tensor.copy_((values.float() * factor).to(values.dtype))
        ema.update_parameters(model)
    assert ema.module.table.dtype == values.dtype
    assert ema.module.table.float().tolist() == [2, 4]  # copied
    torch.testing.assert_close(ema.module.scale, nn.Parameter(torch.tensor([1.1, 2.2])))
    with averaged_weights(model, ema):
        assert model.table.float().tolist() == [2, 4]
    poisoned = torch.tensor([1.0, math.nan]).to(values.dtype)
    assert are_finite([values, poisoned]).tolist() == [True, False]
