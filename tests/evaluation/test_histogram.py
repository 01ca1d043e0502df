from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.histogram import EXACT, NOISED, Bins, ScoreHistogram

BOTH = pytest.mark.parametrize("bins", [EXACT, NOISED], ids=["exact", "noised"])


def _examples(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    logits = random.normal(-2.5, 4.0, count).astype(np.float32)
    return logits, (random.random(count) < 0.2).astype(np.float32)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(0, 200), max_size=6))
def test_histograms_of_sites_add_up_to_that_of_their_union(seed: int, sizes: list[int]) -> None:
    logits, labels = _examples(seed, sum(sizes))
    cuts = np.cumsum(sizes, dtype=np.int64)[:-1]
    parts = zip(np.split(logits, cuts), np.split(labels, cuts), strict=True)
    summed = sum((ScoreHistogram.of(*part) for part in parts), ScoreHistogram.empty())
    union = ScoreHistogram.of(logits, labels)
    np.testing.assert_array_equal(summed.negative, union.negative)
    np.testing.assert_array_equal(summed.positive, union.positive)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 200), row=st.integers(0, 199))
def test_a_visitor_changes_one_count_by_one(seed: int, count: int, row: int) -> None:
    logits, labels = _examples(seed, count)
    whole = ScoreHistogram.of(logits, labels)
    without = ScoreHistogram.of(np.delete(logits, row % count), np.delete(labels, row % count))
    change = np.concatenate([whole.negative - without.negative, whole.positive - without.positive])
    assert np.linalg.norm(change) == 1.0
    assert change.sum() == 1.0


@BOTH
def test_logits_beyond_the_range_are_counted_in_the_outermost_bins(bins: Bins) -> None:
    logits = np.array([-np.inf, -1e30, -bins.limit, bins.limit, 1e30, np.inf], np.float32)
    histogram = ScoreHistogram.of(logits, np.array([0, 1, 0, 0, 1, 0], np.float32), bins)
    assert (histogram.negative[0], histogram.positive[0]) == (2, 1)
    assert (histogram.negative[-1], histogram.positive[-1]) == (2, 1)
    assert histogram.negative.sum() + histogram.positive.sum() == 6


@BOTH
@settings(deadline=None)
@given(share=st.floats(-1, 1))
def test_a_logit_falls_into_the_bin_whose_probability_is_nearest(bins: Bins, share: float) -> None:
    logit = np.float32(share * bins.limit)
    histogram = ScoreHistogram.of(np.array([logit]), np.ones(1, np.float32), bins)
    assert histogram.bins == bins
    (probability,) = bins.probabilities()[histogram.positive == 1]
    half_a_bin = bins.limit / bins.count
    assert abs(np.log(probability / (1 - probability)) - logit) <= half_a_bin + 1e-5


def test_a_logit_of_nan_is_refused() -> None:
    logits = np.array([0.5, np.nan, np.nan], np.float32)
    with pytest.raises(ValueError, match="2 of 3 logits are NaN"):
        ScoreHistogram.of(logits, np.zeros(3, np.float32))


@BOTH
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_count_that_is_not_finite_is_refused(bins: Bins, value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        ScoreHistogram(np.zeros(bins.count), np.full(bins.count, value))


@pytest.mark.parametrize("shape", [(399,), (25,), (0,), (), (1, 24), (24, 1)])
def test_counts_of_other_bins_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="400 or 24 bins"):
        ScoreHistogram(np.zeros(NOISED.count), np.zeros(shape))


def test_either_label_has_the_same_bins() -> None:
    with pytest.raises(ValueError, match="as many bins for either label"):
        ScoreHistogram(np.zeros(NOISED.count), np.zeros(EXACT.count))


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.floats(0.01, 1e9),
    centre=st.floats(-2, 3),
    whole=st.booleans(),
)
def test_without_noise_below_zero_is_the_nearest_histogram_of_the_same_totals(
    seed: int, size: float, centre: float, whole: bool
) -> None:
    """Such a point p is nearest to c if and only if (c - p)(v - p) <= 0 for each corner v.

    That is the first-order condition of the convex problem; the corners hold all in one bin.
    """
    counts = size * np.random.default_rng(seed).normal(centre, 1, (2, NOISED.count))
    noised = ScoreHistogram(*(np.rint(counts) if whole else counts))
    found = noised.without_noise_below_zero()
    for before, after in [(noised.negative, found.negative), (noised.positive, found.positive)]:
        assert (after >= 0).all()
        total, scale = max(before.sum(), 0.0), np.abs(before).max()
        assert after.sum() == pytest.approx(total, abs=1e-12 * scale)
        if (before >= 0).all():
            assert after.tobytes() == before.tobytes()
        elif total > 0:
            away = before - after
            assert (total * away - away @ after).max() <= 1e-12 * scale**2
    again = found.without_noise_below_zero()
    assert again.negative.tobytes() == found.negative.tobytes()
    assert again.positive.tobytes() == found.positive.tobytes()


def test_without_noise_below_zero_by_hand() -> None:
    counts = np.zeros(NOISED.count)
    counts[:4] = 6, 4, 1, -4
    found = ScoreHistogram(counts, -counts).without_noise_below_zero()
    # 1.5 off each of the two that stay: 4.5 + 2.5 = 6 + 4 + 1 - 4.
    assert found.negative.tolist() == [4.5, 2.5] + [0.0] * 22
    assert not found.positive.any()
