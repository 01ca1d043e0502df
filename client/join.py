"""Takes part in a federation: runs a site's agent and SuperNode, and starts again what dies."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from client.agent_socket import AgentError, ask_status
from client.folder import SiteFolder
from client.node import NodeState
from conf.site import SiteConfig
from journeys.durable import write_durably
from service.lock import held
from service.logs import configure
from service.processes import Command, ProcessError, Supervisor, until_stopped

LARGEST_LOG = 10_000_000
"""Bytes; a log that is larger is put aside when the site next joins."""

_LOOK_S = 0.5
_AGENT, _NODE = "agent", "SuperNode"
_log = logging.getLogger(__name__)


class JoinError(ValueError):
    """The site cannot join. The message says what to do."""


def join(folder: SiteFolder, superlink: str, root_certificates: Path, as_json: bool) -> None:
    """Run agent and SuperNode until SIGTERM or SIGINT; both have ended when this returns.

    Raises:
        JoinError, SettingError, PolicyError, SecretError: Nothing was started.
    """
    folder = SiteFolder(folder.path.resolve())
    certificate = _checked(folder, superlink, root_certificates)
    config = folder.config()
    # Loaded to see that it can be.
    folder.policy()
    with _held(folder):
        configure(as_json)
        if not folder.node.public_key.exists():
            key = folder.create_node(config.name)
            _log.info("the SuperNode got a key; give %s to the coordinator", key)
        folder.node.private_key()
        if not folder.authority.exists() or folder.authority.read_bytes() != certificate:
            write_durably(folder.authority, certificate)
            _log.info("%s: the hub's certificate, kept", folder.authority)
        commands = _commands(folder, config, superlink, as_json)
        try:
            with until_stopped() as stopped, Supervisor(commands, _Once().tell) as supervisor:
                _log.info("started; logs are in %s", folder.logs)
                watch = _Watch(folder, folder.socket(config))
                while not stopped.wait(_LOOK_S):
                    supervisor.check()
                    watch.look(supervisor.pids)
                _log.info("stopping")
        except ProcessError as error:
            raise JoinError(str(error)) from error
        _log.info("stopped")


class _Once:
    """Says a line only if it is not the one that was said last, of the same process."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def tell(self, line: str) -> None:
        name = line.partition(" ")[0]
        if self._said.get(name) != line:
            self._said[name] = line
            _log.warning("%s (see logs/%s.log)", line, name.lower())


class _Watch:
    """Says when the agent is ready, and how the SuperNode stands."""

    def __init__(self, folder: SiteFolder, socket: Path) -> None:
        self._folder, self._socket = folder, socket
        self._pids: dict[str, int | None] = {_AGENT: None, _NODE: None}
        self._agent_is_ready = False
        self._node_since = 0.0
        self._node_said: tuple[bool, str] | None = None

    def look(self, pids: dict[str, int]) -> None:
        if pids.get(_AGENT) != self._pids[_AGENT]:
            self._agent_is_ready = False
        if pids.get(_NODE) not in (None, self._pids[_NODE]):
            self._node_since = time.time()
            if self._node_said is not None and self._node_said[0]:
                self._node_said = None
        self._pids = {name: pids.get(name) for name in self._pids}
        if not self._agent_is_ready and _AGENT in pids and _answers(self._socket):
            self._agent_is_ready = True
            _log.info("agent ready")
        state = self._folder.node.state
        # Not what an earlier process left there.
        if state is not None and state.contact >= self._node_since:
            self._say(state)

    def _say(self, state: NodeState) -> None:
        said = state.connected, state.text
        if said == self._node_said:
            return
        self._node_said = said
        if state.connected:
            _log.info("SuperNode connected as %s", state.text)
        else:
            _log.warning("SuperNode not connected: %s", state.text)


def _answers(socket: Path) -> bool:
    try:
        ask_status(socket, timeout_s=1.0)
    except AgentError:
        return False
    return True


def _checked(folder: SiteFolder, superlink: str, root_certificates: Path) -> bytes:
    """The certificates' file. Raises `JoinError` for what cannot do."""
    if not (folder.path / "site.yaml").exists():
        raise JoinError(f"{folder.path}: no site; begin one: python -m client init {folder.path}")
    address = re.fullmatch(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})", superlink)
    if address is None or not 0 < int(address[1]) < 65_536:
        raise JoinError(f"--superlink {superlink}: must be HOST:PORT, such as hub.example.org:9092")
    try:
        content = root_certificates.read_bytes()
    except OSError as error:
        raise JoinError(f"{root_certificates}: cannot be read: {error.strerror}") from None
    try:
        found = x509.load_pem_x509_certificates(content)
    except ValueError:
        found = []
    if not found:
        raise JoinError(
            f"{root_certificates}: holds no certificate; the coordinator has it, as hub-ca.crt"
        )
    ends = max(one.not_valid_after_utc for one in found)
    if ends < datetime.now(UTC):
        raise JoinError(f"{root_certificates}: expired on {ends:%Y-%m-%d}; ask for the new one")
    return content


@contextmanager
def _held(folder: SiteFolder) -> Iterator[None]:
    """Be the only `join` of this site. Raises `JoinError`."""
    with ExitStack() as stack:
        try:
            stack.enter_context(held(folder.path / ".join.lock"))
        except BlockingIOError:
            raise JoinError(f"{folder.path}: takes part already, by another `join`") from None
        yield


def _commands(
    folder: SiteFolder, config: SiteConfig, superlink: str, as_json: bool
) -> tuple[Command, Command]:
    folder.logs.mkdir(mode=0o700, exist_ok=True)
    environment = {
        **os.environ,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    json_logs = ("--json-logs",) if as_json else ()
    python = (sys.executable, "-m", "client")
    agent = (*python, "agent", str(folder.path), *json_logs)
    hub = ("--superlink", superlink, "--root-certificates", str(folder.authority))
    socket = ("--socket", str(folder.socket(config)))
    node = (*python, "carry", str(folder.node.path), *hub, *socket, *json_logs)
    return (
        Command(_AGENT, agent, environment, _log_file(folder.logs / "agent.log")),
        Command(_NODE, node, environment, _log_file(folder.logs / "supernode.log")),
    )


def _log_file(path: Path) -> Path:
    if path.exists() and path.stat().st_size > LARGEST_LOG:
        path.replace(path.with_name(f"{path.name}.1"))
    return path
