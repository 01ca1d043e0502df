from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.histogram import (
    BINS,
    HIGHEST_LOGIT,
    LOWEST_LOGIT,
    ScoreHistogram,
    bin_probabilities,
)


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


def test_logits_beyond_the_range_are_counted_in_the_outermost_bins() -> None:
    logits = np.array([-np.inf, -1e30, LOWEST_LOGIT, HIGHEST_LOGIT, 1e30, np.inf], np.float32)
    histogram = ScoreHistogram.of(logits, np.array([0, 1, 0, 0, 1, 0], np.float32))
    assert (histogram.negative[0], histogram.positive[0]) == (2, 1)
    assert (histogram.negative[-1], histogram.positive[-1]) == (2, 1)
    assert histogram.negative.sum() + histogram.positive.sum() == 6


@settings(deadline=None)
@given(logit=st.floats(LOWEST_LOGIT, HIGHEST_LOGIT, width=32))
def test_a_logit_falls_into_the_bin_whose_probability_is_nearest(logit: float) -> None:
    histogram = ScoreHistogram.of(np.array([logit], np.float32), np.ones(1, np.float32))
    (probability,) = bin_probabilities()[histogram.positive == 1]
    half_a_bin = (HIGHEST_LOGIT - LOWEST_LOGIT) / BINS / 2
    assert abs(np.log(probability / (1 - probability)) - logit) <= half_a_bin + 1e-5


def test_a_logit_of_nan_is_refused() -> None:
    logits = np.array([0.5, np.nan, np.nan], np.float32)
    with pytest.raises(ValueError, match="2 of 3 logits are NaN"):
        ScoreHistogram.of(logits, np.zeros(3, np.float32))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.zeros(BINS - 1), "400 bins"),
        (np.full(BINS, np.nan), "not finite"),
        (np.full(BINS, np.inf), "not finite"),
    ],
)
def test_counts_that_are_no_histogram_are_refused(counts: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreHistogram(np.zeros(BINS), counts)
