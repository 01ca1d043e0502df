"""Sites that misbehave in a whole run: what it costs them, and that it costs nobody else."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from client.policy import PlanRefused
from client.site import Site
from conf.compose import load
from conf.schema import Config
from protocol.plan import RoundPlan
from protocol.replies import SiteUpdate, Weights
from server.rounds import initial_weights
from simulation.faults import Fault, Faults
from simulation.run import simulate

torch.set_num_threads(1)

SPOILT = {
    Fault.RAISE: ("missing", "RuntimeError at the site"),
    Fault.NAN: ("dropped", "weights.output.bias: a value is not finite"),
    Fault.HUGE: ("dropped", "update of norm 1e+30, strategy.max_update_norm=100"),
    Fault.SHAPE: ("dropped", "weights.output.bias: shape (1, 1) instead of (1,)"),
    Fault.MISSING_ARRAY: ("dropped", "missing or unknown"),
    Fault.WRONG_ROUND: ("dropped", "answered for round 1 instead of 2"),
}
"""Outcome and reason in `metrics.jsonl`."""


def settings(*overrides: str) -> Config:
    return load(["debug=tiny", "model=logistic", "data.sites=6", "strategy.quorum=0.3", *overrides])


def run(config: Config, folder: Path, faults: Faults) -> list[dict[str, Any]]:
    """The rounds' lines of `metrics.jsonl`."""
    simulate(config, folder, lambda _: None, faults)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "round"]


def failed(line: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """(outcome, reason) of each site without a sound update."""
    return {
        site: (told["outcome"], told["reason"])
        for site, told in line["sites"].items()
        if told["outcome"] != "trained"
    }


def assert_finite(folder: Path) -> None:
    model = safetensors.numpy.load_file(folder / "model.safetensors")
    assert model
    assert all(np.isfinite(w).all() for w in model.values())


@pytest.mark.parametrize("fault", SPOILT)
def test_a_bad_site_costs_itself_one_round(tmp_path: Path, fault: Fault) -> None:
    lines = run(settings("rounds=3", "data.sites=3"), tmp_path, Faults(((1, 2, fault),)))

    outcome, reason = SPOILT[fault]
    assert [line["completed"] for line in lines] == [True, True, True]
    assert [list(failed(line)) for line in lines] == [[], ["site 1"], []]
    assert failed(lines[1])["site 1"][0] == outcome
    assert reason in failed(lines[1])["site 1"][1]
    assert_finite(tmp_path)


def test_a_duplicate_counts_once(tmp_path: Path) -> None:
    config = settings("rounds=2", "data.sites=3")
    run(config, tmp_path / "once", Faults())
    lines = run(config, tmp_path / "twice", Faults(((1, 1, Fault.DUPLICATE),)))

    assert [failed(line) for line in lines] == [{}, {}]
    once, twice = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "twice")
    )
    assert once == twice


def test_a_refusal_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Site.train

    def refusing(self: Site, plan: RoundPlan, weights: Weights, *stopped: Any) -> SiteUpdate:
        if (self.name, plan.round) == ("site 2", 2):
            raise PlanRefused("privacy.epsilon=3: at most 1")
        return train(self, plan, weights, *stopped)

    monkeypatch.setattr(Site, "train", refusing)
    lines = run(settings("rounds=3", "data.sites=3"), tmp_path, Faults())

    assert [failed(line) for line in lines] == [
        {},
        {"site 2": ("refused", "privacy.epsilon=3: at most 1")},
        {},
    ]


def test_a_run_below_its_quorum_ends_with_the_model_it_began_with(tmp_path: Path) -> None:
    config = settings("rounds=2", "data.sites=3", "strategy.quorum=1")
    faults = Faults(((0, 1, Fault.NAN), (2, 2, Fault.RAISE)))

    lines = run(config, tmp_path, faults)

    assert [line["completed"] for line in lines] == [False, False]
    model = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    start = initial_weights(config)
    assert {n: w.tobytes() for n, w in model.items()} == {n: w.tobytes() for n, w in start.items()}


@pytest.mark.slow
def test_every_fault_in_worker_processes(tmp_path: Path) -> None:
    config = settings("rounds=5", "runtime.workers=2", "strategy.round_timeout_s=30")
    planned = {
        1: {0: Fault.NAN, 1: Fault.HUGE, 2: Fault.SHAPE, 3: Fault.MISSING_ARRAY},
        2: {0: Fault.WRONG_ROUND, 1: Fault.RAISE, 4: Fault.DUPLICATE},
        3: {0: Fault.CRASH},
        # The last that its worker is asked: the ones before it have answered.
        4: {5: Fault.HANG},
    }
    faults = Faults(
        tuple((site, round_, fault) for round_, of in planned.items() for site, fault in of.items())
    )
    children = set(multiprocessing.active_children())

    lines = run(config, tmp_path, faults)

    assert [line["completed"] for line in lines] == [True] * 5
    assert [list(failed(line)) for line in lines] == [
        ["site 0", "site 1", "site 2", "site 3"],
        ["site 0", "site 1"],
        ["site 0"],
        ["site 5"],
        [],
    ]
    assert failed(lines[2])["site 0"] == ("missing", "the site's process died")
    assert failed(lines[3])["site 5"][0] == "missing"
    assert lines[3]["seconds"] < 40
    assert_finite(tmp_path)
    time.sleep(0.1)
    assert set(multiprocessing.active_children()) == children
