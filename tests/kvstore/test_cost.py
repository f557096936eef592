"""Estimates of durations: a base and a price a unit, learned as they come."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.cost import LinearCost

SIZES = st.lists(st.tuples(st.floats(0.5, 1e4), st.floats(1e-6, 10)), min_size=1, max_size=60)


def test_base_and_price_are_found():
    """Durations of several sizes give both parts."""
    cost = LinearCost()
    for units in (1, 5, 40, 3, 100, 10):
        cost.observe(units, 0.004 + 0.0001 * units)
    assert cost.estimate(0) == pytest.approx(0.004, rel=0.01)
    assert cost.estimate(1000) == pytest.approx(0.104, rel=0.01)


def test_a_machine_that_became_slower_is_noticed():
    """Recent observations count most."""
    cost = LinearCost()
    for units in [10, 20] * 200:
        cost.observe(units, units * 1e-3)
    for units in [10, 20] * 100:
        cost.observe(units, units * 5e-3)
    assert cost.estimate(10) == pytest.approx(0.05, rel=0.1)


def test_before_anything_is_known_it_costs_nothing():
    """Nothing observed is said, and estimated as nothing."""
    assert not LinearCost().is_known
    assert LinearCost().estimate(100) == 0.0


@given(SIZES)
def test_estimates_are_never_negative_and_never_fall(observations):
    """Whatever was observed, more units do not take less time."""
    cost = LinearCost()
    for units, seconds in observations:
        cost.observe(units, seconds)
    estimates = [cost.estimate(units) for units in (0, 1, 10, 1000, 1e6)]
    assert all(estimate >= 0 for estimate in estimates)
    assert all(later >= earlier * (1 - 1e-9) for earlier, later in pairwise(estimates))
