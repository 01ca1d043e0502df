from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.compose import load
from conf.schema import Config
from privacy.ledger import Entry, Ledger
from server.history import EvaluationReport, RoundReport
from simulation.run import simulate

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
ROUNDS = 4


@cache
def settings(*overrides: str) -> Config:
    tiny = ["debug=tiny", "model=logistic", "strategy=fedadam", f"rounds={ROUNDS}"]
    return load([*tiny, *overrides])


def run(folder: Path, *overrides: str) -> Path:
    simulate(settings(*overrides), folder, lambda _: None)
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    """Of `metrics.jsonl`, without how long things took."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read]


def model(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def ledgers(folder: Path) -> dict[str, tuple[Entry, ...]]:
    found = {}
    for path in (folder / "ledgers").glob("*.sqlite"):
        with Ledger(path, read_only=True) as ledger:
            found[path.name] = ledger.entries()
    return found


def assert_same(a: Path, b: Path) -> None:
    assert model(a) == model(b)
    assert lines(a) == lines(b)


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a disturbance, in this process. Folders of this name are the same run."""
    return run(tmp_path_factory.mktemp("through") / "run")


# ------------------------------------------------------------------ one result


def test_a_run_leaves_its_files(through: Path) -> None:
    names = {path.name for path in through.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "model.safetensors",
        "model.json",
        "summary.json",
        "report.html",
        "checkpoints",
        "ledgers",
    }
    kinds = [line["kind"] for line in lines(through)]
    assert kinds == ["round", "evaluation"] * ROUNDS


def test_epsilon_ends_at_the_target(through: Path) -> None:
    target = settings().privacy.epsilon  # type: ignore[attr-defined]
    spent = [line["epsilon"] for line in lines(through) if line["kind"] == "round"]

    assert spent == sorted(spent)
    assert 0.99 * target <= spent[-1] <= target
    last = [line for line in lines(through) if line["kind"] == "round"][-1]
    for told in last["sites"].values():
        assert 0.99 * target <= told["epsilon"] <= target


def test_the_same_seed_gives_the_same_run(through: Path, tmp_path: Path) -> None:
    assert_same(run(tmp_path / "run"), through)


def test_another_seed_gives_another_model(through: Path, tmp_path: Path) -> None:
    assert model(run(tmp_path / "run", "seed=1")) != model(through)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_run(
    through: Path, tmp_path: Path, workers: int
) -> None:
    assert_same(run(tmp_path / "run", f"runtime.workers={workers}"), through)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_ray_gives_the_same_run(through: Path, tmp_path: Path) -> None:
    # In a process of its own: Ray leaves threads and warnings behind.
    command(tmp_path / "run", "runtime=ray")
    assert_same(tmp_path / "run", through)


# ------------------------------------------------------------------ going on


class Stopped(Exception):  # noqa: N818
    """The process ends here."""


def stop_after(round_: int, kind: type = RoundReport) -> Any:
    def watch(report: RoundReport | EvaluationReport) -> None:
        # Before the round's checkpoint; the last round's evaluation comes after it.
        if isinstance(report, kind) and report.round == round_:
            raise Stopped

    return watch


@pytest.mark.parametrize(
    ("after", "kind", "charged"),
    # Joining, then a round's training with the evaluation of the one before; the last alone.
    [
        (1, RoundReport, 2),
        (2, RoundReport, 4),
        (ROUNDS, RoundReport, 2 * ROUNDS),
        (ROUNDS, EvaluationReport, 2 * ROUNDS + 1),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    through: Path, tmp_path: Path, after: int, kind: type, charged: int
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        simulate(settings(), folder, stop_after(after, kind))
    assert {len(of) for of in ledgers(folder).values()} == {charged}

    simulate(settings(), folder, lambda _: None)

    assert_same(folder, through)
    # The round that was trained twice is charged once.
    assert ledgers(folder) == ledgers(through)


def test_a_damaged_checkpoint_costs_a_round_and_changes_nothing(
    through: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        simulate(settings(), folder, stop_after(3))
    newest = max((folder / "checkpoints").glob("*.safetensors"))
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)

    simulate(settings(), folder, lambda _: None)

    assert model(folder) == model(through)
    assert ledgers(folder) == ledgers(through)
    got, expected = lines(folder), lines(through)
    # Round 2 was trained again after round 3 had been charged, and says so.
    repeated, first = got.pop(2), expected.pop(2)
    assert got == expected
    assert (repeated["kind"], repeated["round"]) == ("round", 2)
    third = next(line for line in expected if (line["kind"], line["round"]) == ("round", 3))
    assert repeated["epsilon"] == third["epsilon"] > first["epsilon"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def command(folder: Path, *overrides: str) -> None:
    tiny = ["debug=tiny", "model=logistic", "strategy=fedadam", f"rounds={ROUNDS}"]
    simulate_py(*tiny, f"hydra.run.dir={folder}", *overrides)


def simulate_py(*arguments: str, cwd: Path = ROOT) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "simulate.py"), *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_same_end(tmp_path: Path) -> None:
    long = [
        "debug=tiny",
        "model=logistic",
        "strategy=fedadam",
        "rounds=25",
        "runtime.workers=2",
    ]
    killed, whole = tmp_path / "killed" / "run", tmp_path / "whole" / "run"
    process = subprocess.Popen(
        [sys.executable, "simulate.py", *long, f"hydra.run.dir={killed}"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(killed.glob("checkpoints/round-*.sha256")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "summary.json").exists()

    # From within: the run keeps its name, by which its ledgers know it.
    simulate_py("resume=.", cwd=killed)
    simulate_py(*long, f"hydra.run.dir={whole}")

    assert_same(killed, whole)
    assert ledgers(killed) == ledgers(whole)


def test_the_coordinator_loads_no_torch_while_rounds_go_on(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from conf.compose import load
from journeys.sites import load_sites
from simulation.run import federate

if __name__ == "__main__":
    config = load(["data.sites=2", "data.visitors=60", "rounds=1", "model=logistic"])
    federate(config, load_sites(config.data, 0), Path(sys.argv[1]), lambda _: None)
    assert "torch" not in sys.modules
    from server.rounds import initial_weights
    apart = initial_weights(config)
    import torch
    here = initial_weights(config)
    assert apart.keys() == here.keys()
    assert all((apart[name] == here[name]).all() for name in here)
"""
    (tmp_path / "run.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
