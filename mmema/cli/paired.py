"""Statistics of paired differences, one value for each seed; all of them are SciPy's but Holm's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05


@dataclass(frozen=True)
class Summary:
    """Mean of paired differences with its intervals and p values."""

    mean: float
    t_interval: tuple  # 95 %
    bootstrap_interval: tuple  # 95 %, bias-corrected and accelerated (BCa)
    p_sign_flip: float  # of a mean of zero
    p_equivalence: float  # of a mean of the margin or more, in either direction


def summary(values, margin):
    """Return the :class:`Summary` of two or more differences; within ``margin`` none matters.

    Raises:
        ValueError: If there are fewer.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        raise ValueError(f'an interval needs at least 2 seeds, got {len(values)}')
    return Summary(
        values.mean(),
        t_interval(values),
        bootstrap_interval(values),
        sign_flip(values),
        equivalence(values, margin),
    )


def t_interval(values):
    """Return Student's 95 % interval of the mean."""
    if constant(values):
        return values[0], values[0]
    interval = stats.ttest_1samp(values, 0).confidence_interval(1 - LEVEL)
    return interval.low, interval.high


def bootstrap_interval(values):
    """Return the BCa bootstrap's 95 % interval of the mean, the same in each call."""
    if constant(values):
        return values[0], values[0]
    interval = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=1 - LEVEL,
        method='BCa',
        rng=np.random.default_rng(0),
    ).confidence_interval
    return interval.low, interval.high


def constant(values):
    """Return whether all seeds have the same value, but for rounding: nothing to estimate from."""
    return np.ptp(values) < 1e-9


def sign_flip(values):
    """Return the two-sided p of the paired permutation test; exact up to 16 seeds.

    With n seeds there are 2 ** n signs, so that p is at least 2 ** (1 - n): 0.03 with 6 seeds.
    """
    return stats.permutation_test(
        (values,),
        np.mean,
        permutation_type='samples',
        n_resamples=2**16,
        rng=np.random.default_rng(0),
    ).pvalue


def equivalence(values, margin):
    """Return the p of two one-sided t tests (TOST) that the mean is inside of ±margin."""
    if constant(values):
        return float(abs(values[0]) >= margin)
    above = stats.ttest_1samp(values, -margin, alternative='greater').pvalue
    below = stats.ttest_1samp(values, margin, alternative='less').pvalue
    return max(above, below)


def holm(p_values):
    """Return the p values adjusted for their number by Holm's step-down rule."""
    order = np.argsort(p_values)
    steps = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted
