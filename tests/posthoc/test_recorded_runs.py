"""Runs that were not simple: each tool is right about them, or refuses."""

import copy
import math

import numpy as np
import pytest
import torch
from marks import SINCE_TORCH_2_6
from twin import assert_sum, copies, train, twin, weighted

from mmema.checkpoints.formats import CheckpointError
from mmema.posthoc import derive
from mmema.posthoc.facts import facts_in
from mmema.posthoc.profiles import blends_of, exponential, stored_profiles, uniform

pytestmark = SINCE_TORCH_2_6
OURS = dict(type='mmema.EMAHook', momentum=0.1, gamma=5)
PLAIN = dict(momentum=0.1, gamma=5)
LAYERS = ['layers.0.weight', 'layers.2.weight', 'norm.weight']


def restart_hook(**arguments):
    return dict(type='mmema.EMARestartHook', **arguments)


def averages_of(rows, **settings):
    return [(steps, shares.copy()) for steps, shares, _ in twin(rows, **settings)]


def files_of(run, *names):
    return [facts_in(run.folder / f'{name}.pth') for name in names]


def check_restart(run, before, after, since, until, shares, **kwargs):
    """Assert the share W, and the average as if restarted between two files."""
    made = derive.restart(run.folder / f'{before}.pth', run.folder / f'{after}.pth')
    tail = np.where(np.arange(len(shares)) >= since, shares, 0)
    assert made.meta['mmema']['kept'] == pytest.approx(1 - tail.sum(), rel=1e-9)
    last = run.rows[until - 1]
    assert_sum(made.state, run.rows, tail / tail.sum(), last, **kwargs)
    return made


def fitted(run, files, wanted_of):
    stored, notes = stored_profiles(files)
    wanted = wanted_of(stored[-1].total, blends_of(stored))
    made, found = derive.fit(stored, wanted, force=True)
    return made, found, wanted, notes


def test_steps_of_the_optimizer_were_skipped_before_a_soft_restart(tmp_path):
    run = train(
        tmp_path, restart_hook(milestones=[3], steps=6), ema=OURS, epochs=4, skipped=(6, 7, 9)
    )
    assert [row.iter for row in run.rows if not row.stepped] == [5, 6, 8]
    averages = averages_of(run.rows, ema=PLAIN, restarts=[('epoch', 3, dict(steps=6))])
    made = check_restart(run, 'epoch_1', 'epoch_4', 4, 16, averages[-1][1])
    assert made.meta['mmema']['kept'] == pytest.approx(0.037, abs=5e-4)  # not 0.019


def test_a_layer_that_was_frozen_for_a_while(tmp_path):
    run = train(tmp_path, ema=OURS, epochs=4, frozen=range(8, 12))
    assert torch.equal(
        run.rows[8].tensors['layers.0.weight'], run.rows[11].tensors['layers.0.weight']
    )
    check_restart(run, 'epoch_1', 'epoch_4', 4, 16, averages_of(run.rows, ema=PLAIN)[-1][1])


def test_a_milestone_and_a_plateau_that_goes_back_to_the_best_at_one_time(tmp_path):
    script = {1: 1.0, 2: 2.0, 3: 0.0, 4: 0.0}
    hooks = [
        restart_hook(milestones=[3], steps=4),
        restart_hook(on_plateau=dict(metric='score', patience=1), steps=None, source='best'),
    ]
    run = train(tmp_path, *hooks, ema=OURS, epochs=4, script=script)
    restarts = [('epoch', 3, dict(steps=4, source='best'))]
    averages = averages_of(run.rows, ema=PLAIN, restarts=restarts, best=lambda row: 8)
    shares = averages[-1][1]
    assert not shares[8:12].any()
    made = check_restart(run, 'epoch_2', 'epoch_4', 8, 16, shares)
    by_hand = math.prod(1 - (0.9 * math.exp(-(1 + s) / 5) + 0.1) for s in range(4, 8))
    assert made.meta['mmema']['kept'] == pytest.approx(by_hand) == pytest.approx(0.174, abs=5e-4)
    with pytest.raises(CheckpointError, match='epoch_4.pth was not made from that in .*epoch_3'):
        derive.restart(run.folder / 'epoch_3.pth', run.folder / 'epoch_4.pth')


