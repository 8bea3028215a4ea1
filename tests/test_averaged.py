"""The averaged models against the float64 reference and numbers worked out by hand."""

import io
import math
import pickle
import random
from copy import deepcopy
from inspect import signature

import pytest
import torch
from marks import since_torch_2_1
from mmengine.model import (
    BaseAveragedModel,
    BaseModel,
    BaseTTAModel,
    ExponentialMovingAverage,
    MMDistributedDataParallel,
)
from reference import ReferenceEMA, assert_close, blended_names, tensors_of
from torch import nn
from toys import Toy, seeded, shake

from mmema import ExpMomentumEMA, RestartableExpMomentumEMA, averaged_weights
from mmema.update.pairs import pairs_of

BOTH = pytest.mark.parametrize('cls', [ExpMomentumEMA, RestartableExpMomentumEMA])


def one_weight(value=0.0):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def weight_of(ema):
    return ema.module.weight.item()


# --- the formula -----------------------------------------------------------------------------


@BOTH
def test_first_three_updates_by_hand(cls):
    model = one_weight(0.0)
    ema = cls(model, momentum=0.1, gamma=10)

    ema.update_parameters(model)  # copies 0
    assert (int(ema.steps), weight_of(ema)) == (1, 0.0)

    nn.init.constant_(model.weight, 1.0)
    m1 = 0.9 * math.exp(-0.2) + 0.1  # 0.83685767...
    assert ema.current_momentum == pytest.approx(0.8368576777)
    ema.update_parameters(model)
    assert weight_of(ema) == pytest.approx(m1)

    nn.init.constant_(model.weight, 3.0)
    m2 = 0.9 * math.exp(-0.3) + 0.1  # 0.76673639...
    assert ema.current_momentum == pytest.approx(0.7667363986)
    ema.update_parameters(model)
    assert weight_of(ema) == pytest.approx(m1 + m2 * (3 - m1))  # 2.4954...


