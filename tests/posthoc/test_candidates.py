"""The averages that `choose` compares, and that each of their mixtures is solved for once."""

from dataclasses import replace

import numpy as np
import pytest

from mmema.posthoc import derive
from mmema.posthoc.candidates import candidates
from mmema.posthoc.facts import facts_in
from mmema.posthoc.profiles import Stored, stored_profiles


def mean_age(profile):
    """Return how many updates ago the weights in an average were taken, on average."""
    return float(profile @ np.arange(len(profile))[::-1])


def main_average(facts, momentum, interval, total):
    """Return the main average of a run of so many updates, blended at every `interval`-th."""
    hook = dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=momentum)
    facts = replace(
        facts,
        iteration=total,
        config=dict(custom_hooks=[dict(hook, interval=interval)]),
        run=replace(facts.run, iterations=total),
    )
    steps = np.arange(total)
    momenta = np.where(steps % interval == 0, momentum, 0.0)
    momenta[0] = 1
    return Stored(facts, 'ema', total, momenta)


@pytest.mark.parametrize('interval', [1, 10])
def test_horizons_are_those_of_an_average_with_the_interval_of_the_run(stock, interval):
    total = 20_001
    main = main_average(facts_in(stock.file(6)), 0.02, interval, total)
    # A constant average of m has a mean age of (1 - m) / m blends: 49 of the run's own.
    assert mean_age(main.profile()) == pytest.approx(49 * interval, rel=1e-3)
    found = {one.label: one for one in candidates([main], [])}
    for factor in (0.5, 2, 4, 8):
        momentum = 0.02 * factor
        age = mean_age(found[f'momentum {momentum:.4g}'].wanted)
        assert age == pytest.approx((1 - momentum) / momentum * interval, rel=1e-3)
    later = {one.label: one for one in candidates([main], [2001])}
    wanted = later['momentum 0.02, restarted at epoch 2001'].wanted
    assert (
        not wanted[:8004].any()
        and wanted[8004 if interval == 1 else 8010] > 0
        and wanted.sum() == pytest.approx(1)
    )


def test_each_mixture_is_solved_for_once(stock, monkeypatch):
    solved = []
    fit_profiles = derive.fit_profiles
    monkeypatch.setattr(
        derive, 'fit_profiles', lambda *args: solved.append(args[1]) or fit_profiles(*args)
    )
    stored, _ = stored_profiles([facts_in(stock.file(epoch)) for epoch in (4, 5, 6)])
    (one,) = (c for c in candidates(stored, [4]) if c.label == 'mean of the last 2 raw weights')
    made = one.solved().made()
    assert len(solved) == 1
    assert made.meta['mmema']['error'] < 1e-9