@pytest.mark.parametrize('begin, at', [(0, 0), (2, 1)])
def test_the_first_update_copies_after_a_soft_restart_too(tmp_path, begin, at):
    """The plan, the run and the twin agree: no share of the initial weights stays."""
    hook = dict(OURS, begin_epoch=begin + 1 if begin else 0)
    rule = restart_hook(milestones=[at], steps=20) if at else restart_hook(
        follow='PipelineSwitchHook', steps=20
    )  # fmt: skip
    switch = [] if at else [dict(type='mmdet.PipelineSwitchHook', switch_epoch=0,
                                 switch_pipeline=[])]  # fmt: skip
    if switch:
        pytest.importorskip('mmdet.engine')
    run = train(tmp_path, rule, *switch, ema=hook, epochs=4)
    restarts = [('epoch', at, dict(steps=20))]
    averages = averages_of(run.rows, ema=PLAIN, restarts=restarts, begin=begin * 4)
    assert averages[-1][0] == 20 + 16 - begin * 4
    assert averages[-1][1].sum() == pytest.approx(1)
    (last,) = files_of(run, 'epoch_4')
    record = last.averages['ema'].record
    assert record.last_copy == begin * 4
    stored, _ = stored_profiles([last])
    np.testing.assert_allclose(stored[0].profile(), averages[-1][1], rtol=1e-12)
    state = torch.load(tmp_path / 'epoch_4.pth', weights_only=True)['state_dict']
    assert_sum(state, run.rows, averages[-1][1], run.rows[-1])


def test_a_resume_with_another_batch_size(tmp_path):
    run = train(tmp_path, ema=OURS, epochs=8, parts=[dict(stop=11), dict(batch=12)], checkpoint={})
    # Two epochs of 4 iterations are kept, then six of 2.
    epochs = [0] * 4 + [1] * 4 + [2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert [row.epoch for row in run.rows] == epochs
    files = files_of(run, *(f'epoch_{n}' for n in range(1, 9)))
    assert [file.time for file in files] == [f'epoch {n}' for n in range(1, 9)]
    assert [files[-1].iteration_of(epoch) for epoch in range(8)] == [0, 4, 8, 10, 12, 14, 16, 18]
    made = check_restart(
        run, 'epoch_2', 'epoch_7', 8, 18, averages_of(run.rows[:18], ema=PLAIN)[-1][1]
    )
    assert made.lines[0][1] == 'ema, as if restarted hard after epoch 2, at epoch 7'
    start = files[-1].iteration_of(4)
    made, found, wanted, _ = fitted(run, files, lambda n, at: uniform(start, n, at))
    by_hand = [1 / 8 if row.epoch >= 4 else 0 for row in run.rows]
    np.testing.assert_allclose(wanted, by_hand)
    assert_sum(made.state, run.rows, found.profile, run.rows[-1])


def test_a_mixture_of_averages_that_blend_other_tensors(tmp_path):
    """The tensors that one of them copies have a fit of their own."""
    also = dict(nohead=dict(momentum=0.3, exclude=['layers.2.*']), flat=dict(update_buffers=True))
    run = train(tmp_path, ema=dict(OURS, also=also), epochs=5)
    files = files_of(run, *(f'epoch_{n}' for n in range(1, 6)))
    made, found, wanted, notes = fitted(run, files, lambda n, at: exponential(0.2, None, 0, n, at))
    assert not notes and found.error < 0.02
    error = made.meta['mmema']['error']
    for name in LAYERS:
        off = made.state[name].double() - weighted(run.rows, wanted, name)
        spread = math.sqrt(
            sum((r.tensors[name] - run.rows[-1].tensors[name]).square().sum() for r in run.rows)
        )
        assert off.norm() <= error * np.linalg.norm(wanted) * spread + 1e-4
    assert torch.equal(made.state['level'].double(), run.rows[-1].tensors['level'])


def test_blended_buffers_beside_copied_ones(tmp_path):
    also = dict(copied=dict(momentum=0.3, update_buffers=False))
    run = train(tmp_path, ema=dict(OURS, update_buffers=True, also=also), epochs=5)
    files = files_of(run, *(f'epoch_{n}' for n in range(1, 6)))
    made, found, wanted, _ = fitted(run, files, lambda n, at: exponential(0.2, None, 0, n, at))
    rows = run.rows
    for name in ('level', 'norm.running_mean', 'layers.0.weight'):
        off = made.state[name].double() - weighted(rows, wanted, name)
        spread = sum((r.tensors[name] - rows[-1].tensors[name]).square().sum() for r in rows) ** 0.5
        assert off.norm() <= made.meta['mmema']['error'] * np.linalg.norm(wanted) * spread + 1e-4
        assert not torch.equal(made.state[name].double(), rows[-1].tensors[name])


@pytest.mark.parametrize('kind', ['not begun', 'just restarted'])
def test_the_last_average_is_a_copy(tmp_path, kind):
    hooks, hook = [], dict(OURS)
    if kind == 'not begun':
        hook['begin_iter'] = 20
    else:
        hooks = [restart_hook(milestones=[19], by_epoch=False)]
    run = train(tmp_path, *hooks, ema=hook, iters=20, val_interval=100)
    files = files_of(run, *(f'iter_{n}' for n in range(1, 21)))
    made, found, wanted, _ = fitted(run, files, lambda n, at: uniform(10, n, at))
    by_hand = np.array([0] * 10 + [0.1] * 10)
    np.testing.assert_allclose(wanted, by_hand)
    assert found.error < 1e-6
    assert_sum(made.state, run.rows, by_hand, run.rows[-1])


def test_the_last_average_of_a_stock_class_is_a_copy(tmp_path):
    hook = dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.1, begin_iter=16)
    run = train(tmp_path, ema=hook, iters=16, val_interval=100)
    files = files_of(run, *(f'iter_{n}' for n in range(1, 17)))
    stored, (note,) = stored_profiles(files)
    assert 'is a copy of the raw weights, so what it blends cannot be seen' in note
    assert {one.weights for one in stored} == {'raw'}


