"""Scores as histograms: what a site reports instead of scores, and what adds up over sites."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LOWEST_LOGIT = -10.0
HIGHEST_LOGIT = 10.0
BINS = 400

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ScoreHistogram:
    """Counts of examples by predicted logit, one row a label.

    The bins are fixed and public (`BINS` of equal width between `LOWEST_LOGIT` and
    `HIGHEST_LOGIT`; beyond them the outermost), so that the histograms of sites add up to that of
    their union. One visitor changes one count by one: L2 sensitivity 1 under add or remove.
    """

    negative: Floats
    """(BINS,) examples without a conversion."""
    positive: Floats
    """(BINS,) examples with one."""

    def __post_init__(self) -> None:
        for counts in (self.negative, self.positive):
            if counts.shape != (BINS,):
                raise ValueError(f"a score histogram has {BINS} bins, not {counts.shape}")
            if not np.isfinite(counts).all():
                raise ValueError("a score histogram has a count that is not finite")

    def __add__(self, other: ScoreHistogram) -> ScoreHistogram:
        return ScoreHistogram(self.negative + other.negative, self.positive + other.positive)

    @classmethod
    def empty(cls) -> ScoreHistogram:
        """No examples: the neutral element of the sum."""
        return cls(np.zeros(BINS), np.zeros(BINS))

    @classmethod
    def of(cls, logits: npt.NDArray[np.float32], labels: npt.NDArray[np.float32]) -> ScoreHistogram:
        """Count `logits` (N,) by bin and `labels` (N,) of 0 and 1; a logit of NaN: ValueError."""
        if np.isnan(logits).any():
            raise ValueError(f"{np.isnan(logits).sum()} of {len(logits)} logits are NaN")
        position = (logits - LOWEST_LOGIT) / (HIGHEST_LOGIT - LOWEST_LOGIT) * BINS
        bins = np.clip(position, 0, BINS - 1).astype(np.int64)
        positive = labels > 0.5
        return cls(
            np.bincount(bins[~positive], minlength=BINS).astype(np.float64),
            np.bincount(bins[positive], minlength=BINS).astype(np.float64),
        )


def bin_probabilities() -> Floats:
    """(BINS,) predicted probability at the middle of each bin."""
    width = (HIGHEST_LOGIT - LOWEST_LOGIT) / BINS
    middle = LOWEST_LOGIT + width * (np.arange(BINS) + 0.5)
    return np.asarray(1.0 / (1.0 + np.exp(-middle)))
