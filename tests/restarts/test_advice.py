"""Advice before the run: one line each, with the numbers and a value that fits."""

import pytest
from runs import EMA, log_of, make_runner
from torch import nn

from mmema import RestartableConstantEMA, RestartableExpMomentumEMA, RestartableUniformAverage
from mmema.restarts import advice as module
from mmema.restarts.planner import plan
from mmema.restarts.rule import RestartRule
from mmema.run import RunFacts


def advice(facts, *rules, cls=RestartableExpMomentumEMA, **ema):
    return module.advice(rules, plan(rules, facts), facts, cls(nn.Linear(1, 1), **ema))


def by_iter(at, **arguments):
    return RestartRule(milestones=[at], by_epoch=False, **arguments)


def test_a_schedule_that_fits_needs_no_advice():
    assert advice(RunFacts(60000, 1000), RestartRule(milestones=[10])) == []


def test_a_warm_up_longer_than_the_updates_left():
    # 2000 ln(1 / 0.0002) = 17034.4; 10000 / ln(5000) = 1174.1
    assert advice(RunFacts(20000, 1000), RestartRule(milestones=[10])) == [
        'the warm-up of gamma 2000 ends after about 17034 updates, but 10000 updates are left '
        'after the last restart: until then the average forgets fast; gamma=1174 would fit'
    ]


def test_a_soft_restart_and_one_of_the_schedule_alone_have_less_to_warm_up():
    assert advice(RunFacts(20000), by_iter(10000, steps=8000)) == []
    assert advice(RunFacts(20000), by_iter(10000, steps=None, gamma=2000)) == []
    # The counter goes on from 1000, where the soft restart had put it 9000 updates before.
    late = by_iter(11000, steps=None, gamma=2000)
    assert advice(RunFacts(19000), by_iter(10000), late) == [
        'the warm-up of gamma 2000 ends after about 17034 updates, but 8000 updates are left '
        'after the last restart: until then the average forgets fast; gamma=939 would fit'
    ]


def test_a_horizon_longer_than_the_updates_left():
    assert advice(RunFacts(3000), by_iter(1000), gamma=100) == [
        'the horizon of momentum 0.0002 is 5000 updates, but 2000 updates are left after the last '
        'restart; momentum=0.001 would fit'
    ]


def test_an_average_that_begins_after_the_end():
    assert advice(RunFacts(10, begin=20), gamma=1, momentum=0.5) == [
        'the average is never updated: 0 updates are left'
    ]


def test_updates_are_counted_rather_than_iterations():
    # 16 iterations are left with an update at every fourth.
    rule = by_iter(16, momentum=0.1, gamma=1)
    assert advice(RunFacts(32, accumulation=1), rule) == []
    assert advice(RunFacts(32, accumulation=4), rule) == [
        'the horizon of momentum 0.1 is 10 updates, but 4 updates are left after the last '
        'restart; momentum=0.5 would fit'
    ]
    assert '5 updates are left' in advice(RunFacts(33, accumulation=4), rule)[0]


def test_the_horizon_of_an_interval_is_as_many_times_longer():
    # With momentum 0.001 at every 20th update the last 1000 updates hold 1 - 0.999 ** 50 = 4.9 %.
    facts, rule = RunFacts(20000), by_iter(10000, gamma=100)
    assert advice(facts, rule, momentum=0.001) == []
    assert advice(facts, rule, momentum=0.001, interval=20) == [
        'the horizon of momentum 0.001 is 20000 updates, but 10000 updates are left after the '
        'last restart; momentum=0.004 would fit'
    ]
    # The warm-up counts updates, blended or not: 100 ln(1 / 0.01) = 460.5.
    for interval in (1, 2):
        (line,) = advice(RunFacts(400), by_iter(1), momentum=0.01, gamma=100, interval=interval)
        assert 'warm-up of gamma 100 ends after about 461 updates' in line


