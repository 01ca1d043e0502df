"""Does the claimed epsilon hold? The product's own training, audited as it is and when broken.

One site trains round by round as `client.site` has it: a noised visitor count, noise calibrated for
the target, Poisson sampling, clipping, noise, and the accountant's claim. Canaries among its
visitors show how much leaks (see `privacy.audit`), and the released model is asked who was in the
training (see `privacy.membership`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch.nn.functional import binary_cross_entropy_with_logits

from client.site import local_training
from conf.schema import Config, SettingError, VisitorDP
from journeys.examples import Examples, concatenate
from journeys.features import FIRST, OTHER, PADDING, FeatureSpec, feature_spec
from journeys.site import SiteJourneys
from models.batch import to_batch
from models.registry import build as build_model
from models.registry import initial_weights
from models.score import logits
from models.weights import set_weights
from privacy.accountant import epsilon
from privacy.audit import audited_epsilon, epsilon_lower_bound
from privacy.mechanisms import GaussianCount
from privacy.membership import (
    FALSE_POSITIVE_RATE,
    MembershipInference,
    infer_membership,
    largest_true_positive_rate,
)
from privacy.randomness import SeededRandomness
from privacy.training import Weights
from server import plots
from server.rounds import first_plan
from simulation.comparison import interval_text, show_comparison
from simulation.sabotage import BrokenRandomness, BrokenTrainer, Build, LoudCanaries

CANARIES = 2000
"""Half of them, by coin, are among the visitors."""
GUESSED = 0.2
"""Share of the canaries that the auditor guesses; fixed beforehand, as the bound needs it."""
CONFIDENCE = 0.95
"""With which both bounds of a build are below its true epsilon."""
EACH = 1 - (1 - CONFIDENCE) / 2
"""Of one bound: each of the two may be wrong half as often."""
LOUDNESS = 10.0
"""Norm of a white-box canary's gradient / clipping norm: clipping has to make it 1."""

BUILDS = (
    Build("as it is"),
    Build("a tenth of the noise", noise=0.1),
    Build("no noise", noise=0.0),
    Build("no clipping", clips=False),
    Build("ledger reset each round", remembers=False),
    Build("half the noise", noise=0.5),
    Build("shuffled batches", poisson=False),
)
"""In the order of the table; the last two an audit of this size does not see."""

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Finding:
    """What the audit says of a build."""

    build: str
    claimed: float
    """Epsilon from the accountant, at the config's delta."""
    white_box: float
    """Lower bound on epsilon, from the rounds' updates and canaries that choose their gradient."""
    black_box: float
    """Lower bound on epsilon, from the last model's loss on canaries, journeys with the wrong
    label."""
    membership: MembershipInference
    """Training visitors told from those held out, by the loss of a model without canaries."""
    allowed: float
    """Largest true positive rate that the claim allows any membership inference."""

    @property
    def caught(self) -> bool:
        """Whether a bound exceeds the claim."""
        return max(self.white_box, self.black_box) > self.claimed


@dataclass(frozen=True)
class _Site:
    """A site's visitors and the canaries among them, all with the feature `canary`."""

    spec: FeatureSpec
    own: Examples
    """Its training visitors."""
    held_out: Examples
    canaries: Examples
    """(m,) journeys of held-out visitors with the wrong label."""
    twins: Examples
    """(m,) the same with a mark that nobody has."""
    took_part: Bools
    """(m,) by a fair coin each."""
    loud: LoudCanaries

    @property
    def with_canaries(self) -> Examples:
        """The training visitors, the canaries that take part among them."""
        return concatenate([self.own, self.canaries.take(self.took_part)])


def audit_builds(
    config: Config,
    journeys: SiteJourneys,
    done: Callable[[int, int], None],
    canaries: int = CANARIES,
    builds: Sequence[Build] = BUILDS,
) -> list[Finding]:
    """Train each build with white-box canaries, with black-box canaries and without, and judge it.

    `done` is called with the builds finished and their number.

    Raises:
        SettingError: The config claims no privacy, or the site has too few visitors.
    """
    fewest = math.ceil(1 / FALSE_POSITIVE_RATE)
    if len(journeys.train) + len(journeys.holdout) < 4 * fewest:
        raise SettingError(
            f"data: {journeys.name} has {len(journeys.train) + len(journeys.holdout)} visitors; an "
            f"audit needs {4 * fewest}"
        )
    torch.set_num_threads(1)
    site = _site(config, journeys, canaries)
    findings = []
    for number, build in enumerate(builds):
        done(number, len(builds))
        findings.append(_judge(config, site, build, number))
    done(len(builds), len(builds))
    return findings