@pytest.mark.parametrize('update_buffers', [False, True])
@pytest.mark.parametrize('interval', [1, 3])
@pytest.mark.parametrize('seed', range(4))
def test_random_sequences_with_restarts_follow_the_reference(update_buffers, interval, seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    model, generator = Toy(), seeded(seed)
    ema = RestartableExpMomentumEMA(model, 0.05, 7, interval, update_buffers=update_buffers)
    blended = blended_names(model, update_buffers)
    reference = ReferenceEMA(tensors_of(model), blended, 0.05, 7, interval)
    restarts = 0
    for _ in range(60):
        if chance.random() < 0.1:
            restart = chance.choice(
                [
                    dict(steps=0),
                    dict(steps=chance.randint(1, 30), momentum=chance.uniform(0.01, 0.5)),
                    dict(
                        steps=None, momentum=chance.uniform(0.01, 0.5), gamma=chance.uniform(1, 9)
                    ),
                ]
            )
            ema.restart(**restart)
            reference.restart(**restart)
            restarts += 1
        shake(model, generator)
        ema.update_parameters(model)
        reference.update(tensors_of(model))
        assert_close(tensors_of(ema.module), reference.average)
        assert int(ema.steps) == reference.steps
    assert ema.restarts == restarts > 0


def test_live_hyperparameters_change_the_next_update():
    model = one_weight(0.0)
    ema = RestartableExpMomentumEMA(model, momentum=0.1, gamma=0.01)
    ema.update_parameters(model)
    nn.init.constant_(model.weight, 1.0)
    ema.momentum = 0.25
    ema.update_parameters(model)
    assert weight_of(ema) == 0.25
    ema.gamma = 3.0  # at steps = 2: 0.75 / e + 0.25
    assert ema.current_momentum == pytest.approx(0.75 * math.exp(-1) + 0.25)


def test_current_momentum_is_that_of_the_next_blend():
    model = one_weight()
    ema = ExpMomentumEMA(model, momentum=0.1, gamma=10, interval=3)
    assert ema.current_momentum == 1.0  # the next update copies
    for steps, due in ((1, 3), (2, 3), (3, 3), (4, 6)):
        ema.update_parameters(model)
        assert int(ema.steps) == steps
        assert ema.current_momentum == 0.9 * math.exp(-(1 + due) / 10) + 0.1


def test_avg_func_is_the_plain_form_of_the_update():
    torch.manual_seed(0)
    model, generator = Toy(), seeded(0)
    ema = ExpMomentumEMA(model, 0.05, 7)
    ema.update_parameters(model)
    plain = deepcopy(ema)
    shake(model, generator)
    for average, source in zip(plain.module.parameters(), model.parameters()):
        plain.avg_func(average.data, source.data, plain.steps)
    ema.update_parameters(model)
    for ours, theirs in zip(ema.module.parameters(), plain.module.parameters()):
        assert torch.equal(ours, theirs)


# --- what is averaged --------------------------------------------------------------------------


def test_tied_parameters_are_blended_once():
    # mmengine with update_buffers=True blends them once for each name: 0.19 (open-mmlab/mmengine).
    model = nn.Module()
    model.a = one_weight(0.0)
    model.b = model.a
    ema = ExpMomentumEMA(model, momentum=0.1, gamma=0.01, update_buffers=True)
    ema.update_parameters(model)
    nn.init.constant_(model.a.weight, 1.0)
    ema.update_parameters(model)
    assert ema.module.a.weight is ema.module.b.weight
    assert ema.module.a.weight.item() == pytest.approx(0.1)


@since_torch_2_1('cannot assign a state')
def test_tied_parameters_stay_tied_when_a_state_is_assigned():
    # Assigned, they are two objects that share their memory.
    model = nn.Module()
    model.a, model.b = one_weight(0.0), one_weight(0.0)
    model.b.weight = model.a.weight
    ema = ExpMomentumEMA(model, momentum=0.25, gamma=0.01)
    ema.update_parameters(model)
    ema.load_state_dict(ema.state_dict(), assign=True)
    nn.init.constant_(model.a.weight, 1.0)
    ema.update_parameters(model)
    assert ema.module.a.weight.item() == ema.module.b.weight.item() == 0.25


def test_buffers_of_an_average_that_share_memory_may_follow_two():
    # A deep copy by other libraries keeps them so; mmema's own average does not.
    model = nn.Module()
    model.register_buffer('a', torch.zeros(2))
    model.register_buffer('b', model.a[:])
    average = deepcopy(model)
    assert average.a.data_ptr() == average.b.data_ptr()
    assert [pair.name for pair, _ in pairs_of(average, model)] == ['a', 'b']


def test_parameters_that_share_storage_each_follow_their_own():
    storage = torch.zeros(4)
    model = nn.Module()
    model.a, model.b = nn.Parameter(storage[:2]), nn.Parameter(storage[2:])
    model.c = nn.Parameter(storage[:2])
    ema = ExpMomentumEMA(model, momentum=0.1, gamma=0.01)
    ema.update_parameters(model)
    storage.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    ema.update_parameters(model)
    torch.testing.assert_close(ema.module.a.data, torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(ema.module.b.data, torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(ema.module.c.data, torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize('update_buffers', [False, True])
def test_integer_and_non_persistent_buffers_are_kept_up(update_buffers):
    model, generator = Toy(), seeded(1)
    ema = ExpMomentumEMA(model, momentum=0.5, gamma=0.01, update_buffers=update_buffers)
    ema.update_parameters(model)
    before = model.cache.clone()
    for _ in range(50):
        shake(model, generator)
        ema.update_parameters(model)
    assert ema.module.calls == 50
    assert ema.module.norm.num_batches_tracked == 50
    if update_buffers:
        assert (ema.module.cache > before).all() and (ema.module.cache < model.cache).all()
    else:
        assert torch.equal(ema.module.cache, model.cache)


def test_the_model_argument_is_the_source():
    model, other = one_weight(0.0), one_weight(8.0)
    ema = ExpMomentumEMA(model, momentum=0.25, gamma=0.01)
    ema.update_parameters(model)
    ema.update_parameters(other)
    assert weight_of(ema) == 2.0
    ema.update_parameters(model)
    assert weight_of(ema) == 1.5


def replace_parameter(model):
    model.conv.bias = nn.Parameter(torch.full((3,), 5.0))


def replace_buffer(model):
    model.anchors = torch.full((2, 2), 5.0)


def replace_module(model):
    model.norm = nn.BatchNorm2d(3)


def assign_state(model):
    if 'assign' not in signature(model.load_state_dict).parameters:
        pytest.skip('torch 2.0 cannot assign')
    state = {k: torch.rand(v.shape).to(v.dtype) for k, v in model.state_dict().items()}
    state['tied.weight'] = state['conv.weight']
    model.load_state_dict(state, assign=True)
    model.tied.weight = model.conv.weight


def repoint_data(model):
    model.conv.weight.data = torch.full((3, 2, 1, 1), 5.0)


@pytest.mark.parametrize('update_buffers', [False, True])
@pytest.mark.parametrize(
    'change',
    [
        replace_parameter,
        replace_buffer,
        replace_module,
        assign_state,
        repoint_data,
        lambda model: model.double(),
        lambda model: model.double().float(),
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: model.conv.half(),
    ],
)
def test_sources_are_found_afresh(change, update_buffers):
    # mmyolo's class keeps averaging the tensors that were there when it was made.
    torch.manual_seed(0)
    model, generator = Toy(), seeded(2)
    ema = ExpMomentumEMA(model, 0.1, 3, update_buffers=update_buffers)
    blended = blended_names(model, update_buffers)
    reference = ReferenceEMA(tensors_of(model), blended, 0.1, 3)
    for step in range(6):
        if step == 3:
            change(model)
        shake(model, generator)
        ema.update_parameters(model)
        reference.update(tensors_of(model))
        assert_close(tensors_of(ema.module), reference.average, rtol=1e-5)


def test_a_torchscript_source_is_followed():
    model = one_weight(0.0)
    ema = ExpMomentumEMA(model, momentum=0.25, gamma=0.01)
    scripted = torch.jit.script(model)
    ema.update_parameters(scripted)
    nn.init.constant_(model.weight, 4.0)
    ema.update_parameters(scripted)
    assert weight_of(ema) == 1.0


def test_an_average_that_was_changed_is_found_afresh_too():
    model = one_weight(0.0)
    ema = ExpMomentumEMA(model, momentum=0.25, gamma=0.01)
    ema.update_parameters(model)
    ema.module.weight = nn.Parameter(torch.full((1, 1), 8.0), requires_grad=False)
    ema.update_parameters(model)
    assert weight_of(ema) == 6.0
    ema.load_state_dict({'steps': torch.tensor(9), 'module.weight': torch.full((1, 1), 4.0)})
    ema.update_parameters(model)
    assert weight_of(ema) == 3.0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_sixteen_bit_parameters_have_a_float32_average(dtype):
    # At momentum 2e-4 a 16-bit average never moves: from 1 towards 2 it stays at 1.000.
    model = one_weight(1.0).to(dtype)
    ema = ExpMomentumEMA(model, momentum=2e-4, gamma=0.01)
    ema.update_parameters(model)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(5000):
        ema.update_parameters(model)
    assert ema.module.weight.dtype == torch.float32
    assert weight_of(ema) == pytest.approx(2 - (1 - 2e-4) ** 5000, rel=1e-4)  # 1.632


@pytest.mark.parametrize('update_buffers', [False, True])
def test_sixteen_bit_buffers_have_a_float32_average_too(update_buffers):
    model = nn.BatchNorm1d(2).to(torch.bfloat16)
    ema = ExpMomentumEMA(model, momentum=2e-4, gamma=0.01, update_buffers=update_buffers)
    ema.update_parameters(model)
    model.running_mean.fill_(1)
    for _ in range(2000):
        ema.update_parameters(model)
    expected = 1 - (1 - 2e-4) ** 1999 if update_buffers else 1.0
    assert ema.module.running_mean.dtype == torch.float32
    assert ema.module.running_mean[0].item() == pytest.approx(expected, abs=2e-4)
    assert torch.isfinite(ema.eval()(torch.ones(3, 2))).all()  # it can be run


def test_exclude_finds_its_names_behind_test_time_augmentation():
    class TTA(BaseTTAModel):
        def merge_preds(self, data_samples_list):
            return data_samples_list

    class Model(BaseModel):
        def forward(self, inputs, data_samples=None, mode='tensor'):
            return self.head(inputs)

    model = Model()
    model.head = nn.Linear(2, 2)
    ema = ExpMomentumEMA(TTA(model), exclude=['head.*'])
    assert set(dict(ema.module.named_parameters())) == {'head.weight', 'head.bias'}


@pytest.mark.parametrize('place', ['norm', 'empty'])
def test_a_tensor_added_to_any_module_is_an_error_that_names_it(place):
    model = nn.Module()
    model.norm, model.empty = nn.BatchNorm1d(1), nn.Identity()
    ema = ExpMomentumEMA(model)
    ema.update_parameters(model)
    getattr(model, place).register_parameter('scale', nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=rf"has in addition \['{place}.scale'\]"):
        ema.update_parameters(model)


def test_a_tensor_taken_from_the_end_of_the_average_is_an_error_that_names_it():
    model = nn.Sequential(nn.Linear(1, 1))
    ema = ExpMomentumEMA(model)
    ema.update_parameters(model)
    del ema.module[0].bias
    with pytest.raises(ValueError, match=r"has in addition \['0.bias'\]"):
        ema.update_parameters(model)


def test_a_removed_or_added_layer_is_an_error_that_names_it():
    model = Toy()
    ema = ExpMomentumEMA(model)
    ema.update_parameters(model)
    model.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"has in addition \['extra.bias', 'extra.weight'\]"):
        ema.update_parameters(model)
    del model.extra
    del model.anchors
    with pytest.raises(ValueError, match=r"lacks \['anchors'\]"):
        ema.update_parameters(model)
    model.register_buffer('anchors', torch.zeros(5))  # of another shape: copied
    model.norm.weight = nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match=r"'norm.weight' is \(3,\) in the average and \(5,\)"):
        ema.update_parameters(model)
    assert ema.steps == 1


@since_torch_2_1('cannot assign a state')
def test_tied_parameters_of_a_source_that_assigned_its_own_state_are_one():
    # Assigned, they are two Parameters in one memory; that was refused as 'two in the source now'.
    model = nn.Module()
    model.a, model.b = one_weight(0.0), one_weight(0.0)
    model.b.weight = model.a.weight
    ema = ExpMomentumEMA(model, momentum=0.25, gamma=0.01)
    ema.update_parameters(model)
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.a.weight is not model.b.weight
    for value, expected in ((4.0, 1.0), (5.0, 2.0)):
        nn.init.constant_(model.a.weight, value)
        ema.update_parameters(model)
        assert ema.module.a.weight.item() == ema.module.b.weight.item() == expected
    with averaged_weights(model, ema):
        assert model.a.weight.item() == model.b.weight.item() == 2.0
    model.b.weight.data = torch.full((1, 1), 9.0)  # untied: nothing but its address tells
    with pytest.raises(ValueError, match='were one tied tensor'):
        ema.update_parameters(model)


def test_untied_parameters_are_an_error():
    model = Toy()
    ema = ExpMomentumEMA(model)
    model.tied.weight = nn.Parameter(torch.zeros(3, 2, 1, 1))
    with pytest.raises(ValueError, match=r"'conv.weight' and 'tied.weight' were one tied tensor"):
        ema.update_parameters(model)


def test_a_model_that_cannot_be_copied_names_the_tensor():
    model = Toy()
    model.norm.memory = model.conv.weight * 2  # not a leaf: deepcopy refuses it
    with pytest.raises(ValueError, match="'norm.memory' is not"):
        ExpMomentumEMA(model)
    with pytest.raises(ValueError, match="'weight' is lazy"):
        ExpMomentumEMA(nn.LazyLinear(2))
    model.register_buffer('graph', torch.eye(2).to_sparse())
    del model.norm.memory
    with pytest.raises(ValueError, match="'graph' is torch.sparse_coo. Make it dense"):
        ExpMomentumEMA(model)


def test_wrappers_are_taken_off(process_group):
    model = one_weight(0.0)
    wrapped = MMDistributedDataParallel(model)
    ema = ExpMomentumEMA(wrapped, momentum=0.25, gamma=0.01)
    assert set(ema.state_dict()) == {'steps', 'record', 'module.weight'}
    ema.update_parameters(wrapped)
    nn.init.constant_(model.weight, 4.0)
    ema.update_parameters(wrapped)
    assert weight_of(ema) == 1.0


# --- copies, state -----------------------------------------------------------------------------


def test_inside_another_module_the_whole_state_comes_back():
    ema, other = (RestartableExpMomentumEMA(one_weight(0.0), 0.1, 3) for _ in range(2))
    ema.update_parameters(one_weight(5.0))
    ema.restart(steps=7, momentum=0.05)
    outer = nn.ModuleList([other])
    assert outer.load_state_dict(nn.ModuleList([ema]).state_dict()) == ([], [])
    assert weight_of(other) == 5.0
    assert (int(other.steps), other.momentum, other.gamma, other.restarts) == (7, 0.05, 3, 1)
    with pytest.raises(RuntimeError, match='Unexpected key.*"0.mommentum"'):
        outer.load_state_dict({**outer.state_dict(), '0.mommentum': torch.tensor(1.0)})


@BOTH
@pytest.mark.parametrize('copy', [deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))])
def test_a_copy_is_whole_and_independent(cls, copy):
    # deepcopy of mmyolo's class fails: it keeps a generator.
    model = one_weight(0.0)
    ema = cls(model, momentum=0.25, gamma=0.01)
    ema.update_parameters(model)
    other = copy(ema)
    nn.init.constant_(model.weight, 4.0)
    other.update_parameters(model)
    assert (weight_of(other), int(other.steps)) == (1.0, 2)
    assert (weight_of(ema), int(ema.steps)) == (0.0, 1)


