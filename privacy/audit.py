"""A lower bound on epsilon from one training run in which canaries did or did not take part.

T. Steinke, M. Nasr, M. Jagielski, "Privacy Auditing with One (1) Training Run", 2023. Each of m
canaries takes part by a fair coin of its own. From what was released the auditor guesses which did,
and abstains where unsure. Under (epsilon, delta)-differential privacy for adding or removing one
visitor few guesses can be right; where more are, the guarantee is broken, or claimed too small.

The bound is one-sided: a small one does not show that the training is private. Even of a Gaussian
release with the strongest scores it finds a third to a half of the true epsilon.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, bdtrc

_BISECTIONS = 40
_LARGEST = 64.0


def audited_epsilon(
    scores: npt.NDArray[np.floating],
    took_part: npt.NDArray[np.bool_],
    guesses: int,
    delta: float,
    confidence: float,
) -> float:
    """Lower bound on the epsilon at `delta` of what the `scores` were computed from.

    Guarantee: if that is (epsilon, delta)-differentially private under add or remove one visitor,
    the bound exceeds epsilon with probability at most 1 - `confidence`. It needs that each canary
    took part by a fair coin of its own, that the scores know of the coins only through the release,
    and that `guesses` was chosen before the scores were seen.

    Args:
        scores: (m,) of the canaries, finite; higher where the auditor rather believes that the
            canary took part. The upper half of the guesses is "took part", the lower half "did
            not"; ties go by position.
        took_part: (m,) whether it did.
        guesses: how many canaries to guess; even, from 2 to m. The auditor abstains on the others.
        delta: probability with which epsilon may be exceeded.
        confidence: of the bound, between 0 and 1.

    Raises:
        ValueError: An argument is not as described.
    """
    if scores.ndim != 1 or scores.shape != took_part.shape:
        raise ValueError(f"scores {scores.shape}, took_part {took_part.shape}: must be (m,) both")
    if not np.isfinite(scores).all():
        raise ValueError("scores: must be finite")
    if guesses % 2 or not 2 <= guesses <= len(scores):
        raise ValueError(f"guesses={guesses}: must be even and from 2 to {len(scores)} canaries")
    order = np.argsort(scores, kind="stable")
    out, into = took_part[order[: guesses // 2]], took_part[order[-guesses // 2 :]]
    right = int((~out).sum() + into.sum())
    return epsilon_lower_bound(len(scores), guesses, right, delta, confidence)


def epsilon_lower_bound(
    canaries: int, guesses: int, right: int, delta: float, confidence: float
) -> float:
    """The largest epsilon that `right` of `guesses` about `canaries` speak against; 0 if none.

    Guarantee as of `audited_epsilon`. (Steinke et al. 2023, section 5: all epsilons below it have
    a `p_value` under 1 - `confidence`.)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must be between 0 and 1")
    refuted, open_ = 0.0, _LARGEST
    if p_value(canaries, guesses, right, refuted, delta) >= 1 - confidence:
        return 0.0
    for _ in range(_BISECTIONS):
        middle = (refuted + open_) / 2
        if p_value(canaries, guesses, right, middle, delta) < 1 - confidence:
            refuted = middle
        else:
            open_ = middle
    return refuted


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """At most so probable are `right` or more right guesses under (epsilon, delta).

    With delta 0 a guess is right no more often than that of randomised response. Delta adds
    2 m delta x max over i of P[right - i ≤ B < right] / i, B the number of right guesses of
    randomised response (Steinke et al. 2023, corollary 5.4).

    Args:
        canaries: m, each in or out by a fair coin.
        guesses: made, 0 to m.
        right: among them, 0 to `guesses`.
        epsilon: of the guarantee that is put to the test, 0 or more.
        delta: of the same, in [0, 1).
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(
            f"right={right}, guesses={guesses}, canaries={canaries}: each must be 0 up to the next"
        )
    if not (epsilon >= 0 and 0 <= delta < 1):
        raise ValueError(f"epsilon={epsilon}, delta={delta}: must be ≥ 0 and in [0, 1)")
    chance = 1 / (1 + math.exp(-epsilon))
    without_delta = float(bdtrc(right - 1, guesses, chance))
    if right == 0 or delta == 0:
        return without_delta
    up_to = bdtr(np.arange(right), guesses, chance)
    just_below = up_to[-1] - np.append(up_to[-2::-1], 0.0)
    most = float((just_below / np.arange(1, right + 1)).max())
    return min(1.0, without_delta + 2 * canaries * delta * most)
