"""Profiles of stored averages and their fit, against numbers worked out by hand."""

import numpy as np
import pytest
import torch
from recorded import STOCK, parameters, record, shares_of
from reference import assert_close, exp_momentum

from mmema.checkpoints.formats import CheckpointError
from mmema.posthoc import derive
from mmema.posthoc.facts import facts_in
from mmema.posthoc.profiles import exponential, fit, single, stored_profiles, uniform


def facts_of(run, *epochs):
    return [facts_in(run.file(epoch)) for epoch in epochs or range(1, 7)]


# --- profiles --------------------------------------------------------------------------------


def test_wanted_profiles_by_hand():
    np.testing.assert_allclose(uniform(2, 4), [0, 0, 0.5, 0.5])
    np.testing.assert_allclose(single(2, 3), [0, 1, 0])
    np.testing.assert_allclose(exponential(0.5, None, 2, 5), [0, 0, 1 / 7, 2 / 7, 4 / 7])
    momenta = [1.0, exp_momentum(1, 0.1, 2), exp_momentum(2, 0.1, 2)]
    np.testing.assert_allclose(exponential(0.1, 2, 1, 4), [0, *shares_of(momenta)])
    with pytest.raises(
        ValueError, match='the first iteration must be below the 4 of the run, got 4'
    ):
        uniform(4, 4)
    with pytest.raises(ValueError, match='the first iteration must be at least 0, got -1'):
        exponential(0.1, None, -1, 4)


def test_profiles_of_a_stock_run(stock):
    stored, notes = stored_profiles(facts_of(stock, 2, 6))
    assert notes == []
    assert [str(one) for one in stored] == [
        'ema of epoch_2.pth',
        'ema of epoch_6.pth',
        'raw of epoch_2.pth',
        'raw of epoch_6.pth',
    ]
    momenta = [exp_momentum(t, 0.1, 8) if t else 1.0 for t in range(24)]
    np.testing.assert_allclose(stored[0].profile(), [*shares_of(momenta[:8]), *[0] * 16])
    np.testing.assert_allclose(stored[1].profile(), shares_of(momenta))
    np.testing.assert_allclose(stored[2].profile(), np.eye(24)[7])


def test_every_profile_of_ours_gives_the_stored_weights(ours):
    """The averages of `ours` have restarts, an interval, and schedules of their own."""
    from mmema.checkpoints.files import load

    stored, notes = stored_profiles(facts_of(ours))
    assert notes == []
    assert len(stored) == 6 * 5
    for one in stored:
        state = load(one.facts.file).sets()[one.weights]
        assert_close(parameters(state), parameters(ours.sum(one.profile())))
        assert one.profile().sum() == pytest.approx(1)


def test_copies_before_the_average_begins(tmp_path):
    run = record(tmp_path, {**STOCK, 'begin_epoch': 3}, epochs=4)
    stored, notes = stored_profiles(facts_of(run, 1, 2, 3, 4))
    assert notes == []
    momenta = [1.0] * 9 + [exp_momentum(t, 0.1, 8) for t in range(1, 8)]
    np.testing.assert_allclose(stored[3].profile(), shares_of(momenta))
    np.testing.assert_allclose(stored[0].profile(), np.eye(16)[3])


def test_files_without_raw_weights_are_left_out(stock, tmp_path):
    content = torch.load(stock.file(6), weights_only=True)
    del content['ema_state_dict']
    torch.save(content, tmp_path / 'epoch_6.pth')
    last = facts_in(tmp_path / 'epoch_6.pth')
    stored, (note,) = stored_profiles([*facts_of(stock, 4, 5), last])
    assert note.endswith('epoch_6.pth is left out: it has no raw weights')
    assert len(stored) == 4 and {one.total for one in stored} == {20}
    with pytest.raises(CheckpointError, match='no file has raw weights, so the run cannot be'):
        stored_profiles([last])


def test_an_average_that_cannot_be_followed_is_left_out(tmp_path):
    hook = dict(
        type='mmema.EMAHook',
        momentum=0.2,
        gamma=3,
        also=dict(lost=dict(ema_type='ExponentialMovingAverage', horizon='5 updates')),
    )
    run = record(tmp_path, hook, epochs=2)
    stored, (note,) = stored_profiles(facts_of(run, 1, 2))
    assert {one.weights for one in stored} == {'ema', 'raw'}
    assert note.startswith('lost is left out: ')
    assert 'does not say how its average lost was updated; `restart` takes --momentum ' in note


# --- the fit ---------------------------------------------------------------------------------


