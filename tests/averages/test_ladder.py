"""The ladder of averages: names, intervals, and the choice among them from scores alone."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmema.averages.ladder import Climb
from mmema.averages.units import blend_interval
from mmema.run.horizons import AUTO, RAW, rungs_of

NAMES = [RAW, 'a', 'b', 'c', 'd', 'e']


def climb(scores, chosen='c', **options):
    """Return the choice, and the weights that were looked at in order."""
    one, asked = Climb(NAMES, chosen), []

    def score_of(name):
        asked.append(name)
        return dict(zip(NAMES, scores))[name]

    one.see(score_of, **options)
    return one.chosen, asked


@pytest.mark.parametrize(
    ('scores', 'options', 'chosen', 'asked'),
    [
        ([0, 1, 2, 3, 2, 9], {}, 'c', 'cbd'),  # two steps away nobody looks
        ([0, 1, 4, 3, 2, 9], {}, 'b', 'cbd'),
        ([0, 1, 4, 3, 5, 9], {}, 'd', 'cbd'),
        ([0, 1, 3, 3, 3, 9], {}, 'c', 'cbd'),  # a tie stays
        ([0, 1, 4, 3, 4, 9], {}, 'b', 'cbd'),  # of two that are better alike the shorter
        ([0, 1, math.nan, 3, None, 9], {}, 'c', 'cbd'),
        ([0, 1, 2, math.nan, None, 9], {}, 'b', 'cbd'),
        ([0, 1, 2, 3, 4, 9], {'last': True}, 'e', ['c', 'b', 'd', 'e', RAW]),
        ([0, 1, 2, 3, 2, 9], {'last': True}, 'c', ['c', 'b', 'd', RAW]),
        ([7, 1, 2, 3, 2, 9], {'last': True}, RAW, ['c', 'b', 'd', RAW, 'a']),
        ([7, 8, 2, 3, 2, 9], {'last': True}, 'a', ['c', 'b', 'd', RAW, 'a']),
        ([None] * 6, {'last': True}, 'c', ['c', 'b', 'd', RAW]),
        ([0, 1, 2, 3, 2, 9], {'all_of_them': True}, 'e', ['c', RAW, *'abde']),
    ],
)
def test_moves_to_the_best_of_chosen_and_neighbours(scores, options, chosen, asked):
    assert climb(scores, **options) == (chosen, list(asked))


def test_has_one_neighbour_at_either_end():
    assert climb([0, 1, 2, 3, 2, 4], 'e') == ('e', ['e', 'd'])
    assert climb([3, 1, 2, 3, 2, 1], RAW) == (RAW, [RAW, 'a'])


scores = st.lists(
    st.one_of(st.integers(0, 3), st.none(), st.just(math.nan)), min_size=6, max_size=6
)


@given(st.lists(scores, min_size=1, max_size=8))
def test_is_never_worse_than_its_neighbours_and_the_raw_weights_at_the_end(validations):
    one = Climb(NAMES, 'c')
    for number, values in enumerate(validations, 1):
        known = dict(zip(NAMES, values))
        one.see(known.__getitem__, last=number == len(validations))

    def rank(name):
        value = known[name]
        return -math.inf if value is None or math.isnan(value) else value

    place = NAMES.index(one.chosen)
    others = {RAW, *NAMES[max(place - 1, 0) : place + 2]}
    assert all(rank(one.chosen) >= rank(name) for name in others)


def test_the_rungs_of_auto_are_shares_of_the_run():
    assert [rung.name for rung in rungs_of('auto')] == ['h0_3', 'h1', 'h3', 'h10', 'h30']
    assert tuple(rung.horizon for rung in rungs_of('auto')) == AUTO


def test_names_horizons_of_ones_own():
    rungs = rungs_of(['50 updates', '1 epoch', '2.5 epochs', 0.125])
    assert [rung.name for rung in rungs] == ['h50_updates', 'h1_epoch', 'h2_5_epochs', 'h12_5']


@pytest.mark.parametrize(
    ('horizon', 'rule'),
    [
        (['1 epoch'], 'at least two horizons'),
        ([0.1, '1 epoch', 0.1], 'must differ, got 0.1 twice'),
        (['1 epoch', '1 epochs'], 'must differ'),
        (['1 epoch', 'two'], 'horizon must be'),
    ],
)
def test_refuses_a_ladder_that_is_none(horizon, rule):
    with pytest.raises(ValueError, match=rule):
        rungs_of(horizon)


@pytest.mark.parametrize(
    ('updates', 'cost'), [(1000, 4.33), (20_000, 1.73), (100_000, 0.48), (277_000, 0.18)]
)
def test_blends_of_the_ladder_for_each_update_of_a_run(updates, cost):
    blends = sum(1 / blend_interval(share * updates) for share in AUTO)
    assert blends == pytest.approx(cost, abs=0.01)


@pytest.mark.parametrize('horizon', [50, 100, 199, 250, 1000, 83_100])
def test_shares_of_old_weights_differ_by_one_per_cent_at_most(horizon):
    interval = blend_interval(horizon)
    ages = np.arange(10 * horizon)
    plain = (1 - 1 / horizon) ** (ages + 1)  # of what is as old or older in an average at its blend
    rare = (1 - interval / horizon) ** (ages // interval + 1)
    assert abs(plain - rare).max() <= 0.01
