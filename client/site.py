"""A site: the one door to its visitors' journeys."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar, cast

import numpy as np
import torch

from client.policy import PlanRefused, SitePolicy
from conf.schema import JourneyConfig, ModelConfig, VisitorDP
from evaluation.histogram import EXACT, NOISED, ScoreHistogram
from journeys.features import FeatureSpec
from journeys.site import SiteJourneys
from models.registry import build, shapes
from models.score import logits
from models.weights import set_weights
from privacy.accountant import PrivacyEvent, epsilon
from privacy.calibration import UnreachableTargetError, noise_multiplier
from privacy.ledger import Answer, Ledger, LedgerConflictError, Release
from privacy.ledger import Request as LedgerRequest
from privacy.mechanisms import GaussianCount, GaussianHistogram
from privacy.projection import affordable_rounds, epsilon_after
from privacy.randomness import Randomness, SeededRandomness, SystemRandomness
from privacy.training import LocalTraining, Trainer, never
from protocol.exchange import ASKS, Request
from protocol.plan import RoundPlan
from protocol.replies import (
    Reply,
    SiteDescription,
    SiteEvaluation,
    SiteRefusal,
    SiteUpdate,
    Weights,
    weights_fault,
)
from protocol.stored import reply_from_bytes, reply_to_bytes
from protocol.wire import from_text

R = TypeVar("R", bound=Reply)


MOST_RELEASES = 100_000_000
"""Most rounds, evaluations, and training steps in all rounds: more take too long to account for."""

_KINDS = ("describe", "train", "evaluate")
"""The place of each is in the seed of its noise."""


def any_cut(_: JourneyConfig) -> None:
    """For a site that makes whatever cut is asked for."""


class Site:
    """Owns journeys, policy and ledger; `describe`, `train` and `evaluate` are the only ways out.

    Each goes through one gate (`_release`): the policy judges the plan, what the answer costs is
    reserved in the ledger, then the journeys are read, the answer is made and put on record, and
    only then it leaves. The site computes its privacy from what it runs, not from what the
    coordinator says.

    The visitors that training uses and those held out for evaluation are different people: what is
    released of the ones costs the others nothing.
    """

    def __init__(
        self,
        name: str,
        journeys: Callable[[JourneyConfig], SiteJourneys],
        policy: SitePolicy,
        ledger: Ledger,
        seed: tuple[int, int] | None = None,
        check_cut: Callable[[JourneyConfig], None] = any_cut,
    ) -> None:
        """`journeys` cuts the site's examples as a plan asks; called only for what is paid for.

        `check_cut` raises `PlanRefused` for a cut that the site does not make; called before.

        `seed`, of the run and of the site, makes all repeatable, privacy noise included. It is for
        simulations only: who knows it can take the noise off. Without it all randomness comes from
        the operating system.
        """
        self.name = name
        self._journeys = journeys
        self._policy = policy
        self._ledger = ledger
        self._seed = seed
        self._check_cut = check_cut
        self._described: tuple[str, SiteDescription] | None = None
        self._trains: tuple[str, LocalTraining] | None = None

    def close(self) -> None:
        """Let another process have the ledger."""
        self._ledger.close()

    def answer(self, request: Request, stopped: Callable[[], bool] = never) -> dict[str, Reply]:
        """What is asked, one after the other; a refusal in the place of what the site does not do.

        Raises:
            TrainingStopped: `stopped` said so. What was reserved stays reserved; the same request
                is answered later at no further cost.
        """
        replies: dict[str, Reply] = {}
        for ask in ASKS:
            plan = request.plans.get(ask)
            if plan is None:
                continue
            try:
                if ask == "describe":
                    replies[ask] = self.describe(plan)
                elif ask == "evaluate":
                    replies[ask] = self.evaluate(plan, request.weights)
                else:
                    replies[ask] = self.train(plan, request.weights, stopped)
            except PlanRefused as refusal:
                replies[ask] = SiteRefusal(self.name, plan.round, str(refusal))
        return replies

    def describe(self, plan: RoundPlan) -> SiteDescription:
        """The noised number of visitors that the site trains on.

        Raises:
            PlanRefused: The plan asks for what the site does not do, here and below.
        """
        plan = plan.first
        if self._described is not None and self._described[0] == plan.text:
            return self._described[1]
        self._policy.check_plan(plan)
        _check_length(plan)
        mechanism = GaussianCount(_count_noise(plan))
        release = Release("count", "train", mechanism.event)

        def count(randomness: Randomness, _: float | None) -> SiteDescription:
            visitors = self._journeys(plan.journeys).train.visitors
            return SiteDescription(self.name, mechanism.release(visitors, randomness))

        description = self._release("describe", plan, None, release, count)
        self._policy.check_visitors(description.visitors, plan)
        self._check_whole_run(plan, description.visitors)
        self._described = (plan.text, description)
        return description

    def train(
        self, plan: RoundPlan, weights: Weights, stopped: Callable[[], bool] = never
    ) -> SiteUpdate:
        """Train `weights` for one round. Raises `TrainingStopped` once `stopped` says so."""
        if not 1 <= plan.round <= plan.rounds:
            raise PlanRefused(f"round={plan.round}: must be 1 to rounds={plan.rounds}")
        training = self._local_training(plan, self.describe(plan).visitors)
        self._policy.check_training(training)
        trainer = self._trainer(plan, weights)
        release = Release("weights", "train", training.event)

        def update(randomness: Randomness, spent: float | None) -> SiteUpdate:
            examples = self._journeys(plan.journeys).train
            trained = trainer.train(weights, examples, training, randomness, stopped)
            return SiteUpdate(self.name, plan.round, trained, spent)

        return self._release("train", plan, weights, release, update)

    def evaluate(self, plan: RoundPlan, weights: Weights) -> SiteEvaluation:
        """The noised histogram of the model's scores on the visitors kept from training."""
        self.describe(plan)
        trainer = self._trainer(plan, weights)
        mechanism = GaussianHistogram(_evaluation_noise(plan))
        release = Release("histogram", "holdout", mechanism.event)

        def evaluation(randomness: Randomness, spent: float | None) -> SiteEvaluation:
            holdout = self._journeys(plan.journeys).holdout
            set_weights(trainer.model, weights)
            scores = logits(trainer.model, holdout)
            bins = NOISED if mechanism.noise else EXACT
            exact = ScoreHistogram.of(scores, np.asarray(holdout.label), bins)
            counts = np.stack([exact.negative, exact.positive]).astype(np.int64)
            histogram = ScoreHistogram(*mechanism.release(counts, randomness).astype(np.float64))
            return SiteEvaluation(self.name, plan.round, histogram, mechanism.noise, spent)

        return self._release("evaluate", plan, weights, release, evaluation)

    def _trainer(self, plan: RoundPlan, weights: Weights) -> Trainer:
        """What trains the plan's model, once the model is known to be one, and not too large."""
        expected = _shapes(*plan.architecture)
        self._policy.check_parameters(sum(math.prod(shape) for shape in expected.values()))
        if fault := weights_fault(weights, expected):
            raise PlanRefused(fault)
        return _trainer(*plan.architecture)

    def _local_training(self, plan: RoundPlan, visitors: float) -> LocalTraining:
        """The same in all rounds of a run."""
        run = plan.first.text
        if self._trains is None or self._trains[0] != run:
            self._trains = run, local_training(plan, visitors)
        return self._trains[1]

    def _check_whole_run(self, plan: RoundPlan, visitors: float) -> None:
        """Refuse at its start a run that would run out of budget before its end."""
        budget, delta = self._policy.epsilon, self._policy.delta
        if budget == math.inf:
            return
        each = [self._local_training(plan, visitors).event]
        before = [
            release.event
            for entry in self._ledger.entries()
            for release in entry.request.releases
            if release.population == "train"
            and (entry.request.run != _run(plan) or release.name == "count")
        ]
        if epsilon_after(plan.rounds, each, before, delta) > budget:
            left = affordable_rounds(each, before, budget, delta, at_most=plan.rounds)
            raise PlanRefused(
                f"rounds={plan.rounds}: what is left of this site's budget lasts for {left} "
                "(policy: epsilon)"
            )

    def _release(
        self,
        kind: str,
        plan: RoundPlan,
        weights: Weights | None,
        release: Release,
        make: Callable[[Randomness, float | None], R],
    ) -> R:
        """The gate: all that leaves the site leaves here, charged, on record, and once.

        `make` gets the run's privacy loss, `release` included; None where nothing is protected.
        """
        self._policy.check_plan(plan)
        self._policy.check_release(release.name, release.event)
        self._check_cut(plan.journeys)
        request = _request(kind, plan, weights, release)
        spent: float | None = None
        if isinstance(plan.privacy, VisitorDP):
            charged = request in self._ledger
            also = () if charged else request.releases
            spent = self._ledger.epsilon(plan.privacy.delta, run=request.run, also=also)
            if not charged:
                in_all = 0.0
                if self._policy.epsilon < math.inf:
                    in_all = self._ledger.epsilon(self._policy.delta, also=also)
                self._policy.check_spending(plan, spent, in_all)
        try:
            reserved = self._ledger.reserve(request)
        except LedgerConflictError as error:
            raise PlanRefused(
                f"round={plan.round}: {kind} was asked before in this run, with another plan or "
                "model; an answer would be a second release"
            ) from error
        randomness = self._randomness(kind, plan.round)
        if isinstance(reserved, Answer):
            if reserved.reply is not None:
                return cast(R, reply_from_bytes(reserved.reply))
            if not randomness.repeatable:
                raise PlanRefused(f"round={plan.round}: {kind} is answered already, and is over")
            return make(randomness, spent)
        reply = make(randomness, spent)
        # Seeded noise gives the same answer again, so that there is none to keep.
        kept = None if randomness.repeatable else reply_to_bytes(reply)
        self._ledger.commit(reserved, kept)
        return reply

    def _randomness(self, kind: str, round_: int) -> Randomness:
        if self._seed is None:
            return SystemRandomness()
        seed, site = self._seed
        return SeededRandomness(seed, site, round_, _KINDS.index(kind))


