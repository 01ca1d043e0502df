"""What a site allows: its own rules, in its own file, which no coordinator can weaken."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.schema import GROUPS, Unprotected, VisitorDP
from protocol.plan import RoundPlan

if TYPE_CHECKING:
    # Both load torch, for which who only watches a site has no use.
    from privacy.accountant import PrivacyEvent
    from privacy.training import LocalTraining

RELEASES = ("count", "weights", "histogram")
"""All that a site can release: its noised visitor count, model updates, evaluations."""


_ANY = "*"


class PolicyError(ValueError):
    """A policy that is missing or cannot be used. The message names the file and the field."""


class PlanRefused(Exception):  # noqa: N818  (a refusal is an answer, not a fault)
    """The site does not do what the plan asks. The message names the field."""


@dataclass(frozen=True)
class SitePolicy:
    """A site's rules. Every one is needed: what is not said is not allowed."""

    federations: tuple[str, ...]
    """Federations that may ask."""
    purposes: tuple[str, ...]
    """What a model may be used for."""
    releases: tuple[str, ...]
    """What may leave the site: of `count`, `weights` and `histogram`."""
    models: tuple[str, ...]
    """Architectures that may be trained: of `logistic`, `mlp`, `gru` and `attention`."""
    epsilon: float
    """A visitor's largest privacy loss by everything that the site ever releases."""
    run_epsilon: float
    """A visitor's largest privacy loss by one run."""
    delta: float
    """Largest delta, at which both are meant; a plan's may not exceed 1 / visitors either."""
    min_noise_multiplier: float
    """Least noise of a release, in units of what one visitor can change."""
    max_sample_rate: float
    """Largest share of the visitors in a training step, in expectation."""
    max_clipping_norm: float
    """Largest clipping norm."""
    max_steps: int
    """Most training steps in a round."""
    max_parameters: int
    """Most parameters of a model."""
    min_visitors: int
    """Fewest visitors, by the noised count, with whom the site takes part."""

    def __post_init__(self) -> None:
        for name in ("federations", "purposes"):
            _hold(bool(getattr(self, name)), name, "", "must name at least one")
        for name, known in (("releases", RELEASES), ("models", tuple(GROUPS["model"]))):
            for value in getattr(self, name):
                _hold(value in known, name, value, f"must be of {', '.join(known)}")
        for name in ("epsilon", "run_epsilon", "max_clipping_norm", "max_steps", "max_parameters"):
            _hold(getattr(self, name) > 0, name, getattr(self, name), "must be above 0")
        _hold(0 < self.delta < 1, "delta", self.delta, "must be between 0 and 1")
        for name in ("min_noise_multiplier", "min_visitors"):
            _hold(getattr(self, name) >= 0, name, getattr(self, name), "must be 0 or more")
        rate = self.max_sample_rate
        _hold(0 < rate <= 1, "max_sample_rate", rate, "must be in (0, 1]")
        _hold(
            self.run_epsilon <= self.epsilon,
            "run_epsilon",
            self.run_epsilon,
            f"must be at most epsilon={self.epsilon:g}",
        )

    @classmethod
    def load(cls, path: Path) -> SitePolicy:
        """Read a policy from YAML.

        Raises:
            PolicyError: The file is missing, or a field is missing, unknown, of the wrong type or
                out of range. A policy without limits cannot be written in a file.
        """
        try:
            read = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        except FileNotFoundError:
            raise PolicyError(f"{path}: no policy, and without one nothing is released") from None
        except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
            reason = str(error).partition("\n")[0]
            raise PolicyError(f"{path}: not a policy ({reason})") from error
        if not isinstance(read, dict):
            raise PolicyError(f"{path}: not a policy (no fields)")
        hints = typing.get_type_hints(cls)
        for key in sorted(map(str, read.keys() ^ hints.keys())):
            known = "missing" if key in hints else "unknown field"
            raise PolicyError(f"{path}: {key}: {known}; a policy has {', '.join(hints)}")
        try:
            policy = cls(**{name: _typed(name, read[name], hint) for name, hint in hints.items()})
        except PolicyError as error:
            raise PolicyError(f"{path}: {error}") from error
        for name in ("federations", "purposes"):
            if _ANY in getattr(policy, name):
                raise PolicyError(f"{path}: {name}: must be named one by one")
        return policy

    @classmethod
    def of_simulation(cls) -> SitePolicy:
        """Allows all that a federation may ask, unprotected training too.

        For simulations, where all journeys belong to who runs them.
        """
        return cls(
            federations=(_ANY,),
            purposes=(_ANY,),
            releases=RELEASES,
            models=tuple(GROUPS["model"]),
            epsilon=math.inf,
            run_epsilon=math.inf,
            delta=math.nextafter(1.0, 0.0),
            min_noise_multiplier=0.0,
            max_sample_rate=1.0,
            max_clipping_norm=math.inf,
            max_steps=2**63,
            max_parameters=2**63,
            min_visitors=0,
        )

    def check_plan(self, plan: RoundPlan) -> None:
        """Refuse a plan that is weaker than the policy, by what it says. Raises `PlanRefused`."""
        _one_of("federation", plan.federation, self.federations, "federations")
        _one_of("purpose", plan.purpose, self.purposes, "purposes")
        _one_of("model.name", plan.model.name, self.models, "models")
        privacy = plan.privacy
        if isinstance(privacy, Unprotected):
            if self.run_epsilon < math.inf:
                raise PlanRefused(
                    "privacy.name=unprotected: this site trains with differential privacy only; "
                    "ask for visitor_dp"
                )
            return
        if not isinstance(privacy, VisitorDP):
            raise PlanRefused(f"privacy.name={privacy.name}: unknown protection")
        _at_most("privacy.epsilon", privacy.epsilon, self.run_epsilon, "run_epsilon")
        _at_most("privacy.delta", privacy.delta, self.delta, "delta")
        clipping = privacy.clipping_norm
        _at_most("privacy.clipping_norm", clipping, self.max_clipping_norm, "max_clipping_norm")

    def check_release(self, name: str, event: PrivacyEvent) -> None:
        """Refuse what may not leave, or not with so little noise. Raises `PlanRefused`."""
        _one_of("release", name, self.releases, "releases")
        noise, least = event.noise_multiplier, self.min_noise_multiplier
        if noise < least:
            raise PlanRefused(
                f"noise multiplier of {name}={noise:.4g}: this site asks for at least {least:g} "
                "(policy: min_noise_multiplier)"
            )

    def check_training(self, training: LocalTraining) -> None:
        """Refuse training that is weaker than the policy. Raises `PlanRefused`."""
        rate, steps = training.sample_rate, training.steps
        _at_most("sample rate", rate, self.max_sample_rate, "max_sample_rate")
        _at_most("steps", steps, self.max_steps, "max_steps")

    def check_parameters(self, parameters: int) -> None:
        """Refuse a model that is too large. Raises `PlanRefused`."""
        _at_most("model parameters", parameters, self.max_parameters, "max_parameters")

    def check_visitors(self, visitors: float, plan: RoundPlan) -> None:
        """Refuse a cohort too small, by its noised count alone. Raises `PlanRefused`."""
        if visitors < self.min_visitors:
            raise PlanRefused(
                f"visitors={visitors:g}: too few, this site takes part with at least "
                f"{self.min_visitors} (policy: min_visitors)"
            )
        # Asked of every real site, not of a simulation's, whose sites may be tiny.
        if isinstance(plan.privacy, VisitorDP) and self.epsilon < math.inf:
            _at_most("privacy.delta", plan.privacy.delta, 1 / visitors, "delta, by 1 / visitors")

    def check_spending(self, plan: RoundPlan, of_run: float, in_all: float) -> None:
        """Refuse what would spend more than is left. Raises `PlanRefused`.

        Args:
            plan: the plan.
            of_run: epsilon of the run, what is asked for included.
            in_all: the same of everything that the site ever released.
        """
        if isinstance(plan.privacy, VisitorDP):
            _at_most("epsilon of the run", of_run, plan.privacy.epsilon, "the plan's own epsilon")
        _at_most("epsilon of the run", of_run, self.run_epsilon, "run_epsilon")
        _at_most("epsilon in all", in_all, self.epsilon, "epsilon")


def _hold(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise PolicyError(f"{name}={value}: {rule}")


def _typed(name: str, value: Any, hint: Any) -> Any:
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if hint is int and type(value) is int:
        return value
    of_text = isinstance(value, list) and all(isinstance(one, str) for one in value)
    if hint not in (int, float) and of_text:
        return tuple(value)
    wanted = {int: "a whole number", float: "a finite number"}.get(hint, "a list of texts")
    raise PolicyError(f"{name}: must be {wanted}")


def _one_of(field: str, asked: str, allowed: tuple[str, ...], rule: str) -> None:
    if asked not in allowed and allowed != (_ANY,):
        raise PlanRefused(
            f"{field}={asked}: this site allows {', '.join(allowed) or 'none'} (policy: {rule})"
        )


def _at_most(field: str, asked: float, allowed: float, rule: str) -> None:
    # Not `asked > allowed`, which a NaN would pass.
    if not asked <= allowed:
        raise PlanRefused(
            f"{field}={asked:.6g}: this site allows at most {allowed:.6g} (policy: {rule})"
        )
