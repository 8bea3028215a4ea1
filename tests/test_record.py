"""The record of an average: what it holds, its size, and how a resume and a rewind treat it."""

import json
import math

import numpy as np
import pytest
import torch
from reference import exp_momentum
from torch import nn

from mmema import ExpMomentumEMA, RestartableExpMomentumEMA
from mmema.record import MOST, Record, blends_by_rule

PLAIN = dict(momentum=0.1, gamma=5)


def make(**arguments):
    torch.manual_seed(0)
    return RestartableExpMomentumEMA(nn.Linear(1, 1), **{**PLAIN, **arguments})


def update(ema, count, first=None, distance=1):
    """Update so often, at the ends of iterations from ``first`` on."""
    for number in range(count):
        if first is not None:
            ema.record.iteration = first + number * distance
        ema.update_parameters(nn.Linear(1, 1))


def momenta_of(counters, momentum=0.1, gamma=5):
    return [exp_momentum(steps, momentum, gamma) if steps else 1.0 for steps in counters]


def test_updates_by_hand():
    ema = make(interval=2)
    update(ema, 5, first=3, distance=4)
    record = ema.record
    zeros = [0 if n % 2 else m for n, m in enumerate(momenta_of(range(5)))]
    assert record.momenta().tolist() == zeros
    assert record.iterations == [[3, 4, 5]]
    assert record.iterations_of_updates().tolist() == [3, 7, 11, 15, 19]
    assert record.kept == pytest.approx(sum(math.log(1 - m) for m in zeros[1:]))
    assert len(record.segments) == 1 and record.copies == [[0, 1]] and record.last_copy == 0


def test_nothing_needs_to_tell_it_of_a_restart_or_an_assignment():
    ema = make()
    update(ema, 4, first=0)
    ema.momentum = 0.3
    update(ema, 2, first=4)
    ema.restart(steps=2, gamma=8)
    update(ema, 3, first=6)
    ema.restart()
    update(ema, 2, first=9)
    ema.steps.fill_(7)
    update(ema, 1, first=11)
    expected = [
        *momenta_of([0, 1, 2, 3]),
        *momenta_of([4, 5], 0.3),
        *momenta_of([2, 3, 4], 0.3, 8),
        *momenta_of([0, 1], 0.3, 8),
        *momenta_of([7], 0.3, 8),
    ]
    assert ema.record.momenta().tolist() == expected
    assert ema.record.copies == [[0, 1], [9, 1]]
    assert [event['what'] for event in ema.record.events] == ['restart', 'restart']


def test_the_share_of_an_earlier_average():
    ema = make()
    update(ema, 4, first=0)
    earlier = Record.decode(ema.record.encode())
    update(ema, 3, first=4)
    kept = math.prod(1 - m for m in momenta_of([4, 5, 6]))
    assert ema.record.begins_with(earlier) and not earlier.begins_with(ema.record)
    assert ema.record.share_of(earlier) == pytest.approx(kept, rel=1e-14)
    assert ema.record.share_of(Record.decode(ema.record.encode())) == 1
    ema.restart()
    update(ema, 1, first=7)
    assert ema.record.begins_with(earlier) and ema.record.share_of(earlier) == 0


def test_of_another_run_or_another_branch_nothing_is_taken_for_earlier():
    ema, other = make(), make(momentum=0.2)
    for each in (ema, other):
        update(each, 4, first=0)
    assert not ema.record.begins_with(other.record)
    skipping = make()
    update(skipping, 2, first=0)
    update(skipping, 1, first=3)
    assert not ema.record.begins_with(skipping.record)


@pytest.mark.parametrize('steps', [3, 20])
def test_a_copy_that_is_due_stays_due(steps):
    ema = make()
    ema.restart(steps=steps)
    assert ema.current_momentum == 1 and int(ema.steps) == steps
    resumed = make()
    resumed.load_state_dict(ema.state_dict())
    for each in (ema, resumed):
        source = nn.Linear(1, 1)
        each.update_parameters(source)
        assert torch.equal(each.module.weight, source.weight)
        assert int(each.steps) == steps + 1
        update(each, 1)
        assert each.record.momenta().tolist() == momenta_of([0, steps + 1])


def test_a_state_goes_on_and_changed_settings_are_seen(tmp_path):
    ema, again = make(), make(momentum=0.2)
    update(ema, 5, first=0)
    torch.save(ema.state_dict(), tmp_path / 'state.pth')
    again.load_state_dict(torch.load(tmp_path / 'state.pth', weights_only=True))
    update(again, 2, first=5)
    assert again.record.momenta().tolist() == [*momenta_of(range(5)), *momenta_of([5, 6], 0.2)]
    assert [segment.update for segment in again.record.segments] == [1, 5]
    same = make()
    same.load_state_dict(ema.state_dict())
    update(same, 2, first=5)
    assert len(same.record.segments) == 1 and same.record.iterations == [[0, 1, 7]]