def test_state_round_trip_is_exact_and_readable_with_weights_only():
    model, generator = Toy(), seeded(3)
    ema = RestartableExpMomentumEMA(model, 0.1, 20)
    for _ in range(4):
        shake(model, generator)
        ema.update_parameters(model)
    ema.restart(2, momentum=0.3)
    ema.gamma = 11
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    other = RestartableExpMomentumEMA(Toy(), 0.1, 20)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (other.momentum, other.gamma, other.restarts, int(other.steps)) == (0.3, 11, 1, 2)
    # The tied weight stands under two names, the cache is not persistent.
    other.module.cache.copy_(ema.module.cache)
    for _ in range(3):
        shake(model, generator)
        ema.update_parameters(model)
        other.update_parameters(model)
    for name, tensor in tensors_of(ema.module).items():
        assert torch.equal(tensor, tensors_of(other.module)[name]), name


def test_config_wins_over_a_state_that_no_restart_changed(warnings_seen):
    model = one_weight()
    state = RestartableExpMomentumEMA(model, momentum=0.1, gamma=20).state_dict()
    ema = RestartableExpMomentumEMA(model, momentum=0.2, gamma=20)
    ema.load_state_dict(state)
    assert ema.momentum == 0.2
    assert 'momentum: 0.2 from the config is used, the state has 0.1.' in warnings_seen.text
    assert 'gamma' not in warnings_seen.text


