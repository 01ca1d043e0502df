from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from conf.compose import load
from conf.schema import Config
from evaluation.histogram import EXACT, ScoreHistogram
from protocol.exchange import Request
from protocol.plan import RoundPlan
from protocol.replies import (
    Reply,
    SiteDescription,
    SiteEvaluation,
    SiteFailure,
    SiteUpdate,
    Weights,
)
from server.checkpoint import load_checkpoint
from server.federation import Federation
from server.history import EvaluationReport, History, RoundReport
from server.rounds import evaluated_after, first_plan, initial_weights, run_rounds

SITES = ("a", "b", "c", "d")
CENTRE = EXACT.count // 2

Behaviour = Callable[[str, int, Weights], Weights | None]
"""A site's model after a round (site, round, weights); None: no answer."""


def towards_one(site: str, round_: int, weights: Weights) -> Weights:
    return {name: (w + 1) / np.float32(2) for name, w in weights.items()}


@dataclass
class FakeFederation:
    """Sites that train as `behaviour` says. Takes the place of `Federation`."""

    behaviour: Behaviour = towards_one
    counts: tuple[float, ...] = (10.0, 10.0, 10.0, 10.0)

    def __post_init__(self) -> None:
        self.descriptions = {
            s: SiteDescription(s, count) for s, count in zip(SITES, self.counts, strict=True)
        }
        self.absent: list[SiteFailure] = []
        self.joined: tuple[int, int, float] | None = None
        self.plans: list[RoundPlan] = []

    def join(self, plan: RoundPlan, expected: int, needed: int, timeout: float) -> None:
        self.joined = (expected, needed, timeout)

    def ask(self, request: Request, timeout: float) -> dict[str, list[Reply | SiteFailure]]:
        self.plans += request.plans.values()
        asks = {"evaluate": self.evaluate, "train": self.train}
        return {ask: list(asks[ask](plan, request.weights)) for ask, plan in request.plans.items()}

    def train(self, plan: RoundPlan, weights: Weights) -> list[SiteUpdate | SiteFailure]:
        answers: list[SiteUpdate | SiteFailure] = []
        for site in SITES:
            trained = self.behaviour(site, plan.round, weights)
            if trained is None:
                answers.append(SiteFailure(site, "missing", "no reply in 5 s"))
            else:
                told = 0.1 * plan.round + 0.01 * SITES.index(site)
                answers.append(SiteUpdate(site, plan.round, trained, told))
        return answers

    def evaluate(self, plan: RoundPlan, weights: Weights) -> list[SiteEvaluation | SiteFailure]:
        return [
            SiteEvaluation("a", plan.round, histogram(), 0.0, None),
            SiteFailure("b", "missing", "no reply in 5 s"),
            SiteEvaluation("c", plan.round, histogram(), 0.0, None),
        ]


def histogram() -> ScoreHistogram:
    counts = np.zeros(EXACT.count)
    counts[CENTRE] = 4.0
    return ScoreHistogram(counts, counts / 4)


@lru_cache
def settings(*overrides: str) -> Config:
    return load(["debug=tiny", "model=logistic", "rounds=3", *overrides])


def run(
    fake: FakeFederation, config: Config, folder: Path
) -> tuple[Weights, EvaluationReport, History, list[RoundReport | EvaluationReport]]:
    watched: list[RoundReport | EvaluationReport] = []
    answer = run_rounds(cast(Federation, fake), config, len(SITES), folder, watched.append)
    return *answer, watched


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [line for line in lines(folder) if line["kind"] == "round"]


def equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


def silent_in(round_: int, *sites: str) -> Behaviour:
    def behaviour(site: str, now: int, weights: Weights) -> Weights | None:
        return None if now == round_ and site in sites else towards_one(site, now, weights)

    return behaviour


def spoilt_in(round_: int, *sites: str) -> Behaviour:
    def behaviour(site: str, now: int, weights: Weights) -> Weights | None:
        trained = towards_one(site, now, weights)
        if now == round_ and site in sites:
            next(iter(trained.values())).flat[0] = np.nan
        return trained

    return behaviour


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[Weights]:
    """The global model that each round starts from, in order."""
    seen: list[Weights] = []
    original = FakeFederation.train

    def train(
        self: FakeFederation, plan: RoundPlan, weights: Weights
    ) -> list[SiteUpdate | SiteFailure]:
        seen.append({name: w.copy() for name, w in weights.items()})
        return original(self, plan, weights)

    monkeypatch.setattr(FakeFederation, "train", train)
    return seen


def test_all_rounds_go_well(tmp_path: Path) -> None:
    config = settings()

    weights, final, history, watched = run(FakeFederation(), config, tmp_path)

    start = initial_weights(config)
    for name, w in weights.items():
        np.testing.assert_allclose(w, 1 + (start[name] - 1) / 8, rtol=1e-5)
    assert [line["kind"] for line in lines(tmp_path)] == ["round", "evaluation"] * 3
    assert lines(tmp_path) == history.records == [report.record() for report in watched]
    assert (final.round, [e.site for e in final.evaluations]) == (3, ["a", "c"])


