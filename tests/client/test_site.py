from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from client.site import PlanRefused, Site
from conf.schema import (
    FeatureConfig,
    LogisticConfig,
    NumericColumn,
    OptimizerConfig,
    PrivacyConfig,
    Unprotected,
    VisitorDP,
)
from evaluation.histogram import ScoreHistogram
from journeys.examples import Examples
from journeys.features import FeatureSpec, feature_spec
from journeys.site import SiteJourneys
from models.registry import build
from models.score import logits
from models.weights import get_weights, set_weights
from privacy.ledger import Ledger, LedgerError
from privacy.mechanisms import GaussianCount
from protocol.plan import RoundPlan
from protocol.replies import SiteUpdate, Weights

torch.set_num_threads(1)

SPEC = feature_spec(
    FeatureConfig(
        channels=["a", "b", "c"], max_touchpoints=4, numeric={"pages": NumericColumn(high=9)}
    )
)
MODEL = LogisticConfig()
ROUNDS = 4
PROMISE = VisitorDP(epsilon=2.0, delta=1e-5, count_noise=20.0)
PLAN = RoundPlan("run", 1, ROUNDS, MODEL, OptimizerConfig(batch_size=32), PROMISE)


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


class Untouchable:
    """Journeys of a site whose name may be read and nothing else."""

    name = "shop"

    @property
    def train(self) -> Examples:
        raise AssertionError("the journeys were read")

    holdout = train


def a_site(
    tmp_path: Path, journeys: SiteJourneys = JOURNEYS, seed: int = 5, index: int = 0
) -> Site:
    return Site(journeys, SPEC, Ledger(tmp_path / "ledger.jsonl"), seed, index)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return a_site(tmp_path)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A second look at the site's ledger."""
    return Ledger(tmp_path / "ledger.jsonl")


@pytest.fixture(scope="module")
def weights() -> Weights:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_weights(build(MODEL, SPEC))


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
        site = Site(JOURNEYS, SPEC, Ledger(tmp_path / f"{index}.jsonl"), 5, index)
        counts.append(site.describe(of_round(0)).visitors)

    noise = np.array(counts) - 200
    # 5 sigma of the mean and of the deviation of 200 draws
    assert abs(noise.mean()) < 5 * 20 / math.sqrt(200)
    assert abs(noise.std() - 20) < 5 * 20 / math.sqrt(400)
    assert len(set(counts)) > 30


def test_describe_is_charged_once_and_answers_the_same(site: Site, ledger: Ledger) -> None:
    one, two = site.describe(of_round(0)), site.describe(of_round(0))

    assert one == two
    assert [(r.name, r.round, r.noise_multiplier) for r in ledger.releases()] == [
        ("count", 0, 20.0)
    ]
    assert ledger.releases()[0].event == GaussianCount(20.0).event


def test_an_unprotected_count_is_exact_and_charges_nothing(site: Site, ledger: Ledger) -> None:
    assert site.describe(of_round(0, Unprotected())).visitors == 200.0
    assert ledger.releases() == []


# ------------------------------------------------------------------ train


def test_epsilon_grows_to_the_target_and_never_beyond(
    site: Site, ledger: Ledger, weights: Weights
) -> None:
    site.describe(of_round(0))
    told = [update.epsilon for update in train_all(site, weights, PROMISE)]

    spent = [epsilon for epsilon in told if epsilon is not None]
    assert len(spent) == ROUNDS
    assert all(a < b for a, b in pairwise(spent))
    assert 0.99 * PROMISE.epsilon <= spent[-1] <= PROMISE.epsilon
    assert spent[-1] == ledger.epsilon(PROMISE.delta)


def test_what_is_charged_is_what_is_run(site: Site, ledger: Ledger, weights: Weights) -> None:
    visitors = site.describe(of_round(0)).visitors
    list(train_all(site, weights, PROMISE))

    count, *rounds = ledger.releases()

    batches = max(1, round(visitors / 32))
    assert (count.name, count.run) == ("count", "run")
    assert [(r.name, r.run, r.round) for r in rounds] == [
        ("weights", "run", n) for n in range(1, ROUNDS + 1)
    ]
    assert {(r.sample_rate, r.count) for r in rounds} == {(1 / batches, batches)}
    assert len({r.noise_multiplier for r in rounds}) == 1


def test_a_round_asked_twice_is_charged_once_and_answers_the_same(
    tmp_path: Path, site: Site, ledger: Ledger, weights: Weights
) -> None:
    one = site.train(of_round(1), weights)
    again = site.train(of_round(1), weights)
    restarted = a_site(tmp_path).train(of_round(1), weights)

    assert equal(one.weights, again.weights)
    assert equal(one.weights, restarted.weights)
    assert one.epsilon == again.epsilon == restarted.epsilon
    assert [r.round for r in ledger.releases()] == [0, 1]


def test_seeds_tell_rounds_sites_and_runs_apart(tmp_path: Path, weights: Weights) -> None:
    def trained(seed: int, index: int, round_: int) -> Weights:
        site = a_site(tmp_path / f"{seed}-{index}-{round_}", seed=seed, index=index)
        return site.train(of_round(round_), weights).weights

    models = [trained(5, 0, 1), trained(5, 0, 2), trained(5, 1, 1), trained(6, 0, 1)]

    assert len({model[min(model)].tobytes() for model in models}) == 4


