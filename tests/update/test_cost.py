"""The cost of an update, counted in operators and bytes, never in time."""

import weakref
from copy import deepcopy

import model_shapes
import pytest
import torch
from marks import BUFFERS, since_torch_2_1
from mmengine.hooks import EMAHook
from reference import tensors_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Toy, seeded, shake

from mmema import ExpMomentumEMA, RestartableExpMomentumEMA
from mmema.update.pairs import copy_all


class Calls(TorchDispatchMode):
    """The names of all operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def detector_like(blocks=40, width=8):
    """Convolutions and norms in the proportion of a YOLO: 7 tensors a block."""
    return nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width), nn.SiLU())
            for _ in range(blocks)
        ),
        nn.Conv2d(width, 5, 1),
    )


def yolov5_s():
    return model_shapes.stand_in('YOLOv5-s')


def calls_of_an_update(model, update_buffers):
    ema = RestartableExpMomentumEMA(model, update_buffers=update_buffers)
    for _ in range(2):
        ema.update_parameters(model)
    with Calls() as calls:
        ema.update_parameters(model)
    return calls.names


# --- operators ---------------------------------------------------------------------------------

# Read the counter, blend, copy floats and integers, raise the counter. torch 2.0 has no operator
# that copies lists.
FEW = 5


@since_torch_2_1('copies one by one')
@BUFFERS
@pytest.mark.parametrize('build', [detector_like, yolov5_s])
def test_an_update_is_a_few_operators_however_many_tensors(build, update_buffers):
    names = calls_of_an_update(build(), update_buffers)
    assert names[0] == 'aten._local_scalar_dense.default' and names[-1].startswith('aten.add_')
    assert 3 <= len(names) <= FEW, names


@BUFFERS
def test_nothing_is_searched_for_again_while_nothing_changes(update_buffers):
    model, generator = Toy(), seeded(0)
    ema = ExpMomentumEMA(model, update_buffers=update_buffers)
    ema.update_parameters(model)
    follower = ema._follower
    for _ in range(3):
        shake(model, generator)
        model(torch.rand(2, 2, 4, 4)).sum().backward()
        ema.state_dict()
        ema.update_parameters(model)
    assert ema._follower is follower


# --- the same numbers --------------------------------------------------------------------------


@BUFFERS
@pytest.mark.parametrize('momentum', [0.0002, 0.3, 0.5, 0.9])
def test_an_update_is_bit_for_bit_lerp_tensor_by_tensor(momentum, update_buffers):
    generator = seeded(1)
    # Lengths around the vector registers, whose ends are worked out by other code.
    lengths = [*range(1, 70), *[3000] * 12, 5000]
    model = nn.ModuleList([nn.BatchNorm2d(n) for n in lengths] + [detector_like(3)])
    ema = ExpMomentumEMA(model, momentum, 1e-3, update_buffers=update_buffers)
    ema.update_parameters(model)
    expected = deepcopy(tensors_of(ema.module))
    for _ in range(3):
        shake(model, generator)
        ema.update_parameters(model)
        for name, source in tensors_of(model).items():
            blended = isinstance(source, nn.Parameter) or update_buffers
            if blended and source.is_floating_point():
                expected[name].data.lerp_(source.data, momentum)
            else:
                expected[name].copy_(source)
    for name, tensor in tensors_of(ema.module).items():
        assert torch.equal(tensor, expected[name]), name


@since_torch_2_1('copies one by one')
def test_targets_of_two_dtypes_are_copied_one_by_one():
    # pytorch 173531: on a GPU the fused copy took the dtype of the first for that of all.
    sources = [torch.full((2,), 3.0), torch.full((2,), 4.0)]
    targets = [torch.zeros(2, dtype=torch.float64), torch.zeros(2)]
    with Calls() as calls:
        copy_all(targets, sources)
        copy_all([], [])
    assert calls.names == ['aten.copy_.default'] * 2
    assert [t.tolist() for t in targets] == [[3, 3], [4, 4]]
    with Calls() as calls:
        copy_all(targets[1:], sources[1:])
    assert calls.names == ['aten._foreach_copy_.default']


# --- what may go stale -------------------------------------------------------------------------


def one_norm(source):
    return source[1]


@pytest.mark.parametrize('part', [one_norm, lambda source: source], ids=['a norm', 'everything'])
@pytest.mark.parametrize(
    'change',
    [
        lambda m: m.half().float(),
        lambda m: m.double().float(),
        lambda m: [setattr(p, 'data', p.data.clone()) for p in m.parameters()],
        lambda m: [b.set_(b.clone()) for b in m.buffers()],
        lambda m: m._apply(torch.clone),
    ],
    ids=['half', 'double', 'data', 'set_', '_apply'],
)
@BUFFERS
@pytest.mark.parametrize('side', ['average', 'source'])
def test_vectors_that_moved_are_followed(side, change, part, update_buffers):
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model.half().float()  # so that halves hold the weights exactly
    ema = ExpMomentumEMA(model, 0.25, 1e-3, update_buffers=update_buffers)
    ema.update_parameters(model)
    ema.update_parameters(model)
    change(part(model if side == 'source' else ema.module))
    before = deepcopy(tensors_of(ema.module))
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(4)
    ema.update_parameters(model)
    for name, tensor in tensors_of(ema.module).items():
        blended = 'running' not in name or update_buffers
        step = 1 if blended and tensor.is_floating_point() else 4
        torch.testing.assert_close(tensor, before[name] + step, msg=lambda m, n=name: f'{n}: {m}')


def test_a_vector_that_shrinks_is_an_error_that_names_it():
    model = nn.Sequential(nn.BatchNorm2d(4))
    ema = ExpMomentumEMA(model)
    ema.update_parameters(model)
    model[0].weight.data = torch.ones(1)  # would be spread over all four
    with pytest.raises(ValueError, match=r"'0.weight' is \(4,\) in the average and \(1,\)"):
        ema.update_parameters(model)


@pytest.mark.parametrize('side', ['average', 'source'])
@pytest.mark.parametrize(
    'change',
    [
        lambda data: data[:1],
        lambda data: data.t(),
        lambda data: data.double(),
        lambda data: data.to_sparse().to_dense(),
    ],
    ids=['shorter', 'transposed', 'double', 'other memory'],
)
def test_a_tensor_that_is_seen_otherwise_is_followed_or_refused(change, side):
    model = nn.ParameterList([nn.Parameter(torch.arange(16.0).view(4, 4))])
    ema = ExpMomentumEMA(model, momentum=0.25, gamma=1e-3)
    ema.update_parameters(model)
    changed = ema.module if side == 'average' else model
    changed[0].data = change(changed[0].data)
    if changed[0].shape != (4, 4):
        with pytest.raises(ValueError, match='must keep its shape'):
            ema.update_parameters(model)
        return
    expected = ema.module[0].lerp(model[0].to(ema.module[0]), 0.25)
    ema.update_parameters(model)
    assert torch.equal(ema.module[0], expected)


def test_a_tensor_of_another_shape_is_an_error_on_either_side():
    model = nn.ParameterList([nn.Parameter(torch.ones(4, 4))])
    ema = ExpMomentumEMA(model)
    ema.update_parameters(model)
    model[0].data = model[0].data.view(2, 8)  # as many numbers
    with pytest.raises(RuntimeError):
        ema.update_parameters(model)


def test_a_swapped_tensor_is_followed():
    # torch.utils.swap_tensors leaves every Python object in its place.
    if not hasattr(torch.utils, 'swap_tensors'):
        pytest.skip('torch 2.2 and earlier cannot swap')
    model = Toy()
    ema = ExpMomentumEMA(model, 0.25, 1e-3)
    for _ in range(2):
        ema.update_parameters(model)
    other = nn.Parameter(torch.full((3,), 9.0, dtype=torch.float64))
    torch.utils.swap_tensors(model.norm.bias, other)
    ema.update_parameters(model)
    assert torch.equal(ema.module.norm.bias, torch.full((3,), 2.25))


def test_a_replaced_layer_stays_until_the_next_update():
    model = nn.ModuleDict({'head': nn.Sequential(nn.Linear(4, 4))})
    ema = ExpMomentumEMA(model, momentum=0.5)
    ema.update_parameters(model)
    layer = weakref.ref(model['head'][0])
    model['head'] = None
    assert layer() is not None  # else the next layer could have its address, and pass for it
    model['head'] = nn.Sequential(nn.Linear(4, 4))
    ema.update_parameters(model)
    assert layer() is None


class Odd(nn.Parameter):
    """Not a plain parameter: it may keep its numbers anywhere."""


@pytest.mark.parametrize(
    'source',
    [
        nn.Parameter(torch.ones(2, 3).t()),
        nn.Parameter(torch.ones(3, 2, dtype=torch.complex64)),
        nn.Parameter(torch._neg_view(torch.full((3, 2), -1.0))),
        nn.Parameter(torch._efficientzerotensor((3, 2)) + 1),
        Odd(torch.ones(3, 2)),
    ],
    ids=['transposed', 'complex', 'negative', 'zero', 'a subclass'],
)
def test_a_tensor_of_an_odd_kind_is_blended_like_any_other(source):
    model = nn.ParameterList([source])
    ema = ExpMomentumEMA(model, momentum=0.25, gamma=1e-3)
    ema.update_parameters(model)
    ema.module[0].zero_()
    ema.update_parameters(model)
    assert torch.equal(ema.module[0], torch.full((3, 2), 0.25, dtype=source.dtype))


# --- bytes -------------------------------------------------------------------------------------


def peak_bytes(work):
    """The most that ``work`` had allocated at one time beyond what there was."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = work()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
    del result
    return peak


