"""Averages on another device than the source, and what an update asks of a GPU."""

import pytest
import torch
from marks import BUFFERS, ON_GPU, since_torch_2_1
from reference import ReferenceEMA, assert_close, blended_names, tensors_of
from test_cost import calls_of_an_update, detector_like, yolov5_s
from toys import Toy, seeded, shake_on_cpu

from mmema import ExpMomentumEMA, RestartableExpMomentumEMA

fused_everywhere = since_torch_2_1('copies one by one, and fuses nothing on meta')


def follows_the_reference(model, ema, blended, rtol=2e-6):
    generator, reference = seeded(0), ReferenceEMA(tensors_of(model), blended, 0.1, 3)
    for _ in range(5):
        shake_on_cpu(model, generator)
        ema.update_parameters(model)
        reference.update(tensors_of(model))
        actual = {name: t.cpu() for name, t in tensors_of(ema.module).items()}
        expected = {name: t.cpu() for name, t in reference.average.items()}
        assert_close(actual, expected, rtol=rtol)


# --- without a GPU ------------------------------------------------------------------------------


@BUFFERS
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_a_source_of_another_dtype_goes_through_conversion(dtype, update_buffers):
    # The path of a source on another device, too: it is converted, tensor by tensor.
    model = Toy()
    ema = ExpMomentumEMA(model, 0.1, 3, device='cpu', update_buffers=update_buffers)
    model.to(dtype)
    follows_the_reference(model, ema, blended_names(model, update_buffers), rtol=1e-2)
    assert ema.module.conv.weight.dtype == torch.float32
    assert len(ema._follower._blended.single) > 0


@BUFFERS
def test_named_and_unnamed_cpu_are_one(update_buffers):
    model = Toy()
    ema = ExpMomentumEMA(model, 0.1, 3, device='cpu', update_buffers=update_buffers)
    ema.update_parameters(model)
    assert not ema._follower._blended.single
    assert not ema._follower._copied.single


def test_the_default_device_is_for_new_tensors_alone():
    # Reading a counter from an accelerator would wait; on `meta` it is an error.
    model = Toy()
    torch.set_default_device('meta')
    try:
        ema = ExpMomentumEMA(model, 0.1, 3)
        for _ in range(2):
            ema.update_parameters(model)
    finally:
        torch.set_default_device(None)
    assert ema.steps.device.type == 'cpu'
    assert torch.equal(ema.module.conv.weight, model.conv.weight)


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device must name a torch device, got 'cupid'"):
        ExpMomentumEMA(Toy(), device='cupid')


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without CUDA')
@pytest.mark.parametrize('device', ['cuda', 'cuda:1', torch.device('cuda')])
def test_cuda_is_refused_where_there_is_none(device):
    # torch raises an AssertionError, or one of several lines.
    with pytest.raises(ValueError, match='device must name .* Leave it out') as refused:
        ExpMomentumEMA(Toy(), device=device)
    assert '\n' not in str(refused.value)


@fused_everywhere
@pytest.mark.parametrize('skip_non_finite', [False, True])
@BUFFERS
def test_an_update_reads_no_number_from_a_device(update_buffers, skip_non_finite):
    # Tensors on 'meta' have no numbers: whatever would wait for a device to read one raises there.
    model = detector_like().to('meta')
    ema = RestartableExpMomentumEMA(
        model, update_buffers=update_buffers, skip_non_finite=skip_non_finite
    )
    for _ in range(3):
        ema.update_parameters(model)
    ema.restart(steps=5)
    ema.update_parameters(model)
    assert (int(ema.steps), ema.module[0][0].weight.device.type) == (6, 'meta')


@fused_everywhere
@BUFFERS
@pytest.mark.parametrize('build', [detector_like, yolov5_s])
def test_a_device_is_given_one_operator_for_each_dtype(build, update_buffers):
    # Fused, each launches a kernel for some 60 tensors.
    names = calls_of_an_update(build().to('meta'), update_buffers)
    read, *work, count = [name.split('.')[1] for name in names]
    assert (read, count) == ('_local_scalar_dense', 'add_')  # of the counter, on the CPU
    assert work == ['_foreach_lerp_'] + ['_foreach_copy_'] * (1 if update_buffers else 2)