def test_a_line_of_a_round(tmp_path: Path) -> None:
    run(FakeFederation(silent_in(2, "b")), settings(), tmp_path)

    line = rounds(tmp_path)[1]

    assert line.pop("seconds") >= 0
    assert line == {
        "kind": "round",
        "round": 2,
        "completed": True,
        "reason": "",
        "epsilon": pytest.approx(0.23),
        "delta": 1e-5,
        "sites": {
            "a": {"outcome": "trained", "reason": "", "epsilon": pytest.approx(0.2)},
            "b": {"outcome": "missing", "reason": "no reply in 5 s", "epsilon": None},
            "c": {"outcome": "trained", "reason": "", "epsilon": pytest.approx(0.22)},
            "d": {"outcome": "trained", "reason": "", "epsilon": pytest.approx(0.23)},
        },
    }
    assert list(line["sites"]) == list(SITES)


def test_a_line_of_an_evaluation(tmp_path: Path) -> None:
    run(FakeFederation(), settings(), tmp_path)

    line = lines(tmp_path)[1]

    assert (line["kind"], line["round"]) == ("evaluation", 1)
    assert list(line["sites"]) == ["a", "c"]
    assert line["failures"] == {"b": {"outcome": "missing", "reason": "no reply in 5 s"}}
    assert line["sites"]["a"]["base_rate"] == 0.2
    assert line["global"]["examples"] == 10.0
    assert line["band"]["examples"] == [10.0, 10.0]


@pytest.mark.parametrize(
    ("rounds", "evaluations", "expected"),
    [
        (10, 5, {2, 4, 6, 8, 10}),
        (3, 5, {1, 2, 3}),
        (1, 1, {1}),
        (7, 1, {7}),
        (7, 2, {4, 7}),
        (100, 3, {33, 67, 100}),
    ],
)
def test_evaluations_are_spread_over_the_rounds(
    rounds: int, evaluations: int, expected: set[int]
) -> None:
    assert evaluated_after(replace(settings(), rounds=rounds, evaluations=evaluations)) == expected


def test_as_many_evaluations_as_asked_for_and_one_after_the_last_round() -> None:
    for rounds in range(1, 25):
        for evaluations in range(1, 30):
            config = replace(settings(), rounds=rounds, evaluations=evaluations)
            found = evaluated_after(config)
            assert len(found) == min(rounds, evaluations) == first_plan(config, "r").evaluations
            assert max(found) == rounds
            assert min(found) >= 1


@pytest.mark.parametrize("fail", [silent_in, spoilt_in])
def test_with_a_quorum_the_round_completes(
    tmp_path: Path, models: list[Weights], fail: Callable[..., Behaviour]
) -> None:
    run(FakeFederation(fail(2, "a", "d")), settings("strategy.quorum=0.5"), tmp_path)

    assert [line["completed"] for line in rounds(tmp_path)] == [True, True, True]
    assert not equal(models[1], models[2])
    assert all(np.isfinite(w).all() for w in models[2].values())
    outcomes = [{s: t["outcome"] for s, t in line["sites"].items()} for line in rounds(tmp_path)]
    failed = "missing" if fail is silent_in else "dropped"
    assert outcomes[1] == {"a": failed, "b": "trained", "c": "trained", "d": failed}
    assert set(outcomes[2].values()) == {"trained"}


@pytest.mark.parametrize("fail", [silent_in, spoilt_in])
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_below_the_quorum_the_model_stays_bit_identical(
    tmp_path: Path, models: list[Weights], strategy: str, fail: Callable[..., Behaviour]
) -> None:
    config = settings("strategy.quorum=0.51", f"strategy={strategy}")

    run(FakeFederation(fail(2, "a", "d")), config, tmp_path)

    assert [(line["completed"], line["reason"]) for line in rounds(tmp_path)] == [
        (True, ""),
        (False, "2 of 4 sound updates, 3 needed"),
        (True, ""),
    ]
    assert equal(models[1], models[2])
    assert not equal(models[0], models[1])


def test_a_failed_round_leaves_the_strategys_memory(tmp_path: Path) -> None:
    config = settings("strategy.quorum=1", "strategy=fedadam")
    (tmp_path / "through").mkdir()
    (tmp_path / "failed").mkdir()
    run(FakeFederation(), replace(config, rounds=1), tmp_path / "through")
    run(FakeFederation(silent_in(2, "a")), replace(config, rounds=2), tmp_path / "failed")

    one = load_checkpoint(tmp_path / "through" / "checkpoints")
    two = load_checkpoint(tmp_path / "failed" / "checkpoints")

    assert one is not None
    assert two is not None
    assert (two.round, two.records) == (2, 3)
    assert equal(one.weights, two.weights)
    assert equal(one.strategy, two.strategy)
    assert one.strategy


