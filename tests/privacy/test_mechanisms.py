from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from privacy.accountant import PrivacyEvent
from privacy.mechanisms import GaussianCount, GaussianHistogram
from privacy.randomness import Randomness, SeededRandomness, SystemRandomness


@pytest.fixture(params=["seeded", "system"])
def randomness(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Randomness:
    """Either source; the system's keys are those of a fixed sequence."""
    if request.param == "seeded":
        return SeededRandomness(0)
    monkeypatch.setattr("privacy.randomness.urandom", np.random.default_rng(0).bytes)
    return SystemRandomness()


def probabilities(whole: npt.NDArray[np.int64], noise: float) -> npt.NDArray[np.float64]:
    """Of each whole number as noise; from the side of the smaller tail, which keeps its digits."""
    size = np.abs(whole)
    return np.asarray(stats.norm.sf((size - 0.5) / noise) - stats.norm.sf((size + 0.5) / noise))


def is_noise_of(draws: npt.NDArray[np.int64], noise: float) -> bool:
    last = int(3.5 * noise)
    whole = np.arange(-last, last + 1)
    inside = np.array([(draws == k).sum() for k in whole])
    expected = len(draws) * probabilities(whole, noise)
    rest = len(draws) - expected.sum()
    fit = stats.chisquare([*inside, len(draws) - inside.sum()], [*expected, rest])
    return bool(fit.pvalue > 1e-4)


@pytest.mark.parametrize("noise", [1.0, 3.0, 20.0])
def test_histogram_noise_is_what_the_event_says(randomness: Randomness, noise: float) -> None:
    histogram = GaussianHistogram(noise)
    counts = np.arange(300_000).reshape(2, -1)
    added = (histogram.release(counts, randomness) - counts).ravel()
    assert is_noise_of(added, noise)
    assert not is_noise_of(added, 0.98 * noise)
    assert not is_noise_of(added, 1.02 * noise)
    assert added.mean() == pytest.approx(0, abs=4 * noise / math.sqrt(len(added)))
    assert histogram.event == PrivacyEvent(noise)


def test_count_noise_is_what_the_event_says(randomness: Randomness) -> None:
    count = GaussianCount(20.0)
    released = [count.release(5000, randomness) for _ in range(5_000)]
    # Four standard errors.
    assert np.std(released) == pytest.approx(math.sqrt(400 + 1 / 12), rel=0.04)
    assert np.mean(released) == pytest.approx(5000, abs=1.2)
    assert all(number == round(number) for number in released)
    assert count.event == PrivacyEvent(20.0)


@pytest.mark.parametrize("noise", [0.3, 0.5, 1.0, 3.0, 40.0])
def test_the_event_bounds_what_rounded_noise_spends(noise: float) -> None:
    """Exact delta of neighbouring counts, against that of real Gaussian noise in closed form."""
    whole = np.arange(-int(30 * noise) - 3, int(30 * noise) + 4)
    here, there = probabilities(whole, noise), probabilities(whole - 1, noise)
    for epsilon in [*np.linspace(0, 4 / noise, 60), 0.5 / noise**2]:
        spent = np.maximum(here - math.exp(epsilon) * there, 0).sum()
        # Balle and Wang (2018), theorem 8.
        bound = stats.norm.cdf(1 / (2 * noise) - epsilon * noise) - math.exp(
            epsilon
        ) * stats.norm.cdf(-1 / (2 * noise) - epsilon * noise)
        assert spent <= bound + 1e-14


def test_at_least_one_visitor(randomness: Randomness) -> None:
    released = [GaussianCount(20.0).release(0, randomness) for _ in range(100)]
    assert min(released) == 1
    assert max(released) > 1


def test_a_histogram_keeps_shape_type_and_what_is_below_zero(randomness: Randomness) -> None:
    counts = np.zeros((2, 50), np.int32)
    released = GaussianHistogram(5.0).release(counts, randomness)
    assert released.shape == (2, 50)
    assert released.dtype == np.int64
    assert (released < 0).any()
    assert (counts == 0).all()
    assert GaussianHistogram(5.0).release(np.zeros((2, 0), np.int64), randomness).shape == (2, 0)


def test_bins_are_noised_apart(randomness: Randomness) -> None:
    released = GaussianHistogram(5.0).release(np.zeros((20_000, 2), np.int64), randomness) / 5
    again = GaussianHistogram(5.0).release(np.zeros((20_000, 2), np.int64), randomness) / 5
    bound = 5 / math.sqrt(20_000)
    assert abs((released[:, 0] * released[:, 1]).mean()) < bound
    assert abs((released * again).mean()) < bound


def test_without_noise_all_is_as_counted(randomness: Randomness) -> None:
    counts = np.array([0, 3, 2**40])
    assert (GaussianHistogram(0.0).release(counts, randomness) == counts).all()
    assert GaussianCount(0.0).release(7, randomness) == 7
    assert GaussianHistogram(0.0).event == GaussianCount(0.0).event == PrivacyEvent(0.0)


@pytest.mark.parametrize("counts", [np.array([1.0, 2.5]), np.array([True])])
def test_counts_that_are_not_whole_are_refused(counts: npt.NDArray[np.int64]) -> None:
    with pytest.raises(TypeError, match="must be integers"):
        GaussianHistogram(1.0).release(counts, SystemRandomness())


@pytest.mark.parametrize("noise", [-1.0, math.nan, math.inf, 1e10])
def test_impossible_noise_is_refused(noise: float) -> None:
    with pytest.raises(ValueError, match=r"privacy\.count_noise"):
        GaussianCount(noise)
    with pytest.raises(ValueError, match="histogram noise"):
        GaussianHistogram(noise)
