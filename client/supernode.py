"""The SuperNode: carries messages between the hub and the site's agent, and reads none of them.

It runs for the user who owns the node's folder, who need not own anything else of the site. It
imports no torch and fetches no code.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from client.agent_socket import AgentError, AgentUnreachable, ask_agent
from client.fleet import (
    BEAT_S,
    PATIENCE_S,
    Asked,
    Fleet,
    HubError,
    MessageError,
    RunOverError,
    Stop,
    StoppedError,
)
from client.node import NodeBusyError, NodeFolder
from client.secret import SecretError
from protocol.exchange import Parts
from service.logs import configure
from service.processes import until_stopped

STOP_S = 2.0
"""So long the process has to end once it is asked to."""

MOST_AT_WORK = 3
"""Messages that are answered at once; one more, and the oldest is given up. Below what the agent
takes of one user, `agent_socket.MOST_CONNECTIONS`."""

NO_AGENT, UNUSABLE = 9, 2
"""What the process ends with, besides the codes of `HubError`."""

_SHORT_POLL_S, _LONG_POLL_S, _POLL_AT_WORK_S = 0.5, 3.0, 2.0
_EAGER_S = 60.0
_CONTACT_S = 5.0
_LONGEST_WORK_S = 86_400.0
_TICK_S = 0.25

_log = logging.getLogger(__name__)

Ask = Callable[[Parts, float, Callable[[], bool]], Parts]
"""Hands a request to the agent: what, how many seconds it may take, whether it is given up.

Raises `AgentError`."""


class Hub(Protocol):
    """What the loop needs of `Fleet`."""

    def beat(self) -> None:
        """Say that this site is there."""

    def receive(self) -> Asked | None:
        """The next message for this site."""

    def fetch(self, asked: Asked) -> Parts:
        """What a message holds."""

    def answer(self, asked: Asked, answer: Parts | str, seconds: float) -> None:
        """Send the answer, or an error's text."""


@dataclass(frozen=True)
class _Work:
    """A message that is being answered."""

    future: Future[None]
    given_up: threading.Event


class SuperNode:
    """The loop: what comes goes to the agent at once, and the hub is heard meanwhile.

    The agent itself stops what it works on when it is asked for something else, and takes in a
    published model beside it.
    """

    def __init__(
        self, hub: Hub, ask: Ask, stopped: Stop, in_contact: Callable[[], None] = lambda: None
    ) -> None:
        """`in_contact` is called about every 5 s in which the hub answers."""
        self._hub, self._ask, self._stopped, self._in_contact = hub, ask, stopped, in_contact

    def run(self) -> None:
        """Carry messages until stopped. Raises `HubError` where the hub cannot be used."""
        works: list[_Work] = []
        busy_at = beat_at = time.monotonic()
        contact_at = -_CONTACT_S
        workers = ThreadPoolExecutor(MOST_AT_WORK, "message")
        try:
            while not self._stopped.is_set():
                asked = self._hub.receive()
                now = time.monotonic()
                if now >= contact_at + _CONTACT_S:
                    contact_at = now
                    self._in_contact()
                if now >= beat_at + BEAT_S:
                    beat_at = now
                    self._hub.beat()
                for work in [work for work in works if work.future.done()]:
                    works.remove(work)
                    work.future.result()
                    busy_at = now
                if asked is not None:
                    if len(works) == MOST_AT_WORK:
                        works.pop(0).given_up.set()
                    given_up = threading.Event()
                    works.append(_Work(workers.submit(self._answer, asked, given_up), given_up))
                    busy_at = now
                self._pause(works, _poll(now - busy_at, bool(works)))
        except StoppedError:
            pass
        finally:
            for work in works:
                work.given_up.set()
            # They may be in the middle of a call, which is not waited for.
            workers.shutdown(wait=False, cancel_futures=True)

    def _pause(self, works: list[_Work], seconds: float) -> None:
        """Wait; no longer than the agent works, since the next message follows the answer."""
        until = time.monotonic() + seconds
        while not self._stopped.wait(min(_TICK_S, seconds)):
            if time.monotonic() >= until or any(work.future.done() for work in works):
                return

    def _answer(self, asked: Asked, given_up: threading.Event) -> None:
        began = time.monotonic()
        try:
            try:
                answer: Parts | str = self._ask_agent(asked, given_up)
            except (AgentError, MessageError) as error:
                _log.warning("message %s: not answered: %s", asked.id, str(error))
                answer = str(error)
            if self._stopped.is_set():
                return
            seconds = time.monotonic() - began
            self._hub.answer(asked, answer, seconds)
            _log.info("message %s: answered after %.1f s", asked.id, seconds)
        except RunOverError:
            _log.info("message %s: its run is over", asked.id)
        except MessageError as error:
            _log.warning("message %s: the answer was not sent: %s", asked.id, str(error))
        except StoppedError:
            pass

    def _ask_agent(self, asked: Asked, given_up: threading.Event) -> Parts:
        parts = self._hub.fetch(asked)
        size = len(parts.weights or b"")
        _log.info("message %s of run %d: %d bytes", asked.id, asked.message.metadata.run_id, size)

        def cancelled() -> bool:
            return given_up.is_set() or self._stopped.is_set()

        # An agent that is being started again is worth waiting for.
        until = time.monotonic() + PATIENCE_S
        while True:
            left = min(asked.seconds_left, _LONGEST_WORK_S)
            # Not `left <= 0`, which a NaN would pass.
            if not left > 0:
                raise MessageError("a message that came too late")
            try:
                return self._ask(parts, left, cancelled)
            except AgentUnreachable:
                if cancelled() or time.monotonic() + _SHORT_POLL_S > until:
                    raise
            given_up.wait(_SHORT_POLL_S)


