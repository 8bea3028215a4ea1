"""The plan of a run: at which update the average is restarted, and with which values."""

import pytest

from mmema.messages import RunError
from mmema.restarts.planner import Restart, merged, plan
from mmema.restarts.rule import RestartRule
from mmema.run import RunFacts

EPOCHS = RunFacts(iterations=24, epoch_length=4)


def times(planned):
    return [(restart.iteration, restart.update) for restart in planned]


def test_every_trigger_in_the_order_of_time():
    facts = RunFacts(40, 4, switches={'PipelineSwitchHook': [7]})
    rules = [
        RestartRule(milestones=[3, 12]),  # 12 is beyond the end
        RestartRule(every=9, by_epoch=False),
        RestartRule(follow='PipelineSwitchHook'),
    ]
    assert times(plan(rules, facts)) == [(9, 9), (12, 12), (18, 18), (27, 27), (28, 28), (36, 36)]
    assert [restart.causes[0] for restart in plan(rules[::2], facts)] == [
        'epoch 3',
        'epoch 7',
    ]


def test_every_ends_before_the_run_does():
    assert times(plan([RestartRule(every=3)], EPOCHS)) == [(12, 12)]
    assert times(plan([RestartRule(every=12, by_epoch=False)], EPOCHS)) == [(12, 12)]


def test_a_restart_comes_before_the_update_of_its_iteration_or_the_next_one():
    # Updates at the iterations 3, 7, 11 ... of an optimizer that steps at every fourth.
    facts = RunFacts(18, accumulation=4)
    rule = RestartRule(milestones=[3, 4, 7, 8, 16, 17], by_epoch=False)
    assert times(plan([rule], facts)) == [(3, 0), (4, 1), (7, 1), (8, 2), (16, 4), (17, 4)]
    assert [facts.iteration_of(update) for update in range(facts.updates)] == [3, 7, 11, 15, 17]


def test_the_values_of_each_milestone():
    rule = RestartRule(milestones=[1, 2], momentum=[0.3, 0.2], gamma=9, steps=None)
    first, second = plan([rule], EPOCHS)
    assert first.values == dict(momentum=0.3, gamma=9)
    assert second.changes == dict(momentum=0.2, gamma=9)


def test_two_rules_at_one_iteration_make_one_restart_with_the_values_of_both():
    rules = [
        RestartRule(milestones=[2, 3], steps=None, momentum=0.1),
        RestartRule(milestones=[8], by_epoch=False, steps=3, gamma=7, source='best'),
    ]
    for order in (rules, rules[::-1]):
        both, alone = plan(order, EPOCHS)
        assert (both.iteration, both.values['steps'], both.values['source']) == (8, 3, 'best')
        assert both.changes == dict(momentum=0.1, gamma=7)
        assert set(both.causes) == {'epoch 2', 'iter 8'}
        assert (alone.iteration, alone.values) == (12, dict(momentum=0.1))


@pytest.mark.parametrize(
    'name, first, second',
    [
        ('steps', dict(), dict(steps=3)),
        ('momentum', dict(momentum=0.1), dict(momentum=0.2)),
        ('gamma', dict(gamma=5), dict(gamma=6)),
        ('source', dict(source='ema'), dict(source='best')),
    ],
)
def test_two_rules_that_contradict_each_other_are_refused_by_name(name, first, second):
    one = RestartRule(milestones=[2], **first)
    other = RestartRule(every=8, by_epoch=False, **second)
    with pytest.raises(RunError, match=f'before iteration 8 must agree on {name}') as caught:
        plan([one, other], EPOCHS)
    assert f'from {one} and ' in str(caught.value) and f'from {other}.' in str(caught.value)
    assert '\n' not in str(caught.value)
    apart = RestartRule(every=7, by_epoch=False, **second)
    assert times(plan([one, apart], EPOCHS)) == [(7, 7), (8, 8), (14, 14), (21, 21)]


def test_a_later_restart_wins_where_it_sets_a_value():
    first = Restart(4, 4, ('iter 4',), dict(steps=3, momentum=0.1, source='ema'))
    second = Restart(9, 9, ('iter 9',), dict(gamma=5))
    result = merged([first, second])
    assert (result.iteration, result.values['steps'], result.values['source']) == (9, 3, 'ema')
    assert result.changes == dict(momentum=0.1, gamma=5)
    assert result.causes == ('iter 4', 'iter 9')
    assert merged([second, Restart(10, 10, (), dict(steps=0, gamma=6))]).changes == dict(gamma=6)


def test_rules_that_do_not_fit_the_run():
    with pytest.raises(RunError, match='by epochs, got one by iterations. Set by_epoch=False'):
        plan([RestartRule(milestones=[2])], RunFacts(24))
    with pytest.raises(RunError, match="follow='PipelineSwitchHook' must name a hook of the run"):
        plan([RestartRule(follow='PipelineSwitchHook')], RunFacts(24, 4))


def test_a_rule_of_plateaus_alone_plans_nothing():
    rule = RestartRule(on_plateau=dict(metric='score'))
    assert plan([rule], RunFacts(24)) == plan([rule], EPOCHS) == []