def test_a_way_back_takes_the_average_and_says_nothing(warnings_seen):
    ema = RestartableExpMomentumEMA(one_weight(0.0), 0.1, 3)
    ema.update_parameters(one_weight(2.0))
    then = ema.state_dict()
    then = {key: then[key].clone() for key in ('steps', 'module.weight')}
    ema.restart(momentum=0.3)
    ema.update_parameters(one_weight(5.0))
    ema.rewind(then)
    assert (weight_of(ema), int(ema.steps), ema.momentum, ema.restarts) == (2.0, 1, 0.3, 1)
    assert warnings_seen.text == ''


def test_state_wins_where_a_restart_set_it(warnings_seen):
    model = one_weight()
    before = RestartableExpMomentumEMA(model, momentum=0.1, gamma=20)
    before.restart(None, momentum=0.3)
    ema = RestartableExpMomentumEMA(model, momentum=0.2, gamma=30)
    ema.load_state_dict(before.state_dict())
    assert (ema.momentum, ema.gamma) == (0.3, 30)
    assert 'momentum: 0.3 from the state is used, the config has 0.2.' in warnings_seen.text
    assert 'gamma: 30 from the config is used, the state has 20.' in warnings_seen.text
    again = RestartableExpMomentumEMA(model, momentum=0.2, gamma=30)
    again.load_state_dict(ema.state_dict())  # still the restart's after a second resume
    assert again.momentum == 0.3


