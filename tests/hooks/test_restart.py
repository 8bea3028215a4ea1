"""Restarts through a real Runner: when, what, from where, and after a resume."""

import math

import pytest
import runs
import torch
from marks import SINCE_MMENGINE_0_10_3
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS
from mmengine.runner import FlexibleRunner
from reference import ReferenceEMA, assert_close, blended_names, tensors_of
from runs import EMA, Crash, LineModel, assert_same, ema_of, log_of, make_runner, seen, state_of

from mmema import EMARestartHook
from mmema.messages import RunError

RESTART = 'mmema.EMARestartHook'
SCRIPT = {1: 0.5, 2: 0.4, 3: 0.6, 4: 0.55, 5: 0.7, 6: 0.65}


def restart(**arguments):
    return dict(type=RESTART, **arguments)


def restarted_at(runner):
    """The iterations before which a restart took place."""
    before, found = 0, []
    for iteration, _, _, restarts in seen(runner):
        if restarts != before:
            assert restarts == before + 1
            found.append(iteration)
            before = restarts
    return found


# --- when ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'trigger, expected',
    [
        (dict(milestones=[2]), [8]),
        (dict(milestones=[1, 4]), [4, 16]),
        (dict(every=2), [8, 16]),
        (dict(milestones=[3], by_epoch=False), [3]),
        (dict(every=5, by_epoch=False), [5, 10, 15, 20]),
        (dict(milestones=[2], every=2), [8, 16]),  # one moment, one restart
        (dict(milestones=[3], every=4, by_epoch=True), [12, 16]),
    ],
)
def test_moments_by_epoch_and_iteration(tmp_path, trigger, expected):
    runner = make_runner(tmp_path, restart(**trigger))
    runner.train()
    assert restarted_at(runner) == expected


@pytest.mark.parametrize(
    'trigger, expected',
    [
        (dict(milestones=[3, 7], by_epoch=False), [3, 7]),
        (dict(every=4, by_epoch=False), [4, 8]),
    ],
)
def test_moments_of_a_run_by_iterations(tmp_path, trigger, expected):
    runner = make_runner(tmp_path, restart(**trigger), iters=12, val_interval=4)
    runner.train()
    assert restarted_at(runner) == expected


def test_two_hooks_at_once_and_two_units(tmp_path):
    # The first iteration of epoch 2 is iteration 8: within one hook that would be one restart.
    runner = make_runner(
        tmp_path, restart(milestones=[2]), restart(milestones=[10], by_epoch=False, steps=3)
    )
    runner.train()
    assert restarted_at(runner) == [8, 10]
    steps = {iteration: steps for iteration, steps, _, _ in seen(runner)}
    assert (steps[8], steps[9], steps[10]) == (1, 2, 4)


def test_two_hooks_at_one_iteration_make_one_restart_with_the_values_of_both(tmp_path):
    runner = make_runner(
        tmp_path,
        restart(milestones=[2, 4], steps=3),
        restart(milestones=[8], by_epoch=False, steps=None, momentum=0.02),
    )
    runner.train()
    assert restarted_at(runner) == [8, 16]
    after = {iteration: (steps, momentum) for iteration, steps, momentum, _ in seen(runner)}
    assert (after[7], after[8], after[16]) == ((8, 0.1), (4, 0.02), (4, 0.02))
    log = log_of(runner)
    assert log.count('EMA restart') == 2
    assert 'EMA restart 1 at epoch 2, iter 8 (due: epoch 2, iter 8)' in log


def test_two_hooks_that_contradict_each_other_are_refused_before_training(tmp_path):
    runner = make_runner(tmp_path, restart(milestones=[2]), restart(every=2, steps=3))
    with pytest.raises(RunError, match='must agree on steps, got 0 from .* and 3 from') as caught:
        runner.train()
    assert 'EMARestartHook(milestones=[2])' in str(caught.value)
    assert 'EMARestartHook(every=2, steps=3)' in str(caught.value)


def test_a_plateau_and_a_moment_of_two_hooks_make_one_restart(tmp_path):
    runner = make_runner(
        tmp_path,
        restart(on_plateau=dict(metric='score', momentum_add=0.1), steps=None, gamma=9.0),
        restart(milestones=[2], steps=3),
        script=SCRIPT,  # plateaus after the epochs 2, 4 and 6
    )
    runner.train()
    assert restarted_at(runner) == [8, 16]
    after = {iteration: (steps, momentum) for iteration, steps, momentum, _ in seen(runner)}
    assert (after[8][0], after[16][0]) == (4, 12)
    assert (after[8][1], after[16][1]) == (pytest.approx(0.2), pytest.approx(0.3))


def pipeline_switch(at):
    return dict(type='mmdet.PipelineSwitchHook', switch_epoch=at, switch_pipeline=[])


def test_follow_restarts_with_the_real_pipeline_switch(tmp_path):
    pytest.importorskip('mmdet')
    runner = make_runner(tmp_path, pipeline_switch(4), restart(follow='PipelineSwitchHook'))
    runner.train()
    assert restarted_at(runner) == [16]
    log = log_of(runner)
    assert log.index('Switch pipeline now!') < log.index('EMA restart 1 at epoch 4, iter 16')
    assert log.index('Epoch(val) [4]') < log.index('Switch pipeline now!')


@pytest.mark.parametrize('scope', ['mmdet', 'mmyolo'])
def test_follow_restarts_one_epoch_earlier_with_the_real_mode_switch(tmp_path, scope):
    # YOLOXModeSwitchHook fires at epoch + 1 == max_epochs - num_last_epochs (open-mmlab/mmyolo):
    # of 6 epochs with the last 2 without augmentation, before the one with index 3.
    pytest.importorskip(scope)
    from runs import LineModel, loader

    model = LineModel()
    model.bbox_head = torch.nn.Identity()
    switch = dict(type=f'{scope}.YOLOXModeSwitchHook', num_last_epochs=2)
    runner = make_runner(tmp_path, switch, restart(follow='YOLOXModeSwitchHook'), model=model)
    runner.cfg.train_dataloader = dict(loader(), dataset=dict(type='Line'))
    runner.train_dataloader.dataset.update_skip_type_keys = lambda keys: None
    runner.train()
    assert restarted_at(runner) == [12]
    assert model.bbox_head.__dict__['use_l1' if scope == 'mmdet' else 'use_bbox_aux']
    log = log_of(runner)
    assert log.index('Epoch(val) [3]') < log.index('now!') < log.index('Epoch(train) [4]')


