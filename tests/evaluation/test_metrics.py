from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score
from sklearn.metrics import roc_curve as exact_roc

from evaluation.histogram import EXACT, NOISED, Bins, ScoreHistogram
from evaluation.metrics import calibration_curve, metrics, roc_curve

HALF_A_BIN = 0.025


def _draw(
    seed: int, examples: int, centre: float, spread: float, gain: float
) -> tuple[np.ndarray, np.ndarray]:
    """Normal logits, and labels of which they know a share: gain 1 is calibrated, 0 is noise."""
    random = np.random.default_rng(seed)
    logits = random.normal(centre, spread, examples).astype(np.float32)
    true_logits = centre + gain * (logits - centre)
    labels = (random.random(examples) < 1 / (1 + np.exp(-true_logits))).astype(np.float32)
    labels[:2] = 0, 1
    return logits, labels


any_model = {
    "seed": st.integers(0, 2**32 - 1),
    "examples": st.integers(2, 2000),
    "centre": st.floats(-4, 0),
    "spread": st.floats(0, 2.0),
    "gain": st.floats(0, 1.5),
}
realistic_model = {
    "seed": st.integers(0, 2**32 - 1),
    "examples": st.integers(4000, 8000),
    "centre": st.floats(-3, 0),
    "spread": st.floats(0.8, 2.0),
    "gain": st.floats(0.3, 1.5),
}


@settings(deadline=None)
@given(**realistic_model)
def test_metrics_of_the_histogram_are_those_of_the_scores(
    seed: int, examples: int, centre: float, spread: float, gain: float
) -> None:
    logits, labels = _draw(seed, examples, centre, spread, gain)
    found = metrics(ScoreHistogram.of(logits, labels))
    assert found.examples == examples
    assert found.base_rate == pytest.approx(labels.mean(), rel=1e-6)
    assert found.roc_auc == pytest.approx(roc_auc_score(labels, logits), abs=0.002)
    assert found.pr_auc == pytest.approx(average_precision_score(labels, logits), abs=0.005)


@settings(deadline=None)
@given(**any_model)
def test_what_the_bins_hide_is_bounded(
    seed: int, examples: int, centre: float, spread: float, gain: float
) -> None:
    logits, labels = _draw(seed, examples, centre, spread, gain)
    histogram = ScoreHistogram.of(logits, labels)
    found = metrics(histogram)
    ties = histogram.positive @ histogram.negative
    pairs = histogram.positive.sum() * histogram.negative.sum()
    exact = roc_auc_score(labels, logits)
    assert found.roc_auc == pytest.approx(exact, abs=ties / pairs / 2 + 1e-9)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert found.log_loss == pytest.approx(log_loss(labels, probabilities), abs=HALF_A_BIN + 1e-6)
    assert 0 < found.pr_auc <= 1


def test_average_precision_has_no_bias_from_the_bins() -> None:
    """A few visitors, as at a small site, where each positive weighs much."""
    errors = []
    for seed in range(200):
        logits, labels = _draw(seed, examples=500, centre=-2.5, spread=1.0, gain=1.0)
        exact = average_precision_score(labels, logits)
        errors.append(metrics(ScoreHistogram.of(logits, labels)).pr_auc - exact)
    assert abs(np.mean(errors)) < 0.002


def test_log_loss_has_no_bias_from_the_bins() -> None:
    logits, labels = _draw(seed=1, examples=200_000, centre=-2.5, spread=1.0, gain=1.0)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    found = metrics(ScoreHistogram.of(logits, labels))
    assert found.log_loss == pytest.approx(log_loss(labels, probabilities), abs=1e-4)


def test_average_of_the_sites_auc_is_not_the_auc_of_all() -> None:
    """Each site ranks its own visitors perfectly, yet one site's negatives outrank the other's."""
    low = ScoreHistogram.of(np.array([-6, -4], np.float32), np.array([0, 1], np.float32))
    high = ScoreHistogram.of(np.array([1, 3], np.float32), np.array([0, 1], np.float32))
    assert metrics(low).roc_auc == metrics(high).roc_auc == 1.0
    assert metrics(low + high).roc_auc == 0.75


def test_normalised_entropy_is_one_for_a_model_that_predicts_the_base_rate() -> None:
    labels = (np.arange(10_000) < 800).astype(np.float32)
    logits = np.full(10_000, math.log(0.08 / 0.92), np.float32)
    found = metrics(ScoreHistogram.of(logits, labels))
    assert found.normalised_entropy == pytest.approx(1.0, abs=1e-3)
    assert found.roc_auc == 0.5
    assert found.pr_auc == pytest.approx(0.08, abs=2e-4)
    assert found.expected_calibration_error == pytest.approx(0.0, abs=0.002)


