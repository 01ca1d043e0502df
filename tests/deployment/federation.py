"""A real federation on the loopback address: a hub and sites, all of them processes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from client.agent_socket import AgentError, ask_status
from client.folder import SiteFolder, create
from client.ingest import ingest
from conf.hub import HubConfig
from server.admission import admit
from server.checkpoint import load_checkpoint
from server.demo_visits import SITE, write_visits
from server.hub import HubFolder, create_hub

ROOT = Path(__file__).parents[2]
NAMES = ("bakery", "books", "shoes")
SMALL = (
    "model=logistic",
    "rounds=3",
    "evaluations=2",
    "privacy.epsilon=1",
    "optimizer.batch_size=64",
    "strategy.join_timeout_s=60",
    "strategy.round_timeout_s=60",
)
"""Settings of a run that takes a few seconds."""
SLOW = (*SMALL, "optimizer.local_epochs=100", "optimizer.learning_rate=0.01")
"""The same with rounds of some seconds, to do something in the middle of one. The steps are small,
because that many would else lead too far from the round's model, and be dropped."""
READY_S = 90.0


@dataclass
class Federation:
    """A hub and its sites. What is started here is ended by `open_federation`."""

    folder: Path
    hub: HubFolder
    sites: dict[str, Path]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """The processes that a person would have started, by `hub` or the site's name."""

    @property
    def superlink(self) -> str:
        """HOST:PORT that a site is given."""
        config = self.hub.config()
        return f"{config.host}:{config.port}"

    def start_hub(self, *options: str) -> None:
        """`server start`, until it is up."""
        said = len(self.log("hub"))
        self._keep("hub", "server", "start", "hub", *options)
        self.wait("hub", "is up", said)

    def join(
        self, site: str, *options: str, superlink: str = "", before: Sequence[str] = ()
    ) -> None:
        """`client join`; does not wait. `before`: a command that runs it, such as nsenter."""
        where = ("--superlink", superlink or self.superlink)
        certificates = ("--root-certificates", "hub/hub-ca.crt")
        words = ("client", "join", site, *where, *certificates, *options)
        self._keep(site, *words, before=before)

    def log(self, name: str) -> str:
        """What one of the running processes has said."""
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, name: str, said: str, after: int = 0) -> None:
        """Until `name` has said something (beyond its first `after` characters)."""
        until(lambda: said in self.log(name)[after:], f"{name} to say {said!r}", self.dump)

    def pid(self, name: str, command: str) -> int:
        """Process of `name` that runs `-m client command` or the like; waits for it."""
        found: list[int] = []

        def there() -> bool:
            found[:] = [
                pid for pid, argv in descendants(self.running[name].pid) if _is(argv, command)
            ]
            return bool(found)

        until(there, f"the {command} of {name}", self.dump)
        return found[0]

    def kill(self, name: str, command: str, how: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to one process; returns its pid."""
        pid = self.pid(name, command)
        os.kill(pid, how)
        return pid

    def run(self, *overrides: str, check: bool = True) -> Path:
        """`server run` to its end; returns the run's folder."""
        with self.running_run(*overrides) as run:
            run.end(check=check)
        return run.folder

    @contextmanager
    def running_run(self, *overrides: str) -> Iterator[Run]:
        """`server run`, going on; it is killed at the block's end if it has not ended."""
        log = self.folder / "run.log"
        before = {path.name for path in self.hub.runs.glob("*")}
        with log.open("wb") as output:
            process = self._popen(("server", "run", "hub", *overrides), output)
        try:
            yield Run(self, process, log, before, self._resumed(overrides))
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()

    def command(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Another command, to its end."""
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=self.folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def wait_work(self, site: str, ask: str) -> None:
        """Until the site's agent is at work on something that was asked of it."""
        folder = SiteFolder(self.sites[site])
        socket = folder.socket(folder.config())

        def at_work() -> bool:
            try:
                work = ask_status(socket)["at_work"]
            except AgentError:
                return False
            return isinstance(work, dict) and ask in str(work["asked"])

        until(at_work, f"{site} to {ask}", self.dump)

    def stop(self, name: str) -> int:
        """End one of the running processes as a person would; returns its code."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout=30)

    def entries(self, site: str) -> list[Any]:
        """What the site's ledger says was released."""
        return list(SiteFolder(self.sites[site]).released())

    def dump(self) -> str:
        """The ends of all logs, for a failure's message."""
        logs = [*self.folder.glob("*.log"), *self.folder.glob("*/logs/*.log")]
        return "\n".join(
            f"--- {path.relative_to(self.folder)}\n{path.read_text()[-2000:]}" for path in logs
        )

    def _resumed(self, overrides: Sequence[str]) -> Path | None:
        """The folder that `resume=` names."""
        found = [word.removeprefix("resume=") for word in overrides if word.startswith("resume=")]
        return self.folder / found[0] if found else None

    def _keep(self, name: str, *words: str, before: Sequence[str] = ()) -> None:
        with (self.folder / f"{name}.log").open("ab") as output:
            self.running[name] = self._popen(words, output, before)

    def _popen(
        self, words: Sequence[str], output: Any, before: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            # As from a terminal: of tests that are started in the background Ctrl-C is ignored.
            ["env", "--default-signal=INT", *before, sys.executable, "-m", *words],
            cwd=self.folder,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )


@dataclass
class Run:
    """A run that is going on."""

    federation: Federation
    process: subprocess.Popen[bytes]
    _log: Path
    _before: set[str]
    _folder: Path | None

    @property
    def folder(self) -> Path:
        """The run's folder, once there is one."""
        if self._folder is None:
            found: list[Path] = []

            def there() -> bool:
                found[:] = [
                    path.parent
                    for path in self.federation.hub.runs.glob("*/config.yaml")
                    if path.parent.name not in self._before
                ]
                return bool(found) or self.process.poll() is not None

            until(there, "the run's folder", self.federation.dump)
            assert found, self.federation.dump()
            self._folder = found[0]
        return self._folder

    def rounds(self) -> list[dict[str, Any]]:
        """The records of the rounds so far."""
        return rounds(self.folder)

    def wait_rounds(self, number: int) -> None:
        """Until so many rounds are done."""

        def done() -> bool:
            assert self.process.poll() is None or len(self.rounds()) >= number, (
                self.federation.dump()
            )
            return len(self.rounds()) >= number

        until(done, f"round {number}", self.federation.dump)

    def end(self, check: bool = True) -> int:
        """Wait for its end; returns its code."""
        code = self.process.wait(timeout=READY_S * 2)
        assert code == 0 or not check, self.federation.dump()
        return code

    @property
    def said(self) -> str:
        """What it has printed."""
        return self._log.read_text()


def rounds(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's rounds."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    records = [json.loads(line) for line in lines]
    return [record for record in records if record["kind"] == "round"]


def assert_whole(federation: Federation, folder: Path, sites: Sequence[str], rounds: int) -> None:
    """The run is as one to which nothing happened, and so are the sites' ledgers.

    Of a run with two evaluations.
    """
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trainings = [record for record in records if record["kind"] == "round"]
    assert [record["round"] for record in trainings] == list(range(1, rounds + 1))
    for record in trainings:
        assert record["completed"], record
        outcomes = {site: told["outcome"] for site, told in record["sites"].items()}
        assert outcomes == dict.fromkeys(sites, "trained"), record
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    assert [sorted(record["sites"]) for record in evaluations] == [sorted(sites)] * 2
    for site in sites:
        asked = [
            (entry.request.kind, entry.request.round)
            for entry in federation.entries(site)
            if entry.request.run == f"shops/{folder.name}"
        ]
        trained = [round_ for kind, round_ in asked if kind == "train"]
        assert trained == list(range(1, rounds + 1)), asked
        assert len([kind for kind, _ in asked if kind == "evaluate"]) == 2, asked
        assert len([kind for kind, _ in asked if kind == "describe"]) == 1, asked
    checkpoint = load_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.round == rounds
    assert checkpoint.records == len(records) - 1
    model = safetensors.numpy.load_file(folder / "model.safetensors")
    assert model.keys() == checkpoint.weights.keys()
    for name, value in model.items():
        np.testing.assert_array_equal(value, checkpoint.weights[name])
    assert (folder / "report.html").exists()


@contextmanager
def open_federation(
    folder: Path,
    names: Sequence[str] = NAMES,
    visitors: int = 600,
    started: bool = True,
    host: str = "localhost",
) -> Iterator[Federation]:
    """A hub with sites that have visits and are admitted; all processes end with the block.

    `host`: an address of this machine, or its name for itself.
    """
    ports = free_ports(3)
    config = HubConfig(
        host=host,
        listen="127.0.0.1" if host == "localhost" else host,
        port=ports[0],
        superlink_port=ports[1],
        health_port=ports[2],
    )
    hub = create_hub(folder / "hub", config, int(time.time()))
    sites = {name: folder / name for name in names}
    for path in sites.values():
        create(path, int(time.time()))
    write_visits(sites, visitors, datetime.now(UTC))
    for name, path in sites.items():
        (path / "site.yaml").write_text(SITE.format(name=name))
        policy = (path / "policy.yaml").read_text()
        # Enough for all runs of a test module.
        policy = re.sub(r"^epsilon: .*", "epsilon: 100", policy, flags=re.M)
        policy = re.sub(r"^min_visitors: .*", "min_visitors: 100", policy, flags=re.M)
        policy = re.sub(r"^max_steps: .*", "max_steps: 100000", policy, flags=re.M)
        (path / "policy.yaml").write_text(policy)
        ingest(SiteFolder(path), int(time.time()), lambda account: None)
        admit(hub, path / f"{name}.pub")
    federation = Federation(folder, hub, sites)
    try:
        if started:
            federation.start_hub()
            for name in names:
                federation.join(name)
            for name in names:
                federation.wait(name, "SuperNode connected")
        yield federation
    finally:
        for process in federation.running.values():
            process.terminate()
        for process in federation.running.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def until(
    holds: Callable[[], bool], what: str, said: Callable[[], str], most: float = READY_S
) -> None:
    """Wait until something holds. Fails the test with `said()` if that takes too long."""
    deadline = time.monotonic() + most
    while not holds():
        assert time.monotonic() < deadline, f"waited {most:.0f} s for {what}\n{said()}"
        time.sleep(0.05)


def descendants(pid: int) -> list[tuple[int, list[str]]]:
    """Living processes below `pid`, with their arguments."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            state, parent = stat[stat.rindex(")") + 2 :].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            todo.append(child)
            try:
                argv = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            found.append((child, argv))
    return found


def alive(pid: int) -> bool:
    """Is there such a process, and has it not ended?"""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat[stat.rindex(")") + 2] != "Z"


def _is(argv: list[str], command: str) -> bool:
    if command == "superlink":
        return argv[1:2] == ["-c"] and "flower_superlink" in argv[2]
    return argv[1:2] == ["-m"] and argv[2:3] in (["client"], ["server"]) and argv[3] == command


def environment() -> dict[str, str]:
    """Of the processes: the project is found from any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
