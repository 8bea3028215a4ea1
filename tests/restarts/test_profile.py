import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import exp_momentum
from torch import nn

from mmema import ExpMomentumEMA, RestartableExpMomentumEMA
from mmema.restarts.planner import Restart
from mmema.restarts.profile import momenta, shares


def make(cls=RestartableExpMomentumEMA, **kwargs):
    return cls(nn.Linear(1, 1), **{'momentum': 0.1, 'gamma': 3, **kwargs})


def planned(restarts):
    return [Restart(at, at, values=what) for at, what in sorted(restarts.items())]


def test_momenta_by_hand():
    restarts = planned({3: dict(steps=2, momentum=0.05), 6: dict(steps=0)})
    values = momenta(make(), 8, restarts, begin=1)
    counters = [None, 0, 1, 2, 3, 4, 0, 1]
    expected = [
        1.0 if not s else exp_momentum(s, 0.1 if i < 3 else 0.05, 3) for i, s in enumerate(counters)
    ]
    assert values.tolist() == expected
    assert values.dtype == np.float64


def test_two_restarts_before_one_update():
    # As with accumulated gradients: the iterations 8 and 10 are before the update with index 2.
    restarts = [Restart(8, 2, values=dict(steps=3)), Restart(10, 2, values=dict(momentum=0.05))]
    values = momenta(make(), 4, restarts)
    assert values.tolist() == [
        1,
        *(exp_momentum(s, m, 3) for s, m in [(1, 0.1), (3, 0.05), (4, 0.05)]),
    ]


def test_a_restart_of_the_weights_alone_leaves_the_schedule():
    restarts = [Restart(2, 2, values=dict(source='ema'))]
    assert momenta(make(), 5, restarts).tolist() == momenta(make(), 5).tolist()


def test_interval():
    values = momenta(make(ExpMomentumEMA, interval=2), 5)
    assert values.tolist() == [1, 0, exp_momentum(2, 0.1, 3), 0, exp_momentum(4, 0.1, 3)]


restart = st.one_of(
    st.builds(lambda s: dict(steps=s), st.integers(0, 30)),
    st.builds(lambda m: dict(momentum=m), st.floats(0.01, 0.9)),
)


@settings(max_examples=30, deadline=None)
# A soft restart before the first update would keep the random weights that the average has then.
@given(st.integers(1, 40), st.dictionaries(st.integers(1, 39), restart, max_size=3))
def test_shares_are_those_of_the_averaged_model(updates, restarts):
    # Brute force: source i is the i-th unit vector, so the average lists the shares.
    source = nn.Linear(updates, 1, bias=False).double()
    ema = RestartableExpMomentumEMA(source, momentum=0.1, gamma=5)
    for i in range(updates):
        if i in restarts:
            ema.restart(**{'steps': None, **restarts[i]})
        with torch.no_grad():
            source.weight.zero_()[0, i] = 1
        ema.update_parameters(source)
    share = shares(momenta(make(gamma=5), updates, planned(restarts)))
    np.testing.assert_allclose(share, ema.module.weight[0].numpy(), rtol=1e-12, atol=1e-15)
    assert share.sum() == pytest.approx(1)


def test_nothing_before_a_copy():
    share = shares(momenta(make(), 100, planned({60: dict(steps=0)})))
    assert (share[:60] == 0).all() and share[60] > 0
