"""The averaged weights in the place of the trained ones: right inside, exact afterwards."""

import pytest
import torch
from marks import since_torch_2_1
from mmengine.model import ExponentialMovingAverage, MMDistributedDataParallel
from reference import tensors_of
from torch import nn
from toys import Toy, seeded, shake

from mmema import ExpMomentumEMA, RestartableExpMomentumEMA, averaged_weights


def trained(cls=ExpMomentumEMA, model=None, **settings):
    """Return a model after three updates, and an average that has moved away from it."""
    model, generator = model or Toy(), seeded(0)
    ema = cls(model, momentum=0.1, **settings)
    for _ in range(3):
        shake(model, generator)
        ema.update_parameters(model)
    shake(model, generator)
    return model, ema


def values(model):
    return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


def assert_equal(first, second):
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@pytest.mark.parametrize('update_buffers', [False, True])
@pytest.mark.parametrize('cls', [RestartableExpMomentumEMA, ExponentialMovingAverage])
def test_the_model_has_all_of_the_average_inside_and_its_own_afterwards(cls, update_buffers):
    model, ema = trained(cls, update_buffers=update_buffers)
    own, average = values(model), values(ema.module)
    memory = {name: tensor.data_ptr() for name, tensor in tensors_of(model).items()}
    with averaged_weights(model, ema) as inside:
        assert inside is model
        assert_equal(values(model), average)  # tied, integer and non-persistent ones, too
        assert model.tied.weight is model.conv.weight
        assert_equal(values(ema.module), average)
        assert torch.equal(ema.state_dict()['module.conv.weight'], average['conv.weight'])
    assert_equal(values(model), own)
    assert_equal(values(ema.module), average)
    assert memory == {name: tensor.data_ptr() for name, tensor in tensors_of(model).items()}


def test_parameters_share_the_memory_of_the_average_and_buffers_do_not():
    model, ema = trained()
    with averaged_weights(model, ema):
        for name, tensor in tensors_of(model).items():
            shared = tensor.data_ptr() == tensors_of(ema.module)[name].data_ptr()
            assert shared == isinstance(tensor, nn.Parameter), name


@pytest.mark.parametrize('update_buffers', [False, True])
def test_batch_norm_in_training_mode_does_not_write_into_the_average(update_buffers):
    model, ema = trained(update_buffers=update_buffers)
    own, average = values(model), values(ema.module)
    with averaged_weights(model.train(), ema):
        before = values(model)
        model(torch.rand(2, 2, 4, 4))
        assert not torch.equal(model.norm.running_mean, before['norm.running_mean'])
    assert_equal(values(ema.module), average)
    assert_equal(values(model), own)


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.rand(2, 2, 4, 4)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    'write',
    [
        step,
        lambda model: model.load_state_dict(Toy().state_dict()),
        lambda model: [nn.init.zeros_(p) for p in model.parameters()],
    ],
    ids=['step', 'load_state_dict', 'init'],
)
def test_a_write_into_the_averaged_weights_is_refused_and_the_trained_ones_are_restored(write):
    model, ema = trained()
    own = values(model)
    refusal = r"must not be written .* but 'conv.weight', 'conv.bias', .* more were.*copy.deepcopy"
    with pytest.raises(RuntimeError, match=refusal), averaged_weights(model, ema):
        write(model)
    assert_equal(values(model), own)
    with averaged_weights(model, ema):  # nothing is left of it
        pass


def test_a_backward_pass_inside_is_no_write():
    model, ema = trained()
    average = values(ema.module)
    with averaged_weights(model, ema):
        model(torch.rand(2, 2, 4, 4)).sum().backward()
    assert_equal(values(ema.module), average)


def test_an_exception_puts_the_trained_weights_back():
    model, ema = trained()
    own = values(model)
    with pytest.raises(KeyboardInterrupt), averaged_weights(model, ema):
        raise KeyboardInterrupt
    assert_equal(values(model), own)
    ema.update_parameters(model)


def test_twice_at_once_and_updates_meanwhile_are_refused():
    model, ema = trained()
    own = values(model)
    with averaged_weights(model, ema):
        again = averaged_weights(model, ema)
        with pytest.raises(RuntimeError, match='given them a second time'), again:
            pass
        with pytest.raises(RuntimeError, match='holds the averaged weights now'):
            ema.update_parameters(model)
    assert int(ema.steps) == 3
    assert_equal(values(model), own)
    with averaged_weights(model, ema):  # one after the other is fine
        pass


