from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from client.policy import PlanRefused, SitePolicy
from client.site import Site, local_training
from conf.schema import (
    LogisticConfig,
    MlpConfig,
    OptimizerConfig,
    PrivacyConfig,
    Unprotected,
    VisitorDP,
)
from evaluation.histogram import EXACT, NOISED, Bins, ScoreHistogram
from journeys.examples import Examples
from journeys.features import FeatureSpec
from journeys.site import SiteJourneys
from models.registry import build, initial_weights
from models.score import logits
from models.weights import set_weights
from privacy.ledger import Entry, Ledger, LedgerDamagedError
from privacy.mechanisms import GaussianCount
from privacy.training import TrainingStopped
from protocol.exchange import Request
from protocol.plan import RoundPlan
from protocol.replies import SiteEvaluation, SiteRefusal, SiteUpdate, Weights
from tests.shop import CUT, SPEC, Untouchable

torch.set_num_threads(1)

MODEL = LogisticConfig()
ROUNDS = 4
PROMISE = VisitorDP(epsilon=2.0, delta=1e-5, count_noise=20.0)
PLAN = RoundPlan(
    "shops",
    "conversion-model",
    "run",
    1,
    ROUNDS,
    3,
    MODEL,
    OptimizerConfig(batch_size=32),
    PROMISE,
    CUT,
)
POLICY = SitePolicy(
    federations=("shops",),
    purposes=("conversion-model",),
    releases=("count", "weights", "histogram"),
    models=("logistic",),
    epsilon=3.0,
    run_epsilon=2.0,
    delta=1e-5,
    min_noise_multiplier=0.3,
    max_sample_rate=0.5,
    max_clipping_norm=3.0,
    max_steps=20,
    max_parameters=1000,
    min_visitors=50,
)