def _poll(quiet_s: float, at_work: bool) -> float:
    """How long to wait before the hub is asked again."""
    if at_work:
        return _POLL_AT_WORK_S
    return min(_LONG_POLL_S, max(_SHORT_POLL_S, _SHORT_POLL_S * quiet_s / _EAGER_S))


def carry(
    node: NodeFolder, superlink: str, root_certificates: Path, socket: Path, as_json: bool
) -> NoReturn:
    """Be the site's SuperNode until asked to stop, or until the hub cannot be used; ends then."""
    configure(as_json)
    code = 1
    try:
        with until_stopped() as stopped:
            threading.Thread(target=_end_in_time, args=(stopped,), daemon=True).start()
            code = _carry(node, superlink, root_certificates, socket, stopped)
    except BaseException:
        _log.critical("an error that nobody caught", exc_info=True)
    # Whatever still runs: a process that stays without doing anything would not be started again.
    _end(code)


def _carry(
    node: NodeFolder, superlink: str, root_certificates: Path, socket: Path, stopped: Stop
) -> int:
    try:
        with node.held():
            try:
                key, name = node.private_key(), node.name
                authority = root_certificates.read_bytes()
                if not _agent_listens(socket, stopped):
                    return 0
                fleet = Fleet(superlink, authority, key, name, stopped)
                _carry_for(fleet, node, socket, stopped)
            except StoppedError:
                pass
            except (HubError, SecretError, _NoAgentError) as error:
                _say(node, False, str(error))
                raise
            _say(node, False, "stopped")
    except HubError as error:
        _log.error("%s", str(error))
        return error.code
    except _NoAgentError as error:
        _log.error("%s", str(error))
        return NO_AGENT
    except (SecretError, NodeBusyError) as error:
        _log.error("%s", str(error))
        return UNUSABLE
    except OSError as error:
        _log.error("%s: %s", error.filename or node.path, error.strerror)
        return UNUSABLE
    return 0


def _carry_for(fleet: Fleet, node: NodeFolder, socket: Path, stopped: Stop) -> None:
    id_ = fleet.activate(node.node_id)
    try:
        _write(lambda: node.keep_node_id(id_))
        _say(node, True, f"node {id_}")
        _log.info("connected to %s as node %d", fleet.address, id_)
        SuperNode(
            fleet,
            lambda parts, seconds, cancelled: ask_agent(socket, parts, seconds, cancelled),
            stopped,
            lambda: _write(node.say_alive),
        ).run()
    finally:
        fleet.deactivate()
        fleet.close()


class _NoAgentError(Exception):
    """There is no agent to hand messages to."""


def _agent_listens(socket: Path, stopped: Stop) -> bool:
    """Wait for the agent's socket: a site without agent does not report to the hub."""
    until = time.monotonic() + PATIENCE_S
    while not stopped.is_set():
        try:
            if socket.is_socket():
                return True
        except PermissionError:
            raise _NoAgentError(f"{socket}: this user may not enter the folder") from None
        if time.monotonic() > until:
            raise _NoAgentError(
                f"{socket}: no agent listens; start it: python -m client agent SITE"
            )
        stopped.wait(_TICK_S)
    return False


def _say(node: NodeFolder, connected: bool, text: str) -> None:
    _write(lambda: node.say(connected, text))


def _write(what: Callable[[], None]) -> None:
    """A full disk is no reason not to carry messages."""
    try:
        what()
    except OSError as error:
        _log.warning("%s: cannot be written: %s", error.filename, error.strerror)


def _end_in_time(stopped: Stop) -> None:
    while not stopped.wait(60.0):
        pass
    time.sleep(STOP_S)
    _log.warning("stopped in the middle of a call")
    _end(0)


def _end(code: int) -> NoReturn:
    logging.shutdown()
    os._exit(code)