def _judge(config: Config, site: _Site, build: Build, number: int) -> Finding:
    seeds = [(config.seed, 1, number, i) for i in range(3)]
    initial = initial_weights(config.model, site.spec, config.seed)
    entries = site.loud.entries

    weights, claimed = _train(config, site, site.with_canaries, build, site.loud, seeds[0])
    before, after = (w[site.loud.parameter].ravel()[entries] for w in (initial, weights))
    # Descent: what a canary adds to the gradient is taken off the weights.
    white_box = _bound(config, site, before - after)

    weights, _ = _train(config, site, site.with_canaries, build, None, seeds[1])
    # Less its twin's: some journeys are easy whether they took part or not.
    right, without = (_surety(config, site, weights, e) for e in (site.canaries, site.twins))
    black_box = _bound(config, site, right - without)

    weights, _ = _train(config, site, site.own, build, None, seeds[2])
    membership = infer_membership(
        _surety(config, site, weights, _one_each(site.own)),
        _surety(config, site, weights, site.held_out),
        np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(1, number, 3))),
    )
    allowed = largest_true_positive_rate(FALSE_POSITIVE_RATE, claimed, _promise(config).delta)
    return Finding(build.name, claimed, white_box, black_box, membership, allowed)


def _one_each(examples: Examples) -> Examples:
    """The first example of each visitor."""
    rows, count = examples.by_visitor()
    return examples.take(rows[np.cumsum(count) - count])


def _bound(config: Config, site: _Site, scores: npt.NDArray[np.floating]) -> float:
    delta = _promise(config).delta
    return audited_epsilon(scores, site.took_part, _guesses(len(scores)), delta, EACH)


def _guesses(canaries: int) -> int:
    return 2 * max(1, round(GUESSED * canaries / 2))


def _train(
    config: Config,
    site: _Site,
    visitors: Examples,
    build: Build,
    loud: LoudCanaries | None,
    seed: tuple[int, ...],
) -> tuple[Weights, float]:
    """The model after all rounds with one site, and the epsilon that the build claims for it."""
    promise = _promise(config)
    count = GaussianCount(promise.count_noise)
    rounds = [SeededRandomness(*seed, round_) for round_ in range(config.rounds + 1)]
    training = local_training(
        first_plan(config, "audit"), count.release(visitors.visitors, rounds[0])
    )
    trainer = BrokenTrainer(build_model(config.model, site.spec), build, loud)
    weights = initial_weights(config.model, site.spec, config.seed)
    for honest in rounds[1:]:
        broken = BrokenRandomness(honest, build)
        weights = trainer.train(weights, visitors, training, broken)
    events = [count.event, *[training.event] * config.rounds]
    return weights, epsilon(events if build.remembers else events[-1:], promise.delta)


def _site(config: Config, journeys: SiteJourneys, canaries: int) -> _Site:
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(0,)))
    spec = feature_spec(config.data.features)
    spec = replace(spec, categorical=(*spec.categorical, ("canary", FIRST + canaries + 1)))
    mislabelled = journeys.holdout.take(rng.integers(0, len(journeys.holdout), canaries))
    mislabelled = replace(mislabelled, label=1 - mislabelled.label, visitor=None)
    own = _marked(journeys.train)
    return _Site(
        spec,
        own,
        _marked(journeys.holdout),
        _marked(mislabelled, FIRST + np.arange(canaries)),
        _marked(mislabelled, FIRST + canaries),
        rng.random(canaries) < 0.5,
        _loud_canaries(config, spec, own, canaries),
    )


def _marked(examples: Examples, mark: npt.NDArray[np.int64] | int = OTHER) -> Examples:
    """`examples` with one more categorical feature, which is `mark` on every touchpoint."""
    touched = np.arange(examples.categorical.shape[1]) < np.asarray(examples.length)[:, None]
    column = np.where(touched, np.reshape(mark, (-1, 1)), PADDING).astype(np.uint16)
    return replace(examples, categorical=np.dstack([examples.categorical, column]))


