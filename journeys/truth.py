"""The world behind synthetic journeys: what each touchpoint, visitor and day adds to the log-odds.

The log-odds that a visitor converts within the horizon, given the journey up to the decision, are

    intercept + site + PROPENSITY * intent + season(decision time)
        + sum over touchpoints j in the look-back of
          effect[c_j] * factor_j * 2 ** (-age_j / half_life[c_j])

with `intent` the visitor's latent wish to buy (standard normal), c_j the channel, age_j the days
before the decision, and factor_j the product of the factors of `PAIRS` whose first channel came
earlier in the look-back. Effects that add up and fade exponentially are those of Zhang, Wei and
Ren, "Multi-touch attribution in online advertising with survival theory" (ICDM 2014), there of a
hazard; the pairs are our addition.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

DAY = 86_400
"""Seconds."""


class Channel(NamedTuple):
    """How often a channel brings visitors, and what that does."""

    name: str
    share: float
    """Share of touchpoints at a typical site, for intent 0."""
    tilt: float
    """The share is multiplied by exp(tilt * intent): above 0, who comes this way means to buy."""
    effect: float
    """Log-odds that a touchpoint adds at the moment it happens."""
    half_life: float
    """Days after which half of the effect is left."""


CHANNELS = (
    Channel("direct", 0.19, 0.35, 0.30, 1.0),
    Channel("organic search", 0.18, 0.10, 0.50, 2.0),
    Channel("paid search", 0.13, 0.15, 0.90, 2.0),
    Channel("organic social", 0.08, -0.25, 0.05, 2.0),
    Channel("paid social", 0.10, -0.25, 0.15, 4.0),
    Channel("email", 0.08, 0.10, 1.20, 3.0),
    Channel("referral", 0.05, 0.00, 0.40, 2.0),
    Channel("display", 0.09, -0.25, 0.05, 5.0),
    Channel("retargeting", 0.05, 0.10, 0.30, 1.0),
    Channel("affiliate", 0.03, 0.05, 0.80, 1.0),
    Channel("ai assistant", 0.02, 0.20, 1.10, 4.0),
)
"""Email and paid search work strongly, display hardly by itself, direct shows intent."""

PAIRS = (
    ("display", "paid search", 3.0),
    ("paid social", "organic search", 3.0),
    ("organic social", "organic search", 2.0),
    ("email", "direct", 4.0),
    ("direct", "retargeting", 5.0),
    ("paid search", "email", 2.0),
    ("email", "affiliate", 0.1),
)
"""(earlier, later, factor): each touchpoint of the later channel counts `factor` times where the
earlier channel was seen before it. Display prepares paid search; a reminder brings back who knows
the shop; a coupon site takes what an e-mail has already won. No channel is paired with itself."""

PROPENSITY = 0.7
"""Log-odds for one standard deviation of a visitor's latent intent."""

WEEKDAY = (0.10, 0.05, 0.00, 0.00, -0.05, -0.20, 0.05)
"""Log-odds by the decision's day of the week, Monday first."""

MONTH = (-0.15, -0.10, 0.00, 0.00, 0.05, 0.10, 0.00, -0.10, 0.00, 0.05, 0.30, 0.25)
"""Log-odds by the decision's month, January first."""


def journey_logits(
    visitor: npt.NDArray[np.int64],
    channel: npt.NDArray[np.int64],
    age_days: npt.NDArray[np.float64],
    visitors: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """What touchpoints add to the log-odds, and what is left of it without each channel.

    `visitor` (0 to visitors - 1), `channel` (index into `CHANNELS`) and `age_days` (0 or more) have
    one entry a touchpoint in the look-back, a visitor's oldest first. Returns the sums (visitors,)
    and (visitors, channels): in column c without c's touchpoints and without c's part in `PAIRS`.
    """
    names = [c.name for c in CHANNELS]
    effect = np.array([c.effect for c in CHANNELS])
    half_life = np.array([c.half_life for c in CHANNELS])
    added = effect[channel] * np.exp2(-age_days / half_life[channel])

    paired = []
    for earlier, later, factor in PAIRS:
        openers = np.flatnonzero(channel == names.index(earlier))
        first = np.full(visitors, len(channel))
        # Of a repeated index numpy keeps the last value: backwards, that is the oldest touchpoint.
        first[visitor[openers[::-1]]] = openers[::-1]
        rows = np.flatnonzero(channel == names.index(later))
        rows = rows[first[visitor[rows]] < rows]
        added[rows] *= factor
        paired.append((names.index(earlier), rows, factor))

    by_channel = np.bincount(
        visitor * len(CHANNELS) + channel, added, visitors * len(CHANNELS)
    ).reshape(visitors, len(CHANNELS))
    total = by_channel.sum(axis=1)
    without = total[:, None] - by_channel
    for earlier_channel, rows, factor in paired:
        lost = added[rows] * (1 - 1 / factor)
        without[:, earlier_channel] -= np.bincount(visitor[rows], lost, visitors)
    return total, without


def season_logit(time: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Log-odds that the decision's weekday and month add; `time` in UTC seconds."""
    month = time.astype("datetime64[s]").astype("datetime64[M]").astype(np.int64) % 12
    return np.asarray(np.array(WEEKDAY)[weekday(time)] + np.array(MONTH)[month])


def weekday(time: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Day of the week of UTC seconds, Monday 0 (the epoch was a Thursday)."""
    return np.asarray((time // DAY + 3) % 7)
