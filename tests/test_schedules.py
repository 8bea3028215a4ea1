"""The schedules against numbers worked out by hand and against the published formulas."""

import math

import numpy as np
import pytest

from mmema import schedules


def test_exp_momentum_is_the_decay_of_yolov5():
    for updates in (1, 2, 100, 2000, 10**5):
        decay = 0.9999 * (1 - math.exp(-updates / 2000))
        momentum = schedules.ExpSchedule(momentum=0.0001, gamma=2000)(updates - 1)
        assert momentum == pytest.approx(1 - decay, rel=1e-12)
    assert schedules.ExpSchedule(0.1, 10)(0) == pytest.approx(0.9143536762)  # 0.9 e^-0.1 + 0.1


def test_constant_momentum():
    assert [schedules.ConstantSchedule(0.3)(s) for s in (0, 1, 10**6)] == [0.3] * 3


@pytest.mark.parametrize(
    ('steps', 'offset', 'expected'),
    [(0, 1, 9 / 11), (1, 1, 9 / 12), (0, 0, 9 / 10), (89, 1, 0.09), (90, 0, 0.09), (890, 0, 0.01)],
)
def test_threshold_momentum_by_hand(steps, offset, expected):
    got = schedules.ThresholdSchedule(momentum=0.001, offset=offset)(steps)
    assert got == pytest.approx(expected)
    n = steps + offset
    assert got == pytest.approx(1 - min(0.999, (1 + n) / (10 + n)))  # TensorFlow's words


def test_threshold_momentum_stops_at_its_floor():
    # 9 / (10 + n) = 0.01 at n = 890
    assert schedules.ThresholdSchedule(0.01, offset=0)(890) == pytest.approx(0.01)
    assert schedules.ThresholdSchedule(0.01, offset=0)(889) > 0.01
    assert schedules.ThresholdSchedule(0.01, offset=0)(891) == 0.01
    assert schedules.ThresholdSchedule(0.01, factor=100)(1) == pytest.approx(99 / 102)


def test_annealing_momentum_by_hand():
    assert schedules.AnnealingSchedule(0.01, gamma=100)(1) == pytest.approx(100 / 101)
    assert schedules.AnnealingSchedule(0.01, gamma=100)(300) == 0.25
    assert schedules.AnnealingSchedule(0.01, gamma=100)(9899) > 0.01
    assert schedules.AnnealingSchedule(0.01, gamma=100)(9901) == 0.01


def test_power_ramp_reaches_what_its_author_says():
    # "gamma=1, power=2/3 ... decay factor 0.999 at 31.6K steps, 0.9999 at 1M steps"; "power=3/4
    # ... 0.999 at 10K steps, 0.9999 at 215.4k steps"
    def ramp(steps, power):
        return schedules.PowerRampSchedule(1e-9, gamma=1, power=power)(steps)

    assert ramp(31_600, 2 / 3) == pytest.approx(1e-3, rel=2e-3)
    assert ramp(1_000_000, 2 / 3) == pytest.approx(1e-4, rel=2e-3)
    assert ramp(10_000, 3 / 4) == pytest.approx(1e-3, rel=2e-3)
    assert ramp(215_400, 3 / 4) == pytest.approx(1e-4, rel=2e-3)


def test_power_ramp_endpoints_floor_and_ceiling():
    assert schedules.PowerRampSchedule(0.01, gamma=1, power=2 / 3)(0) == 1.0
    assert schedules.PowerRampSchedule(0.01, gamma=5, power=0.5)(15) == 0.5  # (1 + 3) ** -0.5
    assert schedules.PowerRampSchedule(0.01, gamma=1, power=1)(10**9) == 0.01
    assert schedules.PowerRampSchedule(0.01, 1, 1, max_momentum=0.3)(0) == 0.3
    # as in diffusers, the ceiling (their min_decay) wins over the floor (their decay)
    assert schedules.PowerRampSchedule(0.5, 1, 1, max_momentum=0.3)(10**9) == 0.3


def test_power_ramp_with_power_one_is_the_mean():
    mean = 0.0
    for steps, value in enumerate([4.0, 2.0, 9.0, 1.0]):
        mean += schedules.PowerRampSchedule(1e-9, gamma=1, power=1)(steps) * (value - mean)
    assert mean == pytest.approx(4.0)


def power_function(gamma):
    return schedules.PowerFunctionSchedule(schedules.power_function_sigma_rel(gamma))


