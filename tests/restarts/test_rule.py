"""Restart rules: what they accept, and how a checkpoint and a message name them."""

import dataclasses

import pytest

from mmema.restarts.rule import RestartRule
from mmema.run import Moment


def test_a_moment_in_words_and_back():
    moment = Moment('epoch', 8)
    assert str(moment) == 'epoch 8'
    assert Moment.parse('epoch 8') == moment
    assert Moment.parse('iter 500') == Moment('iter', 500)


def test_a_rule_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RestartRule(every=2).every = 3


def test_a_rule_is_named_by_the_arguments_that_were_given():
    rule = RestartRule(milestones=[2], momentum=[0.1], steps=None)
    assert str(rule) == 'EMARestartHook(milestones=[2], steps=None, momentum=[0.1])'
    assert str(RestartRule(every=3)) == 'EMARestartHook(every=3)'


def test_the_key_is_the_one_that_checkpoints_of_0_1_0_have():
    rule = RestartRule(milestones=[2], on_plateau=dict(metric='score', patience=2), source='best')
    plateau = "{'metric': 'score', 'patience': 2}"
    assert rule.key == f"([2], None, True, None, {plateau}, 0, None, None, 'best')"


def test_the_momenta_that_planned_restarts_set():
    assert RestartRule(every=2).momenta == [None]
    assert RestartRule(every=2, momentum=0.1).momenta == [0.1]
    assert RestartRule(milestones=[1, 2], momentum=(0.1, 0.2)).momenta == [0.1, 0.2]


@pytest.mark.parametrize(
    'arguments, expected',
    [
        (dict(every=2), False),
        (dict(every=2, source='best'), True),
        (dict(on_plateau=dict(metric='score', source='best')), True),
        (dict(on_plateau=dict(metric='score', source='ema')), False),
    ],
)
def test_whether_a_rule_goes_back_to_the_best_checkpoint(arguments, expected):
    assert RestartRule(**arguments).uses_best is expected


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(), 'must have a trigger, got none of milestones, every, follow and on_plateau'),
        (dict(milestones=[]), 'must have a trigger'),
        (dict(milestones='23'), "milestones must be a list of integers, got '23'"),
        (dict(milestones=[4, 2]), r'milestones must rise, got \[4, 2\]'),
        (dict(milestones=[2, 2]), r'milestones must rise, got \[2, 2\]'),
        (dict(milestones=[1], every=3, momentum=[0.1]), 'got 1 values for 1 milestones'),
        (dict(every=2, steps=None), 'with steps=None must change momentum, gamma or source'),
        (dict(on_plateau=dict(metric='a'), steps=None), 'on a plateau with steps=None must change'),
        (
            dict(milestones=[1], on_plateau=dict(metric='a', momentum_add=0.1), steps=None),
            'a restart with steps=None must change',
        ),
        (
            dict(milestones=[1], momentum=[0.1], on_plateau=dict(metric='a'), steps=None),
            'on a plateau with steps=None must change',
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        RestartRule(**arguments)


@pytest.mark.parametrize(
    'arguments, plateau, values',
    [
        (dict(), dict(), dict(steps=0)),
        (dict(steps=None, momentum=0.3), dict(), dict(momentum=0.3)),
        (dict(momentum=0.3), dict(momentum_add=0.1), dict(steps=0, momentum=0.2)),
        (dict(momentum=[0.3], milestones=[1]), dict(), dict(steps=0)),
        (dict(steps=None), dict(source='best'), dict(source='best')),
        (dict(source='best', gamma=9), dict(source='model'), dict(steps=0, gamma=9)),
    ],
)
def test_the_values_that_a_restart_on_a_plateau_sets(arguments, plateau, values):
    rule = RestartRule(on_plateau=dict(metric='score', **plateau), **arguments)
    assert rule.values_on_plateau(0.1) == values
