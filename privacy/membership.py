"""Can one tell from a model who was in its training? The attack by loss, and what privacy allows.

Yeom et al., "Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting", 2018: a
visitor with a small loss is taken for a member. Judged by the true positive rate at a small false
positive rate (Carlini et al., "Membership Inference Attacks From First Principles", 2022), as a
few visitors who are surely found are worse than many who are vaguely guessed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Interval = tuple[float, float, float]
"""Lower end, value, upper end."""

FALSE_POSITIVE_RATE = 0.01
_RESAMPLES = 400


@dataclass(frozen=True)
class MembershipInference:
    """How well members were told from others, with 95 % bootstrap intervals over visitors."""

    auc: Interval
    """Probability that a member scores above another; 0.5 is chance."""
    true_positive_rate: Interval
    """Share of members that are found, at a false positive rate of `FALSE_POSITIVE_RATE`."""


def infer_membership(
    members: Floats, others: Floats, rng: np.random.Generator
) -> MembershipInference:
    """The attack that takes the visitors with the highest scores for members.

    Args:
        members: (M,) scores of visitors in the training, for example minus their loss; M ≥ 1.
        others: (N,) scores of visitors of the same kind who were not; N ≥ 1 /
            `FALSE_POSITIVE_RATE`.
        rng: draws the resamples.

    Raises:
        ValueError: Too few scores, or one is NaN.
    """
    if not len(members) or len(others) < 1 / FALSE_POSITIVE_RATE:
        raise ValueError(
            f"{len(members)} members, {len(others)} others: membership inference needs 1 and "
            f"{math.ceil(1 / FALSE_POSITIVE_RATE)}"
        )
    if np.isnan(members).any() or np.isnan(others).any():
        raise ValueError("scores: must not be NaN")
    draws = [(members, others)]
    draws += [
        (rng.choice(members, len(members)), rng.choice(others, len(others)))
        for _ in range(_RESAMPLES)
    ]
    return MembershipInference(
        _interval([_auc(*draw) for draw in draws]),
        _interval([_true_positive_rate(*draw) for draw in draws]),
    )


def largest_true_positive_rate(false_positive_rate: float, epsilon: float, delta: float) -> float:
    """No attack finds a larger share of members than this under (epsilon, delta).

    For a single visitor who was or was not in the training, whatever the attacker knows besides
    (Kairouz, Oh and Viswanath, "The Composition Theorem for Differential Privacy", 2015, theorem
    2.1). In [0, 1]; 1 where epsilon is infinite.
    """
    missed = math.exp(-epsilon) * (1 - delta - false_positive_rate)
    # In logarithms, as exp(epsilon) may overflow.
    found = math.exp(min(0.0, epsilon + math.log(false_positive_rate))) + delta
    return min(1.0, found, 1 - max(0.0, missed))


def _auc(members: Floats, others: Floats) -> float:
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, side="left")
    not_above = np.searchsorted(ordered, members, side="right")
    return float((below + not_above).mean() / (2 * len(others)))


def _true_positive_rate(members: Floats, others: Floats) -> float:
    allowed = int(FALSE_POSITIVE_RATE * len(others))
    threshold = np.partition(others, len(others) - 1 - allowed)[len(others) - 1 - allowed]
    return float((members > threshold).mean())


def _interval(values: list[float]) -> Interval:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return float(low), values[0], float(high)
