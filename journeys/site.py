"""The journeys of one site, cut into examples and split."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from journeys.examples import Examples


@dataclass(frozen=True)
class SiteJourneys:
    """What one site holds. No visitor is in both parts."""

    name: str
    train: Examples
    holdout: Examples
    holdout_probability: npt.NDArray[np.float32] | None = None
    """(N_holdout,) true conversion probability of each holdout example; synthetic data only."""


@lru_cache(maxsize=2**14)
def natural_order(name: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts "site 2" before "site 10"."""
    parts = re.split(r"(\d+)", name)
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts)
