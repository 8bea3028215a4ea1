"""The schedule of the restartable average, for any arguments."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import exp_momentum as reference

from mmema.schedules import ExpSchedule

MOMENTUM = st.floats(1e-6, 1 - 1e-6)
GAMMA = st.floats(0.01, 1e6)
STEPS = st.integers(0, 10**7)


@given(STEPS, MOMENTUM, GAMMA)
def test_between_momentum_and_one_and_as_the_reference(steps, momentum, gamma):
    value = ExpSchedule(momentum, gamma)(steps)
    assert momentum <= value <= 1
    assert value == pytest.approx(reference(steps, momentum, gamma), rel=1e-12)


@given(STEPS, st.integers(1, 1000), MOMENTUM, GAMMA)
def test_never_rises(steps, later, momentum, gamma):
    assert ExpSchedule(momentum, gamma)(steps + later) <= ExpSchedule(momentum, gamma)(steps)


@given(MOMENTUM, GAMMA)
def test_momentum_at_infinity(momentum, gamma):
    assert ExpSchedule(momentum, gamma)(math.ceil(50 * gamma)) == pytest.approx(momentum, rel=1e-12)


@given(MOMENTUM)
def test_nearly_a_copy_where_gamma_is_long(momentum):
    assert ExpSchedule(momentum, 1e9)(0) == pytest.approx(1)
