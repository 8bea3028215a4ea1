"""What of a rule is done: due once, caught up after a resume, of a size that does not grow."""

import json

import pytest

from mmema.restarts.progress import RuleProgress, due_restart
from mmema.restarts.rule import RestartRule
from mmema.run import Moment, RunFacts

FACTS = RunFacts(iterations=400, epoch_length=4)


def progress_of(facts=FACTS, state=None, **rule):
    progress = RuleProgress(RestartRule(**rule))
    if state:
        progress.load_state_dict(state)
    progress.begin(facts)
    return progress


def at(iteration):
    return {'epoch': iteration // 4, 'iter': iteration}


def run(progress, iterations):
    """Return the iterations at which restarts took place, with their causes."""
    found = {}
    for iteration in iterations:
        if progress.is_due(at(iteration)):
            found[iteration] = [*due_restart([progress], at(iteration), 0.1).causes]
    return found


def test_each_moment_once():
    progress = progress_of(milestones=[2, 5], every=3)
    assert run(progress, range(40)) == {
        8: ['epoch 2'],
        12: ['epoch 3'],
        20: ['epoch 5'],
        24: ['epoch 6'],
        36: ['epoch 9'],
    }


def test_a_rule_that_is_new_at_a_resume_restarts_once_for_all_that_it_missed():
    progress = progress_of(milestones=[5, 7], every=10, by_epoch=False)
    assert run(progress, range(33, 45)) == {33: ['iter 5', 'iter 7', 'iter 30'], 40: ['iter 40']}


def test_a_resume_does_not_repeat_what_is_done():
    rule = dict(milestones=[3], every=10, by_epoch=False)
    first = progress_of(**rule)
    run(first, range(26))
    assert run(progress_of(state=first.state_dict(), **rule), range(24, 41)) == {
        30: ['iter 30'],
        40: ['iter 40'],
    }


def test_the_state_says_at_which_iteration_a_moment_was_done():
    progress = progress_of(milestones=[5], every=10, by_epoch=False)
    run(progress, range(13, 31))
    state = progress.state_dict()
    assert dict(zip(state['done'], state['done_at'])) == {'iter 5': 13, 'iter 30': 30}
    assert progress_of(state=state, milestones=[5], every=10, by_epoch=False).state_dict() == state


def test_the_state_does_not_grow_with_the_run():
    facts = RunFacts(iterations=300_000)
    progress = progress_of(facts, milestones=[55, 77], every=10, by_epoch=False)
    sizes, most = [], 0
    for iteration in range(10, 100_000, 10):
        due_restart([progress], {'epoch': 0, 'iter': iteration}, 0.1)
        most = max(most, len(progress.done))
        if iteration in (1000, 10_000, 99_990):
            sizes.append(len(json.dumps(progress.state_dict())))
    assert most == 3  # two milestones and the last multiple
    assert max(sizes) - min(sizes) <= 4  # digits
    assert progress.state_dict()['done'] == ['iter 55', 'iter 77', 'iter 99990']


def test_a_restart_compares_as_few_moments_late_in_a_run_as_early(monkeypatch):
    compared = []
    equal = Moment.__eq__
    monkeypatch.setattr(Moment, '__eq__', lambda a, b: compared.append(1) or equal(a, b))
    progress = progress_of(RunFacts(300_000), milestones=[5], every=10, by_epoch=False)
    counts = []
    for iteration in range(10, 20_000, 10):
        assert progress.is_due({'epoch': 0, 'iter': iteration})
        del compared[:]
        due_restart([progress], {'epoch': 0, 'iter': iteration}, 0.1)
        counts.append(len(compared))
    assert counts[-1] <= counts[10] <= 20
    del compared[:]
    assert not any(progress.is_due({'epoch': 0, 'iter': 19_990 + i}) for i in range(10))
    assert len(compared) <= 10 * 3  # at an iteration without a restart


def test_a_state_of_0_1_0_is_read():
    old = dict(
        arguments='',
        done=[f'iter {i}' for i in range(10, 3000, 10)] + ['epoch 2'],
        plateau_due=False,
        plateau=None,
        kept='best_before_restart_at_iter_40.pth',
    )
    facts = RunFacts(4000, 4, switches={'PipelineSwitchHook': [2]})
    rule = dict(every=10, by_epoch=False, follow='PipelineSwitchHook')
    progress = progress_of(facts, old, **rule)
    assert progress.kept == ['best_before_restart_at_iter_40.pth']
    assert run(progress, range(2990, 3011)) == {3000: ['iter 3000'], 3010: ['iter 3010']}
    assert [str(moment) for moment in progress.done] == ['epoch 2', 'iter 3010']
    assert progress_of(facts, dict(old, kept=None), **rule).kept == []


def test_a_moment_that_is_done_late_does_not_bring_back_a_multiple():
    first = progress_of(every=10, by_epoch=False)
    run(first, range(66))
    rule = dict(milestones=[20], every=10, by_epoch=False)
    changed = progress_of(state=first.state_dict(), **rule)
    assert run(changed, range(65, 72)) == {65: ['iter 20'], 70: ['iter 70']}
    back = progress_of(state=changed.state_dict(), every=10, by_epoch=False)
    assert run(back, range(71, 82)) == {80: ['iter 80']}


def test_a_changed_config_does_what_its_new_moments_ask_for():
    first = progress_of(milestones=[10], by_epoch=False)
    run(first, range(12))
    state = first.state_dict()
    earlier = progress_of(state=state, milestones=[6, 10, 14], by_epoch=False)
    assert run(earlier, range(12, 16)) == {12: ['iter 6'], 14: ['iter 14']}
    none = progress_of(state=state, milestones=[14], by_epoch=False)
    assert run(none, range(12, 16)) == {14: ['iter 14']}


def test_epochs_are_compared_as_epochs():
    # After a checkpoint from the middle of an epoch MMEngine's iterations run ahead of its epochs.
    progress = progress_of(milestones=[3])
    assert not progress.is_due({'epoch': 2, 'iter': 13})
    assert progress.is_due({'epoch': 3, 'iter': 14})


def test_a_moment_comes_before_a_plateau_of_the_same_rule():
    rule = dict(milestones=[2], momentum=0.3, on_plateau=dict(metric='score', momentum_add=0.1))
    progress = progress_of(**rule)
    progress.plateau_due = True
    restart = due_restart([progress], at(4), 0.25)
    assert restart.changes == dict(momentum=pytest.approx(0.35)) and restart.causes == (
        'score stopped improving',
    )
    progress.plateau_due = True
    restart = due_restart([progress], at(8), 0.25)
    assert restart.changes == dict(momentum=0.3) and restart.causes == ('epoch 2',)
    assert not progress.plateau_due


def test_rules_that_are_due_at_one_time_make_one_restart():
    late = progress_of(milestones=[3], steps=None, momentum=0.3)
    early = progress_of(milestones=[2], steps=5, momentum=0.2, gamma=7.0)
    plateau = progress_of(on_plateau=dict(metric='score', source='ema'), steps=0, gamma=9.0)
    plateau.plateau_due = True
    restart = due_restart([late, early, plateau], at(12), 0.1)  # resumed past both moments
    assert (restart.values['steps'], restart.values['source']) == (5, 'ema')
    assert restart.changes == dict(momentum=0.3, gamma=7.0)
    assert restart.causes == ('score stopped improving', 'epoch 2', 'epoch 3')
    assert not any(progress.is_due(at(12)) for progress in (late, early, plateau))