def test_a_resume_with_another_accumulation(tmp_path):
    parts = [dict(stop=17), dict(accumulation=4)]
    run = train(tmp_path, ema=OURS, epochs=8, parts=parts)
    assert [row.iter for row in run.rows if row.stepped] == [*range(16), 19, 23, 27, 31]
    averages = averages_of(run.rows, ema=PLAIN)
    check_restart(run, 'epoch_3', 'epoch_7', 12, 28, averages[27][1])
    check_restart(run, 'epoch_5', 'epoch_7', 20, 28, averages[27][1])
    files = files_of(run, *(f'epoch_{n}' for n in range(1, 9)))
    made, found, wanted, _ = fitted(run, files, lambda n, at: exponential(0.2, None, 8, n, at))
    at = [*range(8, 16), 19, 23, 27, 31]
    assert list(np.flatnonzero(wanted)) == at
    debiased = 0.8 ** np.arange(len(at))[::-1]
    np.testing.assert_allclose(wanted[at], debiased / debiased.sum())
    assert_sum(made.state, run.rows, found.profile, run.rows[-1])


def test_a_file_between_a_restart_and_the_next_accumulated_update(tmp_path):
    """Its average is still that of before, and the file after it is right, too."""
    run = train(
        tmp_path,
        restart_hook(milestones=[9], by_epoch=False, steps=2),
        ema=OURS,
        iters=20,
        val_interval=100,
        parts=[dict(accumulation=4)],
    )
    averages = averages_of(run.rows, ema=PLAIN, restarts=[('iter', 9, dict(steps=2))])
    check_restart(run, 'iter_4', 'iter_10', 4, 10, averages[9][1])
    check_restart(run, 'iter_10', 'iter_18', 10, 18, averages[17][1])
    stored, notes = stored_profiles(files_of(run, *(f'iter_{n}' for n in (4, 10, 18, 20))))
    assert not notes
    for one in stored[:4]:
        shares = averages[one.facts.iteration - 1][1]
        np.testing.assert_allclose(one.profile(), shares, rtol=1e-12)


def test_tensors_that_were_left_out_are_refused(tmp_path):
    run = train(tmp_path, ema=OURS, epochs=2)
    _, after = files_of(run, 'epoch_1', 'epoch_2')
    average = after.averages['ema']
    record = copy.copy(average.record)
    record.skipped = 3
    average.__dict__['record'] = record
    stored, (note,) = stored_profiles([after])
    assert 'left out 3 tensors that were not finite' in note and len(stored) == 1


def test_copies_helper_knows_the_toy():
    assert copies('level') and not copies('level', update_buffers=True)
