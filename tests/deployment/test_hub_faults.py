"""What happens to a run when something at the hub dies, hangs or is stopped: it loses no round."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import server.start
import server.superlink
from conf.hub import HubConfig
from server.hub import create_hub
from server.runs import open_superlink
from server.start import start
from tests.deployment.federation import (
    SLOW,
    Federation,
    Run,
    alive,
    assert_whole,
    descendants,
    free_ports,
    open_federation,
    until,
)

pytestmark = pytest.mark.slow

NAMES = ("bakery", "books")
ROUNDS = 3
SETTINGS = (*SLOW, f"rounds={ROUNDS}", "optimizer.local_epochs=80", "strategy.quorum=1")
"""No site may be missing: what happens at the hub costs none a round."""
STAGES = {"joining": 0, "training": 1, "between rounds": 2}
"""The rounds that are done by then."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """One for all tests: what each leaves behind, the next one has to live with."""
    with open_federation(tmp_path_factory.mktemp("federation"), NAMES) as opened:
        yield opened


@contextmanager
def at_stage(federation: Federation, run: Run, stage: str) -> Iterator[None]:
    """Within, the run is there: one site has joined and the other has not, or is at work, ..."""
    if stage == "joining":
        log = federation.sites["bakery"] / "logs" / "supernode.log"
        before = len(log.read_text())
        # So long it cannot answer.
        with stopped(federation, "books", "agent"):
            until(lambda: "answered after" in log.read_text()[before:], "bakery", federation.dump)
            yield
    else:
        # Not in the first round, to which the sites would still give the same answer again.
        run.wait_rounds(STAGES[stage])
        if stage == "training":
            federation.wait_work("books", "train")
        yield


@contextmanager
def stopped(federation: Federation, name: str, command: str) -> Iterator[None]:
    """Within, a process is there and does nothing."""
    pid = federation.kill(name, command, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_superlink_that_is_killed_at_every_stage_is_started_again_and_the_run_goes_on(
    federation: Federation,
) -> None:
    said = len(federation.log("hub"))
    with federation.running_run(*SETTINGS) as run:
        for stage in STAGES:
            with at_stage(federation, run, stage):
                federation.kill("hub", "superlink")
        run.end()
    assert_whole(federation, run.folder, NAMES, ROUNDS)
    ends = federation.log("hub")[said:].count("superlink ended with 137; started again in ")
    assert ends == len(STAGES), federation.log("hub")


def test_a_killed_front_is_started_again_and_the_run_goes_on(federation: Federation) -> None:
    said = len(federation.log("hub"))
    with federation.running_run(*SETTINGS) as run:
        with at_stage(federation, run, "training"):
            federation.kill("hub", "front")
        run.end()
    assert_whole(federation, run.folder, NAMES, ROUNDS)
    assert "front ended with 137; started again in" in federation.log("hub")[said:]


def test_what_hangs_for_a_while_is_waited_for(federation: Federation) -> None:
    said = len(federation.log("hub"))
    with federation.running_run(*SETTINGS) as run:
        with at_stage(federation, run, "training"), stopped(federation, "hub", "superlink"):
            time.sleep(5)
        run.wait_rounds(2)
        federation.wait_work("books", "train")
        run.process.send_signal(signal.SIGSTOP)
        time.sleep(5)
        run.process.send_signal(signal.SIGCONT)
        run.end()
    assert_whole(federation, run.folder, NAMES, ROUNDS)
    # The SuperLink came back by itself.
    assert "superlink" not in federation.log("hub")[said:]


def test_a_run_that_is_killed_at_every_stage_is_resumed_from_its_last_round(
    federation: Federation,
) -> None:
    words: tuple[str, ...] = SETTINGS
    for stage, done in STAGES.items():
        with federation.running_run(*words) as run:
            with at_stage(federation, run, stage):
                _kill_with_all(federation, run.process)
            assert len(run.rounds()) == done
            words = (f"resume=hub/runs/{run.folder.name}",)
    assert not (run.folder / "report.html").exists()
    federation.run(*words)
    assert_whole(federation, run.folder, NAMES, ROUNDS)


def test_who_interrupts_a_run_hears_how_it_goes_on(federation: Federation) -> None:
    with federation.running_run(*SETTINGS) as run, at_stage(federation, run, "training"):
        run.process.send_signal(signal.SIGINT)
        assert run.end(check=False) == 130
    [line] = [line for line in run.said.splitlines() if line.startswith("error: ")]
    words = f"resume=hub/runs/{run.folder.name}"
    assert line == f"error: interrupted; go on with: python -m server run hub {words}"
    assert "Traceback" not in run.said
    federation.run(words)
    assert_whole(federation, run.folder, NAMES, ROUNDS)


def test_a_killed_hub_leaves_nothing_and_the_run_goes_on_once_it_is_started(
    federation: Federation,
) -> None:
    with federation.running_run(*SETTINGS) as run:
        with at_stage(federation, run, "training"):
            # Two commands, each with its keeper.
            assert _kill_with_all(federation, federation.running.pop("hub")) >= 4
        # What it knew of runs and sites is gone, too: the run has to begin anew at the SuperLink.
        for file in federation.hub.state.glob("state.sqlite*"):
            file.unlink()
        federation.start_hub()
        run.wait_rounds(2)
        assert "the SuperLink is lost; waiting for it" in run.said
        # The run is killed, too, as if the machine had died.
        federation.wait_work("books", "train")
        _kill_with_all(federation, run.process)
        _kill_with_all(federation, federation.running.pop("hub"))
    federation.start_hub()
    federation.run(f"resume=hub/runs/{run.folder.name}")
    assert_whole(federation, run.folder, NAMES, ROUNDS)


def _kill_with_all(federation: Federation, process: subprocess.Popen[bytes]) -> int:
    """Kill a process alone, and see what it had started go; how many these were."""
    left = [pid for pid, _ in descendants(process.pid)]
    process.kill()
    process.wait()
    until(lambda: not any(map(alive, left)), "what it had started to end", federation.dump)
    return len(left)


def test_a_superlink_that_hangs_for_good_is_ended_and_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself that takes `LONGEST_SILENCE_S`, a minute."""
    ports = free_ports(2)
    config = HubConfig(host="localhost", port=ports[0], superlink_port=ports[1], health_port=0)
    hub = create_hub(tmp_path / "hub", config, int(time.time()))
    superlink = open_superlink(hub)
    told: list[str] = []
    end = threading.Event()

    def superlinks() -> list[int]:
        port = str(config.superlink_port)
        return [pid for pid, argv in descendants(os.getpid()) if port in argv and argv[1] == "-c"]

    watching = threading.Thread(target=start, args=(hub, end, told.append), kwargs={"front": False})
    watching.start()
    log = hub.logs / "superlink.log"
    try:
        until(lambda: any("is up" in line for line in told), "the hub", lambda: str(told))
        [before] = superlinks()
        with monkeypatch.context() as short:
            short.setattr(server.start, "LOOK_EACH_S", 0.2)
            short.setattr(server.start, "LONGEST_SILENCE_S", 2.0)
            short.setattr(server.superlink, "CONTROL_TIMEOUT_S", 1.0)
            os.kill(before, signal.SIGSTOP)
            until(lambda: len(told) >= 2, "its end", lambda: f"{told}\n{log.read_text()}")
        until(superlink.is_up, "the new SuperLink", log.read_text)
        assert not alive(before)
        [after] = superlinks()
        assert after != before
        assert told[1:] == [
            "the SuperLink was silent for 2 s; it is ended",
            "superlink ended with 137; started again in 0.5 s",
        ]
    finally:
        end.set()
        watching.join(timeout=30)
    assert not watching.is_alive()
    assert not superlinks()