def test_a_state_without_a_record_is_taken_and_its_beginning_not_known(warnings_seen):
    ema, again = ExpMomentumEMA(nn.Linear(1, 1), **PLAIN), make()
    update(ema, 3)
    state = ema.state_dict()
    del state['record']
    again.load_state_dict(state)
    update(again, 2, first=3)
    assert again.record.updates == 2 and again.record.last_copy == -1
    assert again.record.momenta().tolist() == momenta_of([3, 4])
    assert again.record.events[0]['what'] == 'loaded from a state without a record'
    broken = {**ema.state_dict(), 'record': torch.tensor([1, 2], dtype=torch.uint8)}
    with pytest.raises(ValueError, match='the record of an average must be JSON in a uint8 tensor'):
        again.load_state_dict(broken)


def test_a_rewind_cuts_it():
    ema = make()
    update(ema, 4, first=0)
    best = ema.state_dict()
    update(ema, 3, first=4)
    ema.rewind({key: best[key] for key in best if key.startswith(('module.', 'steps', 'record'))})
    ema.restart(steps=2)
    update(ema, 2, first=7)
    assert ema.record.momenta().tolist() == momenta_of([0, 1, 2, 3, 2, 3])
    assert ema.record.iterations_of_updates().tolist() == [0, 1, 2, 3, 7, 8]
    assert [event['what'] for event in ema.record.events] == ['rewind', 'restart']
    assert ema.record.events[0]['after'] == 7


def test_which_tensors_are_copied_against_the_rule():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)
            self.two.weight = self.one.weight
            self.norm = nn.BatchNorm1d(2)
            self.register_buffer('anchors', torch.rand(2))

    for arguments, expected in (
        (dict(), ['anchors']),
        (dict(update_buffers=True), []),
        (dict(update_buffers=True, exclude=['one.weight']), ['two.weight']),
    ):
        ema = ExpMomentumEMA(Net(), **arguments)
        ema.update_parameters(Net())
        assert ema.record.copied == expected
    assert not blends_by_rule('norm.running_var', False, ())
    assert blends_by_rule('norm.running_var', True, ())
    assert not blends_by_rule('head.weight', True, ('head.*',))


def test_what_was_skipped_is_counted_over_a_resume():
    ema = make(skip_non_finite=True)
    update(ema, 2)
    bad = nn.Linear(1, 1)
    nn.init.constant_(bad.weight, math.nan)
    ema.update_parameters(bad)
    state = ema.state_dict()
    assert ema.record.skipped == 1
    again = make(skip_non_finite=True)
    again.load_state_dict(state)
    again.update_parameters(bad)
    again.state_dict()
    assert again.record.skipped == 2
    again.load_state_dict(state)  # as a rewind does
    again.state_dict()
    assert again.record.skipped == 1


def test_a_long_run_is_a_few_kilobytes():
    """300 epochs of 1000 iterations, ten restarts and five resumes with all that a hook adds."""
    record = Record()
    settings = [
        (make(momentum=0.0002 / (1 + n), gamma=2000).schedule, 1, False, ()) for n in range(11)
    ]
    for number in range(300_000):
        which = number * 11 // 300_000
        steps = number - which * 300_000 // 11
        if steps == 0:
            causes = dict(causes=['epoch 27'], iteration=number, source='model')
            record.note('restart', steps=0, momentum=0.0002, **causes)
        record.iteration = number
        record.add(steps, 1.0 if steps == 0 else 0.0002, settings[which])
    record.parts += 6 * [dict(iteration=150_000, epoch=150, epoch_length=1000, batch=16, ranks=8,
                              accumulation=1, begin=0, log='20260101_000000')]  # fmt: skip
    assert len(record.encode()) < 5000
    assert Record.decode(record.encode()).updates == 300_000


def test_values_that_change_at_each_update_do_not_make_it_grow():
    ema = make()
    for number in range(2 * MOST + 100):
        ema.momentum = 0.1 + 1e-6 * number
        update(ema, 1, first=number)
    record = ema.record
    assert len(record.segments) <= MOST
    momenta = record.momenta()
    assert np.isnan(momenta[1]) and momenta[-1] == pytest.approx(ema.momentum)
    assert record.kept < 0  # of all of them


def test_it_is_json_that_any_tool_reads():
    ema = make(exclude=['bias'])
    update(ema, 3, first=0)
    content = json.loads(bytes(ema.state_dict()['record'].tolist()))
    assert content['updates'] == 3 and content['copies'] == [[0, 1]]
    values = {'momentum': 0.1, 'gamma': 5}
    assert content['segments'] == [[1, 1, 'exp', values, 1, False, ['bias']]]