def examples(n: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    steps, sizes = SPEC.max_touchpoints, [size for _, size in SPEC.categorical]
    length = rng.integers(1, steps + 1, n).astype(np.int32)
    real = np.arange(steps) < length[:, None]
    categorical = np.stack([rng.integers(1, size, (n, steps)) for size in sizes], axis=2)
    numeric = rng.random((n, steps, len(SPEC.numeric)), dtype=np.float32)
    return Examples(
        (categorical * real[:, :, None]).astype(np.uint16),
        (numeric * real[:, :, None]).astype(np.float32),
        length,
        (rng.random(n) < 0.3).astype(np.float32),
    )


JOURNEYS = SiteJourneys("shop", examples(200, 1), examples(50, 2))


def a_site(
    tmp_path: Path,
    journeys: SiteJourneys = JOURNEYS,
    policy: SitePolicy | None = None,
    seed: tuple[int, int] | None = (5, 0),
) -> Site:
    ledger = Ledger(tmp_path / "ledger.sqlite", durable=seed is None)
    return Site("shop", lambda _: journeys, policy or SitePolicy.of_simulation(), ledger, seed)


def entries(tmp_path: Path) -> list[Entry]:
    """The site's ledger, looked at from outside."""
    return list(Ledger(tmp_path / "ledger.sqlite", read_only=True).entries())


def asked(tmp_path: Path) -> list[tuple[str, int]]:
    return [(e.request.kind, e.request.round) for e in entries(tmp_path)]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with closing(a_site(tmp_path)) as opened:
        yield opened


@pytest.fixture
def real_site(tmp_path: Path) -> Iterator[Site]:
    """With a policy, and with noise from the operating system."""
    with closing(a_site(tmp_path, policy=POLICY, seed=None)) as opened:
        yield opened


@pytest.fixture(scope="module")
def weights() -> Weights:
    return initial_weights(MODEL, SPEC, 0)


def equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


def of_round(round_: int, privacy: PrivacyConfig = PROMISE, **change: Any) -> RoundPlan:
    return replace(PLAN, round=round_, privacy=privacy, **change)


def train_all(site: Site, weights: Weights, privacy: PrivacyConfig) -> Iterator[SiteUpdate]:
    for round_ in range(1, ROUNDS + 1):
        update = site.train(of_round(round_, privacy), weights)
        yield update
        weights = update.weights


# ------------------------------------------------------------------ describe


def test_describe_releases_a_noised_count(tmp_path: Path) -> None:
    counts = []
    for index in range(200):
        with closing(a_site(tmp_path / str(index), seed=(5, index))) as site:
            counts.append(site.describe(of_round(0)).visitors)

    noise = np.array(counts) - 200
    # 5 sigma of the mean and of the deviation of 200 draws
    assert abs(noise.mean()) < 5 * 20 / math.sqrt(200)
    assert abs(noise.std() - 20) < 5 * 20 / math.sqrt(400)
    assert len(set(counts)) > 30


def test_describe_is_charged_once_and_answers_the_same(tmp_path: Path, real_site: Site) -> None:
    one, two = real_site.describe(of_round(0)), real_site.describe(of_round(0))

    assert one == two
    (entry,) = entries(tmp_path)
    (release,) = entry.request.releases
    assert (release.name, release.population) == ("count", "train")
    assert release.event == GaussianCount(20.0).event


def test_an_unprotected_count_is_exact_and_known_as_such(tmp_path: Path, site: Site) -> None:
    assert site.describe(of_round(0, Unprotected())).visitors == 200.0
    (entry,) = entries(tmp_path)
    assert entry.request.releases[0].event.noise_multiplier == 0


# ------------------------------------------------------------------ train


@pytest.mark.parametrize("seed", [(5, 0), None])
def test_epsilon_grows_to_the_target_and_never_beyond(
    tmp_path: Path, weights: Weights, seed: tuple[int, int] | None
) -> None:
    with closing(a_site(tmp_path, policy=POLICY, seed=seed)) as site:
        site.describe(of_round(0))
        told = [update.epsilon for update in train_all(site, weights, PROMISE)]

    spent = [epsilon for epsilon in told if epsilon is not None]
    assert len(spent) == ROUNDS
    assert all(a < b for a, b in pairwise(spent))
    assert 0.99 * PROMISE.epsilon <= spent[-1] <= PROMISE.epsilon
    assert spent[-1] == Ledger(tmp_path / "ledger.sqlite", read_only=True).epsilon(PROMISE.delta)


def test_what_is_charged_is_what_is_run(tmp_path: Path, site: Site, weights: Weights) -> None:
    visitors = site.describe(of_round(0)).visitors
    list(train_all(site, weights, PROMISE))

    count, *rounds = entries(tmp_path)

    batches = max(1, round(visitors / 32))
    assert (count.request.kind, count.request.run) == ("describe", "shops/run")
    assert [e.request.key for e in rounds] == [
        ("shops/run", n, "train") for n in range(1, ROUNDS + 1)
    ]
    releases = [release for e in rounds for release in e.request.releases]
    assert {(r.name, r.population) for r in releases} == {("weights", "train")}
    assert {(r.event.sample_rate, r.event.count) for r in releases} == {(1 / batches, batches)}
    assert len({r.event.noise_multiplier for r in releases}) == 1
    assert all(e.committed for e in entries(tmp_path))


@pytest.mark.parametrize("seed", [(5, 0), None])
def test_promise_8_a_round_asked_twice_is_charged_once_and_answers_the_same(
    tmp_path: Path, weights: Weights, seed: tuple[int, int] | None
) -> None:
    with closing(a_site(tmp_path, policy=POLICY, seed=seed)) as site:
        one = site.train(of_round(1), weights)
        again = site.train(of_round(1), weights)
    with closing(a_site(tmp_path, policy=POLICY, seed=seed)) as site:
        restarted = site.train(of_round(1), weights)

    assert equal(one.weights, again.weights)
    assert equal(one.weights, restarted.weights)
    assert one.epsilon == again.epsilon == restarted.epsilon
    assert asked(tmp_path) == [("describe", 0), ("train", 1)]


def test_noise_of_the_system_is_never_the_same(tmp_path: Path, weights: Weights) -> None:
    def trained(name: str) -> Weights:
        with closing(a_site(tmp_path / name, policy=POLICY, seed=None)) as site:
            return site.train(of_round(1), weights).weights

    assert not equal(trained("a"), trained("b"))


def test_seeds_tell_rounds_sites_and_runs_apart(tmp_path: Path, weights: Weights) -> None:
    def trained(seed: int, index: int, round_: int) -> Weights:
        folder = tmp_path / f"{seed}-{index}-{round_}"
        with closing(a_site(folder, seed=(seed, index))) as site:
            return site.train(of_round(round_), weights).weights

    models = [trained(5, 0, 1), trained(5, 0, 2), trained(5, 1, 1), trained(6, 0, 1)]

    assert len({model[min(model)].tobytes() for model in models}) == 4


def test_the_update_answers_for_its_round_and_site(site: Site, weights: Weights) -> None:
    before = {name: w.copy() for name, w in weights.items()}

    update = site.train(of_round(3), weights)

    assert (update.site, update.round) == ("shop", 3)
    assert {n: (w.shape, w.dtype) for n, w in update.weights.items()} == {
        n: (w.shape, np.dtype(np.float32)) for n, w in weights.items()
    }
    assert not equal(update.weights, weights)
    assert equal(before, weights)


def test_unprotected_training_learns_and_has_no_epsilon(
    tmp_path: Path, site: Site, weights: Weights
) -> None:
    updates = list(train_all(site, weights, Unprotected()))

    assert [update.epsilon for update in updates] == [None] * ROUNDS
    ledger = Ledger(tmp_path / "ledger.sqlite", read_only=True)
    assert ledger.epsilon(1e-5) == math.inf


def test_either_clipping_engine_trains_the_same_model(tmp_path: Path, weights: Weights) -> None:
    assert {local_training(of_round(1), 200.0).clipping_engine} == {"bookkeeping"}
    models = []
    for engine in ("bookkeeping", "opacus"):
        plan = of_round(1, replace(PROMISE, clipping_engine=engine))
        assert local_training(plan, 200.0).clipping_engine == engine
        with closing(a_site(tmp_path / engine)) as site:
            models.append(site.train(plan, weights).weights)

    for name in weights:
        np.testing.assert_allclose(models[0][name], models[1][name], atol=1e-4)


def test_fedprox_pulls_towards_the_rounds_model(tmp_path: Path, weights: Weights) -> None:
    def distance(mu: float) -> float:
        with closing(a_site(tmp_path / str(mu))) as site:
            trained = site.train(of_round(1, Unprotected(), proximal_mu=mu), weights).weights
        return math.sqrt(sum(float(((trained[n] - weights[n]) ** 2).sum()) for n in weights))

    assert distance(1.0) < 0.9 * distance(0.0)


# ------------------------------------------------------------------ evaluate


def exact_histogram(weights: Weights, bins: Bins) -> ScoreHistogram:
    model = build(MODEL, SPEC)
    set_weights(model, weights)
    return ScoreHistogram.of(logits(model, JOURNEYS.holdout), JOURNEYS.holdout.label, bins)


def test_an_unprotected_evaluation_is_exact(site: Site, weights: Weights) -> None:
    evaluation = site.evaluate(of_round(3, Unprotected()), weights)

    expected = exact_histogram(weights, EXACT)
    assert np.array_equal(evaluation.histogram.positive, expected.positive)
    assert np.array_equal(evaluation.histogram.negative, expected.negative)
    assert (evaluation.site, evaluation.round, evaluation.noise) == ("shop", 3, 0.0)


def test_an_evaluation_carries_the_noise_that_it_says(tmp_path: Path, weights: Weights) -> None:
    expected = exact_histogram(weights, NOISED)
    differences = []
    for index in range(40):
        with closing(a_site(tmp_path / str(index), seed=(5, index))) as site:
            evaluation = site.evaluate(of_round(1), weights)
        differences += [
            evaluation.histogram.positive - expected.positive,
            evaluation.histogram.negative - expected.negative,
        ]

    noise = np.concatenate(differences)
    assert len(noise) == 40 * 2 * NOISED.count
    # Rounding to whole visitors adds 1/12; 5 sigma of the deviation of so many draws
    deviation = math.sqrt(evaluation.noise**2 + 1 / 12)
    assert abs(noise.std() - deviation) < 5 * deviation / math.sqrt(2 * len(noise))
    assert abs(noise.mean()) < 5 * deviation / math.sqrt(len(noise))


def test_all_evaluations_together_spend_what_training_may(
    tmp_path: Path, real_site: Site, weights: Weights
) -> None:
    told = [real_site.evaluate(of_round(n), weights).epsilon for n in (1, 2, 3)]

    assert [e for e in told if e is not None] == sorted(e for e in told if e is not None)
    assert 0.99 * PROMISE.epsilon <= (told[-1] or 0) <= PROMISE.epsilon
    histograms = [e.request.releases[0] for e in entries(tmp_path)[1:]]
    assert {(h.name, h.population) for h in histograms} == {("histogram", "holdout")}


def test_one_evaluation_more_than_planned_is_refused(real_site: Site, weights: Weights) -> None:
    for round_ in (1, 2, 3):
        real_site.evaluate(of_round(round_), weights)

    with pytest.raises(PlanRefused, match="epsilon of the run"):
        real_site.evaluate(of_round(4), weights)


def test_training_and_evaluation_are_of_different_visitors(
    tmp_path: Path, real_site: Site, weights: Weights
) -> None:
    list(train_all(real_site, weights, PROMISE))
    evaluations: list[SiteEvaluation] = [real_site.evaluate(of_round(n), weights) for n in (1, 2)]

    assert all(e.epsilon is not None and e.epsilon <= PROMISE.epsilon for e in evaluations)


# ------------------------------------------------------------------ refusals


def untouched(tmp_path: Path, policy: SitePolicy | None = None) -> Site:
    return a_site(tmp_path, cast(SiteJourneys, Untouchable()), policy)


@pytest.mark.parametrize("round_", [0, -1, ROUNDS + 1])
def test_a_round_outside_the_run_is_refused_unread(
    tmp_path: Path, weights: Weights, round_: int
) -> None:
    message = f"round={round_}: must be 1 to rounds=4"
    with closing(untouched(tmp_path)) as site, pytest.raises(PlanRefused, match=message):
        site.train(of_round(round_), weights)

    assert entries(tmp_path) == []


@pytest.mark.parametrize("noise", [0.2, 0.01, 1e-6])
@pytest.mark.parametrize("ask", ["describe", "train"])
def test_a_count_that_costs_more_than_the_promise_is_refused_uncharged(
    tmp_path: Path, weights: Weights, ask: str, noise: float
) -> None:
    plan = of_round(1, replace(PROMISE, count_noise=noise))

    message = r"privacy\.count_noise=.* more than privacy\.epsilon=2"
    with closing(untouched(tmp_path)) as site, pytest.raises(PlanRefused, match=message):
        site.describe(plan) if ask == "describe" else site.train(plan, weights)

    assert entries(tmp_path) == []


LONGER: dict[str, tuple[dict[str, Any], str]] = {
    "rounds": ({"rounds": 10**18}, "^rounds and evaluations: a run has 1 to 100,000,000"),
    "no rounds": ({"rounds": 0}, "^rounds and evaluations: a run has 1 to 100,000,000"),
    "evaluations": ({"evaluations": 10**18}, "^rounds and evaluations: a run has 1 to"),
    "count": ({"privacy": replace(PROMISE, count_noise=1e300)}, "^privacy.count_noise=1e.300"),
    "run": ({"run": "x" * 200}, "^run: must be 1 to 200 printable characters"),
    "terminal": ({"run": "\x1b[31m"}, "^run: must be 1 to 200 printable characters"),
}


@pytest.mark.parametrize("kind", LONGER)
def test_a_plan_beyond_what_can_be_accounted_for_is_refused_unread(
    tmp_path: Path, kind: str
) -> None:
    change, message = LONGER[kind]
    with closing(untouched(tmp_path)) as site, pytest.raises(PlanRefused, match=message):
        site.describe(replace(PLAN, **change))

    assert entries(tmp_path) == []


@pytest.mark.parametrize("epochs", [1e300, 1e7])
def test_more_steps_than_can_be_accounted_for_are_refused(
    tmp_path: Path, weights: Weights, epochs: float
) -> None:
    plan = replace(PLAN, optimizer=OptimizerConfig(batch_size=1, local_epochs=epochs))
    with (
        closing(a_site(tmp_path, policy=POLICY, seed=None)) as site,
        pytest.raises(PlanRefused, match=r"^optimizer\.local_epochs=1e.*at most 100,000,000"),
    ):
        site.train(plan, weights)

    assert asked(tmp_path) == [("describe", 0)]


def test_a_cut_that_is_refused_is_not_charged(tmp_path: Path, weights: Weights) -> None:
    def refuse(_: object) -> None:
        raise PlanRefused("data.features: no")

    ledger = Ledger(tmp_path / "ledger.sqlite", durable=False)
    journeys = cast(SiteJourneys, Untouchable())
    policy = SitePolicy.of_simulation()
    with closing(Site("shop", lambda _: journeys, policy, ledger, check_cut=refuse)) as site:
        answers = site.answer(Request(dict.fromkeys(("train", "evaluate"), PLAN), weights))

    for answer in answers.values():
        assert answer == SiteRefusal("shop", 1, "data.features: no")
    assert entries(tmp_path) == []


WEAKER: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "federation": ({"federation": "others"}, {}, "federation=others"),
    "purpose": ({"purpose": "credit"}, {}, "purpose=credit"),
    "model": ({"model": MlpConfig()}, {}, r"model\.name=mlp"),
    "unprotected": ({"privacy": Unprotected()}, {}, r"privacy\.name=unprotected"),
    "unknown": ({"privacy": PrivacyConfig("magic")}, {}, r"privacy\.name=magic: unknown"),
    "epsilon": ({"privacy": replace(PROMISE, epsilon=2.1)}, {}, r"privacy\.epsilon=2\.1"),
    "delta": ({"privacy": replace(PROMISE, delta=1e-4)}, {}, r"privacy\.delta=0\.0001"),
    "clipping": (
        {"privacy": replace(PROMISE, clipping_norm=3.1)},
        {},
        r"privacy\.clipping_norm=3\.1",
    ),
    "count": ({}, {"releases": ("weights",)}, "release=count"),
    "noise": ({}, {"min_noise_multiplier": 30.0}, "noise multiplier of count=20"),
}


