from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest

from evaluation import band
from evaluation.band import noise_band
from evaluation.histogram import EXACT, NOISED, Bins, ScoreHistogram
from evaluation.metrics import metrics


def _exact(rng: np.random.Generator, bins: Bins = NOISED) -> ScoreHistogram:
    truth = rng.normal(-2.5, 1.0, 3000)
    labels = (rng.random(3000) < 1 / (1 + np.exp(-truth))).astype(np.float32)
    return ScoreHistogram.of((truth + rng.normal(0, 0.7, 3000)).astype(np.float32), labels, bins)


def _noised(histogram: ScoreHistogram, noise: float, rng: np.random.Generator) -> ScoreHistogram:
    counts = (histogram.negative, histogram.positive)
    negative, positive = (c + np.rint(rng.normal(0, noise, c.shape)) for c in counts)
    return ScoreHistogram(negative, positive).without_noise_below_zero()


def test_nine_bands_in_ten_hold_the_metric_of_the_exact_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five metrics of 40 releases, as 200 draws of which related ones count for about half.

    Noise taken 0.7 times as large leaves 0.71, 1.5 times 0.96.
    """
    monkeypatch.setattr(band, "_REPEATS", 100)
    rng, held = np.random.default_rng(5), []
    for _ in range(40):
        exact = _exact(rng)
        found = noise_band(_noised(exact, 10.0, rng), 10.0)
        truth = asdict(metrics(exact))
        names = ("base_rate", "roc_auc", "pr_auc", "log_loss", "normalised_entropy")
        held.append([found[name][0] <= truth[name] <= found[name][1] for name in names])
    assert 0.82 <= np.mean(held) <= 0.95
    assert np.mean(held, axis=0).min() >= 0.75


@pytest.mark.parametrize("bins", [EXACT, NOISED], ids=["exact", "noised"])
def test_without_noise_a_band_has_no_width(bins: Bins) -> None:
    histogram = _exact(np.random.default_rng(0), bins)
    found = noise_band(histogram, 0.0)
    assert found == {name: (v, v) for name, v in asdict(metrics(histogram)).items()}


def test_a_band_grows_with_the_noise_and_stays_within_the_metrics_range() -> None:
    rng = np.random.default_rng(1)
    exact = _exact(rng)
    widths = []
    for noise in (1.0, 10.0, 300.0):
        histogram = _noised(exact, noise, rng)
        found = noise_band(histogram, noise)
        low, high = found["roc_auc"]
        widths.append(high - low)
        for name, value in asdict(metrics(histogram)).items():
            if name == "expected_calibration_error":
                # Noise mostly raises it: a band around what was measured would seldom hold it.
                assert all(map(math.isnan, found[name]))
                continue
            low, high = found[name]
            assert 0 <= low <= value <= high
            assert high <= 1 or name in ("examples", "log_loss", "normalised_entropy")
    assert 0 < widths[0] < widths[1] < widths[2]


def test_what_is_unknown_has_no_band() -> None:
    for noise in (0.0, 0.01):
        found = noise_band(ScoreHistogram.empty(NOISED), noise)
        assert not math.isnan(found["examples"][0])
        assert all(map(math.isnan, found["roc_auc"] + found["log_loss"]))


def test_the_same_counts_give_the_same_band() -> None:
    histogram = _exact(np.random.default_rng(2))
    assert repr(noise_band(histogram, 3.0)) == repr(noise_band(histogram, 3.0))
