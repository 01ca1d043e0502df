from __future__ import annotations

import numpy as np
import pytest

from evaluation.band import noise_band
from evaluation.histogram import NOISED, ScoreHistogram
from protocol.replies import SiteEvaluation, SiteFailure
from server.history import EvaluationReport, plus_minus


def evaluation(site: str, noise: float) -> SiteEvaluation:
    rng = np.random.default_rng(len(site))
    logits = rng.normal(-2, 1.5, 2000)
    labels = (rng.random(2000) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    exact = ScoreHistogram.of(logits.astype(np.float32), labels, NOISED)
    counts = (exact.negative, exact.positive)
    negative, positive = (c + rng.normal(0, noise, c.shape).round() for c in counts)
    return SiteEvaluation(site, 2, ScoreHistogram(negative, positive), noise, 1.0)


def test_noise_is_taken_off_after_the_counts_of_the_sites_are_summed() -> None:
    sites = [evaluation("a", 3.0), evaluation("bb", 4.0)]

    report = EvaluationReport(2, sites, [])

    summed = sites[0].histogram + sites[1].histogram
    assert summed.negative.min() < 0
    expected = summed.without_noise_below_zero()
    assert report.histogram.negative.tobytes() == expected.negative.tobytes()
    assert report.histogram.positive.tobytes() == expected.positive.tobytes()


def test_noise_of_the_sites_adds_up_by_its_squares() -> None:
    report = EvaluationReport(2, [evaluation("a", 3.0), evaluation("bb", 4.0)], [])

    record = report.record()

    assert repr(report.band) == repr(noise_band(report.histogram, 5.0))
    low, high = record["band"]["roc_auc"]
    assert low < record["global"]["roc_auc"] < high
    assert record["band"]["expected_calibration_error"] is None
    assert list(record["sites"]) == ["a", "bb"]


def test_without_any_evaluation_all_is_unknown() -> None:
    failures = [SiteFailure("a", "dropped", "histogram: 400 bins instead of 24")]

    record = EvaluationReport(2, [], failures).record()

    assert record["global"]["examples"] == 0
    assert record["global"]["roc_auc"] is record["band"]["roc_auc"] is None
    assert record["sites"] == {}
    assert record["failures"] == {
        "a": {"outcome": "dropped", "reason": "histogram: 400 bins instead of 24"}
    }


@pytest.mark.parametrize(
    ("band", "value", "text"),
    [
        ([0.7, 0.74], 0.72, "± 0.020"),
        ([0.7, 1.0], 0.95, "± 0.250"),
        ([0.0, 0.3], 0.1, "± 0.200"),
        ([0.7, 0.7], 0.7, ""),
        (None, 0.7, ""),
        (None, None, ""),
    ],
)
def test_plus_minus(band: list[float] | None, value: float | None, text: str) -> None:
    assert plus_minus(band, value) == text