@pytest.mark.parametrize("kind", WEAKER)
@pytest.mark.parametrize("ask", ["describe", "train", "evaluate"])
def test_promise_12_a_weaker_plan_is_refused_unread(
    tmp_path: Path, weights: Weights, ask: str, kind: str
) -> None:
    plan_change, policy_change, message = WEAKER[kind]
    plan = replace(PLAN, **plan_change)

    with (
        closing(untouched(tmp_path, replace(POLICY, **policy_change))) as site,
        pytest.raises(PlanRefused, match=message),
    ):
        site.describe(plan) if ask == "describe" else getattr(site, ask)(plan, weights)

    assert entries(tmp_path) == []


TRAINING: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "weights": ({}, {"releases": ("count",)}, "release=weights"),
    "noise": ({}, {"min_noise_multiplier": 5.0}, "noise multiplier of weights"),
    "sample rate": ({"optimizer": OptimizerConfig(batch_size=100_000)}, {}, "sample rate=1"),
    "steps": ({"optimizer": OptimizerConfig(batch_size=32, local_epochs=9.0)}, {}, "steps="),
    "parameters": ({}, {"max_parameters": 3}, "model parameters="),
}


@pytest.mark.parametrize("kind", TRAINING)
def test_promise_12_weaker_training_is_refused_and_not_charged(
    tmp_path: Path, weights: Weights, kind: str
) -> None:
    plan_change, policy_change, message = TRAINING[kind]
    policy = replace(POLICY, **policy_change)

    with (
        closing(a_site(tmp_path, policy=policy, seed=None)) as site,
        pytest.raises(PlanRefused, match=message),
    ):
        site.train(replace(PLAN, **plan_change), weights)

    assert asked(tmp_path) == [("describe", 0)]


