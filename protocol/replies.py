"""What a site answers: all that ever leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evaluation.histogram import ScoreHistogram

Weights = dict[str, npt.NDArray[np.float32]]
"""A model's parameters by name."""


def flat(weights: Weights) -> npt.NDArray[np.float32]:
    """(P,) all values in one vector, ordered by name: a model that was saved has another order."""
    return np.concatenate([weights[name].ravel() for name in sorted(weights)])


def weights_fault(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Why `weights` are no model with parameters of `shapes`, all finite; empty if they are."""
    if missing := shapes.keys() ^ weights.keys():
        return f"weights.{min(missing)}: missing or unknown"
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            return f"weights.{name}: shape {weights[name].shape} instead of {shape}"
    # Fast: a sum of squares is not finite where one of them is not, nor sometimes elsewhere.
    if all(np.isfinite(np.vdot(value, value)) for value in weights.values()):
        return ""
    for name in shapes:
        if not np.isfinite(weights[name]).all():
            return f"weights.{name}: a value is not finite"
    return ""


@dataclass(frozen=True)
class SiteDescription:
    """The answer to a plan of round 0: who is there."""

    site: str
    """The site's name in reports."""
    visitors: float
    """Noised number of visitors that it trains on, at least 1."""


@dataclass(frozen=True)
class SiteEvaluation:
    """How a model did on the visitors that the site keeps from training."""

    site: str
    round: int
    """The model evaluated is the one after so many rounds."""
    histogram: ScoreHistogram
    noise: float
    """Standard deviation of the noise on each count; 0 where nothing is protected."""
    epsilon: float | None
    """As in `SiteUpdate`."""

    def __post_init__(self) -> None:
        if not self.noise >= 0:
            raise ValueError("noise: must be 0 or more")


@dataclass(frozen=True)
class SiteUpdate:
    """The answer to a training plan."""

    site: str
    round: int
    weights: Weights
    """The site's model after the round."""
    epsilon: float | None
    """The site's own account of a visitor's privacy loss so far, this round included; None where
    nothing is protected. For the report: nothing is decided by it."""


@dataclass(frozen=True)
class SiteRefusal:
    """The site does not do what the plan asks."""

    site: str
    round: int
    reason: str
    """Names the field, what was asked and what is allowed. Nothing in it comes from a journey."""


@dataclass(frozen=True)
class SiteReceipt:
    """The site has a published model now, or had it before."""

    site: str
    run: str


Reply = SiteDescription | SiteEvaluation | SiteUpdate | SiteRefusal | SiteReceipt


REPLIES: dict[str, type[Reply]] = {
    kind.__name__: kind
    for kind in (SiteDescription, SiteEvaluation, SiteUpdate, SiteRefusal, SiteReceipt)
}
"""By the name under which they travel and are kept."""


@dataclass(frozen=True)
class SiteFailure:
    """The coordinator's note of a site without a sound answer."""

    site: str
    outcome: str
    """`refused` by the site, `missing` within the time, or `dropped` by the coordinator."""
    reason: str