@BOTH
@pytest.mark.parametrize('strict', [False, True])
def test_an_incomplete_state_is_never_taken_in_silence(cls, strict):
    # With mmengine's default strict_load=False a state without `steps` loads, and the next update
    # replaces the average by raw weights.
    model = Toy()
    ema = cls(model)
    whole = ema.state_dict()
    for missing in ('steps', 'module.norm.running_mean', 'module.conv.weight'):
        state = {key: value for key, value in whole.items() if key != missing}
        with pytest.raises(RuntimeError, match=missing):
            ema.load_state_dict(state, strict=strict)
    state = {**whole, 'module.conv.bias': torch.zeros(7)}
    with pytest.raises(RuntimeError, match='conv.bias'):
        ema.load_state_dict(state, strict=strict)


def test_states_of_mmengine_load_and_ours_loads_there(warnings_seen):
    model, generator = Toy(), seeded(4)
    theirs = ExponentialMovingAverage(model, momentum=0.1)
    for _ in range(3):
        shake(model, generator)
        theirs.update_parameters(model)
    ours = RestartableExpMomentumEMA(Toy())
    ours.load_state_dict(theirs.state_dict())
    assert int(ours.steps) == 3
    assert torch.equal(ours.module.conv.weight, theirs.module.conv.weight)
    assert 'took over an average after 3 updates' in warnings_seen.text
    back = ExponentialMovingAverage(Toy(), momentum=0.1)
    back.load_state_dict(ours.state_dict(), strict=False)
    assert torch.equal(back.module.conv.weight, theirs.module.conv.weight) and back.steps == 3
    state = ExpMomentumEMA(Toy()).state_dict()
    ExponentialMovingAverage(Toy()).load_state_dict(state, strict=False)