def test_too_few_visitors_are_refused_by_their_noised_count(tmp_path: Path) -> None:
    policy = replace(POLICY, min_visitors=1000)

    with (
        closing(a_site(tmp_path, policy=policy, seed=None)) as site,
        pytest.raises(PlanRefused, match=r"visitors=\d+: too few"),
    ):
        site.describe(of_round(0))


def test_promise_11_with_the_budget_gone_no_journey_is_read(
    tmp_path: Path, weights: Weights
) -> None:
    with closing(a_site(tmp_path, policy=POLICY, seed=None)) as site:
        list(train_all(site, weights, PROMISE))
    other = replace(PLAN, run="another", privacy=replace(PROMISE, epsilon=1.9))

    with closing(untouched(tmp_path, replace(POLICY, epsilon=2.0))) as site:
        for ask in ("describe", "train"):
            with pytest.raises(PlanRefused, match=r"epsilon in all=2.* at most 2 \(policy: eps"):
                site.describe(other) if ask == "describe" else site.train(other, weights)

    assert len(entries(tmp_path)) == 1 + ROUNDS


def test_a_run_that_would_run_out_of_budget_is_refused_at_its_start(
    tmp_path: Path, weights: Weights
) -> None:
    with closing(a_site(tmp_path, policy=POLICY, seed=None)) as site:
        list(train_all(site, weights, PROMISE))
    other = replace(PLAN, run="another")

    policy = replace(POLICY, epsilon=2.5)
    message = r"rounds=4: what is left .* lasts for [123] \("
    opened = a_site(tmp_path, policy=policy, seed=None)
    with closing(opened) as site, pytest.raises(PlanRefused, match=message):
        site.describe(other)

    assert asked(tmp_path)[-1] == ("describe", 0)
    assert len(entries(tmp_path)) == 2 + ROUNDS


