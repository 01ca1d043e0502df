"""What the coordinator asks of a site for one round."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from conf.schema import JourneyConfig, ModelConfig, OptimizerConfig, PrivacyConfig
from journeys.features import FeatureSpec, feature_spec
from protocol.wire import to_text


@dataclass(frozen=True)
class RoundPlan:
    """One request, the same for every site. A site checks it; it commands nothing.

    Within a run the plans differ in `round` alone.
    """

    federation: str
    """Who asks: a site's policy names the federations that may."""
    purpose: str
    """What the model will be used for: a site's policy names the purposes that it allows."""
    run: str
    """Identifies the run, over restarts too."""
    round: int
    """1 to `rounds`; 0 before the first round (describe)."""
    rounds: int
    """Rounds of the whole run: what the privacy budget has to last for."""
    evaluations: int
    """Evaluations of the whole run, which share the privacy of the visitors held out."""
    model: ModelConfig
    optimizer: OptimizerConfig
    privacy: PrivacyConfig
    journeys: JourneyConfig
    """How examples are cut from journeys."""
    proximal_mu: float = 0.0
    """Weight of the pull towards the round's model (FedProx)."""

    @cached_property
    def text(self) -> str:
        """As it travels, and as a site's ledger knows it again: JSON."""
        return to_text(self)

    # What follows is asked for at each of a simulation's sites, which share the plan.

    @cached_property
    def first(self) -> RoundPlan:
        """The run's plan before its first round."""
        return replace(self, round=0)

    @cached_property
    def architecture(self) -> tuple[str, FeatureSpec]:
        """The model's config as JSON, and the features that it reads."""
        return to_text(self.model), feature_spec(self.journeys.features)
