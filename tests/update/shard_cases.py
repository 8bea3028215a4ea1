"""Checks of averages of sharded models that run on each of several ranks: ``shard_cases.py CASE``.

Each case is a function with assertions; the last line that rank 0 prints names those that failed.
"""

import copy
import sys
import traceback
from unittest.mock import patch

import forks
import pytest
import torch
from reference import ReferenceEMA, blended_names, tensors_of
from torch import nn

from mmema import (
    ExpMomentumEMA,
    RestartableExpMomentumEMA,
    averaged_weights,
)
from mmema.hooks.monitor import relative_distance
from mmema.update.finite import names_of_non_finite
from mmema.update.replicas import names_that_differ
from mmema.update.sharded import Parts, PartsView, followed, own_state
from mmema.update.staging import StagedView


class Net(nn.Module):
    """A layer of 3 rows, one of 7, one of a single row, BatchNorm, tied and frozen parameters."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, 3)
        self.body = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
        self.again = nn.ModuleList([self.first])
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.head = nn.Linear(3, 1)
        self.register_buffer('scratch', torch.rand(2), persistent=False)

    def forward(self, x):
        return self.head(self.body(self.first(x)))


def sharded(model, mesh=None):
    from torch.distributed.fsdp import fully_shard

    world = torch.distributed.get_world_size()
    mesh = mesh or torch.distributed.init_device_mesh('cpu', (world,))
    fully_shard(model.body, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(state):
    return {k: v.full_tensor() if hasattr(v, 'full_tensor') else v for k, v in state.items()}


def step(*models):
    """Train models one step on the same data."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step.count))
    step.count += 1
    for model in models:
        model.train()
        model(x).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.3)
                    parameter.grad = None


step.count = 0


def assert_same(one, other):
    assert list(one) == list(other)
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def trained(cls=ExpMomentumEMA, updates=4, **arguments):
    """Return a sharded model and its average, and the same without sharding."""
    plain, model = Net(), sharded(Net())
    emas = [cls(m, momentum=0.2, gamma=3, **arguments) for m in (model, plain)]
    for _ in range(updates):
        step(model, plain)
        emas[0].update_parameters(model)
        emas[1].update_parameters(plain)
    return model, emas[0], plain, emas[1]


def the_average_has_the_bits_of_one_without_sharding():
    for arguments in ({}, {'update_buffers': True}, {'exclude': ['body.*'], 'interval': 2}):
        model, ema, plain, expected = trained(**arguments)
        assert isinstance(ema._follower.view, PartsView)
        assert_same(expected.state_dict(), whole(ema.state_dict()))
        assert_same(plain.state_dict(), whole(model.state_dict()))


def the_average_is_that_of_the_slow_reference():
    plain, model = Net(), sharded(Net())
    ema = ExpMomentumEMA(model, momentum=0.2, gamma=3, update_buffers=True)
    names = blended_names(plain, True)
    reference = ReferenceEMA(tensors_of(plain), names, 0.2, 3)
    for _ in range(5):
        step(model, plain)
        ema.update_parameters(model)
        reference.update(tensors_of(plain))
    for name, value in whole(ema.module.state_dict()).items():
        expected = reference.average[name].to(value.dtype)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def parts_can_be_staged():
    with patch('mmema.update.follower.is_far', lambda average, source: isinstance(source, Parts)):
        model, ema, plain, expected = trained(skip_non_finite=True, interval=2, updates=5)
    assert isinstance(ema._follower.view, StagedView)
    assert_same(expected.state_dict(), whole(ema.state_dict()))
    follower = ema._follower
    model.body[1].running_mean = torch.full((7,), 3.0)
    assert not follower.holds(ema.module, model)