def test_with_no_sound_update_at_all_the_run_goes_on(tmp_path: Path) -> None:
    run(FakeFederation(silent_in(1, *SITES)), settings(), tmp_path)

    assert [line["completed"] for line in rounds(tmp_path)] == [False, True, True]
    assert rounds(tmp_path)[0]["epsilon"] is None


def test_who_did_not_join_is_named_in_every_record(tmp_path: Path) -> None:
    fake = FakeFederation()
    fake.absent = [SiteFailure("node 9", "refused", "privacy.epsilon=9: at most 3")]

    run(fake, settings(), tmp_path)

    told = {"outcome": "refused", "reason": "privacy.epsilon=9: at most 3"}
    for line in lines(tmp_path):
        if line["kind"] == "round":
            assert line["sites"]["node 9"] == {**told, "epsilon": None}
        else:
            assert line["failures"]["node 9"] == told


@pytest.mark.parametrize(("quorum", "needed"), [("0.5", 2), ("0.51", 3), ("1", 4), ("0.01", 1)])
def test_joining_needs_the_quorum(tmp_path: Path, quorum: str, needed: int) -> None:
    fake = FakeFederation()

    config = settings(f"strategy.quorum={quorum}", "strategy.join_timeout_s=9")
    run(fake, config, tmp_path)

    assert fake.joined == (4, needed, 9.0)


def test_the_plan(tmp_path: Path) -> None:
    fake = FakeFederation()

    config = settings("strategy=fedprox", "evaluations=2", "federation=shops", "purpose=budgets")
    run(fake, config, tmp_path)

    assert [plan.round for plan in fake.plans] == [1, 2, 2, 3, 3]
    first = fake.plans[0]
    assert all(replace(plan, round=1) == first for plan in fake.plans)
    assert (first.run, first.rounds, first.evaluations) == (tmp_path.name, 3, 2)
    assert (first.federation, first.purpose) == ("shops", "budgets")
    assert first.proximal_mu == 0.1
    assert first_plan(settings("strategy=fedavg"), "run").proximal_mu == 0.0


@pytest.mark.parametrize(
    ("override", "share"), [("strategy.weights=visitors", 0.6), ("strategy.weights=uniform", 0.25)]
)
def test_sites_weigh_by_their_counts_or_alike(tmp_path: Path, override: str, share: float) -> None:
    def only_a_moves(site: str, round_: int, weights: Weights) -> Weights:
        return {name: w + np.float32(site == "a") for name, w in weights.items()}

    config = replace(settings(override), rounds=1)
    # 30 : 10 : 5 : 5, below the cap of 4 medians
    weights, *_ = run(FakeFederation(only_a_moves, (30.0, 10.0, 5.0, 5.0)), config, tmp_path)

    start = initial_weights(config)
    for name, w in weights.items():
        np.testing.assert_allclose(w - start[name], share, atol=1e-5)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    assert equal(initial_weights(settings("seed=1")), initial_weights(settings("seed=1")))
    one, two = (initial_weights(load(["model=gru", f"seed={s}"])) for s in (1, 2))
    assert not equal(one, two)


# ------------------------------------------------------------------ going on


class Stopped(Exception):  # noqa: N818
    """The process ends here."""


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 5, 6])
def test_interrupted_after_any_record_it_ends_as_if_it_never_was(
    tmp_path: Path, strategy: str, after: int
) -> None:
    config = settings(f"strategy={strategy}")
    (tmp_path / "through").mkdir()
    (tmp_path / "halted").mkdir()
    weights, *_ = run(FakeFederation(silent_in(2, "b")), config, tmp_path / "through")
    left = after

    def stop(_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Stopped

    fake = cast(Federation, FakeFederation(silent_in(2, "b")))
    with pytest.raises(Stopped):
        run_rounds(fake, config, len(SITES), tmp_path / "halted", stop)
    resumed, *_ = run(FakeFederation(silent_in(2, "b")), config, tmp_path / "halted")

    assert equal(resumed, weights)
    told = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines(tmp_path / name)]
        for name in ("through", "halted")
    ]
    assert told[0] == told[1]


def test_a_finished_run_run_again_trains_no_more(tmp_path: Path) -> None:
    weights, *_ = run(FakeFederation(), settings(), tmp_path)
    before = lines(tmp_path)

    fake = FakeFederation()
    again, final, *_ = run(fake, settings(), tmp_path)

    assert equal(again, weights)
    assert len(fake.plans) == 1
    assert final.round == 3
    assert lines(tmp_path) == before


def test_a_history_drops_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1}\n{"round": 2}\n{"rou')

    history = History(path, keep=2)

    assert history.records == [{"round": 1}, {"round": 2}]
    assert path.read_text() == '{"round": 1}\n{"round": 2}\n'


def test_a_new_run_starts_a_new_history(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1}\n')

    assert History(path).records == []
    assert path.read_text() == ""
