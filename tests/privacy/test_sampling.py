from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from privacy.randomness import Randomness, SeededRandomness, SystemRandomness
from privacy.sampling import draw_steps

CHANCE = 1e-4
"""Of a test to fail by bad luck, were its seed not fixed."""


@pytest.fixture(params=[0, 64], ids=["by visitor", "by step"], autouse=True)
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privacy.sampling._FEW", request.param)


def seeded(seed: int = 0) -> Randomness:
    return SeededRandomness(seed)


def drawn(visitors: int, rate: float, steps: int, randomness: Randomness) -> np.ndarray:
    """bool (steps, visitors)."""
    result = np.zeros((steps, visitors), dtype=bool)
    for step, rows in zip(range(steps), draw_steps(visitors, rate, steps, randomness), strict=True):
        result[step, rows] = True
    return result


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    visitors=st.integers(0, 40),
    rate=st.floats(1e-3, 1.0),
    steps=st.integers(0, 30),
    seed=st.integers(0, 2**16),
)
def test_each_step_has_some_of_the_visitors_in_ascending_order(
    visitors: int, rate: float, steps: int, seed: int
) -> None:
    all_rows = list(draw_steps(visitors, rate, steps, seeded(seed)))
    assert len(all_rows) == steps
    for rows in all_rows:
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()
        assert ((rows >= 0) & (rows < visitors)).all()
        if rate == 1:
            assert len(rows) == visitors


@pytest.mark.parametrize("rate", [1.0, 0.9, 0.5, 1 / 3, 0.02])
@pytest.mark.parametrize("randomness", [seeded(1), SystemRandomness()])
def test_a_visitor_is_drawn_at_every_step_alike(rate: float, randomness: Randomness) -> None:
    steps, visitors = 12, 50_000
    table = drawn(visitors, rate, steps, randomness)
    if rate == 1:
        assert table.all()
        return
    for counts, trials in ((table.sum(axis=1), visitors), (table.sum(), visitors * steps)):
        away = (counts - rate * trials) / math.sqrt(trials * rate * (1 - rate))
        assert np.abs(away).max() < stats.norm.isf(CHANCE / steps)


@pytest.mark.parametrize("rate", [0.9, 0.5, 1 / 3])
def test_every_pattern_of_steps_is_as_likely_as_by_independent_draws(rate: float) -> None:
    """All 2^4 patterns of a visitor over 4 steps, which cross a block's border."""
    steps, visitors = 4, 400_000
    patterns = (1 << np.arange(steps)) @ drawn(visitors, rate, steps, seeded(2))
    seen = np.bincount(patterns, minlength=2**steps)
    ones = np.array([number.bit_count() for number in range(2**steps)])
    expected = visitors * rate**ones * (1 - rate) ** (steps - ones)
    assert stats.chisquare(seen, expected).pvalue > CHANCE


def test_visitors_are_drawn_independently_of_each_other() -> None:
    """The size of a batch is binomial, and so no batch has a fixed size."""
    rate, visitors, steps = 0.1, 200, 20_000
    sizes = drawn(visitors, rate, steps, seeded(3)).sum(axis=1)
    variance = visitors * rate * (1 - rate)
    assert sizes.mean() == pytest.approx(visitors * rate, abs=4 * math.sqrt(variance / steps))
    assert sizes.var() == pytest.approx(variance, rel=4 * math.sqrt(2 / steps))


def test_a_visitor_may_be_drawn_in_several_steps_of_a_block_or_in_none() -> None:
    rate, visitors, steps = 1 / 50, 100_000, 50
    times = drawn(visitors, rate, steps, seeded(4)).sum(axis=0)
    most = 8
    seen = np.bincount(times.clip(max=most), minlength=most + 1)
    exact = stats.binom(steps, rate)
    expected = visitors * np.append(exact.pmf(np.arange(most)), exact.sf(most - 1))
    assert stats.chisquare(seen, expected).pvalue > CHANCE


def test_the_same_seed_draws_the_same() -> None:
    first, again = drawn(500, 0.1, 25, seeded(5)), drawn(500, 0.1, 25, seeded(5))
    assert (first == again).all()
    assert (first != drawn(500, 0.1, 25, seeded(6))).any()
