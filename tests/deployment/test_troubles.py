"""What happens when a disk is full, the network is cut, a clock is wrong or a neighbour hostile."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from journeys.durable import write_durably
from server.report import write_report
from tests.deployment.federation import (
    NAMES,
    ROOT,
    SLOW,
    SMALL,
    Federation,
    assert_whole,
    free_ports,
    open_federation,
    rounds,
    until,
)

pytestmark = pytest.mark.slow

FULL, CUT, OFF = "books", "shoes", "bakery"
"""The sites to which it happens: a full disk, a cut network, a clock that is off."""
CUT_S = 90.0
SETTINGS = (*SLOW, "optimizer.local_epochs=80")


@dataclass(frozen=True)
class Way:
    """The way of the site `CUT` to the hub."""

    host: str
    """The hub's."""
    superlink: str
    """Where the site calls; empty: the hub itself."""
    before: Sequence[str]
    """Before the site's command."""
    cut: Callable[[], None]
    """From now on nothing passes, and nobody is told."""
    heal: Callable[[], None]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Federation, Way]]:
    """One federation for all tests: what each leaves behind, the next one has to live with."""
    folder = tmp_path_factory.mktemp("federation")
    with ExitStack() as stack:
        for disk in (folder / FULL, folder / "hub" / "runs"):
            stack.enter_context(_small_disk(disk))
        name = f"cf{os.getpid()}"
        network = None
        if _may("ip", "netns", "add", name):
            network = stack.enter_context(_network(name))
        host = "localhost" if network is None else network.host
        federation = stack.enter_context(open_federation(folder, started=False, host=host))
        way = network or stack.enter_context(_relay(federation.hub.config().port))
        federation.start_hub()
        for name in NAMES:
            if name == CUT:
                federation.join(name, superlink=way.superlink, before=way.before)
            else:
                federation.join(name)
        for name in NAMES:
            federation.wait(name, "SuperNode connected")
        yield federation, way


@pytest.fixture(scope="module")
def federation(opened: tuple[Federation, Way]) -> Federation:
    return opened[0]


def told(run: Sequence[dict[str, Any]], site: str) -> list[tuple[str, str]]:
    """Outcome and reason of a site in each round."""
    return [
        (one["sites"][site]["outcome"], one["sites"][site]["reason"])
        if site in one["sites"]
        else ("", "")
        for one in run
    ]


def charged(federation: Federation, site: str, run: Path) -> set[int]:
    """The rounds of a run that the site's ledger knows."""
    return {
        entry.request.round
        for entry in federation.entries(site)
        if entry.request.run == f"shops/{run.name}" and entry.request.kind == "train"
    }


def test_a_site_whose_disk_is_full_releases_nothing_and_takes_part_again_once_there_is_room(
    federation: Federation,
) -> None:
    site = federation.sites[FULL]
    _need_small(site)
    agent = federation.pid(FULL, "agent")
    with federation.running_run(*SETTINGS, "rounds=6") as run:
        run.wait_rounds(1)
        with full(site):
            until(lambda: refused(run.rounds()) != [], "it to refuse", federation.dump)
        run.end()
        found = told(run.rounds(), FULL)
    assert found[0][0] == found[-1][0] == "trained", found
    assert "ledger.sqlite: cannot be written: database or disk is full" in refused(run.rounds())
    for reason in refused(run.rounds()):
        assert re.match(r"ledger\.sqlite: cannot be (written|opened): ", reason), found
    for record in run.rounds():
        assert record["completed"], record
        assert all(record["sites"][other]["outcome"] == "trained" for other in (OFF, CUT)), record
    got = {number for number, (outcome, _) in enumerate(found, start=1) if outcome == "trained"}
    assert got <= charged(federation, FULL, run.folder)
    assert federation.pid(FULL, "agent") == agent
    # Ledger and audit log are what was written.
    federation.command("client", "audit", FULL)


def refused(run: Sequence[dict[str, Any]]) -> list[str]:
    """Why the site with the full disk did not train."""
    return [reason for outcome, reason in told(run, FULL) if outcome == "missing"]


