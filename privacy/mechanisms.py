"""Mechanisms: each couples a release's noise with what the release costs in privacy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from privacy.accountant import PrivacyEvent


@dataclass(frozen=True)
class GaussianCount:
    """A site's number of visitors, with Gaussian noise.

    Guarantee: one release is `event`. Neighbouring relation: add or remove one visitor, which
    moves the count by 1, the sensitivity. Rounding and cutting off come after the noise and cost
    nothing.

    ==================  ==========================================================
    no visitor          released like any count: at least 1
    noise of 0          the true count; `event` says that nothing is protected
    ==================  ==========================================================
    """

    noise: float
    """Standard deviation, in visitors; 0 or more."""

    def __post_init__(self) -> None:
        if not (self.noise >= 0 and math.isfinite(self.noise)):
            raise ValueError(f"privacy.count_noise={self.noise}: must be finite and ≥ 0")

    @property
    def event(self) -> PrivacyEvent:
        """What one release spends."""
        return PrivacyEvent(noise_multiplier=self.noise)

    def release(self, count: int, rng: np.random.Generator) -> float:
        """`count` with noise, a whole number of at least 1.

        A seeded `rng` is for simulation: who knows the seed can take the noise off.
        """
        return float(max(1, round(rng.normal(count, self.noise))))