def test_calibration_error_sees_a_model_that_predicts_twice_the_rate() -> None:
    random = np.random.default_rng(2)
    rate = random.uniform(0.02, 0.2, 100_000)
    labels = (random.random(100_000) < rate).astype(np.float32)
    error = []
    for factor in (1, 2):
        logits = np.log(factor * rate / (1 - factor * rate)).astype(np.float32)
        error.append(metrics(ScoreHistogram.of(logits, labels)).expected_calibration_error)
    assert error[0] < 0.005
    assert error[1] == pytest.approx(rate.mean(), abs=0.005)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_alone_leaves_nothing_to_judge_by(label: float) -> None:
    histogram = ScoreHistogram.of(np.zeros(5, np.float32), np.full(5, label, np.float32))
    found = metrics(histogram)
    assert (found.examples, found.base_rate) == (5, label)
    assert all(math.isnan(value) for value in astuple(found)[2:])


def test_noise_that_leaves_less_than_one_example_leaves_nothing_to_judge_by() -> None:
    five, hardly_any = np.zeros(EXACT.count), np.zeros(EXACT.count)
    five[200], hardly_any[100] = 5.0, 1e-17
    for histogram in (ScoreHistogram(five, hardly_any), ScoreHistogram(hardly_any, five)):
        found = metrics(histogram)
        assert found.examples == 5
        assert all(math.isnan(value) for value in astuple(found)[2:])
    assert len(calibration_curve(ScoreHistogram(hardly_any, hardly_any))[0]) == 0


def test_no_examples_leave_nothing_to_judge_by() -> None:
    found = metrics(ScoreHistogram.empty())
    assert found.examples == 0
    assert all(math.isnan(value) for value in astuple(found)[1:])
    assert [len(part) for part in calibration_curve(ScoreHistogram.empty())] == [0, 0, 0]


def test_roc_curve_has_the_area_that_the_metrics_name_and_passes_the_exact_curve() -> None:
    logits, labels = _draw(seed=3, examples=5000, centre=-2.0, spread=1.2, gain=1.0)
    histogram = ScoreHistogram.of(logits, labels)
    false, true = roc_curve(histogram)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(true, false) == pytest.approx(metrics(histogram).roc_auc, abs=1e-12)
    exact_false, exact_true, _ = exact_roc(labels, logits)
    assert np.abs(np.interp(false, exact_false, exact_true) - true).max() < 0.02


@settings(deadline=None)
@given(**any_model)
def test_calibration_groups_hold_all_examples_in_order_of_score(
    seed: int, examples: int, centre: float, spread: float, gain: float
) -> None:
    histogram = ScoreHistogram.of(*_draw(seed, examples, centre, spread, gain))
    predicted, observed, size = calibration_curve(histogram)
    assert size.sum() == examples
    assert observed @ size == pytest.approx(histogram.positive.sum())
    assert (np.diff(predicted) > 0).all()
    largest_bin = (histogram.negative + histogram.positive).max()
    assert np.abs(size - examples / 10).max() <= largest_bin + 1


@pytest.mark.parametrize("bins", [EXACT, NOISED], ids=["exact", "noised"])
@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), examples=st.integers(0, 300), noise=st.floats(0, 20))
def test_counts_with_privacy_noise_give_finite_metrics_or_nan(
    bins: Bins, seed: int, examples: int, noise: float
) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(-2, 1, examples).astype(np.float32)
    exact = ScoreHistogram.of(logits, (random.random(examples) < 0.1).astype(np.float32), bins)
    noised = ScoreHistogram(
        exact.negative + random.normal(0, noise, bins.count),
        exact.positive + random.normal(0, noise, bins.count),
    ).without_noise_below_zero()
    found = metrics(noised)
    assert not any(math.isinf(value) for value in astuple(found))
    assert np.isfinite(calibration_curve(noised)).all()
    assert np.isfinite(roc_curve(noised)).all()


@pytest.mark.parametrize("seed", range(3))
def test_few_bins_without_noise_hide_little(seed: int) -> None:
    logits, labels = _draw(seed, examples=5000, centre=-2.5, spread=1.0, gain=1.0)
    few = metrics(ScoreHistogram.of(logits, labels, NOISED))
    many = metrics(ScoreHistogram.of(logits, labels))
    assert few.roc_auc == pytest.approx(many.roc_auc, abs=0.01)
    assert few.pr_auc == pytest.approx(many.pr_auc, abs=0.02)
    assert few.log_loss == pytest.approx(many.log_loss, abs=0.005)