def test_a_hub_whose_disk_is_full_ends_the_run_in_one_line_and_loses_nothing(
    federation: Federation,
) -> None:
    disk = federation.hub.runs
    _need_small(disk)
    with federation.running_run(*SETTINGS) as run:
        run.wait_rounds(1)
        with full(disk):
            assert run.end(check=False) == 2
            name = run.folder.name
            go_on = f"python -m server run hub resume=hub/runs/{name}"
            _assert_one_line(run.said, run.folder, go_on)
            # While there is no room, that does not help, but does no harm.
            with federation.running_run(f"resume=hub/runs/{name}") as again:
                assert again.end(check=False) == 2
            _assert_one_line(again.said, run.folder, go_on)
            assert federation.command("server", "status", "hub").returncode == 0
    assert not list(run.folder.rglob("*.tmp"))
    federation.run(f"resume=hub/runs/{name}")
    assert_whole(federation, run.folder, NAMES, 3)
    # A report that is there is whole: it says that the run is finished.
    before = (run.folder / "report.html").read_bytes()
    with full(disk), pytest.raises(OSError, match=r"No space left on device: .*report\.html"):
        write_report(run.folder)
    assert (run.folder / "report.html").read_bytes() == before


def _assert_one_line(said: str, folder: Path, go_on: str) -> None:
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(
        rf"error: {re.escape(str(folder.resolve()))}/\S+: No space left on device; "
        rf"go on with: {re.escape(go_on)}",
        line,
    ), said
    assert "Traceback" not in said


def test_idle_connections_of_neighbours_keep_no_site_out(federation: Federation) -> None:
    config = federation.hub.config()
    address = (config.host, config.port)
    assert federation.stop(OFF) == 0
    # The first neighbour shares the site's address; the second has one of its own, and wants more
    # than the front takes of one.
    with idle_connections(address, "", 50), idle_connections(address, "127.0.0.2", 100):
        said = len(federation.log(OFF))
        federation.join(OFF)
        federation.wait(OFF, "SuperNode connected", said)
        folder = federation.run(*SMALL, "rounds=1", "evaluations=1", "strategy.quorum=1")
    for site in NAMES:
        assert [outcome for outcome, _ in told(rounds(folder), site)] == ["trained"]


CLOCK = """\
import datetime, os, sys, time

if "carry" in sys.orig_argv:
    true_time, true_datetime = time.time, datetime.datetime

    class Kind(type):
        def __instancecheck__(cls, one):
            return isinstance(one, true_datetime)

    class Datetime(true_datetime, metaclass=Kind):
        @classmethod
        def now(cls, tz=None):
            return true_datetime.fromtimestamp(time.time(), tz)

    def shifted():
        with open(os.environ["CLOCK"]) as file:
            return true_time() + float(file.read())

    time.time, datetime.datetime = shifted, Datetime
"""
"""`sitecustomize.py`: the SuperNode's clock is off by the seconds that a file says."""