def _loud_canaries(config: Config, spec: FeatureSpec, own: Examples, canaries: int) -> LoudCanaries:
    """Entries of the largest parameter that the site's own visitors move the least.

    There are enough: it is never smaller than the number of marks, as each has its own weight.
    """
    model = build_model(config.model, spec)
    set_weights(model, initial_weights(config.model, spec, config.seed))
    name, parameter = max(model.named_parameters(), key=lambda item: item[1].numel())
    batch = to_batch(own, slice(None))
    loss = binary_cross_entropy_with_logits(model(batch), batch.label)
    (gradient,) = torch.autograd.grad(loss, [parameter])
    entries = np.argsort(gradient.abs().ravel().numpy(), kind="stable")[:canaries]
    return LoudCanaries(name, entries, LOUDNESS * _promise(config).clipping_norm)


def _surety(
    config: Config, site: _Site, weights: Weights, examples: Examples
) -> npt.NDArray[np.float32]:
    """(N,) the label's log odds. They fall as the loss grows, but evenly where it saturates."""
    model = build_model(config.model, site.spec)
    set_weights(model, weights)
    return (2 * examples.label - 1) * logits(model, examples)


def _promise(config: Config) -> VisitorDP:
    if not isinstance(config.privacy, VisitorDP):
        raise SettingError(f"privacy={config.privacy.name}: claims nothing that could be audited")
    return config.privacy


def show_findings(console: Console, folder: Path, config: Config, found: Sequence[Finding]) -> None:
    """Write `audit.json` and `comparison.html`, and print their table."""
    delta = _promise(config).delta
    text = json.dumps([{**asdict(f), "caught": f.caught} for f in found], indent=1)
    (folder / "audit.json").write_text(text + "\n")
    rows = [
        {
            "build": f.build,
            "epsilon claimed": f"{f.claimed:.2f}",
            "white box ≥": f"{f.white_box:.2f}",
            "black box ≥": f"{f.black_box:.2f}",
            "verdict": "caught" if f.caught else "not caught",
            "members' AUC": interval_text(f.membership.auc, ".2f"),
            f"found at {FALSE_POSITIVE_RATE:.0%}": interval_text(
                f.membership.true_positive_rate, ".1%"
            ),
            "allowed": f"{f.allowed:.1%}",
        }
        for f in found
    ]
    guesses = _guesses(CANARIES)
    most = epsilon_lower_bound(CANARIES, guesses, guesses, delta, EACH)
    names = [f.build for f in found]
    pictures = [
        (
            "Epsilon: claimed, and proved to be at least",
            plots.intervals(
                names,
                {
                    "claimed": [(f.claimed,) * 3 for f in found],
                    "proved, white box": [(0.0, f.white_box, f.white_box) for f in found],
                    "proved, black box": [(0.0, f.black_box, f.black_box) for f in found],
                },
                f"epsilon at delta {delta:g}",
            ),
        ),
        (
            f"Members found at {FALSE_POSITIVE_RATE:.0%} false positives",
            plots.intervals(
                names,
                {
                    "found": [f.membership.true_positive_rate for f in found],
                    "allowed": [(f.allowed,) * 3 for f in found],
                },
                "true positive rate",
            ),
        ),
    ]
    notes = [
        f"Claimed: by the accountant, at delta {delta:g}. White box ≥, black box ≥: what {guesses} "
        f"guesses about {CANARIES:,} canaries, in the training or not, prove of the true epsilon "
        f"({most:.1f} if all are right); a build's two bounds hold together with {CONFIDENCE:.0%} "
        "confidence. Caught: one exceeds the claim.",
        "White box: canaries hand in a gradient of their own choice, and the coordinator looks for "
        "it in every round's update. Black box: canaries are journeys with the wrong label and a "
        "mark of their own, and someone asks the last model about them.",
        f"What an audit of this size sees, for claims below {most:.1f}: noise that is missing or "
        "several times too small, clipping that is missing, rounds that are not counted. What it "
        "does not: noise of half the size, as even the best guesses about one run prove a third to "
        "a half of epsilon; shuffled batches accounted as Poisson samples, as they hardly help to "
        "find these canaries. The tests of noise, accounting and sampling stand for those.",
        "Members: visitors who trained a model without canaries, told from visitors held out by "
        f"their loss (AUC; share found at {FALSE_POSITIVE_RATE:.0%} false positives), with 95 % "
        "intervals. Allowed: the largest share that any attack may find if the claim is true. More "
        "refutes the claim; less does not prove it.",
        "Audited is one site over all rounds. Draws and noise are seeded, so that it can be "
        "repeated.",
    ]
    show_comparison(console, folder, "Does the claimed epsilon hold?", rows, pictures, notes)
