"""Staging: an average in main memory of a source on a GPU has the same numbers, one update late.

Without a GPU the same code is run with a source in main memory, which is called far.
"""

import pickle
from copy import deepcopy

import pytest
import torch
from marks import BUFFERS, GPU, ON_GPU
from reference import ReferenceEMA, assert_close, blended_names, tensors_of
from torch import nn
from toys import Toy, seeded, shake_on_cpu

from mmema import ExpMomentumEMA, RestartableExpMomentumEMA, averaged_weights
from mmema.update import follower
from mmema.update.staging import StagedView, Transfer, staged_once


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=GPU)])
def far(request, monkeypatch):
    """The device of a source that is far from an average in main memory."""
    if request.param == 'cpu':
        monkeypatch.setattr(follower, 'is_far', lambda _, source: not hasattr(source, 'near'))
    return request.param


def make(far, model=None, **kwargs):
    model = (Toy() if model is None else model).to(far)
    ema = RestartableExpMomentumEMA(model, 0.1, 3, device='cpu', **kwargs)
    return model, ema


def on_cpu(tensors):
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def memory_of(ema):
    """The tensors of an average as they are, without the reading that would catch up."""
    return tensors_of(ema.__dict__['_modules']['module'])


# --- the same numbers ---------------------------------------------------------------------------


@BUFFERS
@pytest.mark.parametrize('interval', [1, 3])
@pytest.mark.parametrize('reads', [False, True])
def test_it_follows_the_reference(far, reads, interval, update_buffers):
    model, ema = make(far, interval=interval, update_buffers=update_buffers)
    blended = blended_names(model, update_buffers)
    reference = ReferenceEMA(on_cpu(tensors_of(model)), blended, 0.1, 3, interval)
    generator = seeded(0)
    for step in range(9):
        shake_on_cpu(model, generator)
        if step == 5:
            ema.restart(steps=2)
            reference.restart(steps=2)
        ema.update_parameters(model)
        reference.update(on_cpu(tensors_of(model)))
        if reads:
            assert_close(tensors_of(ema.module), reference.average, rtol=2e-6)
    assert isinstance(ema._follower.view, StagedView)
    assert_close(tensors_of(ema.module), reference.average, rtol=2e-6)
    assert int(ema.steps) == reference.steps


@BUFFERS
def test_it_is_bit_for_bit_the_average_of_a_near_source(far, update_buffers):
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)]
    model, late = make(far, nn.Sequential(*layers), update_buffers=update_buffers)
    other = deepcopy(model).cpu()
    other.near = True
    near = ExpMomentumEMA(other, 0.1, 3, update_buffers=update_buffers)
    generator = seeded(1)
    for _ in range(4):
        shake_on_cpu(model, generator)
        other.load_state_dict(model.state_dict())
        late.update_parameters(model)
        near.update_parameters(other)
    for name, tensor in tensors_of(late.module).items():
        assert torch.equal(tensor, tensors_of(near.module)[name]), name


def test_what_training_does_after_an_update_is_not_in_it(far):
    model, ema = make(far)
    ema.update_parameters(model)
    then = {name: t.detach().cpu().clone() for name, t in tensors_of(model).items()}
    shake_on_cpu(model, seeded(2))
    for name, tensor in tensors_of(ema.module).items():
        assert torch.equal(tensor, then[name]), name


def test_a_sixteen_bit_source_has_a_float32_average(far):
    model, ema = make(far, nn.Linear(2, 2).bfloat16())
    nn.init.constant_(model.weight, 1)
    ema.update_parameters(model)
    ema.restart(steps=1000, momentum=0.25)
    nn.init.constant_(model.weight, 2)
    ema.update_parameters(model)
    assert torch.equal(ema.module.weight, torch.full((2, 2), 1.25))


def test_what_is_not_finite_is_left_out(far):
    model, ema = make(far, nn.Linear(2, 2), skip_non_finite=True)
    ema.update_parameters(model)
    before = ema.module.weight.clone()
    nn.init.constant_(model.weight, float('nan'))
    ema.update_parameters(model)
    assert ema.skipped == {'weight': 1}
    assert torch.equal(ema.module.weight, before)


# --- late, and unnoticed ---- -------------------------------------------------------------------


def test_an_update_leaves_the_average_for_later(far):
    model, ema = make(far)
    ema.update_parameters(model)
    ema.module  # noqa: B018
    before = deepcopy(memory_of(ema))
    shake_on_cpu(model, seeded(3))
    ema.update_parameters(model)
    for name, tensor in memory_of(ema).items():
        assert torch.equal(tensor, before[name]), name
    assert int(ema.steps) == 2
    ema.update_parameters(model)
    assert not torch.equal(memory_of(ema)['conv.weight'], before['conv.weight'])


