"""How good a model is, from a score histogram alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from evaluation.histogram import Floats, ScoreHistogram

CALIBRATION_GROUPS = 10


@dataclass(frozen=True)
class Metrics:
    """Quality of predicted conversion probabilities; NaN where there is nothing to judge by."""

    examples: float
    """Number of examples."""
    base_rate: float
    """Share of them that converted."""
    roc_auc: float
    """Probability that a converting example scores above another one, 0.5 is chance."""
    pr_auc: float
    """Average precision; the base rate is chance."""
    log_loss: float
    """Mean negative log-likelihood, in nats."""
    normalised_entropy: float
    """Log-loss over the entropy of the base rate (He et al. 2014, eq. 1); below 1 is a gain."""
    expected_calibration_error: float
    """Mean distance of predicted from observed rate over ten groups of equal size, by score."""


def metrics(histogram: ScoreHistogram) -> Metrics:
    """All metrics of one histogram without a negative count.

    Exact up to the bins. With those of 0.05 in logit: ROC-AUC counts scores of one bin as ties, so
    that it is off by at most half the share of such pairs (measured on 4,000 examples: 0.002 where
    logits spread by 0.8, 0.01 where they spread by 0.1); PR-AUC takes their order as even (0.005);
    log-loss takes the middle of the bin (0.025 at most, without a bias), and 10 beyond a logit of
    10. With the ten times wider ones, for counts with noise: 0.01, 0.02 and 0.005 where logits
    spread by 1.
    """
    positive, negative = histogram.positive, histogram.negative
    positives, negatives = float(positive.sum()), float(negative.sum())
    examples = positives + negatives
    base_rate = positives / examples if examples else math.nan
    # Counts with privacy noise are no whole numbers: less than one example is none.
    if positives < 1 or negatives < 1:
        unknown = math.nan
        return Metrics(examples, base_rate, unknown, unknown, unknown, unknown, unknown)
    predicted = histogram.bins.probabilities()
    log_loss = -float(positive @ np.log(predicted) + negative @ np.log1p(-predicted)) / examples
    entropy = -(base_rate * math.log(base_rate) + (1 - base_rate) * math.log1p(-base_rate))
    return Metrics(
        examples=examples,
        base_rate=base_rate,
        roc_auc=_roc_auc(positive / positives, negative / negatives),
        pr_auc=_pr_auc(positive, negative),
        log_loss=log_loss,
        normalised_entropy=log_loss / entropy,
        expected_calibration_error=_calibration_error(histogram),
    )


def roc_curve(histogram: ScoreHistogram) -> tuple[Floats, Floats]:
    """False and true positive rates, (bins + 1,) each, from the strictest threshold on."""
    rates = []
    for counts in (histogram.negative, histogram.positive):
        above = np.concatenate([[0.0], counts[::-1].cumsum()])
        rates.append(above / max(float(above[-1]), 1.0))
    return rates[0], rates[1]


def calibration_curve(histogram: ScoreHistogram) -> tuple[Floats, Floats, Floats]:
    """Mean predicted rate, observed rate and examples of up to ten groups of equal size by score.

    A bin is never split, so groups differ in size where many scores fall into one bin.
    """
    counts = histogram.positive + histogram.negative
    total = max(float(counts.sum()), 1.0)
    # A bin belongs to the group in which its middle example lies; with noise that may be outside.
    middle = (counts.cumsum() - counts / 2) / total
    group = np.clip((middle * CALIBRATION_GROUPS).astype(np.int64), 0, CALIBRATION_GROUPS - 1)
    size, predicted, observed = (
        np.bincount(group, weights=weight, minlength=CALIBRATION_GROUPS).astype(np.float64)
        for weight in (counts, counts * histogram.bins.probabilities(), histogram.positive)
    )
    filled = size >= 1
    size = size[filled]
    return predicted[filled] / size, observed[filled] / size, size


def _roc_auc(positive: Floats, negative: Floats) -> float:
    """Mann and Whitney 1947: ties, that is one bin, count half."""
    below = negative.cumsum() - negative
    return float(positive @ (below + negative / 2))


def _pr_auc(positive: Floats, negative: Floats) -> float:
    """Average precision, the examples of a bin taken to be mixed evenly.

    Precision at the middle one of a bin's positives, which counts itself: hence the half.
    """
    counts = positive + negative
    found = positive[::-1].cumsum() - positive[::-1] / 2 + 0.5
    chosen = counts[::-1].cumsum() - counts[::-1] / 2 + 0.5
    precision = np.divide(found, chosen, out=np.zeros_like(found), where=chosen > 0)
    # Only noise takes it out of [0, 1], and without bound where counts cancel.
    return float(np.clip(precision, 0, 1) @ positive[::-1] / positive.sum())


def _calibration_error(histogram: ScoreHistogram) -> float:
    predicted, observed, size = calibration_curve(histogram)
    return float(np.abs(predicted - observed) @ size / size.sum()) if size.size else math.nan
