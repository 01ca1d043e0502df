"""How far privacy noise on a score histogram may have moved its metrics."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np

from evaluation.histogram import ScoreHistogram
from evaluation.metrics import Metrics, metrics

COVERAGE = 0.9
"""Share of such noise with which a metric ends up within its band."""
_REPEATS = 200

_UNBOUNDED = {"examples", "log_loss", "normalised_entropy"}

Band = dict[str, tuple[float, float]]
"""Lower and upper end by the metric's name; NaN where it is unknown."""


def noise_band(histogram: ScoreHistogram, noise: float) -> Band:
    """Around each metric of `histogram`, where noise of this size puts it nine times in ten.

    A parametric bootstrap (Efron and Tibshirani 1993, chapter 6): noise of the same standard
    deviation is put on the released counts again. It holds the noise alone, not that the held-out
    visitors are a sample. Measured with 300 to 100,000 visitors, a band holds the metric of the
    exact counts 83 to 98 times in 100. The calibration error has no band (NaN): noise mostly raises
    it, and a band would hold it 52 to 89 times. Post-processing: it costs no privacy. The same
    input gives the same band.

    Args:
        histogram: without a negative count.
        noise: standard deviation of the noise on each of its counts; 0 gives bands of no width.
    """
    rng = np.random.default_rng(0)
    repeats = [_again(histogram, noise, rng) for _ in range(_REPEATS)] if noise > 0 else []
    found, band = metrics(histogram), {}
    for field in fields(Metrics):
        value = getattr(found, field.name)
        moved = np.array([getattr(repeat, field.name) for repeat in repeats]) - value
        moved = moved[np.isfinite(moved)]
        # Symmetric: the bootstrap's bias and skew are those of the noise put on twice.
        half = float(np.quantile(np.abs(moved), COVERAGE)) if moved.size else 0.0
        if field.name == "expected_calibration_error" and noise > 0:
            half = math.nan
        # Every metric is 0 or more.
        most = math.inf if field.name in _UNBOUNDED else 1.0
        band[field.name] = (
            float(np.clip(value - half, 0.0, most)),
            float(np.clip(value + half, 0.0, most)),
        )
    return band


def _again(histogram: ScoreHistogram, noise: float, rng: np.random.Generator) -> Metrics:
    counts = (histogram.negative, histogram.positive)
    negative, positive = (c + rng.normal(0.0, noise, c.shape) for c in counts)
    return metrics(ScoreHistogram(negative, positive).without_noise_below_zero())
