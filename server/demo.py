"""A federation from beginning to end on this machine: the commands that a real one takes.

A hub and three sites, each with processes of its own, TLS and registered keys. The sites' commands
are run as their operators would run them; nothing here reads a site's folder.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from server.demo_visits import SITE, write_visits
from server.hub import HubError
from service.processes import Command, Process

SITES = ("bakery", "books", "shoes")
VISITORS = 3000
ROUNDS = 5
LONGEST_WAIT_S = 120.0
"""So long a started process may take until it says that it is ready."""


def demo(console: Console, out: Path, overrides: list[str]) -> Path:
    """Train over a hub with three sites of made-up visits; returns the report, in the folder `out`.

    Everything else is in a temporary folder, which is gone afterwards, as are the processes.

    Raises:
        HubError: A command failed. The message ends with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="federation-") as folder, ExitStack() as running:
        stage = _Stage(console, Path(folder))
        stage.run("server", "init", "hub", "--host", "localhost", "--port", str(_free_port()))
        _set_ports(stage.folder / "hub" / "hub.yaml")
        for name in SITES:
            stage.run("client", "init", name)
        console.print("made-up visits at each site, instead of a Matomo", style="dim")
        sites = {name: stage.folder / name for name in SITES}
        write_visits(sites, VISITORS, datetime.now(UTC))
        for name in SITES:
            (sites[name] / "site.yaml").write_text(SITE.format(name=name))
            stage.run("client", "ingest", name)
            stage.run("server", "admit", "hub", f"{name}/{name}.pub")
        running.enter_context(stage.kept("server", "start", "hub", ready="is up"))
        port = re.search(r"^port: (\d+)", (stage.folder / "hub" / "hub.yaml").read_text(), re.M)
        assert port is not None
        for name in SITES:
            where = ("--superlink", f"localhost:{port[1]}")
            trust = ("--root-certificates", "hub/hub-ca.crt")
            running.enter_context(stage.kept("client", "join", name, *where, *trust, ready=None))
        stage.run("server", "run", "hub", f"rounds={ROUNDS}", *overrides, shown=True)
        run = max((stage.folder / "hub" / "runs").iterdir())
        stage.run("server", "publish", "hub", f"hub/runs/{run.name}", shown=True)
        stage.run("server", "status", "hub", shown=True)
        for name in SITES[:1]:
            model = f"{name}/models/{run.name}/model.safetensors"
            stage.run("client", "score", name, "--model", model, "--out", f"{name}/scores.csv")
            stage.run("client", "budget", name, shown=True)
        out.mkdir(parents=True, exist_ok=True)
        for file in ("report.html", "model.safetensors", "model.json", "summary.json"):
            shutil.copy(run / file, out / file)
        return out / "report.html"


class _Stage:
    """Runs commands in a folder, and shows each."""

    def __init__(self, console: Console, folder: Path) -> None:
        self.folder = folder
        self._console = console
        root = str(Path(__file__).parent.parent)
        self._environment = {**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}

    def run(self, *words: str, shown: bool = False) -> None:
        """Run a command to its end. Raises `HubError` if it fails."""
        self._show(words)
        output = None if shown else subprocess.PIPE
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=self.folder,
            env=self._environment,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            text=True,
        )
        if done.returncode:
            said = "\n".join((done.stdout or "").splitlines()[-5:])
            raise HubError(f"python -m {' '.join(words)} ended with {done.returncode}: {said}")

    @contextmanager
    def kept(self, *words: str, ready: str | None) -> Iterator[None]:
        """Keep a command running; begin once it has said `ready`."""
        self._show(words)
        log = self.folder / f"{'-'.join(words[1:3])}.log"
        command = Command(
            words[1], (sys.executable, "-m", *words), self._environment, log, self.folder
        )
        with Process(command) as process:
            deadline = time.monotonic() + LONGEST_WAIT_S
            while ready is not None and ready not in (log.read_text() if log.exists() else ""):
                if process.poll() is not None or time.monotonic() > deadline:
                    said = "\n".join(log.read_text().splitlines()[-5:])
                    raise HubError(f"python -m {' '.join(words)} did not start: {said}")
                time.sleep(0.1)
            yield

    def _show(self, words: tuple[str, ...]) -> None:
        line = f"$ python -m {' '.join(words)}"
        self._console.print(line, style="bold", highlight=False, markup=False, soft_wrap=True)


def _set_ports(settings: Path) -> None:
    """Other ports than a real hub on this machine would have."""
    text = settings.read_text()
    for name in ("superlink_port", "health_port"):
        text = re.sub(rf"^{name}: \d+", f"{name}: {_free_port()}", text, flags=re.M)
    settings.write_text(re.sub(r"^listen: .*", "listen: 127.0.0.1", text, flags=re.M))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
