"""A site: the one door to its visitors' journeys."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from conf.schema import ModelConfig, Unprotected, VisitorDP
from evaluation.histogram import ScoreHistogram
from journeys.features import FeatureSpec
from journeys.site import SiteJourneys
from models.registry import build
from models.score import logits
from models.weights import set_weights
from privacy.accountant import epsilon
from privacy.calibration import UnreachableTargetError, noise_multiplier
from privacy.ledger import Ledger, Release
from privacy.mechanisms import GaussianCount
from privacy.training import LocalTraining, Trainer
from protocol.plan import RoundPlan
from protocol.replies import SiteDescription, SiteEvaluation, SiteUpdate, Weights
from protocol.wire import from_text, to_text


class PlanRefused(Exception):  # noqa: N818  (a refusal is an answer, not a fault)
    """The site does not do what the plan asks. The message names the field."""


class Site:
    """Owns journeys and ledger; `describe`, `train` and `evaluate` are the only ways out.

    Each follows the same order: the plan is judged, what it costs is reserved in the ledger, the
    journeys are read, the answer is made. The site computes its privacy from what it runs, not
    from what the coordinator says.
    """

    def __init__(
        self, journeys: SiteJourneys, spec: FeatureSpec, ledger: Ledger, seed: int, index: int
    ) -> None:
        """`seed` and `index` seed what is random at the site, privacy noise included: simulation
        only, since whoever knows them can take the noise off.
        """
        self.name = journeys.name
        self._journeys = journeys
        self._spec = spec
        self._ledger = ledger
        self._seed = (seed, index)

    def describe(self, plan: RoundPlan) -> SiteDescription:
        """The noised number of visitors that the site trains on."""
        return SiteDescription(self.name, self._visitors(plan))

    def train(self, plan: RoundPlan, weights: Weights) -> SiteUpdate:
        """Train `weights` for one round; and evaluate them as they came, which saves a message.

        Raises:
            PlanRefused: The plan asks for what the site does not do.
        """
        if not 1 <= plan.round <= plan.rounds:
            raise PlanRefused(f"round={plan.round}: must be 1 to rounds={plan.rounds}")
        training = self._local_training(plan)
        self._reserve(plan, "weights", training.noise_multiplier, training)
        trainer = _trainer(to_text(plan.model), self._spec)
        evaluation = self._evaluation(plan.round - 1, trainer, weights)
        trained = trainer.train(weights, self._journeys.train, training, self._seeds(plan.round))
        return SiteUpdate(self.name, plan.round, trained, self._epsilon(plan), evaluation)

    def evaluate(self, plan: RoundPlan, weights: Weights) -> SiteEvaluation:
        """The histogram of the model's scores on the visitors kept from training.

        The counts are exact: for simulations, where all journeys belong to who runs them.
        """
        trainer = _trainer(to_text(plan.model), self._spec)
        return self._evaluation(plan.round, trainer, weights)

    def _evaluation(self, round_: int, trainer: Trainer, weights: Weights) -> SiteEvaluation:
        holdout = self._journeys.holdout
        set_weights(trainer.model, weights)
        histogram = ScoreHistogram.of(logits(trainer.model, holdout), np.asarray(holdout.label))
        return SiteEvaluation(self.name, round_, histogram)

    def _visitors(self, plan: RoundPlan) -> float:
        if isinstance(plan.privacy, Unprotected):
            return float(len(self._journeys.train))
        promise = _visitor_dp(plan)
        mechanism = GaussianCount(promise.count_noise)
        _check_count(promise, mechanism)
        self._ledger.reserve(Release(plan.run, 0, "count", mechanism.noise, 1.0, 1))
        rng = np.random.default_rng(self._seeds(0))
        return mechanism.release(len(self._journeys.train), rng)

    def _local_training(self, plan: RoundPlan) -> LocalTraining:
        """Sample rate, steps and noise, from the plan and the noised visitor count alone."""
        visitors = self._visitors(plan)
        batches = max(1, round(visitors / plan.optimizer.batch_size))
        steps = max(1, round(plan.optimizer.local_epochs * batches))
        noise, clipping_norm = 0.0, math.inf
        if not isinstance(plan.privacy, Unprotected):
            promise = _visitor_dp(plan)
            clipping_norm = promise.clipping_norm
            noise = _calibrated(promise, 1 / batches, steps * plan.rounds)
        return LocalTraining(
            sample_rate=1 / batches,
            steps=steps,
            expected_batch_size=visitors / batches,
            noise_multiplier=noise,
            clipping_norm=clipping_norm,
            optimizer=plan.optimizer,
            proximal_mu=plan.proximal_mu,
        )

    def _reserve(self, plan: RoundPlan, name: str, noise: float, training: LocalTraining) -> None:
        rate, steps = training.sample_rate, training.steps
        self._ledger.reserve(Release(plan.run, plan.round, name, noise, rate, steps))

    def _epsilon(self, plan: RoundPlan) -> float | None:
        if isinstance(plan.privacy, Unprotected):
            return None
        return self._ledger.epsilon(_visitor_dp(plan).delta)

    def _seeds(self, round_: int) -> np.random.SeedSequence:
        seed, index = self._seed
        return np.random.SeedSequence(seed, spawn_key=(index, round_))


def _check_count(promise: VisitorDP, mechanism: GaussianCount) -> None:
    # 1 / (2 noise²) is the mean loss, which epsilon exceeds; exact accounting of so little noise
    # takes minutes.
    hopeless = 2 * mechanism.noise**2 * promise.epsilon <= 1
    if hopeless or epsilon([mechanism.event], promise.delta) >= promise.epsilon:
        raise PlanRefused(
            f"privacy.count_noise={promise.count_noise:g}: the visitor count alone spends more "
            f"than privacy.epsilon={promise.epsilon:g}; raise one of the two"
        )


def _calibrated(promise: VisitorDP, sample_rate: float, steps: int) -> float:
    count = GaussianCount(promise.count_noise).event
    try:
        return noise_multiplier(promise.epsilon, promise.delta, sample_rate, steps, (count,))
    except UnreachableTargetError as error:
        raise PlanRefused(str(error)) from error


def _visitor_dp(plan: RoundPlan) -> VisitorDP:
    if not isinstance(plan.privacy, VisitorDP):
        raise PlanRefused(f"privacy.name={plan.privacy.name}: unknown protection")
    return plan.privacy


@lru_cache(maxsize=4)
def _trainer(model: str, spec: FeatureSpec) -> Trainer:
    """One trainer a process and architecture: wrapping a model for every site costs memory."""
    torch.set_num_threads(1)
    return Trainer(build(from_text(ModelConfig, model), spec))