def test_another_model_is_refused_and_left_alone():
    model, ema = trained()
    other = nn.Linear(1, 1)
    with pytest.raises(ValueError, match='same tensors'), averaged_weights(other, ema):
        pass
    with averaged_weights(model, ema):  # nothing is left of the failed one
        pass


def test_a_model_that_was_sharded_after_it_was_averaged_is_refused_and_left_alone():
    model, ema = trained(ExponentialMovingAverage)
    own = values(model)
    model.conv.weight.ds_id = 0
    with pytest.raises(ValueError, match='this one is, by DeepSpeed'), averaged_weights(model, ema):
        pass
    assert_equal(values(model), own)
    del model.conv.weight.ds_id
    with averaged_weights(model, ema):  # nothing is left of the failed one
        pass


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_sixteen_bits_see_a_rounded_copy_of_a_float32_average(dtype):
    model, ema = trained(model=Toy().to(dtype))
    own, average = values(model), values(ema.module)
    assert average['conv.weight'].dtype == torch.float32
    with averaged_weights(model, ema):
        assert torch.equal(model.conv.weight, average['conv.weight'].to(dtype))
    assert_equal(values(model), own)
    assert_equal(values(ema.module), average)


def test_the_memory_layout_of_the_model_is_kept():
    model = nn.Conv2d(2, 3, 3)
    ema = ExpMomentumEMA(model)
    model.to(memory_format=torch.channels_last)
    nn.init.zeros_(model.weight)
    with averaged_weights(model, ema):
        assert model.weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(model.weight, ema.module.weight)
    assert not model.weight.any()


def test_a_conversion_inside_is_undone_in_buffers_too():
    # YOLOX and YOLOv5 evaluate in half precision: .half() puts other buffers into the model.
    model, ema = trained(update_buffers=True)
    own = values(model)
    with averaged_weights(model, ema):
        model.half()
    assert_equal(values(model), own)


def test_a_buffer_that_grew_inside_stays():
    model, ema = trained()
    with averaged_weights(model, ema):
        model.cache = torch.ones(9)
    assert model.cache.shape == (9,)


def test_parameters_replaced_inside_keep_what_they_were_made_from():
    model, ema = trained()
    with averaged_weights(model, ema):
        fused = model.conv.weight.detach() * 2
        model.fused = nn.Conv2d(2, 3, 1)
        model.fused.weight.data = fused
        del model.conv, model.tied
    assert torch.equal(model.fused.weight, 2 * ema.module.conv.weight)
    assert torch.equal(model.norm.weight, ema.module.norm.weight)


def test_a_layer_replaced_inside_does_not_leave_the_model_in_the_averages_memory():
    model, ema = trained()
    with averaged_weights(model, ema):
        model.more = nn.Linear(1, 1)
    assert model.conv.weight.data_ptr() != ema.module.conv.weight.data_ptr()
    assert torch.equal(model.conv.weight, ema.module.conv.weight)


def test_a_parameter_assigned_anew_inside_is_the_trained_one_afterwards():
    model, ema = trained()
    own, weight = values(model), model.conv.bias
    with averaged_weights(model, ema):
        model.conv.bias = nn.Parameter(torch.full((3,), 9.0))
    assert model.conv.bias is weight  # the one that the optimizer holds
    assert_equal(values(model), own)


def test_a_wrapped_model(process_group):
    model, ema = trained()
    own = values(model)
    with averaged_weights(MMDistributedDataParallel(model), ema) as inside:
        assert torch.equal(inside.module.conv.weight, ema.module.conv.weight)
    assert_equal(values(model), own)


@since_torch_2_1('does not compile on Python 3.11')
def test_a_compiled_model():
    model, ema = trained()
    compiled = torch.compile(model, backend='eager')
    own = values(model)
    with averaged_weights(compiled, ema):
        assert torch.equal(model.conv.weight, ema.module.conv.weight)
        inside = compiled(torch.ones(2, 2, 4, 4))
        assert not torch.isnan(inside).any()
    assert_equal(values(model), own)