def test_a_mode_switch_hook_that_never_switches_is_not_followed(tmp_path):
    # MMYOLO's compares with ==: with as many last epochs as there are, it is never true.
    pytest.importorskip('mmyolo')
    switch = dict(type='mmyolo.YOLOXModeSwitchHook', num_last_epochs=6)
    runner = make_runner(tmp_path, switch, restart(follow='YOLOXModeSwitchHook'))
    runner.train()
    assert restarted_at(runner) == []


def test_a_switch_beyond_the_end_is_said(tmp_path):
    pytest.importorskip('mmdet')
    runner = make_runner(tmp_path, pipeline_switch(40), restart(follow='PipelineSwitchHook'))
    runner.train()
    assert restarted_at(runner) == []
    assert "the milestone 'epoch 40' is beyond the end of the run" in log_of(runner)


@pytest.mark.parametrize('by_iter', [False, True])
def test_a_resume_past_a_milestone_restarts_once_and_says_so(tmp_path, by_iter):
    length = dict(iters=24, val_interval=4) if by_iter else {}
    with pytest.raises(KeyboardInterrupt):
        make_runner(tmp_path, Crash(14), **length).train()
    hook = restart(milestones=[3, 5, 9], by_epoch=False)
    runner = make_runner(tmp_path, hook, resume=True, **length)
    runner.train()
    start = 15 if by_iter else 12
    assert restarted_at(runner) == [start]
    assert 'EMA restart 1 at epoch' in log_of(runner)
    assert '(due: iter 3, iter 5, iter 9)' in log_of(runner)


# --- on_plateau ---------------------------------------------------------------------------------


def test_plateau_counts_validations_that_do_not_improve(tmp_path):
    script = {1: 0.1, 2: 0.2, 3: 0.2, 4: 0.15, 5: 0.1, 6: 0.1, 7: 0.05, 8: 0.04}
    plateau = dict(metric='score', patience=2, momentum_add=0.1, max_momentum=0.25)
    hook = restart(on_plateau=plateau, steps=None)
    runner = make_runner(tmp_path, hook, epochs=8, script=script)
    runner.train()
    # 3 and 4 do not improve: restart before epoch 4. 5 begins anew, 6 and 7 do not improve.
    assert restarted_at(runner) == [16, 28]
    momentum = {iteration: m for iteration, _, m, _ in seen(runner)}
    assert momentum[15] == 0.1 and momentum[16] == pytest.approx(0.2)
    assert momentum[28] == 0.25  # not beyond max_momentum
    assert 'due: score stopped improving' in log_of(runner)


def test_plateau_where_less_is_better_and_only_after_a_restart(tmp_path):
    script = dict(enumerate([None, 3, 4, 5, 2, 2.5, 2.7]))
    plateau = dict(metric='score', rule='less', momentum_add=0.01, after_restart=True)
    hook = restart(milestones=[3], on_plateau=plateau, steps=2)
    runner = make_runner(tmp_path, hook, script=script)
    runner.train()
    assert restarted_at(runner) == [12, 20]  # 2 is better than 3; 2.5 is not


def test_plateau_of_an_unknown_metric_names_those_there_are(tmp_path):
    runner = make_runner(tmp_path, restart(on_plateau=dict(metric='coco/bbox_mAP')))
    with pytest.raises(ValueError, match=r"got 'coco/bbox_mAP'; there are \['score'\]"):
        runner.train()


def test_a_validation_without_any_metric_is_no_plateau(tmp_path):
    # mmdet's CocoMetric gives an empty dict where nothing is detected, as in early epochs.
    class NoDetections(Hook):
        priority = 'HIGHEST'

        def after_val_epoch(self, runner, metrics=None):
            if runner.epoch < 3:
                metrics.clear()

    script = {1: 0.1, 2: 0.1, 3: 0.1, 4: 0.1, 5: 0.2, 6: 0.3}
    runner = make_runner(
        tmp_path, restart(on_plateau=dict(metric='score')), NoDetections(), script=script
    )
    runner.train()
    assert restarted_at(runner) == [16]


# --- what ---------------------------------------------------------------------------------------


@HOOKS.register_module()
class Twin(Hook):
    """Runs the float64 reference beside the average, restarted when it should be."""

    priority = 'LOWEST'

    def __init__(self, plan, update_buffers=False, interval=1):
        self.plan, self.update_buffers, self.interval = plan, update_buffers, interval
        self.reference = None

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        model, ema = runner.model, ema_of(runner)
        if self.reference is None:
            blended = blended_names(model, self.update_buffers)
            self.reference = ReferenceEMA(tensors_of(model), blended, 0.1, 5, self.interval)
        if runner.iter in self.plan:
            self.reference.restart(**self.plan[runner.iter])
        self.reference.update(tensors_of(model))
        assert_close(tensors_of(ema.module), self.reference.average, rtol=1e-5, atol=1e-5)
        assert int(ema.steps) == self.reference.steps


@pytest.mark.parametrize('update_buffers, interval', [(False, 1), (True, 3)])
@pytest.mark.parametrize('by_iter', [False, True])
@pytest.mark.parametrize(
    'what',
    [
        dict(),
        dict(steps=7),
        dict(steps=0, momentum=0.02, gamma=3),
        dict(steps=None, momentum=0.3),
        dict(steps=None, gamma=50.0),
    ],
)
def test_every_mode_follows_the_reference(tmp_path, what, by_iter, update_buffers, interval):
    plan = {9: what, 17: what}
    length = dict(iters=24, val_interval=4) if by_iter else {}
    ema = dict(EMA, update_buffers=update_buffers, interval=interval)
    runner = make_runner(
        tmp_path,
        restart(milestones=[9, 17], by_epoch=False, **what),
        dict(type='Twin', plan=plan, update_buffers=update_buffers, interval=interval),
        ema=ema,
        **length,
    )
    runner.train()
    assert restarted_at(runner) == [9, 17]


@pytest.mark.parametrize(
    'trigger, at',
    [
        (dict(milestones=[2, 4]), [8, 16]),
        (dict(every=2), [8, 16]),
        (dict(every=7, by_epoch=False), [7, 14, 21]),
        (dict(follow='PipelineSwitchHook'), [12]),
        (dict(on_plateau=dict(metric='score')), [8, 16]),
        (dict(milestones=[1], on_plateau=dict(metric='score', momentum_add=0.1)), [4, 8, 16]),
    ],
)
@pytest.mark.parametrize(
    'what', [dict(), dict(steps=6), dict(steps=None, gamma=9.0), dict(steps=None, momentum=0.2)]
)
def test_every_trigger_follows_the_reference(tmp_path, trigger, at, what):
    pytest.importorskip('mmdet')
    plan = {iteration: dict(what) for iteration in at}
    if 'momentum_add' in trigger.get('on_plateau', {}):
        before = what.get('momentum', 0.1)
        plan[8]['momentum'], plan[16]['momentum'] = before + 0.1, before + 0.2
    runner = make_runner(
        tmp_path,
        pipeline_switch(3),
        restart(**trigger, **what),
        dict(type='Twin', plan=plan),
        script=SCRIPT,  # plateaus after the epochs 2, 4 and 6
    )
    runner.train()
    assert restarted_at(runner) == at