def test_a_site_whose_clock_is_off_is_told_by_how_much_and_connects_once_it_is_right(
    federation: Federation, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    clock = tmp_path / "clock"
    write_durably(clock, b"-600")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    assert federation.stop(OFF) == 0
    said = len(federation.log(OFF))
    federation.join(OFF, before=("env", f"PYTHONPATH={path}", f"CLOCK={clock}"))
    off = "SuperNode not connected: the hub refuses this site, because this machine's clock is "
    federation.wait(OFF, f"{off}600 s behind the hub's; set it right (NTP)", said)
    write_durably(clock, b"60")
    federation.wait(OFF, f"{off}60 s ahead of the hub's; set it right (NTP)", said)
    shown = " ".join(federation.command("client", "status", OFF).stdout.split())
    assert "clock is 60 s ahead of the hub's" in shown
    assert "SuperNode connected" not in federation.log(OFF)[said:]
    write_durably(clock, b"0")
    federation.wait(OFF, "SuperNode connected", said)


def test_a_site_that_is_cut_off_for_90_s_is_missed_and_comes_back_by_itself(
    opened: tuple[Federation, Way],
) -> None:
    federation, way = opened
    agent = federation.pid(CUT, "agent")
    # More rounds than there will be, each with more noise, hence the smaller steps.
    more = ("rounds=100", "strategy.round_timeout_s=20", "optimizer.learning_rate=0.0005")
    with federation.running_run(*SLOW, *more) as run:
        run.wait_rounds(1)
        federation.wait_work(CUT, "train")
        way.cut()
        try:
            time.sleep(CUT_S)
            during = run.rounds()
        finally:
            way.heal()
        # It looks again after at most 10 s in vain and 10 s of pause.
        until(
            lambda: told(run.rounds()[len(during) :], CUT)[-2:] == [("trained", "")] * 2,
            "the site to be back",
            federation.dump,
            most=60,
        )
        run.process.send_signal(signal.SIGINT)
        assert run.end(check=False) == 130
    found = run.rounds()
    assert all(record["completed"] for record in found), found
    for record in found:
        assert all(record["sites"][other]["outcome"] == "trained" for other in (OFF, FULL)), record
    missed = [outcome for outcome, _ in told(during, CUT)].count("missing")
    # The run went on meanwhile.
    assert missed >= 4, told(during, CUT)
    got = {
        number for number, (outcome, _) in enumerate(told(found, CUT), 1) if outcome == "trained"
    }
    assert got <= charged(federation, CUT, run.folder)
    # Nobody started the site again.
    assert federation.running[CUT].poll() is None
    assert federation.pid(CUT, "agent") == agent


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Within, the disk is full to its last byte."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        for size in (65_536, 4096, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    assert os.statvfs(disk).f_bavail == 0
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def _small_disk(path: Path) -> Iterator[None]:
    """A disk of its own, where we may mount one (`_need_small`)."""
    path.mkdir(parents=True)
    mounted = _may("mount", "-t", "tmpfs", "-o", "size=16m,mode=0700", "tmpfs", str(path))
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", str(path)], check=True)


def _need_small(path: Path) -> None:
    if not path.is_mount():
        pytest.skip("a disk that can be filled has to be mounted, which needs root")


@contextmanager
def idle_connections(address: tuple[str, int], source: str, number: int) -> Iterator[None]:
    """A neighbour who keeps connections open, says nothing, and opens again what is closed."""
    end = threading.Event()
    opened = 0

    def hold() -> None:
        nonlocal opened
        held: list[socket.socket] = []
        while not end.wait(0.2):
            for one in select.select(held, [], [], 0)[0]:
                held.remove(one)
                one.close()
            for _ in range(min(20, number - len(held))):
                held.append(socket.create_connection(address, 10, source_address=(source, 0)))
                opened += 1
        for one in held:
            one.close()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        until(lambda: opened >= number, "the connections", lambda: f"{opened}", most=20)
        yield
    finally:
        end.set()
        thread.join(timeout=20)
    assert not thread.is_alive()


def _may(*command: str) -> bool:
    """Run it, if it is there and we may."""
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@contextmanager
def _network(name: str) -> Iterator[Way]:
    """The site in a network of its own, joined to the hub's by a cable (veth)."""
    # Of the addresses that are set aside for tests of networks.
    net = f"198.18.{os.getpid() % 256}"
    ours, theirs = f"{name}a", f"{name}b"
    inside = ("ip", "netns", "exec", name)

    def ip(*words: str) -> None:
        subprocess.run(words, check=True, capture_output=True)

    try:
        ip("ip", "link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        ip("ip", "address", "add", f"{net}.1/30", "dev", ours)
        ip("ip", "link", "set", ours, "up")
        ip(*inside, "ip", "address", "add", f"{net}.2/30", "dev", theirs)
        ip(*inside, "ip", "link", "set", theirs, "up")
        ip(*inside, "ip", "link", "set", "lo", "up")
        # Our end: at the site's nothing says that the cable is cut.
        yield Way(
            f"{net}.1",
            "",
            inside,
            lambda: ip("ip", "link", "set", ours, "down"),
            lambda: ip("ip", "link", "set", ours, "up"),
        )
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@contextmanager
def _relay(port: int) -> Iterator[Way]:
    """A relay to the hub, which passes nothing on while it is cut, and closes nothing."""
    passing, ended = threading.Event(), threading.Event()
    passing.set()
    threads: list[threading.Thread] = []

    def begin(what: Callable[..., None], *arguments: object) -> None:
        threads.append(threading.Thread(target=what, args=arguments))
        threads[-1].start()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        data = b"."
        with suppress(OSError):
            while data and not ended.is_set():
                if select.select([source], [], [], 0.5)[0]:
                    data = source.recv(65_536)
                    passing.wait()
                    sink.sendall(data)
        # The other direction ends, too.
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def attend(site: socket.socket) -> None:
        with site, socket.create_connection(("localhost", port), 10) as hub:
            hub.settimeout(None)
            back = threading.Thread(target=pump, args=(hub, site))
            back.start()
            pump(site, hub)
            back.join()

    def accept() -> None:
        with socket.create_server(("127.0.0.1", listening)) as server:
            server.settimeout(0.2)
            while not ended.is_set():
                passing.wait()
                with suppress(TimeoutError):
                    site, _ = server.accept()
                    site.settimeout(None)
                    begin(attend, site)

    [listening] = free_ports(1)
    begin(accept)
    try:
        yield Way("localhost", f"localhost:{listening}", (), passing.clear, passing.set)
    finally:
        ended.set()
        passing.set()
        for thread in threads:
            thread.join(timeout=20)
