"""The smallest noise that keeps a promise of privacy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

from privacy import accountant
from privacy.accountant import PrivacyEvent

TOLERANCE = 0.005
"""A calibrated release spends between (1 - TOLERANCE) of its target epsilon and all of it."""

_SMALLEST, _LARGEST = 0.1, 1e6


class UnreachableTargetError(ValueError):
    """No amount of noise reaches the target. The message names the setting to change."""


def noise_multiplier(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    others: Iterable[PrivacyEvent] = (),
) -> float:
    """Smallest noise multiplier with which `steps` and `others` spend at most `epsilon`.

    Guarantee: `steps` releases of that noise, each over visitors drawn with probability
    `sample_rate`, and `others` together are (epsilon, delta)-differentially private under add or
    remove one visitor, and spend at least (1 - TOLERANCE) x epsilon unless a noise multiplier of
    0.1 already spends less.

    Raises:
        UnreachableTargetError: `others` alone leave nothing of `epsilon`, or `delta` is too small
            to account for (below about 1e-20).
    """
    if not epsilon > 0:
        raise ValueError(f"privacy.epsilon={epsilon}: must be above 0")
    if steps < 1:
        raise ValueError(f"steps={steps}: must be 1 or more")
    return _noise_multiplier(epsilon, delta, sample_rate, steps, tuple(sorted(others)))


@lru_cache(maxsize=1024)
def _noise_multiplier(
    target: float, delta: float, sample_rate: float, steps: int, others: tuple[PrivacyEvent, ...]
) -> float:
    already = accountant.epsilon(others, delta)
    if already >= target:
        raise UnreachableTargetError(
            f"privacy.epsilon={target:g}: the other releases alone spend {already:.3g}; "
            "raise privacy.epsilon or privacy.count_noise"
        )

    def spent(noise: float) -> float:
        return accountant.epsilon([PrivacyEvent(noise, sample_rate, steps), *others], delta)

    # Secant on log epsilon over log noise, kept between the noise known to be too small (low) and
    # the noise known to be enough (high).
    low, high = 0.0, _LARGEST
    noise, slope = _guess(target, delta, sample_rate, steps, others), -1.0
    aim = (1 - TOLERANCE / 2) * target
    tried: tuple[float, float] | None = None
    while high > low * (1 + 1e-4):
        now = spent(noise)
        if now > target:
            low = noise
        else:
            high = noise
            if now >= (1 - TOLERANCE) * target or noise == _SMALLEST:
                break
        if 0 < now < math.inf:
            if tried is not None and now != tried[1]:
                slope = min(math.log(now / tried[1]) / math.log(noise / tried[0]), -0.01)
            tried = (noise, now)
            noise = max(noise * (aim / now) ** (1 / slope), _SMALLEST)
        if not low < noise < high:
            noise = math.sqrt(max(low, _SMALLEST) * high)
    if high == _LARGEST:
        raise UnreachableTargetError(
            f"privacy.epsilon={target:g}: no noise reaches it at privacy.delta={delta:g}; "
            "raise one of the two"
        )
    return high


def _guess(
    target: float, delta: float, sample_rate: float, steps: int, others: tuple[PrivacyEvent, ...]
) -> float:
    # Imported here: unprotected training need not wait for it.
    from scipy.optimize import brentq
    from scipy.special import log_ndtr, ndtr

    # Where to begin, not a bound: the central limit of many small releases is one Gaussian release
    # with this reciprocal of its noise (Bu et al., "Deep Learning with Gaussian Differential
    # Privacy", 2020, corollary 4), whose epsilon is known (Balle and Wang, 2018, theorem 8).
    def excess(mu: float) -> float:
        lower = math.exp(target + log_ndtr(-target / mu - mu / 2))
        return float(ndtr(mu / 2 - target / mu)) - lower - delta

    mu_squared = brentq(excess, 1e-6, 10 + 2 * math.sqrt(target) + 2 * target, xtol=1e-6) ** 2
    spent = sum(
        e.count * e.sample_rate**2 * math.expm1(min(e.noise_multiplier**-2, 50.0)) for e in others
    )
    each = max(mu_squared - spent, 0.05 * mu_squared) / (steps * sample_rate**2)
    return min(max(1 / math.sqrt(math.log1p(each)), _SMALLEST), _LARGEST / 2)