def test_one_momentum_for_each_milestone(tmp_path):
    hook = restart(milestones=[1, 2, 4], momentum=[0.3, 0.2, 0.05], steps=None)
    runner = make_runner(tmp_path, hook)
    runner.train()
    momentum = {iteration: m for iteration, _, m, _ in seen(runner)}
    assert [momentum[i] for i in (3, 4, 8, 15, 16, 23)] == [0.1, 0.3, 0.2, 0.2, 0.05, 0.05]


def test_scalars_and_log_say_what_changed(tmp_path):
    runner = make_runner(tmp_path, restart(milestones=[2], momentum=0.02, gamma=9))
    runner.train()
    line = next(line for line in log_of(runner).splitlines() if 'EMA restart' in line)
    assert line.endswith(
        'EMA restart 1 at epoch 2, iter 8 (due: epoch 2): steps 8 -> 0, momentum 0.1 -> 0.02, '
        'gamma 5 -> 9; training goes on from the current weights'
    )
    scalars = runner.message_hub.log_scalars
    assert scalars['train/ema_restarts'].current() == 1
    assert scalars['train/ema_set_momentum'].current() == 0.02
    assert scalars['train/ema_set_gamma'].current() == 9


# --- source -------------------------------------------------------------------------------------


@HOOKS.register_module()
class Snapshots(Hook):
    """Keeps all tensors before the restart (by iteration), after it, and after validations."""

    priority = 'VERY_HIGH'  # before the restart

    def __init__(self):
        self.before, self.validated = {}, {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.before[runner.iter] = state_of(runner)


@HOOKS.register_module()
class After(Hook):
    priority = 'LOWEST'

    def __init__(self):
        self.after = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.after[runner.iter] = {
            **state_of(runner),
            'lr': runner.optim_wrapper.get_lr()['lr'][0],
            'epoch': runner.epoch,
        }


def moments_of(runner):
    before = next(h.before for h in runner.hooks if isinstance(h, Snapshots))
    return before, next(h.after for h in runner.hooks if isinstance(h, After))


def part(state, *prefixes):
    """Some tensors, without what a restart changes by itself."""
    live = ('ema.momentum', 'ema.gamma', 'ema.restarts', 'ema.changed', 'ema.steps')
    return {k: v for k, v in state.items() if k.startswith(prefixes) and not k.startswith(live)}


def test_source_ema_gives_the_model_the_averaged_weights(tmp_path):
    hook = restart(milestones=[3], source='ema')
    runner = make_runner(tmp_path, hook, dict(type='Snapshots'), dict(type='After'))
    runner.train()
    before, after = (state[12] for state in moments_of(runner))
    raw = {k.replace('raw.', 'ema.module.'): v for k, v in part(after, 'raw.').items()}
    assert_same(raw, part(before, 'ema.module.'))
    assert_same(part(after, 'optimizer.'), part(before, 'optimizer.'))
    assert not torch.equal(before['raw.layers.0.weight'], after['raw.layers.0.weight'])


@pytest.mark.parametrize('steps', [0, 3, None])
def test_source_best_puts_everything_back_and_time_goes_on(tmp_path, steps):
    script = {1: 0.1, 2: 0.5, 3: 0.3, 4: 0.2, 5: 0.9, 6: 0.1}
    hook = restart(milestones=[4], source='best', steps=steps, momentum=0.04)
    runner = make_runner(tmp_path, hook, dict(type='Snapshots'), dict(type='After'), script=script)
    runner.train()
    before, after = moments_of(runner)
    best = before[8]  # nothing happens between the best validation and the next iteration
    assert_same(part(after[16], 'raw.', 'ema.', 'optimizer.'), part(best, 'raw.', 'ema.', 'optim'))
    assert not torch.equal(before[16]['raw.layers.0.weight'], best['raw.layers.0.weight'])
    assert after[16]['ema.steps'] == (8 if steps is None else steps)
    assert after[16]['ema.momentum'] == 0.04
    assert after[16]['epoch'] == 4
    assert after[16]['lr'] == pytest.approx(0.05 * 0.95**4)
    assert after[20]['lr'] == pytest.approx(0.05 * 0.95**5)
    # Epoch 5 gave a better one, and CheckpointHook deleted the best of epoch 2; ours is kept.
    assert not (tmp_path / 'best_score_epoch_2.pth').exists()
    assert (tmp_path / 'best_before_restart_at_iter_16.pth').exists()


@OPTIM_WRAPPERS.register_module()
class ScaledWrapper(OptimWrapper):
    """What AmpOptimWrapper adds to a state, which itself runs on a GPU only."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=1.0)

    def state_dict(self):
        return {**super().state_dict(), 'loss_scaler': self.loss_scaler.state_dict()}

    def load_state_dict(self, state_dict):
        self.loss_scaler.load_state_dict(state_dict.pop('loss_scaler'))
        super().load_state_dict(state_dict)

    def step(self, **kwargs):
        super().step(**kwargs)
        self.loss_scaler.load_state_dict(
            {**self.loss_scaler.state_dict(), 'scale': 2 * self.loss_scaler.get_scale()}
        )


@pytest.mark.skipif(not hasattr(torch.amp, 'GradScaler'), reason='GradScaler of the CPU: torch 2.3')
def test_source_best_puts_the_scaler_of_amp_back(tmp_path):
    script = {1: 0.1, 2: 0.5, 3: 0.3, 4: 0.2, 5: 0.1, 6: 0.1}
    wrapper = dict(type='ScaledWrapper', optimizer=dict(type='SGD', lr=0.05, momentum=0.9))
    hook = restart(milestones=[4], source='best')
    runner = make_runner(tmp_path, hook, script=script, optim_wrapper=wrapper)
    runner.train()
    assert runner.optim_wrapper.loss_scaler.get_scale() == 2.0 ** (8 + 8)  # best at 8, 8 more


def test_plateaus_go_back_to_the_best_of_the_stage_before(tmp_path):
    script = {1: 0.5, 2: 0.3, 3: 0.6, 4: 0.55, 5: 0.9, 6: 0.8, 7: 0.1}
    hook = restart(
        milestones=[2],
        source='best',
        steps=None,
        on_plateau=dict(metric='score', momentum_add=0.01, after_restart=True),
    )
    runner = make_runner(
        tmp_path, hook, dict(type='Snapshots'), dict(type='After'), script=script, epochs=7
    )
    runner.train()
    before, after = moments_of(runner)
    assert restarted_at(runner) == [8, 16, 24]
    for iteration in (8, 16, 24):  # always to epoch 1, the best when the stage ended
        assert_same(part(after[iteration], 'raw.', 'ema.'), part(before[4], 'raw.', 'ema.'))


def test_a_plateau_alone_goes_back_to_the_best_so_far(tmp_path):
    script = dict(enumerate([None, 0.5, 0.4, 0.6, 0.8, 0.75, 0.1]))
    hook = restart(on_plateau=dict(metric='score'), source='best', steps=3)
    runner = make_runner(tmp_path, hook, dict(type='Snapshots'), dict(type='After'), script=script)
    runner.train()
    before, after = moments_of(runner)
    assert restarted_at(runner) == [8, 20]
    assert_same(part(after[8], 'raw.', 'ema.'), part(before[4], 'raw.', 'ema.'))  # epoch 1, 0.5
    assert_same(part(after[20], 'raw.', 'ema.'), part(before[16], 'raw.', 'ema.'))  # 4, 0.8


@pytest.mark.parametrize('source', ['ema', 'best'])
def test_gradients_of_abandoned_weights_are_dropped(tmp_path, source):
    class Gradients(Hook):
        priority = 'LOWEST'

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 8:
                grads = [p.grad for p in runner.model.parameters()]
                assert all(g is None or not g.any() for g in grads)
                runner.checked = True

    wrapper = dict(accumulative_counts=3, optimizer=dict(type='SGD', lr=0.05, momentum=0.9))
    hook = restart(milestones=[2], source=source)
    runner = make_runner(tmp_path, hook, Gradients(), optim_wrapper=wrapper)
    runner.train()
    assert runner.checked and restarted_at(runner) == [8]


def test_the_first_metric_of_save_best_decides(tmp_path):
    class Second(Hook):
        priority = 'HIGHEST'

        def after_val_epoch(self, runner, metrics=None):
            metrics['other'] = -metrics['score']
            if runner.epoch == 1:
                metrics['score'] = math.nan  # so `other` has a best checkpoint first

    script = dict(enumerate([None, 0.1, 0.2, 0.3, 0.3, 0.3, 0.3]))
    runner = make_runner(
        tmp_path,
        restart(milestones=[3], source='best'),
        Second(),
        script=script,
        checkpoint=dict(save_best=['score', 'other'], rule=['greater', 'greater']),
    )
    runner.train()
    kept = torch.load(tmp_path / 'best_before_restart_at_iter_12.pth')
    assert kept['meta']['epoch'] == 3


def test_a_best_checkpoint_from_before_the_hook_is_not_gone_back_to(tmp_path):
    script = dict(enumerate([None, 0.9, 0.2, 0.3, 0.3, 0.3, 0.3]))
    with pytest.raises(KeyboardInterrupt):
        make_runner(tmp_path, Crash(10), script=script).train()
    hook = restart(milestones=[4], source='best')
    runner = make_runner(tmp_path, hook, resume=True, script=script)
    runner.train()
    assert restarted_at(runner) == [16]
    log = log_of(runner)
    assert 'best_score_epoch_1.pth has no optimizer: it was saved before this hook' in log
    assert 'training goes on from the current weights' in log


def test_source_ema_before_the_first_update_leaves_the_weights_alone(tmp_path):
    # The stock EMAHook's average is a copy from before init_weights until then.
    pytest.importorskip('mmdet')
    model = LineModel()
    model.init_weights = lambda: torch.nn.init.constant_(model.layers[0].weight, 7.0)
    hook = restart(follow='PipelineSwitchHook', source='ema')
    runner = make_runner(
        tmp_path, hook, pipeline_switch(0), dict(type='After'), model=model, epochs=2
    )
    runner.train()
    after = next(h.after for h in runner.hooks if isinstance(h, After))
    assert (after[0]['raw.layers.0.weight'] == 7).all()


def test_without_a_best_checkpoint_it_says_so_before_training(tmp_path):
    hook = restart(milestones=[2], source='best')
    runner = make_runner(tmp_path, hook, checkpoint=dict(save_best=None, rule=None))
    runner.train()
    assert restarted_at(runner) == [8]
    log = log_of(runner)
    assert "source='best' finds no best checkpoint in this run" in log
    assert log.index('finds no best') < log.index('Epoch(train) [1]')
    assert 'training goes on from the current weights' in log


def test_without_a_best_checkpoint_yet_it_goes_on_from_the_current_weights(tmp_path):
    runner = make_runner(tmp_path, restart(milestones=[2], source='best'), val_interval=3)
    runner.train()
    log = log_of(runner)
    assert 'there is no best checkpoint to go back to' in log
    known = "the restart 'epoch 2' comes before the first validation, after 12 iterations"
    assert log.index(known) < log.index('Epoch(train) [1]')
    assert restarted_at(runner) == [8]


def test_a_best_checkpoint_that_is_gone_is_an_error(tmp_path):
    class Thief(Hook):
        def before_train_epoch(self, runner):
            for file in tmp_path.glob('best*'):
                file.unlink()

    runner = make_runner(tmp_path, restart(milestones=[2], source='best'), Thief())
    with pytest.raises(ValueError, match='best_score_epoch_[12].pth, but the file is gone'):
        runner.train()


def kept_copies(folder):
    return sorted(file.name for file in folder.glob('best_before_restart_at_*'))


RISING = {epoch: epoch / 10 for epoch in range(1, 30)}


def test_copies_that_no_resume_can_need_are_deleted(tmp_path):
    hook = restart(every=1, source='best')
    few = make_runner(tmp_path / 'few', hook, script=RISING, checkpoint=dict(max_keep_ckpts=1))
    few.train()
    assert restarted_at(few) == [4, 8, 12, 16, 20]
    # The last restart was at 20 with a checkpoint of 20, which names the copy of 16.
    names = [f'best_before_restart_at_iter_{at}.pth' for at in (4, 8, 12, 16, 20)]
    assert kept_copies(tmp_path / 'few') == sorted(names[-2:])
    # Every checkpoint is there, and each restart after the first one can be done again.
    make_runner(tmp_path / 'all', hook, script=RISING).train()
    assert kept_copies(tmp_path / 'all') == sorted(names)


def test_no_more_copies_in_a_longer_run(tmp_path):
    most = 0

    class Count(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            nonlocal most
            most = max(most, len(kept_copies(tmp_path)))

    make_runner(
        tmp_path,
        restart(every=1, source='best'),
        Count(),
        script=RISING,
        epochs=20,
        checkpoint=dict(max_keep_ckpts=2),
    ).train()
    assert most == 3
    state = torch.load(tmp_path / 'epoch_20.pth')['ema_restart'][0]
    assert len(state['kept']) == 3 and state['done'] == ['epoch 19']


def test_a_copy_that_only_the_best_checkpoint_names_is_kept(tmp_path):
    # The best one, of epoch 2, was saved after the restart at 4 and is never surpassed.
    script = {**dict.fromkeys(range(1, 9), 0.1), 1: 0.2, 2: 0.5}
    settings = dict(script=script, epochs=8, checkpoint=dict(max_keep_ckpts=1))
    hook = restart(
        every=1, source='best', on_plateau=dict(metric='score', patience=2, after_restart=True)
    )
    make_runner(tmp_path, hook, **settings).train()
    assert kept_copies(tmp_path)[-1] == 'best_before_restart_at_iter_4.pth'
    # What checkpoints are left, last and best, name copies that are there.
    for file in ('epoch_8.pth', 'best_score_epoch_2.pth'):
        state = torch.load(tmp_path / file)['ema_restart'][0]
        assert (tmp_path / state['kept'][-1]).is_file()


def test_a_copy_is_not_deleted_while_another_hook_names_it(tmp_path):
    script = {**RISING, 5: 0.0, 7: 0.0}
    stage = restart(
        milestones=[1],
        source='best',
        on_plateau=dict(metric='score', after_restart=True),
    )
    each = restart(milestones=[2, 3, 4, 6], source='best')
    runner = make_runner(
        tmp_path, stage, each, script=script, epochs=8, checkpoint=dict(max_keep_ckpts=1)
    )
    runner.train()
    log = log_of(runner)
    assert log.count('from the best checkpoint (best_before_restart_at_iter_4.pth)') == 3
    assert 'iter 20 (due: score stopped improving)' in log


@pytest.mark.slow
@pytest.mark.parametrize(
    'place', [(15, 'before_val_epoch'), (16, 'after_val_epoch'), (17, 'after_train_iter')]
)
@pytest.mark.parametrize('keep', [1, 2])
def test_a_resume_needs_no_deleted_copy(tmp_path, place, keep):
    plateau = dict(metric='score', after_restart=True)
    hook = restart(milestones=[1, 2, 3, 5], source='best', on_plateau=plateau)
    settings = dict(script={**RISING, 4: 0.2}, checkpoint=dict(max_keep_ckpts=keep), epochs=7)
    whole = make_runner(tmp_path / 'whole', hook, **settings)
    whole.train()
    assert_resume_changes_nothing(whole, tmp_path / 'cut', hook, settings, Crash(*place))


def test_a_resume_from_the_oldest_checkpoint_needs_no_deleted_copy(tmp_path):
    # The plateau after epoch 2 goes back to the copy of iteration 4; the restart at 12 makes one.
    hook = restart(
        milestones=[1, 3], source='best', on_plateau=dict(metric='score', after_restart=True)
    )
    script = {1: 0.9, 2: 0.1, 3: 0.5, 4: 0.6, 5: 0.7, 6: 0.8}
    settings = dict(script=script, checkpoint=dict(max_keep_ckpts=2))
    whole = make_runner(tmp_path / 'whole', hook, **settings)
    whole.train()
    assert restarted_at(whole) == [4, 8, 12]
    cut = tmp_path / 'cut'
    with pytest.raises(KeyboardInterrupt):
        make_runner(cut, hook, Crash(13), **settings).train()
    resumed = make_runner(cut, hook, resume=True, load_from=str(cut / 'epoch_2.pth'), **settings)
    resumed.train()
    assert_same(state_of(whole), state_of(resumed))


def test_only_the_best_checkpoint_gets_an_optimizer(tmp_path):
    script = {1: 0.1, 2: 0.5, 3: 0.3, 4: 0.2, 5: 0.9, 6: 0.1}
    hook = restart(milestones=[4], source='best')
    save = dict(save_optimizer=False, save_param_scheduler=False)
    make_runner(tmp_path, hook, script=script, checkpoint=save, resume=False).train()
    for epoch in range(1, 7):
        checkpoint = torch.load(tmp_path / f'epoch_{epoch}.pth')
        assert 'optimizer' not in checkpoint and 'param_schedulers' not in checkpoint, epoch
    best = torch.load(tmp_path / 'best_score_epoch_5.pth')
    assert best['optimizer']['state'] and len(best['param_schedulers']) == 1
    assert 'optimizer' in torch.load(tmp_path / 'best_before_restart_at_iter_16.pth')


def test_after_a_resume_only_a_new_best_checkpoint_gets_an_optimizer(tmp_path):
    script = {1: 0.1, 2: 0.5, 3: 0.3, 4: 0.2, 5: 0.9, 6: 0.1}
    hook = restart(milestones=[5], source='best')
    settings = dict(script=script, checkpoint=dict(save_optimizer=False))
    with pytest.raises(KeyboardInterrupt):
        make_runner(tmp_path, hook, Crash(13), **settings).train()
    make_runner(tmp_path, hook, resume=True, **settings).train()
    assert 'optimizer' in torch.load(tmp_path / 'best_score_epoch_5.pth')
    for epoch in (4, 5, 6):
        assert 'optimizer' not in torch.load(tmp_path / f'epoch_{epoch}.pth')


def test_every_metric_of_save_best_gets_an_optimizer(tmp_path):
    class Second(Hook):
        priority = 'HIGHEST'

        def after_val_epoch(self, runner, metrics=None):
            metrics['other'] = -float(runner.epoch)

    save = dict(save_best=['score', 'other'], rule=['greater', 'greater'], save_optimizer=False)
    runner = make_runner(
        tmp_path, restart(milestones=[4], source='best'), Second(), script=RISING, checkpoint=save
    )
    runner.train()
    for name in ('best_score_epoch_6.pth', 'best_other_epoch_1.pth'):
        assert 'optimizer' in torch.load(tmp_path / name), name
    assert 'optimizer' not in torch.load(tmp_path / 'epoch_6.pth')


# --- resume ---------------------------------------------------------------------------------------

PLATEAU = dict(metric='score', momentum_add=0.01)
CASES = {
    'hard': (restart(milestones=[2]), {}),
    'soft': (restart(every=2, steps=3, momentum=0.03), {}),
    'schedule': (restart(milestones=[2, 4], momentum=[0.05, 0.02], gamma=9, steps=None), {}),
    'mid-epoch': (restart(milestones=[6, 18], by_epoch=False, steps=2), {}),
    'ema': (restart(milestones=[3], source='ema'), {}),
    'best': (restart(milestones=[2, 4], source='best'), dict(script=SCRIPT)),
    'plateau': (restart(on_plateau=PLATEAU, steps=None), dict(script=SCRIPT)),
    'stage 2': (
        restart(
            milestones=[2], on_plateau=dict(PLATEAU, after_restart=True), source='best', steps=None
        ),
        dict(script=SCRIPT),
    ),
}
ITERS = {
    'iter hard': (restart(milestones=[5, 9], by_epoch=False), {}),
    'iter best': (
        restart(every=7, by_epoch=False, source='best'),
        dict(script={4 * k: v for k, v in SCRIPT.items()}),
    ),
    'iter plateau': (
        restart(on_plateau=PLATEAU, source='best'),
        dict(script={4 * k: v for k, v in SCRIPT.items()}),
    ),
}


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    """The run that was not interrupted, once for each case."""
    runs = {}

    def run(case, hook, settings):
        if case not in runs:
            runs[case] = make_runner(tmp_path_factory.mktemp('whole'), hook, **settings)
            runs[case].train()
            assert restarted_at(runs[case])
        return runs[case]

    return run


def assert_resume_changes_nothing(whole, work_dir, hook, settings, crash):
    with pytest.raises(KeyboardInterrupt):
        make_runner(work_dir, hook, crash, **settings).train()
    resumed = make_runner(work_dir, hook, resume=True, **settings)
    resumed.train()
    assert_same(state_of(whole), state_of(resumed))
    if 'script' in settings:  # the hook looks at metrics, so it caught up on the validation
        best = [runner.message_hub.get_info('best_score') for runner in (whole, resumed)]
        assert best[0] == best[1]


PLACES = [
    (6, 'before_train_iter'),  # inside an epoch, before the milestone
    (7, 'before_val_epoch'),  # the checkpoint is saved, the validation is not done
    (8, 'after_val_epoch'),  # both are
    (8, 'after_train_iter'),  # after the milestone
    (15, 'before_val_epoch'),
    (17, 'after_train_iter'),  # inside stage 2
    (20, 'before_val_epoch'),
]


@pytest.mark.slow
@pytest.mark.parametrize('place', PLACES, ids=str)
@pytest.mark.parametrize('case', CASES)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, unbroken, case, place):
    hook, settings = CASES[case]
    whole = unbroken(case, hook, settings)
    assert_resume_changes_nothing(whole, tmp_path, hook, settings, Crash(*place))


@SINCE_MMENGINE_0_10_3
@pytest.mark.slow
@pytest.mark.parametrize('place', PLACES, ids=str)
@pytest.mark.parametrize('case', ITERS)
def test_a_resumed_run_by_iterations_ends_with_the_same_bits(tmp_path, unbroken, case, place):
    hook, settings = ITERS[case]
    settings = dict(settings, iters=24, val_interval=4, checkpoint=dict(interval=3))
    whole = unbroken(case, hook, settings)
    assert_resume_changes_nothing(whole, tmp_path, hook, settings, Crash(*place))


@SINCE_MMENGINE_0_10_3
@pytest.mark.parametrize('place', [PLACES[0], PLACES[5]], ids=str)
def test_the_same_from_an_infinite_sampler(tmp_path, unbroken, place):
    # MMEngine reads the data that are over once more; onedl-mmengine has the sampler skip them.
    hook, settings = ITERS['iter hard']
    sampler = dict(type='InfiniteSampler', shuffle=True)
    data = {**runs.loader(batch_size=5), 'sampler': sampler}  # 24 pictures: batches cross epochs
    settings = dict(settings, iters=24, val_interval=4, checkpoint=dict(interval=3))
    settings['train_dataloader'] = data
    whole = unbroken('infinite', hook, settings)
    assert_resume_changes_nothing(whole, tmp_path, hook, settings, Crash(*place))


@pytest.mark.slow
@pytest.mark.parametrize('case', ['soft', 'ema', 'best', 'stage 2'])
def test_the_same_with_our_own_hook(tmp_path, unbroken, case):
    hook, settings = CASES[case]
    settings = dict(settings, ema=dict(EMA, type='mmema.EMAHook', update_buffers=True))
    whole = unbroken(f'{case}, ours', hook, settings)
    assert_resume_changes_nothing(whole, tmp_path, hook, settings, Crash(15, 'before_val_epoch'))


def test_a_plateau_found_with_a_new_best_of_another_metric_survives(tmp_path):
    # CheckpointHook saves again after such a validation, with the restart still to come.
    class Second(Hook):
        priority = 'HIGHEST'

        def after_val_epoch(self, runner, metrics=None):
            metrics['other'] = float(runner.epoch)

    settings = dict(script=SCRIPT, checkpoint=dict(save_best='other'))
    hook = restart(on_plateau=PLATEAU)
    with pytest.raises(KeyboardInterrupt):
        make_runner(tmp_path, hook, Second(), Crash(8, 'before_train_epoch'), **settings).train()
    runner = make_runner(tmp_path, hook, Second(), resume=True, **settings)
    runner.train()
    assert restarted_at(runner)[0] == 8


def test_resume_from_the_best_checkpoint_when_the_last_is_cut_short(tmp_path):
    hook = restart(milestones=[4], source='best')
    settings = dict(
        script=dict(enumerate([None, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])),
        # A rate that depends on how often its scheduler has been called.
        param_scheduler=dict(type='MultiStepLR', milestones=[3], by_epoch=True),
    )
    whole = make_runner(tmp_path / 'whole', hook, **settings)
    whole.train()
    cut = tmp_path / 'cut'
    with pytest.raises(KeyboardInterrupt):
        make_runner(cut, hook, Crash(8, 'before_train_epoch'), **settings).train()
    (cut / 'epoch_1.pth').unlink()
    last = cut / 'epoch_2.pth'
    last.write_bytes(last.read_bytes()[:3000])
    resumed = make_runner(cut, hook, resume=True, **settings)
    resumed.train()
    assert seen(resumed)[0][0] == 8
    assert 'so the run is resumed from' in log_of(resumed)
    assert_same(state_of(whole), state_of(resumed))


@pytest.mark.parametrize('case', ['soft', 'best', 'stage 2'])
def test_flexible_runner_restarts_and_resumes_as_the_plain_runner(tmp_path, monkeypatch, case):
    # FlexibleRunner loads a checkpoint before the hooks' before_run.
    hook, settings = CASES[case]
    settings = dict(settings, ema=dict(EMA, type='mmema.EMAHook'))
    whole = make_runner(tmp_path / 'whole', hook, **settings)
    whole.train()
    monkeypatch.setattr(runs, 'Runner', FlexibleRunner)
    crash = Crash(15, 'before_val_epoch')
    assert_resume_changes_nothing(whole, tmp_path / 'cut', hook, settings, crash)


def test_two_hooks_each_get_their_own_state_back(tmp_path):
    old = restart(milestones=[1, 5])
    with pytest.raises(KeyboardInterrupt):
        make_runner(tmp_path, old, Crash(11)).train()
    new = restart(milestones=[1], steps=None, momentum=0.05)
    runner = make_runner(tmp_path, new, old, resume=True)
    runner.train()
    # The new one at once, the old one not again before its time.
    assert [i for i, _, _, n in seen(runner) if n == 2] == list(range(8, 20))
    assert ema_of(runner).restarts == 3


def test_a_run_in_another_folder_finds_the_kept_checkpoint(tmp_path):
    hook, settings = CASES['stage 2']
    with pytest.raises(KeyboardInterrupt):
        make_runner(tmp_path / 'one', hook, Crash(14), **settings).train()
    file = str(tmp_path / 'one' / 'epoch_3.pth')  # the kept one is older
    whole = make_runner(tmp_path / 'whole', hook, **settings)
    whole.train()
    other = make_runner(tmp_path / 'two', hook, resume=True, load_from=file, **settings)
    other.train()
    assert_same(state_of(whole), state_of(other))
    for kept in tmp_path.rglob('best_before*'):
        kept.unlink()
    file = str(tmp_path / 'two' / 'epoch_4.pth')
    lost = make_runner(tmp_path / 'three', hook, resume=True, load_from=file, **settings)
    with pytest.raises(ValueError, match='but .*three does not hold it. Copy it there'):
        lost.train()


def test_a_resume_in_the_middle_of_an_epoch_validates_nothing_twice(tmp_path):
    script = dict(enumerate([None, 0.5, 0.4, 0.6, 0.7, 0.8, 0.9]))
    settings = dict(script=script, checkpoint=dict(by_epoch=False, interval=5))
    hook = restart(on_plateau=dict(metric='score', patience=2))
    with pytest.raises(KeyboardInterrupt):
        make_runner(tmp_path, hook, Crash(10), **settings).train()
    runner = make_runner(tmp_path, hook, resume=True, **settings)
    runner.train()
    assert 'the validation before the resume' not in log_of(runner)
    assert restarted_at(runner) == []


def test_loading_weights_after_a_resumed_run_is_no_resume(tmp_path):
    hook = restart(milestones=[2])
    with pytest.raises(KeyboardInterrupt):
        make_runner(tmp_path, hook, Crash(11)).train()
    runner = make_runner(tmp_path, hook, resume=True)
    runner.train()
    torch.save(dict(state_dict=LineModel(3).state_dict()), tmp_path / 'weights.pth')
    runner.load_checkpoint(str(tmp_path / 'weights.pth'))
    assert torch.equal(runner.model.layers[0].weight, LineModel(3).layers[0].weight)


def test_fine_tuning_starts_a_schedule_of_its_own(tmp_path):
    make_runner(tmp_path / 'first', restart(milestones=[2], momentum=0.3)).train()
    file = str(tmp_path / 'first' / 'epoch_6.pth')
    runner = make_runner(tmp_path / 'second', restart(milestones=[4]), load_from=file)
    runner.train()
    assert restarted_at(runner) == [16]
    assert seen(runner)[0] == (0, 1, 0.1, 0)


# --- states that are not whole ------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path):
    make_runner(tmp_path, restart(milestones=[2]), epochs=3).train()
    return tmp_path


def resume_after(work_dir, change, file='epoch_3.pth'):
    checkpoint = torch.load(work_dir / file)
    change(checkpoint)
    torch.save(checkpoint, work_dir / file)
    make_runner(work_dir, restart(milestones=[2]), resume=True).train()


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda c: c.pop('ema_state_dict'), 'epoch_3.pth has no ema_state_dict'),
        (lambda c: c['ema_state_dict'].pop('steps'), "epoch_3.pth lacks 'steps'"),
        (
            lambda c: c['ema_state_dict'].pop('module.norm.running_mean'),
            "epoch_3.pth lacks 'module.norm.running_mean'",
        ),
        (
            lambda c: c['ema_state_dict'].update({'module.norm.weight': torch.ones(9)}),
            "other shapes than the model for 'norm.weight'",
        ),
    ],
)
def test_an_incomplete_state_is_an_error_that_says_how_to_go_on(finished, change, message):
    with pytest.raises(RunError, match=message) as caught:
        resume_after(finished, change)
    assert 'load_from=' in str(caught.value)


def test_a_last_file_that_is_cut_short_is_passed_over(finished):
    last = finished / 'epoch_3.pth'
    last.write_bytes(last.read_bytes()[:5000])
    runner = make_runner(finished, restart(milestones=[2]), resume=True)
    runner.train()
    assert seen(runner)[0][0] == 8  # from epoch_2.pth
    last.write_bytes(last.read_bytes()[:5000])
    for other in ('epoch_1.pth', 'epoch_2.pth', 'epoch_4.pth', 'epoch_5.pth', 'epoch_6.pth'):
        (finished / other).unlink()
    (finished / 'last_checkpoint').write_text(str(last))
    with pytest.raises(ValueError, match='epoch_3.pth is cut short, and no other one is whole'):
        make_runner(finished, restart(milestones=[2]), resume=True).train()
    with pytest.raises(ValueError, match='epoch_3.pth is cut short: the run was stopped'):
        make_runner(finished, restart(milestones=[2]), resume=True, load_from=str(last)).train()


def test_a_checkpoint_of_mmengines_class_is_adopted_and_it_is_said(tmp_path):
    theirs = dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.1)

    class NoClock(Hook):
        pass

    from runs import Clock

    Clock.after_train_iter, kept = Hook.after_train_iter, Clock.after_train_iter
    try:
        make_runner(tmp_path, ema=theirs, epochs=3).train()
    finally:
        Clock.after_train_iter = kept
    runner = make_runner(tmp_path, restart(milestones=[4]), resume=True)
    runner.train()
    assert restarted_at(runner) == [16]
    assert seen(runner)[0][:2] == (12, 13)
    assert 'took over an average after 12 updates from a state of another class' in log_of(runner)


# --- bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(), 'must have a trigger'),
        (dict(milestones=3), 'milestones must be a list of integers, got 3'),
        (dict(milestones=[0]), 'a milestone must be at least 1, got 0'),
        (dict(milestones=[2.5]), 'a milestone must be an integer, got 2.5'),
        (dict(milestones=[4, 2]), r'milestones must rise, got \[4, 2\]'),
        (dict(every=0), 'every must be at least 1, got 0'),
        (dict(every=True), 'every must be an integer'),
        (dict(every=2, by_epoch='yes'), "by_epoch must be True or False, got 'yes'"),
        (dict(follow='PipelineSwitch'), "follow must be one of .* got 'PipelineSwitch'"),
        (dict(every=2, steps=-1), 'steps must be at least 0, got -1'),
        (dict(every=2, steps='0'), "steps must be an integer, got '0'"),
        (dict(every=2, momentum=1.5), r'momentum must be in \(0, 1\), got 1.5'),
        (dict(every=2, momentum=[0.1]), 'one value for each milestone'),
        (dict(milestones=[1, 2], momentum=[0.1]), '1 values for 2 milestones'),
        (dict(every=2, gamma=0), 'gamma must be above 0'),
        (dict(every=2, source='raw'), "source must be one of .* got 'raw'"),
        (dict(every=2, steps=None), 'must change momentum, gamma or source'),
        (dict(on_plateau='score'), "on_plateau must be a dict, got 'score'"),
        (dict(on_plateau=dict(patience=2)), "missing 1 required positional argument: 'metric'"),
        (dict(on_plateau=dict(metric='a', patence=2)), "unexpected keyword argument 'patence'"),
        (dict(on_plateau=dict(metric='a', patience=0)), r"\['patience'\] must be at least 1"),
        (dict(on_plateau=dict(metric='a', rule='more')), r"\['rule'\] must be one of"),
        (dict(on_plateau=dict(metric='a', momentum_add=-1)), r"\['momentum_add'\] must be in"),
        (dict(on_plateau=dict(metric='a', max_momentum=0.1)), 'needs on_plateau'),
        (dict(on_plateau=dict(metric='a', after_restart=True)), 'must come with another trigger'),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        EMARestartHook(**arguments)


def test_what_the_run_lacks_is_said_before_training(tmp_path):
    def refused(message, *hooks, **settings):
        with pytest.raises(ValueError, match=message):
            make_runner(tmp_path, *hooks, **settings).train()

    refused('must name a hook of the run, got', restart(follow='PipelineSwitchHook'))
    refused('got one by iterations. Set by_epoch=False', restart(milestones=[2]), iters=4)
    refused('needs a restartable average, got ExpMomentumEMA', restart(every=2),
            ema=dict(type='EMAHook', ema_type='mmema.ExpMomentumEMA'))  # fmt: skip
    refused('must have one EMAHook, got 2', restart(every=2), EMA)
    constant = dict(type='EMAHook', ema_type='mmema.RestartableConstantEMA')
    refused('can only change what RestartableConstantEMA has, got gamma',
            restart(every=2, gamma=4), ema=constant)  # fmt: skip


# --- a run that cannot do what the hook is asked for ---------------------------------------------

TWO_IN_A_ROW = dict(metric='score', patience=2)


def test_a_plateau_without_validations_is_refused(tmp_path):
    runner = make_runner(tmp_path, restart(on_plateau=TWO_IN_A_ROW), epochs=2)
    runner._val_loop = None
    with pytest.raises(RunError, match="on_plateau watches 'score'.*this run has none"):
        runner.train()


@pytest.mark.parametrize('epochs, said', [(3, 1), (4, 0)])
def test_a_plateau_that_too_few_validations_can_show(tmp_path, epochs, said):
    # The first validation improves; two without an improvement follow, then there must be an epoch.
    script = dict.fromkeys(range(1, 5), 0.5)
    runner = make_runner(tmp_path, restart(on_plateau=TWO_IN_A_ROW), epochs=epochs, script=script)
    runner.train()
    assert log_of(runner).count('seen at the 3th validation at the earliest') == said
    assert restarted_at(runner) == ([] if said else [12])


@pytest.mark.parametrize('name', ['EMAHook', 'mmema.EMAHook'])
def test_an_ema_hook_behind_the_checkpoint_hook_is_refused(tmp_path, name):
    # Files lacked the last update, and a resumed run ended one short.
    late = dict(EMA, type=name, priority='LOWEST')
    runner = make_runner(tmp_path, restart(milestones=[1]), ema=late, epochs=2)
    with pytest.raises(RunError, match=r'must come before CheckpointHook.*leave out priority='):
        runner.train()


def test_a_hook_object_serves_one_run_after_another(tmp_path):
    # k folds with one config (keras 3000): the second run did not restart.
    hook = EMARestartHook(milestones=[1])
    for fold in range(2):
        runner = make_runner(tmp_path / str(fold), hook, epochs=2)
        runner.train()
        assert restarted_at(runner) == [4]
    resumed = make_runner(tmp_path / '1', hook, epochs=3, resume=True)
    resumed.train()
    assert ema_of(resumed).restarts == 1


@pytest.mark.parametrize('hooks', [[], [restart(milestones=[1]), restart(milestones=[2])]])
@pytest.mark.parametrize('name', ['EMAHook', 'mmema.EMAHook'])
def test_a_resume_without_an_optimizer_is_told(tmp_path, hooks, name):
    ema = dict(EMA, type=name)
    make_runner(tmp_path, *hooks, ema=ema, epochs=1).train()
    told = bool(hooks) or name != 'EMAHook'
    for file, times in ((next(tmp_path.glob('best_*.pth')), told), (tmp_path / 'epoch_1.pth', 0)):
        settings = dict(epochs=2, ema=ema, resume=True, load_from=str(file))
        runner = make_runner(tmp_path / str(times), *hooks, **settings)
        runner.train()
        line = f'{file} has no optimizer and no param_schedulers: the run goes on with fresh ones'
        assert log_of(runner).count(line) == times
