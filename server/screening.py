"""Which updates are sound. One bad site costs its own update, never the round."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from protocol.replies import SiteFailure, SiteUpdate, Weights, flat, weights_fault

MOST_VISITORS = 1e11
"""Of a site: more than there are people, by far."""


def screen_updates(
    answers: list[SiteUpdate | SiteFailure], weights: Weights, max_update_norm: float
) -> tuple[list[SiteUpdate], list[SiteFailure]]:
    """The updates that may be averaged, and why the other sites' may not.

    Args:
        answers: at most one of each site.
        weights: the round's model, finite.
        max_update_norm: largest L2 distance of a site's model from the round's.
    """
    sound: list[SiteUpdate] = []
    failed: list[SiteFailure] = []
    shapes = {name: value.shape for name, value in weights.items()}
    before = flat(weights).astype(np.float64)
    for answer in answers:
        if isinstance(answer, SiteFailure):
            failed.append(answer)
        elif fault := _fault(answer.weights, shapes, before, max_update_norm):
            failed.append(SiteFailure(answer.site, "dropped", fault))
        else:
            sound.append(answer)
    return sound, failed


def cap_weights(visitors: dict[str, float], cap: float) -> dict[str, float]:
    """What each site counts for: its noised visitor count, at most `cap` times the median.

    A count that is not finite and above 0 counts as 1 visitor, one beyond `MOST_VISITORS` as that
    many: no site can take over by its count, nor several together by counts that overflow.
    """
    counts = {
        site: min(count, MOST_VISITORS) if np.isfinite(count) and count >= 1 else 1.0
        for site, count in visitors.items()
    }
    most = cap * float(np.median(list(counts.values())))
    return {site: min(count, most) for site, count in counts.items()}


def _fault(
    update: Weights,
    shapes: dict[str, tuple[int, ...]],
    before: npt.NDArray[np.float64],
    max_update_norm: float,
) -> str:
    norm = math.nan
    if shapes == {name: value.shape for name, value in update.items()}:
        # In float64 only what is not finite has a norm that is not.
        norm = float(np.linalg.norm(flat(update) - before))
    if math.isfinite(norm) and norm <= max_update_norm:
        return ""
    fault = weights_fault(update, shapes)
    return fault or f"update of norm {norm:.3g}, strategy.max_update_norm={max_update_norm:g}"