def local_training(plan: RoundPlan, visitors: float) -> LocalTraining:
    """Sample rate, steps and noise of a round, from the plan and the noised visitor count alone.

    Raises:
        PlanRefused: No noise keeps the plan's promise, or there are too many steps to tell.
    """
    batches = max(1, round(visitors / plan.optimizer.batch_size))
    planned = max(1.0, plan.optimizer.local_epochs * batches)
    if not planned * plan.rounds <= MOST_RELEASES:
        raise PlanRefused(
            f"optimizer.local_epochs={plan.optimizer.local_epochs:g}: {planned:.6g} steps in each "
            f"of rounds={plan.rounds}; a run has at most {MOST_RELEASES:,}"
        )
    steps = round(planned)
    noise, clipping_norm, engine = 0.0, math.inf, "bookkeeping"
    if isinstance(plan.privacy, VisitorDP):
        clipping_norm, engine = plan.privacy.clipping_norm, plan.privacy.clipping_engine
        count = GaussianCount(plan.privacy.count_noise).event
        noise = _calibrated(plan.privacy, 1 / batches, steps * plan.rounds, count)
    return LocalTraining(
        sample_rate=1 / batches,
        steps=steps,
        expected_batch_size=visitors / batches,
        noise_multiplier=noise,
        clipping_norm=clipping_norm,
        optimizer=plan.optimizer,
        clipping_engine=engine,
        proximal_mu=plan.proximal_mu,
    )