@pytest.mark.parametrize(
    'read',
    [
        lambda ema, model: ema.module.conv.weight,
        lambda ema, model: ema.state_dict()['module.conv.weight'],
        lambda ema, model: nn.ModuleList([ema]).state_dict()['0.module.conv.weight'],
        lambda ema, model: dict(ema.named_parameters())['module.conv.weight'],
        lambda ema, model: next(ema.children()).conv.weight,
        lambda ema, model: ema.avg_parameters['conv.weight'],
        lambda ema, model: deepcopy(ema).module.conv.weight,
        lambda ema, model: pickle.loads(pickle.dumps(ema)).module.conv.weight,
        lambda ema, model: ema.double().module.conv.weight.float(),
        lambda ema, model: ema.copy_to(model) or model.conv.weight,
        lambda ema, model: restored(ema, model).conv.weight,
        lambda ema, model: restored(ema, model, inside=nn.ModuleList).conv.weight,
    ],
    ids=[
        'module',
        'state_dict',
        'nested',
        'named_parameters',
        'children',
        'avg_parameters',
        'deepcopy',
        'pickle',
        'double',
        'copy_to',
        'load_state_dict',
        'nested load_state_dict',
    ],
)
def test_whatever_reads_the_average_sees_the_last_update(far, read):
    model, ema = make(far)
    ema.update_parameters(model)
    nn.init.constant_(model.conv.weight, 7)
    ema.restart()
    ema.update_parameters(model)  # copies
    assert torch.equal(read(ema, model).cpu(), torch.full((3, 2, 1, 1), 7.0))


def restored(ema, model, inside=None):
    """Another average with an update on its way that loads a state: the state wins."""
    model = deepcopy(model)
    nn.init.zeros_(model.conv.weight)
    other = RestartableExpMomentumEMA(model, device='cpu')
    other.update_parameters(model)
    outer, state = (other, ema) if inside is None else (inside([other]), inside([ema]))
    outer.load_state_dict(state.state_dict())
    return other.module