def test_schedules_that_fit_a_stage_of_any_length():
    assert 'horizon' in advice(RunFacts(3000), by_iter(1000), cls=RestartableConstantEMA)[0]
    assert advice(RunFacts(3000), by_iter(1000), cls=RestartableUniformAverage) == []


def test_a_milestone_beyond_the_end():
    assert advice(RunFacts(100000, 1000), RestartRule(milestones=[10, 100])) == [
        "the milestone 'epoch 100' is beyond the end of the run (100000 iterations); the last that "
        'would fit is 99'
    ]


def test_a_decay_given_as_momentum():
    assert advice(RunFacts(100000), by_iter(1, momentum=0.9998)) == [
        'momentum 0.9998 is the weight of the new value; did you mean 1 - 0.9998 = 0.0002?'
    ]


def test_a_switch_that_no_restart_follows():
    facts = RunFacts(200000, 1000, switches={'PipelineSwitchHook': [90]})
    assert advice(facts, by_iter(5)) == [
        'PipelineSwitchHook switches at epoch 90, and no restart follows it; '
        "follow='PipelineSwitchHook' would. Without one, 0.00 of the average at the end are "
        'weights from before it'
    ]
    assert advice(facts, RestartRule(milestones=[90])) == []
    assert advice(facts, RestartRule(follow='PipelineSwitchHook')) == []


@pytest.mark.parametrize(
    'epochs, switch, length, momentum, interval, share',
    [
        (500, 490, 925, 0.0001, 1, '0.40'),  # MMYOLO's YOLOv8, 8xb16
        (300, 280, 463, 0.0002, 1, '0.16'),  # MMDetection's RTMDet, 8xb32
        (300, 285, 1849, 0.0001, 1, '0.06'),  # MMDetection's YOLOX, 8xb8
        (300, 280, 463, 0.0004, 2, '0.16'),
    ],
)
def test_the_share_of_weights_from_before_the_switch(
    epochs, switch, length, momentum, interval, share
):
    facts = RunFacts(epochs * length, length, switches={'PipelineSwitchHook': [switch]})
    (line,) = advice(facts, by_iter(5), momentum=momentum, interval=interval)
    assert line.endswith(
        f'Without one, {share} of the average at the end are weights from before it'
    )
    (line,) = advice(facts, by_iter(5), cls=RestartableUniformAverage)
    assert line.endswith('would')


def test_restarts_before_there_is_a_best_checkpoint():
    facts = RunFacts(100000, 1000, first_best=3000)
    line = ' before the first validation, after 3000 iterations, so there is no best checkpoint yet'
    (one,) = advice(facts, RestartRule(milestones=[1, 9], source='best'))
    assert one.startswith("the restart 'epoch 1' comes" + line)
    rule = RestartRule(every=500, by_epoch=False, source='best', momentum=0.01, gamma=1)
    (many,) = advice(facts, rule)
    names = "'iter 500', 'iter 1000', 'iter 1500' and 2 more"
    assert many.startswith(f'the restarts {names} come' + line)
    assert advice(facts, RestartRule(milestones=[1])) == []  # from its own weights


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


@pytest.mark.parametrize(
    'ema, left', [('mmema.EMAHook', 2), ('EMAHook', 8)], ids=['ours', 'stock: at every iteration']
)
def test_the_updates_of_a_real_run_with_accumulation(tmp_path, ema, left):
    wrapper = dict(accumulative_counts=4, optimizer=dict(type='SGD', lr=0.05))
    hook = dict(type='mmema.EMARestartHook', milestones=[4], momentum=0.01)
    runner = make_runner(tmp_path, hook, ema=dict(EMA, type=ema), optim_wrapper=wrapper)
    runner.train()
    assert f'{left} updates are left after the last restart' in log_of(runner)
    average = next(h.ema_model for h in runner.hooks if hasattr(h, 'ema_model'))
    assert int(average.steps) == left
