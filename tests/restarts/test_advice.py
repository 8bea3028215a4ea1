"""Advice before the run: one line each, with the numbers and a value that fits."""

import pytest
from runs import log_of, make_runner

from mmema.restarts.advice import Plan, advice


def test_a_schedule_that_fits_needs_no_advice():
    assert advice(Plan(iterations=60000, moments={'epoch 10': 10000}, epoch=1000)) == []


def test_a_warm_up_longer_than_what_is_left():
    plan = Plan(iterations=20000, moments={'epoch 10': 10000}, epoch=1000)
    # 2000 ln(1 / 0.0002) = 17034.4; 10000 / ln(5000) = 1174.1
    assert advice(plan) == [
        'the warm-up of gamma 2000 ends after about 17034 updates, but 10000 updates are left '
        'after the last restart: until then the average forgets fast; gamma=1174 would fit'
    ]


def test_a_soft_restart_and_one_of_the_schedule_alone_have_less_to_warm_up():
    assert advice(Plan(iterations=20000, moments={'iter 10000': 10000}, steps=8000)) == []
    assert advice(Plan(iterations=20000, moments={'iter 10000': 10000}, steps=None)) == []


def test_a_horizon_longer_than_what_is_left():
    plan = Plan(iterations=3000, moments={'iter 1000': 1000}, gamma=100)
    assert advice(plan) == [
        'the horizon of momentum 0.0002 is 5000 updates, but 2000 updates are left after the last '
        'restart; momentum=0.001 would fit'
    ]


def test_a_milestone_beyond_the_end():
    plan = Plan(iterations=100000, moments={'epoch 10': 10000, 'epoch 100': 100000}, epoch=1000)
    assert advice(plan) == [
        "the milestone 'epoch 100' is beyond the end of the run (100000 iterations); the last that "
        'would fit is 99'
    ]


def test_a_decay_given_as_momentum():
    plan = Plan(iterations=100000, own_momentum=[0.9998], moments={'iter 1': 1}, momentum=0.9998)
    assert advice(plan) == [
        'momentum 0.9998 is the weight of the new value; did you mean 1 - 0.9998 = 0.0002?'
    ]


def test_a_switch_that_no_restart_follows():
    switches = {'PipelineSwitchHook switches at epoch 90': 90000}
    plan = Plan(iterations=100000, moments={'iter 5': 5}, switches=switches)
    assert advice(plan) == [
        'PipelineSwitchHook switches at epoch 90, and no restart follows it; '
        "follow='PipelineSwitchHook' would"
    ]
    assert advice(Plan(100000, {'epoch 90': 90000}, switches, gamma=1, momentum=0.01)) == []


def test_the_hook_gives_it_once_before_training(tmp_path):
    pytest.importorskip('mmdet')
    switch = dict(type='mmdet.PipelineSwitchHook', switch_epoch=5, switch_pipeline=[])
    hook = dict(type='mmema.EMARestartHook', milestones=[2, 9], momentum=0.8)
    runner = make_runner(tmp_path, hook, switch)
    runner.train()
    log = log_of(runner)
    for line in (
        'EMARestartHook: momentum 0.8 is the weight',
        "the milestone 'epoch 9' is beyond the end",
        'PipelineSwitchHook switches at epoch 5, and no restart follows it',
    ):
        assert log.count(line) == 1 and log.index(line) < log.index('Epoch(train) [1]')