def test_a_copy_takes_neither_follower_nor_source_along(far):
    model, ema = make(far)
    ema.update_parameters(model)
    for other in (deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        assert other._follower is None
    assert ema._follower.view.source is model


def test_an_update_that_blends_nothing_fetches_nothing_to_blend(far):
    model, ema = make(far, interval=2)
    ema.update_parameters(model)
    ema.module  # noqa: B018
    nn.init.constant_(model.conv.weight, 7)
    nn.init.constant_(model.anchors, 7)
    ema.update_parameters(model)
    ema._follower.view.wait()
    near = tensors_of(ema._follower.view.module)
    assert torch.equal(near['anchors'], torch.full((2, 2), 7.0))
    assert not torch.equal(near['conv.weight'], torch.full((3, 2, 1, 1), 7.0))


def test_a_model_with_the_averaged_weights_has_the_last_update(far):
    model, ema = make(far)
    ema.update_parameters(model)
    nn.init.constant_(model.conv.weight, 7)
    ema.restart()
    ema.update_parameters(model)
    nn.init.constant_(model.conv.weight, 1)
    with averaged_weights(model, ema):
        assert torch.equal(model.conv.weight.cpu(), torch.full((3, 2, 1, 1), 7.0))
        with pytest.raises(RuntimeError, match='cannot update them'):
            ema.update_parameters(model)
    assert torch.equal(model.conv.weight.cpu(), torch.ones(3, 2, 1, 1))


# --- what may go stale --------------------------------------------------------------------------


def replace_parameter(model, ema):
    model.conv.weight = model.tied.weight = nn.Parameter(model.conv.weight.detach().clone())


def replace_average(model, ema):
    ema.module = deepcopy(ema.module)


def other_layout(model, ema):
    model.conv.weight.data = model.conv.weight.data.as_strided((3, 2, 1, 1), (1, 3, 6, 6))


def repoint(model, ema):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def reassign_buffer(model, ema):
    model.anchors = model.anchors.clone()


def there_and_back(model, ema):
    model.double()
    ema.update_parameters(model)  # a double source meanwhile
    model.float()


def average_there_and_back(model, ema):
    ema.module.double()
    ema.update_parameters(model)
    ema.module.float()


@pytest.mark.parametrize(
    'change',
    [
        replace_parameter,
        replace_average,
        other_layout,
        repoint,
        reassign_buffer,
        there_and_back,
        average_there_and_back,
    ],
)
def test_what_changed_is_found_again(far, change):
    model, ema = make(far)
    ema.update_parameters(model)
    change(model, ema)
    ema.restart()
    nn.init.constant_(model.conv.weight, 3)
    nn.init.constant_(model.anchors, 4)
    ema.update_parameters(model)
    assert torch.equal(ema.module.conv.weight, torch.full((3, 2, 1, 1), 3.0))
    assert torch.equal(ema.module.anchors, torch.full((2, 2), 4.0))
    assert ema.module.tied.weight is ema.module.conv.weight


def test_an_average_converted_while_an_update_is_on_its_way_gets_it(far):
    model, ema = make(far)
    ema.update_parameters(model)
    kept = ema.module  # the one way that finishes nothing
    nn.init.constant_(model.conv.weight, 3)
    ema.restart()
    ema.update_parameters(model)
    kept.double()
    assert torch.equal(ema.module.conv.weight, torch.full((3, 2, 1, 1), 3.0).double())
    assert not ema._follower.holds(kept, model)  # whether the source is still far is asked again


def test_another_layout_gets_another_follower(far):
    model, ema = make(far)
    ema.update_parameters(model)
    before = ema._follower
    other_layout(model, ema)
    ema.update_parameters(model)
    assert ema._follower is not before
    near = tensors_of(ema._follower.view.module)['conv.weight']
    assert near.stride() == model.conv.weight.stride()


def test_an_error_leaves_no_half_of_a_follower(far):
    model, ema = make(far)
    model.norm.weight = nn.Parameter(torch.zeros(5, device=far))
    for _ in range(2):
        with pytest.raises(ValueError, match="'norm.weight' is"):
            ema.update_parameters(model)
    assert int(ema.steps) == 0


def test_an_interrupted_wait_forgets_nothing(far, monkeypatch):
    model, ema = make(far)
    nn.init.constant_(model.conv.weight, 3)
    ema.update_parameters(model)

    def interrupted():
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(ema._follower.view, 'wait', interrupted)
    with pytest.raises(KeyboardInterrupt):
        ema.module  # noqa: B018
    assert torch.equal(ema.module.conv.weight, torch.full((3, 2, 1, 1), 3.0))


def test_a_source_with_other_layers_is_an_error_and_the_average_stays(far):
    model, ema = make(far)
    ema.update_parameters(model)
    nn.init.constant_(model.conv.weight, 3)
    ema.restart()
    ema.update_parameters(model)
    with pytest.raises(ValueError, match='must have the same tensors'):
        ema.update_parameters(nn.Linear(1, 1))
    assert torch.equal(ema.module.conv.weight, torch.full((3, 2, 1, 1), 3.0))
    assert int(ema.steps) == 1


# --- with a GPU ---------------------------------------------------------------------------------


@ON_GPU
def test_an_update_does_not_wait_for_the_gpu(source):
    model, ema = make(source)
    for _ in range(2):
        ema.update_parameters(model)
    ema.module  # noqa: B018
    ema.restart()  # the next update copies
    nn.init.constant_(model.conv.weight, 7)
    torch.cuda._sleep(2_000_000_000)  # about a second
    torch.cuda.set_sync_debug_mode('error')
    try:
        ema.update_parameters(model)
        assert not torch.cuda.current_stream().query()  # still asleep: nobody has waited
    finally:
        torch.cuda.set_sync_debug_mode('default')
    nn.init.zeros_(model.conv.weight)  # in the same stream, so after the copy
    assert torch.equal(ema.module.conv.weight, torch.full((3, 2, 1, 1), 7.0))


@ON_GPU
def test_the_memory_in_between_is_pinned(source):
    model, ema = make(source)
    ema.update_parameters(model)
    assert all(transfer.target.is_pinned() for transfer in ema._follower.view._transfers)


# --- several averages of one source ---------------------------------------------------------------


def several(far):
    """Averages of one source, with the tensors that each blends and the interval."""
    model, first = make(far)
    kinds = [dict(), dict(interval=3), dict(update_buffers=True), dict(interval=2)]
    return model, [
        RestartableExpMomentumEMA(model, 0.2 + n / 10, 3, device='cpu', **kwargs)
        for n, kwargs in enumerate(kinds)
    ]


@pytest.mark.parametrize('reads', [False, True])
def test_staged_once_for_several_averages(far, monkeypatch, reads):
    model, together = several(far)
    alone = [deepcopy(ema) for ema in together]
    sent = []
    send = Transfer.send
    monkeypatch.setattr(Transfer, 'send', lambda self: sent.append(self) or send(self))
    generator = seeded(0)
    for step in range(8):
        shake_on_cpu(model, generator)
        if step == 4:
            model.norm.weight = nn.Parameter(model.norm.weight.detach().clone())  # all are stale
        if step == 6:
            model.anchors = model.anchors + 1
        sent.clear()
        with staged_once():
            for ema in together:
                ema.update_parameters(model)
        views = {id(ema._follower.view) for ema in together}
        assert len(views) == 2  # one for each set of blended tensors
        assert len(sent) == len({id(transfer) for transfer in sent})
        for ema in alone:
            ema.update_parameters(model)
        if reads:
            assert together[1].module.conv.weight.isfinite().all()
    assert len({id(ema._follower.view) for ema in alone}) == len(alone)
    for one, other in zip(together, alone):
        for (name, tensor), expected in zip(one.state_dict().items(), other.state_dict().values()):
            assert torch.equal(tensor, expected), name


def test_a_later_update_of_one_of_several_stages_anew(far):
    model, (one, _, _, two) = several(far)
    with staged_once():
        one.update_parameters(model)
        two.update_parameters(model)
    nn.init.constant_(model.conv.weight, 3)
    one.restart()
    one.update_parameters(model)  # outside, so the source may have changed
    nn.init.constant_(model.conv.weight, 7)
    two.restart()
    two.update_parameters(model)
    assert (one.module.conv.weight == 3).all() and (two.module.conv.weight == 7).all()
