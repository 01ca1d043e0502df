"""Promise 5, the statistics: the bound is below the true epsilon, and not far below."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from privacy.accountant import PrivacyEvent, epsilon
from privacy.audit import audited_epsilon, epsilon_lower_bound, p_value

CONFIDENCE = 0.95
REPEATS = 200


def most_false_alarms(repeats: int) -> int:
    """More in `repeats` audits speak against their confidence, itself with 99.9 % confidence."""
    return int(binom.ppf(0.999, repeats, 1 - CONFIDENCE))


@pytest.mark.parametrize(
    ("canaries", "guesses", "right", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_published_bounds(
    canaries: int, guesses: int, right: int, delta: float, published: float
) -> None:
    """Steinke et al. 2023, appendix D and section 7."""
    bound = epsilon_lower_bound(canaries, guesses, right, delta, CONFIDENCE)
    assert bound == pytest.approx(published, abs=1e-3)


@given(st.integers(1, 500), st.floats(0.5, 0.999))
def test_all_guesses_right_without_delta(guesses: int, confidence: float) -> None:
    """Then all are right with probability (1 / (1 + exp(-epsilon)))^guesses."""
    bound = epsilon_lower_bound(guesses, guesses, guesses, 0.0, confidence)
    chance = (1 - confidence) ** (1 / guesses)
    assert bound == pytest.approx(max(0.0, math.log(chance / (1 - chance))), abs=1e-6)


@settings(max_examples=200)
@given(
    st.integers(1, 400),
    st.floats(0, 1),
    st.floats(0, 8),
    st.floats(0, 2),
    st.sampled_from([0.0, 1e-6, 1e-4]),
)
def test_a_weaker_guarantee_is_harder_to_refute(
    guesses: int, share: float, epsilon: float, more: float, delta: float
) -> None:
    """So that all epsilons below the bound are refuted, not only those where it was looked."""
    right = round(share * guesses)
    strong, weak = (p_value(1000, guesses, right, e, delta) for e in (epsilon, epsilon + more))
    assert strong <= weak + 1e-9 or weak > 0.5
    assert p_value(1000, guesses, right, epsilon, delta) <= p_value(
        1000, guesses, right, epsilon, 10 * delta + 1e-9
    )


def randomised_response(
    true_epsilon: float, canaries: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Each canary's coin, told truly with probability 1 / (1 + exp(-epsilon))."""
    took_part = rng.random(canaries) < 0.5
    true = rng.random(canaries) < 1 / (1 + math.exp(-true_epsilon))
    return (took_part == true) + 0.1 * rng.random(canaries), took_part


@pytest.mark.parametrize("true_epsilon", [0.5, 2.0])
def test_randomised_response_is_bounded_tightly(true_epsilon: float) -> None:
    rng = np.random.default_rng(1)
    bounds = [
        audited_epsilon(*randomised_response(true_epsilon, 2000, rng), 1000, 0.0, CONFIDENCE)
        for _ in range(1000)
    ]
    alarms = sum(bound > true_epsilon for bound in bounds)
    assert 1 <= alarms <= most_false_alarms(1000)
    assert np.mean(bounds) > true_epsilon - 0.3


@pytest.mark.parametrize("noise", [0.5, 1.5])
def test_a_gaussian_release_is_bounded(noise: float) -> None:
    """One coordinate a canary, 1 where it took part, with noise: the strongest white-box scores."""
    rng, delta = np.random.default_rng(2), 1e-5
    true_epsilon = epsilon([PrivacyEvent(noise)], delta)
    bounds = []
    for _ in range(REPEATS):
        took_part = rng.random(1000) < 0.5
        scores = took_part + noise * rng.standard_normal(1000)
        bounds.append(audited_epsilon(scores, took_part, 200, delta, CONFIDENCE))
    assert max(bounds) < true_epsilon
    assert np.mean(bounds) > 0.25 * true_epsilon


def test_scores_without_a_trace_of_the_canaries_prove_nothing() -> None:
    rng = np.random.default_rng(3)
    bounds = [
        audited_epsilon(rng.random(500), rng.random(500) < 0.5, 100, 1e-5, CONFIDENCE)
        for _ in range(REPEATS)
    ]
    assert sum(bound > 0 for bound in bounds) <= most_false_alarms(REPEATS)
    same = np.zeros(500)
    assert audited_epsilon(same, rng.random(500) < 0.5, 100, 1e-5, CONFIDENCE) < 0.5


def test_high_scores_mean_in() -> None:
    took_part = np.arange(400) % 2 == 0
    scores = np.where(took_part, 1.0, -1.0)
    assert audited_epsilon(scores, took_part, 200, 1e-5, CONFIDENCE) > 4
    assert audited_epsilon(-scores, took_part, 200, 1e-5, CONFIDENCE) == 0


@pytest.mark.parametrize(
    ("scores", "guesses", "message"),
    [
        ([0.0, math.nan], 2, "scores: must be finite"),
        ([0.0, 1.0], 1, "guesses=1: must be even and from 2 to 2"),
        ([0.0, 1.0], 4, "guesses=4: must be even"),
        ([0.0, 1.0, 2.0], 2, r"scores \(3,\), took_part \(2,\)"),
    ],
)
def test_a_bad_audit_is_refused(scores: list[float], guesses: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audited_epsilon(np.array(scores), np.array([True, False]), guesses, 1e-5, CONFIDENCE)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="right=3, guesses=2, canaries=9"):
        p_value(9, 2, 3, 1.0, 0.0)
    with pytest.raises(ValueError, match="epsilon=-1"):
        p_value(9, 2, 1, -1.0, 0.0)
    with pytest.raises(ValueError, match="confidence=1"):
        epsilon_lower_bound(9, 2, 1, 0.0, 1.0)