def test_promise_14_a_plan_that_changes_within_a_run_is_refused(
    tmp_path: Path, real_site: Site, weights: Weights
) -> None:
    """Noise is calibrated to all rounds: a coordinator that adds some would overspend."""
    real_site.train(of_round(1), weights)

    for change in ({"rounds": 9}, {"evaluations": 1}, {"privacy": replace(PROMISE, epsilon=1.9)}):
        with pytest.raises(PlanRefused, match="asked before in this run, with another plan"):
            real_site.train(replace(PLAN, round=2, **change), weights)  # type: ignore[arg-type]

    assert asked(tmp_path) == [("describe", 0), ("train", 1)]


def test_a_round_asked_again_with_another_model_is_refused(
    tmp_path: Path, real_site: Site, weights: Weights
) -> None:
    real_site.train(of_round(1), weights)
    other = {name: w + 1 for name, w in weights.items()}

    with pytest.raises(PlanRefused, match="a second release"):
        real_site.train(of_round(1), other)

    assert asked(tmp_path) == [("describe", 0), ("train", 1)]


def test_a_round_that_is_over_is_not_answered_again(
    tmp_path: Path, real_site: Site, weights: Weights
) -> None:
    real_site.train(of_round(1), weights)
    real_site.train(of_round(2), weights)

    with pytest.raises(PlanRefused, match="round=1: train is answered already, and is over"):
        real_site.train(of_round(1), weights)


