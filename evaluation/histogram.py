"""Scores as histograms: what a site reports instead of scores, and what adds up over sites."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bins:
    """`count` bins of equal width between logits of -`limit` and `limit`; public.

    Scores beyond the limits fall into the outermost bins.
    """

    count: int
    limit: float

    def of(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """(N,) the bin of each logit; one that is NaN: ValueError."""
        if np.isnan(logits).any():
            raise ValueError(f"{np.isnan(logits).sum()} of {len(logits)} logits are NaN")
        position = (logits + self.limit) / (2 * self.limit) * self.count
        return np.asarray(np.clip(position, 0, self.count - 1), dtype=np.int64)

    def probabilities(self) -> Floats:
        """(count,) predicted probability at the middle of each bin."""
        width = 2 * self.limit / self.count
        middle = -self.limit + width * (np.arange(self.count) + 0.5)
        return np.asarray(1.0 / (1.0 + np.exp(-middle)))


EXACT = Bins(400, 10.0)
"""For counts without noise."""
NOISED = Bins(24, 6.0)
"""For counts with noise, which each bin adds: few, and none where scores are hardly ever."""


@dataclass(frozen=True)
class ScoreHistogram:
    """Counts of examples by predicted logit, one row a label.

    The bins are fixed and public, so that the histograms of sites add up to that of their union.
    One visitor changes one count by one: L2 sensitivity 1 under add or remove.
    """

    negative: Floats
    """(bins,) examples without a conversion; with noise they may be below 0."""
    positive: Floats
    """(bins,) examples with one."""

    def __post_init__(self) -> None:
        for counts in (self.negative, self.positive):
            if counts.shape not in ((EXACT.count,), (NOISED.count,)):
                raise ValueError(
                    f"a score histogram has {EXACT.count} or {NOISED.count} bins, "
                    f"not {counts.shape}"
                )
            if not np.isfinite(counts).all():
                raise ValueError("a score histogram has a count that is not finite")
        if self.negative.shape != self.positive.shape:
            raise ValueError("a score histogram has as many bins for either label")

    def __add__(self, other: ScoreHistogram) -> ScoreHistogram:
        return ScoreHistogram(self.negative + other.negative, self.positive + other.positive)

    @property
    def bins(self) -> Bins:
        """Its bins."""
        return EXACT if len(self.negative) == EXACT.count else NOISED

    @classmethod
    def empty(cls, bins: Bins = EXACT) -> ScoreHistogram:
        """No examples: the neutral element of the sum."""
        return cls(np.zeros(bins.count), np.zeros(bins.count))

    @classmethod
    def of(
        cls,
        logits: npt.NDArray[np.float32],
        labels: npt.NDArray[np.float32],
        bins: Bins = EXACT,
    ) -> ScoreHistogram:
        """Count `logits` (N,) by bin and `labels` (N,) of 0 and 1; a logit of NaN: ValueError."""
        bin_of, positive = bins.of(logits), labels > 0.5
        return cls(
            np.bincount(bin_of[~positive], minlength=bins.count).astype(np.float64),
            np.bincount(bin_of[positive], minlength=bins.count).astype(np.float64),
        )

    def without_noise_below_zero(self) -> ScoreHistogram:
        """The nearest histogram (L2) without a negative count and with the same two totals.

        Counts that are none keep their bits; a total below 0 becomes 0. Post-processing: it costs
        no privacy. (Projection onto a simplex: Duchi et al., "Efficient Projections onto the
        l1-Ball for Learning in High Dimensions", 2008, figure 1.)
        """
        return ScoreHistogram(_on_simplex(self.negative), _on_simplex(self.positive))


def _on_simplex(counts: Floats) -> Floats:
    if (counts >= 0).all():
        return counts
    total = max(float(counts.sum()), 0.0)
    descending = np.sort(counts)[::-1]
    excess = (descending.cumsum() - total) / np.arange(1, len(counts) + 1)
    kept = np.flatnonzero(descending > excess)
    cut = excess[kept[-1]] if kept.size else descending[0]
    return np.asarray(np.maximum(counts - cut, 0.0))
