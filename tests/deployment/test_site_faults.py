"""What happens to a run when something at a site dies, hangs, comes late or goes away."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment.federation import (
    NAMES,
    SLOW,
    SMALL,
    Federation,
    Run,
    descendants,
    open_federation,
    until,
)

pytestmark = pytest.mark.slow

HIT = "books"
"""The site to which it happens."""
OTHERS = [name for name in NAMES if name != HIT]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """One for all tests: what each leaves behind, the next one has to live with."""
    with open_federation(tmp_path_factory.mktemp("federation")) as opened:
        yield opened


def outcomes(run: list[dict[str, object]], site: str) -> list[str]:
    """What each round got of a site."""
    told = []
    for record in run:
        sites = record["sites"]
        assert isinstance(sites, dict)
        told.append(str(sites[site]["outcome"]) if site in sites else "")
    return told


def assert_charged(federation: Federation, run: str, rounds: list[str], kills: int = 1) -> None:
    """Every update that the hub has was charged; at most one that was charged got lost a kill."""
    charged = {
        entry.request.round
        for entry in federation.entries(HIT)
        if entry.request.run == f"shops/{run}" and entry.request.kind == "train"
    }
    got = {number for number, outcome in enumerate(rounds, start=1) if outcome == "trained"}
    assert got <= charged, (got, charged)
    assert len(charged - got) <= kills, (got, charged)


@pytest.mark.parametrize("process", ["agent", "carry"])
def test_a_killed_process_of_a_site_costs_it_some_rounds_and_no_other_site_any(
    federation: Federation, process: str
) -> None:
    with federation.running_run(*SLOW, "rounds=12") as run:
        # While sites join.
        federation.kill(HIT, process)
        wait_back(run, 0)
        federation.wait_work(HIT, "train")
        federation.kill(HIT, process)
        done = len(run.rounds())
        wait_back(run, done + 1)
        # Between rounds.
        run.wait_rounds(len(run.rounds()) + 1)
        federation.kill(HIT, process)
        run.end()
        rounds = run.rounds()
    assert len(rounds) == 12
    assert all(record["completed"] for record in rounds), rounds
    for other in OTHERS:
        assert outcomes(rounds, other) == ["trained"] * 12
    hit = outcomes(rounds, HIT)
    # It is back before the end.
    assert hit[-1] == "trained", hit
    assert_charged(federation, run.folder.name, hit, kills=3)


def wait_back(run: Run, after: int) -> None:
    """Until the site has trained in a round after round `after`."""
    until(
        lambda: "trained" in outcomes(run.rounds()[after:], HIT),
        "the site to be back",
        run.federation.dump,
    )


@pytest.mark.parametrize("process", ["agent", "carry"])
def test_a_process_that_hangs_is_waited_for_no_longer_than_the_round(
    federation: Federation, process: str
) -> None:
    with federation.running_run(*SLOW, "rounds=4", "strategy.round_timeout_s=10") as run:
        federation.wait_work(HIT, "train")
        pid = federation.kill(HIT, process, signal.SIGSTOP)
        try:
            run.wait_rounds(1)
        finally:
            os.kill(pid, signal.SIGCONT)
        run.end()
        rounds = run.rounds()
    assert all(record["completed"] for record in rounds), rounds
    hit = outcomes(rounds, HIT)
    assert hit[0] == "missing", hit
    assert hit[-1] == "trained", hit
    assert rounds[0]["sites"][HIT]["reason"].startswith("no reply in 10 s")
    assert rounds[0]["seconds"] < 15
    for other in OTHERS:
        assert outcomes(rounds, other) == ["trained"] * 4
    assert_charged(federation, run.folder.name, hit)


@pytest.mark.parametrize("process", ["agent", "carry"])
def test_a_process_that_hangs_is_waited_for_no_longer_than_joining(
    federation: Federation, process: str
) -> None:
    pid = federation.kill(HIT, process, signal.SIGSTOP)
    try:
        with federation.running_run(
            *SMALL, "strategy.quorum=0.6", "strategy.join_timeout_s=10"
        ) as run:
            run.end()
    finally:
        os.kill(pid, signal.SIGCONT)
    first, *later = run.rounds()
    assert first["sites"][HIT]["outcome"] == "missing"
    assert first["sites"][HIT]["reason"].startswith("no reply in ")
    for record in (first, *later):
        assert record["completed"], record
        assert [record["sites"][other]["outcome"] for other in OTHERS] == ["trained"] * 2


def test_a_site_that_leaves_for_good_is_missed_and_one_that_comes_late_joins(
    federation: Federation,
) -> None:
    with federation.running_run(*SLOW, "rounds=5", "strategy.round_timeout_s=10") as run:
        federation.wait_work(HIT, "train")
        left = federation.running.pop(HIT)
        gone = [pid for pid, _ in descendants(left.pid)]
        left.kill()
        left.wait()
        until(lambda: not any(map(_alive, gone)), "the site's processes to end", federation.dump)
        run.end()
        rounds = run.rounds()
    assert all(record["completed"] for record in rounds), rounds
    hit = outcomes(rounds, HIT)
    assert hit[0] == "missing", hit
    assert set(hit) <= {"missing", ""}, hit
    assert_charged(federation, run.folder.name, hit)

    with federation.running_run(*SLOW, "rounds=8", "strategy.join_timeout_s=10") as run:
        run.wait_rounds(1)
        federation.join(HIT)
        run.end()
        rounds = run.rounds()
    late = outcomes(rounds, HIT)
    assert late[0] == "missing", late
    assert late[-1] == "trained", late
    assert rounds[0]["sites"][HIT]["reason"] == "not connected"


def test_below_the_quorum_a_run_does_not_begin_and_says_why(federation: Federation) -> None:
    assert federation.stop(HIT) == 0
    began = time.monotonic()
    with federation.running_run(*SMALL, "strategy.quorum=1", "strategy.join_timeout_s=8") as run:
        assert run.end(check=False) == 2
    assert time.monotonic() - began < 40
    said = run.said.replace("\n", " ")
    assert "2 of 3 sites joined within 8 s, 3 are needed (books: not connected)" in said
    assert f"go on with: python -m server run hub resume=hub/runs/{run.folder.name}" in said
    # Once the site is there, so does the run.
    federation.join(HIT)
    federation.wait(HIT, "SuperNode connected", len(federation.log(HIT)))
    federation.run(f"resume=hub/runs/{run.folder.name}")
    assert (run.folder / "report.html").exists()


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat[stat.rindex(")") + 2] != "Z"