def test_training_is_charged_before_it_begins(
    tmp_path: Path, real_site: Site, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    real_site.describe(of_round(0))
    monkeypatch.setattr("privacy.training.Trainer.train", killed)
    with pytest.raises(KeyboardInterrupt):
        real_site.train(of_round(1), weights)

    assert [(e.request.kind, e.committed) for e in entries(tmp_path)] == [
        ("describe", True),
        ("train", False),
    ]


def test_what_was_reserved_and_never_answered_is_answered_at_no_further_cost(
    tmp_path: Path, real_site: Site, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("privacy.training.Trainer.train", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            real_site.train(of_round(1), weights)

    update = real_site.train(of_round(1), weights)

    assert asked(tmp_path) == [("describe", 0), ("train", 1)]
    assert all(entry.committed for entry in entries(tmp_path))
    assert update.epsilon == Ledger(tmp_path / "ledger.sqlite", read_only=True).epsilon(1e-5)


def test_promise_10_on_a_damaged_ledger_there_is_no_site(tmp_path: Path, site: Site) -> None:
    site.describe(of_round(0))
    site.close()
    with (tmp_path / "ledger.sqlite").open("r+b") as file:
        file.truncate(100)

    with pytest.raises(LedgerDamagedError):
        untouched(tmp_path)


@pytest.mark.parametrize("ask", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda w: {"output.weight": w["output.weight"]}, "output.bias: missing or unknown"),
        (lambda w: {**w, "more": w["output.bias"]}, "more: missing or unknown"),
        (
            lambda w: {**w, "output.bias": np.zeros((1, 2), np.float32)},
            r"output.bias: shape \(1, 2\) instead of \(1,\)",
        ),
        (
            lambda w: {**w, "output.bias": np.full(1, np.nan, np.float32)},
            "output.bias: a value is not finite",
        ),
    ],
)
def test_a_model_that_is_none_is_refused_before_anything_is_charged(
    real_site: Site,
    weights: Weights,
    tmp_path: Path,
    ask: str,
    spoil: Callable[[Weights], Weights],
    reason: str,
) -> None:
    real_site.describe(of_round(0))

    with pytest.raises(PlanRefused, match=rf"^weights\.{reason}"):
        getattr(real_site, ask)(of_round(1), spoil(weights))

    assert asked(tmp_path) == [("describe", 0)]


def test_a_model_too_large_is_refused_before_it_is_built(tmp_path: Path) -> None:
    huge = replace(PLAN, model=MlpConfig(embedding=65_536, hidden=65_536))
    policy = replace(POLICY, models=("mlp",))
    with closing(a_site(tmp_path, policy=policy, seed=None)) as site:
        for ask in ("train", "evaluate"):
            with pytest.raises(PlanRefused, match=r"^model parameters=.*at most 1000"):
                getattr(site, ask)(huge, {})


def test_training_that_was_stopped_is_answered_later_at_no_further_cost(
    real_site: Site, weights: Weights, tmp_path: Path
) -> None:
    request = Request({"train": of_round(1)}, weights)
    with pytest.raises(TrainingStopped):
        real_site.answer(request, stopped=lambda: True)
    [_, stopped] = entries(tmp_path)
    assert (stopped.request.kind, stopped.committed) == ("train", False)

    answer = real_site.answer(request)["train"]

    assert isinstance(answer, SiteUpdate)
    [_, answered] = entries(tmp_path)
    assert answered == replace(stopped, committed=True)


def test_each_thing_asked_is_answered_or_refused_for_itself(
    tmp_path: Path, weights: Weights
) -> None:
    policy = replace(POLICY, releases=("count", "weights"))
    with closing(a_site(tmp_path, policy=policy, seed=None)) as site:
        plans = {"train": of_round(2), "evaluate": of_round(1)}
        answers = site.answer(Request(plans, weights))

    assert list(answers) == ["evaluate", "train"]
    refusal = answers["evaluate"]
    assert isinstance(refusal, SiteRefusal)
    assert refusal.round == 1
    assert refusal.reason.startswith("release=histogram")
    assert isinstance(answers["train"], SiteUpdate)


def test_a_spec_is_hashable() -> None:
    """The trainer is kept by spec."""
    assert hash(SPEC) == hash(FeatureSpec(SPEC.categorical, SPEC.numeric, SPEC.max_touchpoints))