def test_power_function_profile_is_the_power_function():
    # Response of the average after T updates to the value at t: about (gamma + 1) t^gamma / T^...
    gamma, total = 3.0, 400
    weights = np.zeros(total)
    for steps in range(total):
        momentum = power_function(gamma)(steps)
        weights *= 1 - momentum
        weights[steps] = momentum
    edges = np.arange(total + 1) / total
    assert weights == pytest.approx(np.diff(edges ** (gamma + 1)), rel=1e-9)
    middles = np.arange(total) + 0.5
    mean = (weights * middles).sum()
    width = math.sqrt((weights * (middles - mean) ** 2).sum()) / total
    assert width == pytest.approx(schedules.power_function_sigma_rel(gamma), rel=1e-4)


def test_power_function_momentum_by_hand():
    assert power_function(6.94)(0) == 1.0
    assert power_function(2)(1) == pytest.approx(1 - 0.5**3)
    assert power_function(0)(3) == pytest.approx(0.25)  # the mean


@pytest.mark.parametrize('sigma_rel', [0.001, 0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.28])
def test_power_function_gamma_is_the_root_of_the_cubic(sigma_rel):
    # (g + 2)^2 (g + 3) = (g + 1) / sigma_rel^2, multiplied out
    t = sigma_rel**-2
    root = np.roots([1, 7, 16 - t, 12 - t]).real.max()
    assert schedules.power_function_gamma(sigma_rel) == pytest.approx(root, rel=1e-9)


def test_power_function_widths_of_the_paper():
    assert schedules.power_function_gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert schedules.power_function_gamma(0.10) == pytest.approx(6.94, abs=0.005)
    widest = schedules.power_function_sigma_rel(0)
    assert widest == pytest.approx(1 / math.sqrt(12))
    assert schedules.power_function_gamma(widest) == pytest.approx(0, abs=1e-9)


def test_debiased_momentum_is_adams_correction():
    decay, zero_start, average = 0.9, 0.0, 0.0
    for steps, value in enumerate([5.0, -1.0, 3.0, 8.0, 2.0]):
        zero_start = decay * zero_start + (1 - decay) * value
        debiased = zero_start / (1 - decay ** (steps + 1))
        average += schedules.DebiasedSchedule(0.1)(steps) * (value - average)
        assert average == pytest.approx(debiased)
    assert schedules.DebiasedSchedule(0.1)(0) == pytest.approx(1)
    assert schedules.DebiasedSchedule(0.1)(10**6) == pytest.approx(0.1)
    # 1 - (1 - m)^2 = 2e-12 - 1e-24 in exact arithmetic; (1 - 1e-12) ** 2 would lose four digits
    assert schedules.DebiasedSchedule(1e-12)(1) == pytest.approx(0.5, rel=1e-11)


def test_half_life():
    momentum = schedules.momentum_of_half_life(1000)
    assert (1 - momentum) ** 1000 == pytest.approx(0.5, rel=1e-9)
    assert momentum == pytest.approx(6.929070095e-4)  # 1 - 2 ** -0.001


def test_the_uniform_schedule_is_the_mean():
    mean = 0.0
    for steps, value in enumerate([5.0, -1.0, 3.0, 9.0]):
        mean += schedules.UniformSchedule()(steps) * (value - mean)
    assert mean == 4.0  # 16 / 4


@pytest.mark.parametrize(
    ('make', 'error', 'message'),
    [
        (
            lambda: schedules.ExpSchedule(momentum=1),
            ValueError,
            r'momentum must be in \(0, 1\), got 1',
        ),
        (lambda: schedules.ExpSchedule(momentum=None), TypeError, 'momentum must be a number'),
        (lambda: schedules.ExpSchedule(gamma=None), TypeError, 'gamma must be a number, got None'),
        (lambda: schedules.ExpSchedule(gamma='2'), TypeError, "gamma must be a number, got '2'"),
        (lambda: schedules.ThresholdSchedule(factor=1), ValueError, 'factor must be above 1'),
        (
            lambda: schedules.ThresholdSchedule(offset=2),
            ValueError,
            'offset must be one of',
        ),
        (
            lambda: schedules.PowerRampSchedule(max_momentum=0),
            ValueError,
            'must be in',
        ),
        (lambda: schedules.PowerFunctionSchedule(0.3), ValueError, r'sigma_rel .* 0.2887'),
        (lambda: schedules.UniformSchedule(0.1), TypeError, 'argument'),
    ],
)
def test_a_schedule_checks_its_fields(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_schedule_is_a_value():
    assert schedules.ExpSchedule(0.1, 5) == schedules.ExpSchedule(0.1, 5)
    with pytest.raises(AttributeError):
        schedules.ExpSchedule().momentum = 0.5
    names = [kind.name for kind in schedules.Schedule.__subclasses__()]
    assert len(names) == len(set(names)) == 8 and all(names)
    assert schedules.ThresholdSchedule.live_fields() == ('momentum', 'factor')
