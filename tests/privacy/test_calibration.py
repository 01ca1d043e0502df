from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.accountant import PrivacyEvent, epsilon
from privacy.calibration import UnreachableTargetError, noise_multiplier

COUNT = PrivacyEvent(20.0)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    target=st.floats(0.25, 20.0),
    rate=st.floats(0.01, 1.0),
    steps=st.integers(1, 1000),
    others=st.sampled_from([(), (COUNT,), (COUNT, PrivacyEvent(40.0, 0.5, 3))]),
)
def test_spends_the_target_and_no_more(
    target: float, rate: float, steps: int, others: tuple[PrivacyEvent, ...]
) -> None:
    """Promise 4."""
    noise = noise_multiplier(target, 1e-5, rate, steps, others)
    spent = epsilon([PrivacyEvent(noise, rate, steps), *others], 1e-5)
    assert 0.99 * target <= spent <= target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"),
    [(0.01, 1e-6, 0.1, 100), (90.0, 1e-5, 0.1, 100), (3.0, 1e-7, 0.002, 3000), (8.0, 1e-5, 1.0, 1)],
)
def test_spends_the_target_at_the_edges(
    target: float, delta: float, rate: float, steps: int
) -> None:
    noise = noise_multiplier(target, delta, rate, steps)
    assert 0.99 * target <= epsilon([PrivacyEvent(noise, rate, steps)], delta) <= target


def test_target_that_the_count_alone_exceeds_is_refused() -> None:
    with pytest.raises(
        UnreachableTargetError, match=r"privacy\.epsilon=0\.1: .*privacy\.count_noise"
    ):
        noise_multiplier(0.1, 1e-5, 0.05, 100, (COUNT,))


def test_delta_too_small_to_account_for_is_refused() -> None:
    with pytest.raises(UnreachableTargetError, match=r"privacy\.delta=1e-30"):
        noise_multiplier(1.0, 1e-30, 0.05, 100)


def test_a_target_that_hardly_any_noise_meets_stays_within_it() -> None:
    noise = noise_multiplier(1e4, 1e-5, 0.5, 3)
    assert epsilon([PrivacyEvent(noise, 0.5, 3)], 1e-5) <= 1e4


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan")])
def test_impossible_target_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match=r"privacy\.epsilon"):
        noise_multiplier(target, 1e-5, 0.05, 100)


def test_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="steps=0"):
        noise_multiplier(1.0, 1e-5, 0.05, 0)