def test_fit_by_hand():
    """Nearest to (0, 0, 1) among the mixtures of (1, 0, 0) and (0, 1, 0): half of each."""
    found = fit([np.array([1.0, 0, 0]), np.array([0, 1.0, 0])], np.array([0, 0, 1.0]))
    np.testing.assert_allclose(found.coefficients, [0.5, 0.5])
    assert found.error == pytest.approx(np.sqrt(1.5))
    assert found.size == pytest.approx(1)
    # (1 - c) (1, 0, 0) + c (-1, 1, 1) is nearest to (0, 3, 0) where (1 - 2c)^2 + (c - 3)^2 + c^2 is
    # least: -4 (1 - 2c) + 2 (c - 3) + 2c = 0, c = 5/6.
    found = fit([np.array([1.0, 0, 0]), np.array([-1.0, 1, 1])], np.array([0, 3.0, 0]))
    np.testing.assert_allclose(found.coefficients, [1 / 6, 5 / 6])
    residual = np.array([1 - 5 / 3, 5 / 6 - 3, 5 / 6])
    assert found.error == pytest.approx(np.linalg.norm(residual) / 3)
    one = fit([np.array([1.0, 0, 0])], np.array([0, 1.0, 0]))
    assert list(one.coefficients) == [1]
    assert one.error == pytest.approx(np.sqrt(2))


def test_a_restart_is_in_the_span_of_its_two_files(tmp_path):
    ema = dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.1)
    run = record(tmp_path, ema)
    files = facts_of(run, 3, 6)
    stored, _ = stored_profiles(files)
    wanted = exponential(0.1, None, 12, 24)
    made, found = derive.fit(stored, wanted, dict(momentum=0.1))
    kept = 0.9**12
    np.testing.assert_allclose(
        found.coefficients, [-kept / (1 - kept), 1 / (1 - kept), 0, 0], atol=1e-9
    )
    assert found.error < 1e-9
    assert_close(parameters(made.state), parameters(run.sum(wanted)))
    assert made.meta['mmema']['made'] == 'fit'
    assert made.meta['mmema']['momentum'] == 0.1


def test_another_horizon_from_averages_of_two(tmp_path):
    """The sum of the recorded weights with the fitted profile, and near the wanted one."""
    hook = dict(
        type='mmema.EMAHook',
        ema_type='mmema.RestartableConstantEMA',
        momentum=0.05,
        update_buffers=True,
        also=dict(short=dict(momentum=0.3)),
    )
    run = record(tmp_path, hook)
    stored, _ = stored_profiles(facts_of(run))
    wanted = exponential(0.15, None, 0, 24)
    made, found = derive.fit(stored, wanted)
    assert 1e-9 < found.error < 0.1
    state = {n: t for n, t in made.state.items() if t.is_floating_point()}
    expected = {n: t for n, t in run.sum(found.profile).items() if n in state}
    assert_close(state, expected)
    assert made.lines[0][1] == f'{found.error:.2%} off the wanted one'


def test_the_mean_of_raw_weights_has_the_others_of_the_last_file(stock):
    stored = [one for one in stored_profiles(facts_of(stock))[0] if one.weights == 'raw']
    wanted = sum(one.profile() for one in stored[3:]) / 3
    made, found = derive.fit(stored, wanted)
    np.testing.assert_allclose(found.coefficients, [0, 0, 0, 1 / 3, 1 / 3, 1 / 3], atol=1e-9)
    state = made.state
    assert state['calls'] == 24
    expected = stock.sum(wanted)
    assert_close(parameters(state), parameters(expected))
    assert_close(*({'mean': s['norm.running_mean']} for s in (state, expected)))


def test_a_bad_fit_is_refused_unless_forced(stock):
    stored, _ = stored_profiles(facts_of(stock, 1, 6))
    wanted = uniform(12, 24)
    with pytest.raises(CheckpointError, match=r'is \d\d\.\d% off the wanted profile, more than 10'):
        derive.fit(stored, wanted)
    assert derive.fit(stored, wanted, force=True)[1].error > 0.1
    with pytest.raises(CheckpointError, match='there are no averages and no raw weights to mix'):
        derive.fit([], wanted)


def test_large_coefficients_are_avoided_where_that_is_possible():
    """Three profiles on a line but for 1e-6: the way there along the line is short, 2 and -1."""
    line = np.array([0, 0, 1.0, 0]), np.array([0, 0, 0, 1.0])
    odd = (line[0] + line[1]) / 2 + np.array([1e-6, -1e-6, 0, 0])
    wanted = 2 * line[0] - line[1] + np.array([0.1, -0.1, 0, 0])
    assert fit([*line, odd], wanted).size == pytest.approx(2e5, rel=1e-3)
    assert fit([*line, odd], wanted).error < 1e-6
    found = fit([*line, odd], wanted, most=1000)
    np.testing.assert_allclose(found.profile, wanted - [0.1, -0.1, 0, 0], atol=1e-5)
    assert found.error == pytest.approx(np.sqrt(0.02 / 5.02), rel=1e-4)
    assert found.size < 4


def test_huge_coefficients_are_refused_unless_forced(stock):
    """Two averages that hardly differ give a third one only by their enlarged difference."""
    stored, _ = stored_profiles(facts_of(stock, 6))
    one = stored[0]
    near = one._replace(momenta=one.momenta * (1 - 1e-5 * np.arange(24) / 24))
    difference = near.profile() - one.profile()
    wanted = one.profile() + 2000 * difference
    with pytest.raises(CheckpointError, match='sum to 3,999 without their signs, more than 1,000'):
        derive.fit([one, near], wanted)
    assert derive.fit([one, near], wanted, force=True)[1].size == pytest.approx(3999, rel=1e-3)