def _check_length(plan: RoundPlan) -> None:
    if not (1 <= plan.rounds <= MOST_RELEASES and plan.evaluations <= MOST_RELEASES):
        raise PlanRefused(f"rounds and evaluations: a run has 1 to {MOST_RELEASES:,} of them")


def _request(
    kind: str, plan: RoundPlan, weights: Weights | None, release: Release
) -> LedgerRequest:
    try:
        return LedgerRequest(_run(plan), plan.round, kind, _digest(plan, weights), (release,))
    except ValueError as error:
        # A run's name that cannot be shown, a round below 0.
        raise PlanRefused(str(error)) from error


def _run(plan: RoundPlan) -> str:
    return f"{plan.federation}/{plan.run}"


def _count_noise(plan: RoundPlan) -> float:
    if not isinstance(plan.privacy, VisitorDP):
        return 0.0
    promise, noise = plan.privacy, plan.privacy.count_noise
    try:
        event = GaussianCount(noise).event
    except ValueError as error:
        raise PlanRefused(str(error)) from error
    if epsilon([event], promise.delta) >= promise.epsilon:
        raise PlanRefused(
            f"privacy.count_noise={noise:g}: the visitor count alone spends more than "
            f"privacy.epsilon={promise.epsilon:g}; raise one of the two"
        )
    return noise


def _evaluation_noise(plan: RoundPlan) -> float:
    if not isinstance(plan.privacy, VisitorDP):
        return 0.0
    return _calibrated(plan.privacy, 1.0, max(plan.evaluations, 1))


def _calibrated(
    promise: VisitorDP, sample_rate: float, releases: int, *others: PrivacyEvent
) -> float:
    try:
        return noise_multiplier(promise.epsilon, promise.delta, sample_rate, releases, others)
    except UnreachableTargetError as error:
        raise PlanRefused(str(error)) from error


def _digest(plan: RoundPlan, weights: Weights | None) -> str:
    """Of all that is asked."""
    asked = hashlib.sha256(plan.text.encode())
    for name, value in sorted((weights or {}).items()):
        asked.update(name.encode() + b"\0")
        asked.update(np.ascontiguousarray(value).data)
    return asked.hexdigest()


@lru_cache(maxsize=4)
def _shapes(model: str, spec: FeatureSpec) -> dict[str, tuple[int, ...]]:
    return shapes(from_text(ModelConfig, model), spec)


@lru_cache(maxsize=4)
def _trainer(model: str, spec: FeatureSpec) -> Trainer:
    """One trainer a process and architecture: wrapping a model for every site costs memory."""
    torch.set_num_threads(1)
    return Trainer(build(from_text(ModelConfig, model), spec))