def test_steps_stay_on_the_cpu_and_an_integer_through_conversions():
    ema = ExpMomentumEMA(one_weight())
    ema.update_parameters(one_weight())
    ema.double()
    assert ema.steps.dtype == torch.int64 and ema.steps == 1
    assert ema.module.weight.dtype == torch.float64
    assert isinstance(ema, BaseAveragedModel)


# --- bad input ----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    'arguments, error, message',
    [
        (dict(momentum=0), ValueError, r'momentum must be in \(0, 1\), got 0'),
        (dict(momentum=1.0), ValueError, r'momentum must be in \(0, 1\), got 1.0'),
        (dict(momentum=-3), ValueError, 'momentum'),
        (dict(momentum=math.nan), ValueError, 'momentum'),
        (dict(momentum='0.0002'), TypeError, "momentum must be a number, got '0.0002'"),
        (dict(momentum=True), TypeError, 'momentum'),
        (dict(gamma=0), ValueError, 'gamma must be above 0 and finite, got 0'),
        (dict(gamma=math.inf), ValueError, 'gamma'),
        (dict(gamma=[1]), TypeError, 'gamma'),
        (dict(interval=0), ValueError, 'interval must be at least 1, got 0'),
        (dict(interval=1.5), TypeError, 'interval must be an integer, got 1.5'),
        (dict(interval=True), TypeError, 'interval'),
        (dict(update_buffers=1), TypeError, 'update_buffers must be True or False, got 1'),
        (dict(device='gpu'), ValueError, "device must name a torch device, got 'gpu'"),
        (dict(device=3), TypeError, 'device'),
        (dict(momentun=0.1), TypeError, 'momentun'),
    ],
)
def test_bad_arguments_are_refused_at_once(cls, arguments, error, message):
    with pytest.raises(error, match=message):
        cls(one_weight(), **arguments)


@BOTH
def test_a_model_must_be_a_module(cls):
    with pytest.raises(TypeError, match='model must be a torch.nn.Module, got dict'):
        cls({})


@pytest.mark.parametrize(
    'arguments, error, message',
    [
        (dict(steps=-1), ValueError, 'steps must be at least 0, got -1'),
        (dict(steps=0.5), TypeError, 'steps must be an integer, got 0.5'),
        (dict(steps=None), ValueError, 'must change one of momentum, gamma'),
        (dict(momentum=2), ValueError, 'momentum'),
        (dict(momentum=0.5, gamma=-1), ValueError, 'gamma'),
    ],
)
def test_a_refused_restart_changes_nothing(arguments, error, message):
    ema = RestartableExpMomentumEMA(one_weight(), momentum=0.1, gamma=10)
    ema.update_parameters(one_weight())
    with pytest.raises(error, match=message):
        ema.restart(**arguments)
    assert (int(ema.steps), ema.momentum, ema.gamma, ema.restarts) == (1, 0.1, 10, 0)
    with pytest.raises(ValueError, match='momentum'):
        ema.momentum = 7
    assert ema.momentum == 0.1


