"""Mechanisms: each couples a release's noise with what the release costs in privacy.

All add Gaussian noise rounded to whole numbers. As the true numbers are whole too, the result is
that of the Gaussian mechanism, rounded: post-processing, so that the `PrivacyEvent` of the
Gaussian mechanism bounds what it spends (Balle and Wang, "Improving the Gaussian Mechanism for
Differential Privacy", 2018, theorem 8). From `SystemRandomness` that noise is exact and there is
no floating-point number whose low bits could tell. Seeded, it is for simulation: who knows the seed
can take the noise off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from privacy.accountant import PrivacyEvent
from privacy.randomness import LARGEST_DEVIATION, Randomness


@dataclass(frozen=True)
class GaussianCount:
    """A site's number of visitors, with Gaussian noise.

    Guarantee: one release is `event`. Neighbouring relation: add or remove one visitor, which
    moves the count by 1, the sensitivity. Cutting off comes after the noise and costs nothing.

    ==================  ==========================================================
    no visitor          released like any count: at least 1
    noise of 0          the true count; `event` says that nothing is protected
    ==================  ==========================================================
    """

    noise: float
    """Standard deviation, in visitors, before rounding; 0 or more."""

    def __post_init__(self) -> None:
        _check("privacy.count_noise", self.noise)

    @property
    def event(self) -> PrivacyEvent:
        """What one release spends."""
        return PrivacyEvent(noise_multiplier=self.noise)

    def release(self, count: int, randomness: Randomness) -> float:
        """`count` with noise, a whole number of at least 1."""
        (noise,) = randomness.rounded_normal(self.noise, 1)
        return float(max(1, count + int(noise)))


@dataclass(frozen=True)
class GaussianHistogram:
    """Numbers of visitors by bin, with Gaussian noise on each.

    Guarantee: one release of the whole histogram is `event`, if each visitor is counted once, in
    one bin. Neighbouring relation: add or remove one visitor, which moves one number by 1: the
    L2 sensitivity is 1, however many bins there are. The bins must not depend on the visitors.

    ==================  ==========================================================
    no visitor          noise around 0 in each bin
    below 0             left so: cut off, the sums over sites would be too high
    noise of 0          the true numbers; `event` says that nothing is protected
    ==================  ==========================================================
    """

    noise: float
    """Standard deviation in each bin, in visitors, before rounding; 0 or more. Rounding adds about
    1/12 to the variance."""

    def __post_init__(self) -> None:
        _check("histogram noise", self.noise)

    @property
    def event(self) -> PrivacyEvent:
        """What one release spends."""
        return PrivacyEvent(noise_multiplier=self.noise)

    def release(
        self, counts: npt.NDArray[np.integer], randomness: Randomness
    ) -> npt.NDArray[np.int64]:
        """`counts` of any shape with noise, whole numbers of the same shape.

        Raises:
            TypeError: `counts` are not of an integer type. Fractions would show through the noise.
        """
        if not np.issubdtype(counts.dtype, np.integer):
            raise TypeError(f"histogram counts are {counts.dtype}: must be integers")
        noise = randomness.rounded_normal(self.noise, counts.size)
        return counts.astype(np.int64) + noise.reshape(counts.shape)


def _check(name: str, noise: float) -> None:
    if not 0 <= noise <= LARGEST_DEVIATION:
        raise ValueError(f"{name}={noise}: must be from 0 to {LARGEST_DEVIATION:.0f}")