def test_the_update_answers_for_its_round_and_site(site: Site, weights: Weights) -> None:
    before = {name: w.copy() for name, w in weights.items()}

    update = site.train(of_round(3), weights)

    assert (update.site, update.round) == ("shop", 3)
    assert (update.evaluation.site, update.evaluation.round) == ("shop", 2)
    assert {n: (w.shape, w.dtype) for n, w in update.weights.items()} == {
        n: (w.shape, np.dtype(np.float32)) for n, w in weights.items()
    }
    assert not equal(update.weights, weights)
    assert equal(before, weights)


def test_the_model_is_evaluated_as_it_came(site: Site, weights: Weights) -> None:
    update = site.train(of_round(1), weights)

    model = build(MODEL, SPEC)
    set_weights(model, weights)
    expected = ScoreHistogram.of(logits(model, JOURNEYS.holdout), JOURNEYS.holdout.label)
    assert np.array_equal(update.evaluation.histogram.positive, expected.positive)
    assert np.array_equal(update.evaluation.histogram.negative, expected.negative)
    assert update.evaluation.histogram.positive.sum() == JOURNEYS.holdout.label.sum()


def test_evaluate_equals_the_evaluation_on_the_way(
    site: Site, ledger: Ledger, weights: Weights
) -> None:
    evaluation = site.evaluate(of_round(3), weights)

    assert ledger.releases() == []
    on_the_way = site.train(of_round(4), weights).evaluation
    assert (evaluation.site, evaluation.round) == ("shop", 3)
    assert np.array_equal(evaluation.histogram.positive, on_the_way.histogram.positive)
    assert np.array_equal(evaluation.histogram.negative, on_the_way.histogram.negative)


def test_unprotected_training_learns_and_has_no_epsilon(
    site: Site, ledger: Ledger, weights: Weights
) -> None:
    updates = list(train_all(site, weights, Unprotected()))

    assert [update.epsilon for update in updates] == [None] * ROUNDS
    assert ledger.epsilon(1e-5) == math.inf
    assert {r.noise_multiplier for r in ledger.releases()} == {0.0}


def test_fedprox_pulls_towards_the_rounds_model(tmp_path: Path, weights: Weights) -> None:
    def distance(mu: float) -> float:
        site = a_site(tmp_path / str(mu))
        trained = site.train(of_round(1, Unprotected(), proximal_mu=mu), weights).weights
        return math.sqrt(sum(float(((trained[n] - weights[n]) ** 2).sum()) for n in weights))

    assert distance(1.0) < 0.9 * distance(0.0)


# ------------------------------------------------------------------ refusals


TOO_LITTLE = [0.2, 0.01, 1e-6]


@pytest.mark.parametrize("round_", [0, -1, ROUNDS + 1])
def test_a_round_outside_the_run_is_refused_unread(
    tmp_path: Path, ledger: Ledger, weights: Weights, round_: int
) -> None:
    site = a_site(tmp_path, cast(SiteJourneys, Untouchable()))

    with pytest.raises(PlanRefused, match=f"round={round_}: must be 1 to rounds=4"):
        site.train(of_round(round_), weights)

    assert ledger.releases() == []


@pytest.mark.parametrize("noise", TOO_LITTLE)
@pytest.mark.parametrize("ask", ["describe", "train"])
def test_a_count_that_costs_more_than_the_promise_is_refused_uncharged(
    tmp_path: Path, ledger: Ledger, weights: Weights, ask: str, noise: float
) -> None:
    site = a_site(tmp_path, cast(SiteJourneys, Untouchable()))
    plan = of_round(1, replace(PROMISE, count_noise=noise))

    with pytest.raises(PlanRefused, match=r"privacy\.count_noise=.* more than privacy\.epsilon=2"):
        site.describe(plan) if ask == "describe" else site.train(plan, weights)

    assert ledger.releases() == []


def test_an_unknown_protection_is_refused_unread(tmp_path: Path, weights: Weights) -> None:
    site = a_site(tmp_path, cast(SiteJourneys, Untouchable()))
    plan = of_round(1, PrivacyConfig("homomorphic"))

    with pytest.raises(PlanRefused, match=r"privacy\.name=homomorphic: unknown protection"):
        site.train(plan, weights)
    with pytest.raises(PlanRefused, match=r"privacy\.name=homomorphic: unknown protection"):
        site.describe(plan)


def test_training_is_charged_before_it_begins(
    site: Site, ledger: Ledger, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    site.describe(of_round(0))
    monkeypatch.setattr("privacy.training.Trainer.train", killed)
    with pytest.raises(KeyboardInterrupt):
        site.train(of_round(1), weights)

    assert [(r.name, r.round) for r in ledger.releases()] == [("count", 0), ("weights", 1)]


@pytest.mark.parametrize("damage", [b"garbage\n", b'{"run": "run", "rou'])
def test_on_a_damaged_ledger_nothing_is_read(
    tmp_path: Path, weights: Weights, damage: bytes
) -> None:
    a_site(tmp_path).describe(of_round(0))
    site = a_site(tmp_path, cast(SiteJourneys, Untouchable()))
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(damage)

    with pytest.raises(LedgerError, match="line 2"):
        site.train(of_round(1), weights)


def test_weights_that_do_not_fit_are_an_error(site: Site, weights: Weights) -> None:
    name = min(weights)

    with pytest.raises(RuntimeError, match=name):
        site.train(of_round(1), {**weights, name: np.zeros((1, 2, 3), np.float32)})


def test_a_spec_is_hashable() -> None:
    """The trainer is kept by spec."""
    assert hash(SPEC) == hash(FeatureSpec(SPEC.categorical, SPEC.numeric, SPEC.max_touchpoints))