def size_of(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@BUFFERS
def test_there_is_one_extra_copy_of_the_weights_and_no_more(update_buffers):
    model = detector_like(10, width=64)
    weights = size_of(*tensors_of(model).values())
    largest = max(map(size_of, model.parameters()))
    vectors = size_of(*(t for t in tensors_of(model).values() if t.dim() < 2))
    assert vectors < weights / 50
    small = 2 * vectors + 4096

    made = []
    peak = peak_bytes(lambda: made.append(ExpMomentumEMA(model, update_buffers=update_buffers)))
    assert weights <= peak <= weights + small
    ema = made[0]
    assert peak_bytes(lambda: ema.update_parameters(model)) <= small  # copies
    assert peak_bytes(lambda: ema.update_parameters(model)) <= small  # blends
    assert peak_bytes(lambda: ema.state_dict()) <= small

    hook = EMAHook()
    hook.src_model, hook.ema_model = model, ema
    assert peak_bytes(hook._swap_ema_parameters) <= largest + small


def test_sixteen_bit_sources_are_converted_tensor_by_tensor():
    model = detector_like(10, width=64).bfloat16()
    ema = ExpMomentumEMA(model)
    ema.update_parameters(model)
    ema.update_parameters(model)
    largest = max(map(size_of, ema.module.parameters()))
    assert peak_bytes(lambda: ema.update_parameters(model)) <= largest + 4096