def an_update_has_no_collective_and_a_rank_keeps_its_part():
    from torch.distributed.tensor.debug import CommDebugMode

    model, ema, *_ = trained()
    with CommDebugMode() as mode:
        ema.update_parameters(model)
        with averaged_weights(model, ema):
            pass
    assert mode.get_total_counts() == 0
    world = torch.distributed.get_world_size()
    own = sum(p.numel() for p in ema.module.parameters())
    every = sum(p.numel() for p in Net().parameters())
    assert own <= sum(-(-p.shape[0] // world) * p[0].numel() for p in Net().parameters()) < every


def a_nan_in_one_part_leaves_the_tensor_out_everywhere():
    model, ema, *_ = trained(skip_non_finite=True, update_buffers=True)
    before = whole(ema.module.state_dict())
    weight = model.body[0].weight
    if torch.distributed.get_rank() == 1:
        with torch.no_grad():
            weight.to_local()[0].fill_(float('nan'))
        model.body[1].running_var[2] = float('inf')
    step.count += 1
    with torch.no_grad():
        model.first.weight.add_(1)
    ema.update_parameters(model)
    after = whole(ema.module.state_dict())
    left_out = {'body.0.weight', 'body.1.running_var'}
    for name, value in after.items():
        if name in left_out:
            assert torch.equal(value, before[name]), name
    assert not torch.equal(after['first.weight'], before['first.weight'])
    assert set(ema.skipped) == left_out
    assert names_of_non_finite(ema.module, ema.module.reduced) == []
    source = followed(model)
    assert set(names_of_non_finite(source, source.reduced)) == left_out


def weights_are_swapped_in_and_out():
    model, ema, plain, expected = trained()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(9))
    own, average = whole(model.state_dict()), whole(ema.state_dict())
    for each in (model, plain):
        each.eval()
    with torch.no_grad():
        raw = model(x)
        with averaged_weights(model, ema), averaged_weights(plain, expected):
            assert torch.equal(model(x), plain(x)) and not torch.equal(model(x), raw)
            with pytest.raises(RuntimeError, match='holds the averaged weights now'):
                ema.update_parameters(model)
        assert torch.equal(model(x), raw)
    assert_same(own, whole(model.state_dict()))
    assert_same(average, whole(ema.state_dict()))
    with pytest.raises(KeyError), averaged_weights(model, ema):
        raise KeyError
    assert_same(own, whole(model.state_dict()))
    step(model, plain)  # a root that stayed gathered would go on from the average
    assert_same(plain.state_dict(), whole(model.state_dict()))


def stale_parts_are_found():
    model, ema, plain, expected = trained()
    changes = [
        lambda m: setattr(m.body[1], 'running_mean', torch.full((7,), 3.0)),
    ]
    for change in changes:
        for each in (model, plain):
            change(each)
        for each, average in ((model, ema), (plain, expected)):
            average.update_parameters(each)
        assert_same(expected.state_dict(), whole(ema.state_dict()))
    follower = ema._follower
    model.load_state_dict(own_state(Net(5).state_dict(), model), assign=True)
    plain.load_state_dict(Net(5).state_dict())
    step(model, plain)
    ema.update_parameters(model)
    expected.update_parameters(plain)
    assert ema._follower is not follower
    assert_same(expected.module.state_dict(), whole(ema.module.state_dict()))


def a_forward_without_a_backward_is_no_obstacle():
    model, ema, plain, expected = trained()
    for each in (model, plain):
        each.train()
        each(torch.ones(3, 4))
    assert not hasattr(model.first.weight, 'device_mesh')  # the root stays gathered
    ema.update_parameters(model)
    expected.update_parameters(plain)
    assert_same(expected.state_dict(), whole(ema.state_dict()))
    ema.copy_to(model)
    expected.copy_to(plain)
    assert_same(plain.state_dict(), whole(model.state_dict()))


def a_state_of_whole_tensors_is_loaded_and_a_wrong_one_is_not():
    model, ema, plain, expected = trained(RestartableExpMomentumEMA)
    expected.restart(steps=2, momentum=0.3)
    ema.load_state_dict(expected.state_dict())
    assert ema.momentum == 0.3 and ema.steps == 2
    assert_same(expected.state_dict(), whole(ema.state_dict()))
    ema.load_state_dict(ema.state_dict())  # of DTensors
    assert_same(expected.state_dict(), whole(ema.state_dict()))
    wrong = expected.state_dict()
    # The shape of the part of a rank: it must not be taken for the part.
    wrong['module.body.0.weight'] = ema.module.body._modules['0'].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r'module.body.0.weight must be \(7, 3\)'):
        ema.load_state_dict(wrong)
    for average in (ema, expected):  # which both records tell
        average.rewind(expected.state_dict())
    with pytest.raises(RuntimeError, match='has only the part of this rank'):
        ema.module(torch.ones(1, 4))
    copied = copy.deepcopy(ema)
    assert isinstance(copied.module, Parts)
    copied.update_parameters(model)
    one, other = expected.state_dict(), whole(ema.state_dict())
    del one['record'], other['record']  # which tells of the rewind
    assert_same(one, other)


def the_distance_is_that_of_whole_tensors():
    model, ema, plain, expected = trained()
    distance = relative_distance(expected.module, plain)
    assert relative_distance(ema.module, model) == pytest.approx(distance, rel=1e-5)


def sixteen_bits_have_a_float32_average():
    model = sharded(Net().bfloat16())
    ema = ExpMomentumEMA(model, momentum=0.001, gamma=1)
    ema.update_parameters(model)
    with torch.no_grad():
        model.first.weight.fill_(2)
    before = whole(ema.module.state_dict())['first.weight'].clone()
    for _ in range(3):
        ema.update_parameters(model)
    average = whole(ema.module.state_dict())['first.weight']
    assert average.dtype == torch.float32 and not torch.equal(average, before)
    expected = ema.module.first.weight.bfloat16()
    with averaged_weights(model, ema):
        assert torch.equal(model.first.weight.to_local(), expected)


def ranks_that_drift_apart_are_named():
    plain = Net()
    assert names_that_differ(plain) == ([], [])
    if torch.distributed.get_rank() == 1:
        with torch.no_grad():
            plain.body[2].bias[1] += 1e-6
            plain.body[1].running_mean[0] = 1
    assert names_that_differ(plain) == (['body.2.bias'], ['body.1.running_mean'])
    model = sharded(Net())
    assert names_that_differ(followed(model)) == ([], [])  # parts differ, there are no replicas
    world = torch.distributed.get_world_size()
    mesh = torch.distributed.init_device_mesh('cpu', (world, 1), mesh_dim_names=('r', 's'))
    model = sharded(Net(), mesh)
    ema = ExpMomentumEMA(model)
    if torch.distributed.get_rank() == 1:
        ema.module.head.weight.detach()[0, 0] += 1
    assert names_that_differ(followed(model)) == ([], [])
    assert names_that_differ(ema.module) == (['head.weight'], [])


CASES = {
    name: value
    for name, value in globals().items()
    if name not in ('sharded', 'whole', 'step', 'assert_same', 'trained', 'followed', 'own_state')
    and getattr(value, '__module__', '') == __name__
    and callable(value)
    and not isinstance(value, type)
}


def main(names):
    torch.set_num_threads(1)
    forks.join_ranks()
    failed = []
    for name in names:
        step.count = 0
        try:
            CASES[name]()
            own = 0
        except BaseException:
            traceback.print_exc()
            own = 1
        errors = torch.tensor(own)
        torch.distributed.all_reduce(errors)
        if errors:
            failed.append(name)
    torch.distributed.destroy_process_group()
    if failed:
        sys.exit('failed: ' + ' '.join(failed))


if __name__ == '__main__':
    main(sys.argv[1:])