def test_a_decay_given_as_momentum_is_questioned(warnings_seen):
    ExpMomentumEMA(one_weight(), momentum=0.9998)
    assert 'Did you mean 1 - 0.9998 = 0.0002?' in warnings_seen.text


# --- what is copied instead of blended ----------------------------------------------------------


def averaged_by(change=lambda step, model: None, blended=None, **settings):
    """Average a toy for six updates, beside the reference; return both."""
    model, generator = Toy(), seeded(5)
    ema = ExpMomentumEMA(model, 0.1, 3, **settings)
    always = blended or (lambda names: names)
    reference = ReferenceEMA(tensors_of(model), [], 0.1, 3)
    for step in range(6):
        change(step, model)
        reference.blended = always(blended_names(model, settings.get('update_buffers', False)))
        shake(model, generator)
        ema.update_parameters(model)
        reference.update(tensors_of(model))
    return tensors_of(ema.module), reference.average


@pytest.mark.parametrize(
    'exclude, copied',
    [
        (['conv.bias'], {'conv.bias'}),
        (['norm.*'], {'norm.weight', 'norm.bias', 'norm.running_mean', 'norm.running_var'}),
        (['*bias', 'anchors'], {'conv.bias', 'norm.bias', 'tied.bias', 'anchors'}),
        (('tied.w*',), {'conv.weight', 'tied.weight'}),  # one tensor under two names
    ],
)
def test_what_is_excluded_is_copied(exclude, copied):
    assert_close(
        *averaged_by(blended=lambda names: names - copied, exclude=exclude, update_buffers=True),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    'exclude, error, message',
    [
        (['conv'], ValueError, r"'conv' matches none, .* write 'conv.\*'"),
        (['conv.*', 'backbone.*'], ValueError, r"'backbone.\*' matches none"),
        ('conv.*', TypeError, 'exclude must be a list of strings'),
        ([3], TypeError, 'exclude must be a list of strings'),
        (None, TypeError, 'exclude must be a list of strings, got None'),
    ],
)
@BOTH
def test_a_filter_that_filters_nothing_is_an_error(cls, exclude, error, message):
    with pytest.raises(error, match=message):
        cls(Toy(), exclude=exclude)


def test_frozen_parameters_are_blended_as_all_others():
    """As MMEngine has it; GANs freeze one half for a part of each iteration."""

    def change(step, model):
        model.conv.requires_grad_(step in (0, 1, 4, 5))

    assert_close(*averaged_by(change), rtol=1e-5)


def test_a_constant_parameter_stays_as_it_is_bit_for_bit():
    model = Toy()
    model.conv.weight.requires_grad_(False)
    constant = model.conv.weight.clone()
    ema = ExpMomentumEMA(model, 0.3, 3)
    for _ in range(50):
        ema.update_parameters(model)
    assert torch.equal(ema.module.conv.weight, constant)


# --- what else happens to models in a run -------------------------------------------------------


def test_a_conversion_of_batch_norm_to_sync_batch_norm():
    def change(step, model):
        if step == 3:
            model.norm = nn.SyncBatchNorm.convert_sync_batchnorm(model.norm)
            assert isinstance(model.norm, nn.SyncBatchNorm)

    assert_close(*averaged_by(change), rtol=1e-5)


@since_torch_2_1('does not compile on Python 3.11')
@pytest.mark.parametrize('whole', [False, True])
def test_a_compiled_model(whole):
    model, generator = Toy(), seeded(6)
    ema, other = ExpMomentumEMA(model, 0.1, 3), ExpMomentumEMA(model, 0.1, 3)
    if whole:
        compiled = torch.compile(model, backend='eager')
    else:
        model.norm = torch.compile(model.norm, backend='eager')
        compiled = model
    for _ in range(3):
        compiled(torch.ones(2, 2, 4, 4)).sum().backward()
        shake(model, generator)
        ema.update_parameters(compiled)
    assert not torch.equal(ema.module.conv.weight, other.module.conv.weight)
    made_of_compiled = ExpMomentumEMA(compiled, 0.1, 3)
    made_of_compiled.update_parameters(compiled)
    made_of_compiled.update_parameters(model)
    assert made_of_compiled.steps == 2
