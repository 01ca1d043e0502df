from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.accountant import PrivacyEvent, epsilon
from privacy.projection import affordable_rounds, epsilon_after

COUNT = PrivacyEvent(20.0)
ROUND = (PrivacyEvent(1.2, 0.04, 25), PrivacyEvent(30.0))


def test_costs_what_the_rounds_then_cost() -> None:
    assert epsilon_after(7, ROUND, [COUNT], 1e-5) == epsilon([COUNT, *ROUND * 7], 1e-5)
    assert epsilon_after(0, ROUND, [COUNT], 1e-5) == epsilon([COUNT], 1e-5)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(budget=st.floats(0.5, 10.0), noise=st.floats(0.8, 3.0))
def test_one_round_more_than_affordable_exceeds_the_budget(budget: float, noise: float) -> None:
    each_round = (PrivacyEvent(noise, 0.05, 20),)
    rounds = affordable_rounds(each_round, [COUNT], budget, 1e-5, at_most=10_000)
    assert epsilon_after(rounds, each_round, [COUNT], 1e-5) <= budget
    assert epsilon_after(rounds + 1, each_round, [COUNT], 1e-5) > budget


def test_nothing_is_affordable_without_budget_or_without_noise() -> None:
    spent = [PrivacyEvent(1.0, 0.1, 1000)]
    assert affordable_rounds(ROUND, spent, 1.0, 1e-5) == 0
    assert affordable_rounds([PrivacyEvent(0.0)], [], 1.0, 1e-5) == 0


def test_free_rounds_have_no_end() -> None:
    assert affordable_rounds([], [COUNT], 1.0, 1e-5, at_most=50) == 50


def test_negative_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds=-1"):
        epsilon_after(-1, ROUND, [], 1e-5)
