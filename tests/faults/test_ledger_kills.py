"""Promises 6 to 11, with real processes that are killed: the ledger against what really left."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conf.compose import load
from journeys.sites import load_sites
from privacy.ledger import LedgerDamagedError
from server.history import EvaluationReport, RoundReport
from simulation.faults import Fault, Faults
from simulation.run import federate
from tests.faults.site_process import (
    BUNDLE,
    EVALUATIONS,
    POINTS,
    PROMISE,
    ROOT,
    ROUNDS,
    TRAINING,
    Forks,
    Watched,
)

CHARGED = POINTS[POINTS.index("reserved, head behind") :]
"""Where the request is on disk."""
ANSWERED = POINTS[POINTS.index("committed, head behind") :]
"""Where the answer is."""
RUN = POINTS[POINTS.index("in the middle") :]
"""Where journeys have been read."""


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as started:
        yield started


@pytest.fixture
def site(tmp_path: Path, forks: Forks) -> Iterator[Watched]:
    watched = Watched(tmp_path / "site", forks, epsilon=10.0)
    yield watched
    watched.kill()


# ------------------------------------------------------------------ 6


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("kind", ["describe", "train", "evaluate"])
def test_promise_6_killed_at_every_step_of_a_round(site: Watched, kind: str, point: str) -> None:
    key = ("spring", kind, 0 if kind == "describe" else 2)
    site.start()
    if kind != "describe":
        site.reply("describe")
        site.reply("train", 1)

    assert site.ask(*key[1:], stop_at=point) == {"at": point}
    site.kill()

    left = site.spent()
    after_kill = site.recorded()
    assert after_kill >= left
    kept = site.last_kept()
    site.start()
    assert site.recorded() == after_kill
    assert site.charges()[key] == (point in CHARGED)

    reply = site.reply(*key[1:])
    assert site.reply(*key[1:]) == reply
    assert (reply == kept) == (point in ANSWERED)

    assert site.spent() == site.recorded()
    # What the ledger said after the kill was too much by this one request at most.
    assert after_kill == (site.spent() if point in CHARGED else left)
    assert set(site.charges().values()) == {1}
    assert len(site.ran[key]) == 1 + (point in RUN and point not in ANSWERED)


def test_promise_6_a_run_killed_at_every_step_costs_as_much_as_any(site: Watched) -> None:
    site.start()
    site.reply("describe")
    for round_, point in enumerate(POINTS, start=1):
        site.ask("train", round_, stop_at=point)
        site.kill()
        assert site.spent() <= site.recorded()
        site.start()
        site.reply("train", round_)
        assert site.spent() == site.recorded()

    assert len(POINTS) == ROUNDS
    assert 0.99 * PROMISE.epsilon <= site.spent() <= PROMISE.epsilon


def test_promise_6_killed_at_any_moment(site: Watched) -> None:
    moments = random.Random(6)
    site.start()
    site.reply("describe")
    for round_ in range(1, ROUNDS + 1):
        site.send("train", round_)
        time.sleep(moments.uniform(0, 0.1))
        site.kill()
        assert site.spent() <= site.recorded() <= site.spent(also=[TRAINING.event])
        site.start()
        site.reply("train", round_)
        assert site.spent() == site.recorded()


@pytest.mark.parametrize(
    "point", ["before reserve", "reserved, head behind", "before commit", "committed, head behind"]
)
def test_promise_6_with_a_full_disk_nothing_leaves(site: Watched, point: str) -> None:
    site.start()
    site.reply("describe")

    full = site.ask("train", 1, full_at=point)
    later = site.ask("train", 2)

    assert full["error"] == later["error"] == "LedgerError"
    assert f"{site.ledger}: cannot be written: " in full["message"]
    assert "closed" in later["message"]
    assert len(site.ran["spring", "train", 1]) == (point in RUN)
    site.kill()
    assert site.spent() <= site.recorded() <= site.spent(also=[TRAINING.event])

    site.start()
    site.reply("train", 1)
    assert site.spent() == site.recorded()
    assert set(site.charges().values()) == {1}


# ------------------------------------------------------------------ 7


@pytest.mark.slow
def test_promise_7_the_ledger_outlives_node_run_and_bundle(site: Watched, tmp_path: Path) -> None:
    site.start(node=1)
    site.reply("describe")
    first = site.reply("train", 1)
    site.ask("train", 2, stop_at="reserved")
    site.kill()
    before = site.recorded()
    bundle = tmp_path / "bundle"
    for name in BUNDLE:
        shutil.copytree(ROOT / name, bundle / name, ignore=shutil.ignore_patterns("__pycache__"))
    (bundle / "tests" / "faults").mkdir(parents=True)
    for script in (Path("tests", "faults", "site_process.py"), Path("tests", "shop.py")):
        shutil.copy(ROOT / script, bundle / script)

    with Forks(bundle) as site.forks:
        opened = site.start(node=2)
        assert (opened["code"], opened["cwd"]) == (str(bundle / "client"), str(bundle))
        assert opened["node"] == 2
        assert site.recorded() == before
        assert site.reply("train", 1) == first
        site.reply("train", 2)
        assert site.recorded() == site.spent() == before
        site.reply("describe", run="autumn")
        site.reply("train", 1, run="autumn")
        site.kill()

    assert site.recorded("shops/spring") == site.spent("spring") == before
    assert site.recorded("shops/autumn") == site.spent("autumn") > 0
    assert site.recorded() == site.spent() > before
    assert set(site.charges().values()) == {1}


# ------------------------------------------------------------------ 8


def test_promise_8_a_round_asked_twice_is_trained_and_charged_once(site: Watched) -> None:
    site.start(node=1)
    site.reply("describe")
    replies = [site.reply("train", 1) for _ in range(2)]
    for node in (2, 3):
        site.kill()
        site.start(node=node)
        replies += [site.reply("train", 1) for _ in range(2)]

    assert len(set(replies)) == 1
    assert len(site.ran["spring", "train", 1]) == 1
    assert site.charges() == {("spring", "describe", 0): 1, ("spring", "train", 1): 1}
    assert site.recorded() == site.spent()


# ------------------------------------------------------------------ 9


def test_promise_9_the_second_process_is_turned_away_until_the_first_is_dead(
    site: Watched,
) -> None:
    site.start()
    site.reply("describe")
    site.ask("train", 1, stop_at="in the middle")

    for _ in range(2):
        second = site.forks.start(site.folder, node=2)
        second.end()
        assert second.opened == {
            "error": "LedgerBusyError",
            "message": f"{site.ledger}: in use by another process of this site; wait for it to "
            "end, or stop it",
        }
    assert site.charges()["spring", "train", 1] == 1
    site.kill()

    assert site.start(node=2)["opened"]
    site.reply("train", 1)
    assert site.recorded() == site.spent()


# ------------------------------------------------------------------ 10


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip(file: Path) -> None:
    """One bit, within the reservation of a training."""
    content = bytearray(file.read_bytes())
    content[content.index(b'"kind":"train"') + len(b'"kind":"t')] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip])
@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_promise_10_on_a_damaged_ledger_the_site_does_not_open(
    site: Watched, suffix: str, damage: Callable[[Path], None]
) -> None:
    site.start()
    site.reply("describe")
    site.reply("train", 1)
    # Closed in good order, all is in one file; killed, all is in SQLite's log of writes.
    site.kill() if suffix else site.end()
    damage(site.ledger.with_name(site.ledger.name + suffix))
    damaged = {file.name: file.read_bytes() for file in site.folder.iterdir()}

    opened = site.start()

    assert opened["error"] == "LedgerDamagedError"
    named = rf"{re.escape(str(site.ledger))}: damaged at record [1-4]: .*Nothing is released until"
    assert re.match(named, opened["message"])
    site.kill()
    for name in ("ledger.sqlite", "ledger.sqlite.head", "policy.yaml"):
        assert (site.folder / name).read_bytes() == damaged[name]
    with pytest.raises(LedgerDamagedError, match=named):
        site.recorded()


def test_promise_10_an_audit_of_a_damaged_ledger_ends_with_1(site: Watched) -> None:
    site.start()
    site.reply("describe")
    site.reply("train", 1)
    site.end()
    command = [sys.executable, "-m", "client", "audit", str(site.ledger)]
    whole = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    flip(site.ledger)
    broken = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert (whole.returncode, broken.returncode) == (0, 1)
    assert f"{site.ledger}: whole; 4 records" in whole.stdout
    # Records 1 and 2 are the visitor count's.
    assert f"{site.ledger}: damaged at record 3: " in broken.stderr


@pytest.mark.slow
def test_promise_10_a_run_goes_on_without_the_site(tmp_path: Path) -> None:
    tiny = ["debug=tiny", "model=logistic", "data.sites=3", "rounds=3", "strategy.quorum=0.3"]
    config = load([*tiny, "privacy=unprotected", "runtime.workers=1"])

    def damage_the_ledger(report: RoundReport | EvaluationReport) -> None:
        if isinstance(report, RoundReport) and report.round == 1:
            # The worker dies in the next round, and another one opens its sites anew.
            for file in (tmp_path / "ledgers").glob("1.sqlite*"):
                truncate(file)

    sites = load_sites(config.data, config.seed)
    federate(config, sites, tmp_path, damage_the_ledger, Faults(((0, 2, Fault.CRASH),)))

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"]
    assert [line["completed"] for line in rounds] == [True, True, True]
    missing = [
        {name: of["reason"] for name, of in line["sites"].items() if of["outcome"] == "missing"}
        for line in rounds
    ]
    died, damaged = "the site's process died", "LedgerDamagedError at the site"
    assert missing == [{}, {"site 0": died, "site 1": damaged}, {"site 1": damaged}]


# ------------------------------------------------------------------ 11


@pytest.mark.parametrize(
    ("kind", "budget", "reason"),
    [
        ("describe", 2.0, r"epsilon in all=2\.\d+: .* at most 2 "),
        ("train", 2.1, rf"rounds={ROUNDS}: what is left of this site's budget lasts for 0 "),
        # Of the visitors held out, of whom training spends nothing.
        ("evaluate", 2.1, r"epsilon in all=2\.\d+: .* at most 2\.1 "),
    ],
)
def test_promise_11_with_the_budget_gone_no_journey_is_read(
    site: Watched, kind: str, budget: float, reason: str
) -> None:
    spends, rounds = ("evaluate", EVALUATIONS) if kind == "evaluate" else ("train", ROUNDS)
    site.start()
    site.reply("describe")
    for round_ in range(1, rounds + 1):
        site.reply(spends, round_)
    if kind != "describe":
        site.reply("describe", run="autumn")
    site.kill()
    # Both runs were affordable when they began; then the operator lowers the budget.
    site.allow(budget)
    before, round_ = site.recorded(), 0 if kind == "describe" else 1
    site.start(readable=False)

    answer = site.ask(kind, round_, run="autumn")

    site.kill()
    assert answer["arrays"] == 0
    assert re.match(rf"{reason}\(policy: epsilon\)", answer["refused"])
    assert not site.ran["autumn", kind, round_]
    assert site.recorded() == before <= budget