# --- with one -----------------------------------------------------------------------------------


@ON_GPU
@BUFFERS
@pytest.mark.parametrize('device', [None, 'cpu', 'cuda', 'cuda:0'])
def test_a_source_on_the_gpu_is_averaged_anywhere(source, device, update_buffers):
    # mmyolo's class stores `device` and leaves the sources where they are.
    model = Toy().to(source)
    ema = ExpMomentumEMA(model, 0.1, 3, device=device, update_buffers=update_buffers)
    follows_the_reference(model, ema, blended_names(model, update_buffers))
    assert ema.module.conv.weight.device.type == (device or source)[:4].rstrip(':')
    if device != 'cpu':
        assert not ema._follower._blended.single
        assert not ema._follower._copied.single


@ON_GPU
@BUFFERS
def test_an_update_never_waits_for_the_gpu(source, update_buffers):
    model = detector_like().to(source)
    ema = RestartableExpMomentumEMA(model, update_buffers=update_buffers)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(3):
            ema.update_parameters(model)
        ema.restart(steps=5)
        ema.update_parameters(model)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@ON_GPU
@fused_everywhere
@BUFFERS
def test_an_update_launches_at_most_ten_kernels(source, update_buffers):
    model = yolov5_s().to(source)
    ema = ExpMomentumEMA(model, update_buffers=update_buffers)
    for _ in range(2):
        ema.update_parameters(model)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ema.update_parameters(model)
        torch.cuda.synchronize()
    kernels = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and 'Sync' not in event.name
    ]
    assert 0 < len(kernels) <= 10, kernels


@ON_GPU
@since_torch_2_1('cannot assign a state')
def test_an_assigned_counter_stays_on_the_cpu(source):
    ema = ExpMomentumEMA(Toy())
    state = {key: tensor.to(source) for key, tensor in ema.state_dict().items()}
    ema.load_state_dict(state, assign=True)
    assert ema.steps.device.type == 'cpu'


@ON_GPU
def test_moving_source_and_average_is_seen(source):
    model = Toy()
    ema = ExpMomentumEMA(model, 0.25, 1e-3)
    for where in (source, 'cpu', source):
        model.to(where)
        ema.update_parameters(model)
        ema.to(where)
        ema.update_parameters(model)
    before = ema.module.conv.weight.clone()
    with torch.no_grad():
        model.conv.weight.add_(4)
    ema.update_parameters(model)
    torch.testing.assert_close(ema.module.conv.weight, before + 1)


@ON_GPU
@BUFFERS
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_sixteen_bit_weights_have_a_float32_average_on_the_gpu(source, dtype, update_buffers):
    model = Toy().to(source, dtype)
    ema = ExpMomentumEMA(model, 0.1, 3, update_buffers=update_buffers)
    follows_the_reference(model, ema, blended_names(model, update_buffers), rtol=1e-2)
    assert ema.module.conv.weight.dtype == torch.float32
    assert ema.module.conv.weight.device.type == source


@ON_GPU
@BUFFERS
def test_channels_last_weights_on_the_gpu_are_blended_by_one_operator(source, update_buffers):
    model = detector_like().to(source, memory_format=torch.channels_last)
    ema = ExpMomentumEMA(model, 0.1, 3, update_buffers=update_buffers)
    follows_the_reference(model, ema, blended_names(model, update_buffers))
    assert not ema._follower._blended.single
    assert ema.module[0][0].weight.is_contiguous(memory_format=torch.channels_last)


@ON_GPU
def test_a_compiled_model_on_the_gpu_is_the_model(source):
    pytest.importorskip('triton')
    model = detector_like(blocks=2).to(source)
    compiled, generator = torch.compile(model), seeded(0)
    ours, other = ExpMomentumEMA(model, 0.1, 3), ExpMomentumEMA(compiled, 0.1, 3)
    for _ in range(3):
        compiled(torch.rand(2, 8, 16, 16, device=source)).sum().backward()
        shake_on_cpu(model, generator)
        ours.update_parameters(model)
        other.update_parameters(compiled)
    expected = {name: t.cpu() for name, t in tensors_of(ours.module).items()}
    assert all(torch.equal(t.cpu(), expected[n]) for n, t in tensors_of(other.module).items())
