"""The site agent: the process that owns a site's journeys, policy and ledger, and answers for it.

What it runs is the code that the site installed. Whoever asks, over the socket, hands in a plan and
a model and gets an answer; nothing else of the site is in their reach.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# The process loads what training needs before anybody can ask, so that no round waits for it.
import privacy.engines  # noqa: F401
from client.agent_socket import LARGEST_TEXT, SLACK, Connection, Listener
from client.folder import SiteFolder
from client.frames import FrameError, Limits
from client.journeys import StoredJourneys, check_cut
from client.policy import PolicyError, SitePolicy
from client.published import PublicationRefused, accept
from client.refusals import Refusals, shown
from client.site import Site
from journeys.errors import JourneyDataError
from journeys.store import StoreError
from privacy.ledger import Ledger, LedgerBusyError, LedgerError
from privacy.training import TrainingStopped
from protocol.exchange import Parts, read_request, reply_parts
from protocol.publication import LARGEST_BYTES, PUBLISH
from protocol.replies import SiteRefusal, SiteUpdate
from protocol.wire import WireError
from service.health import HealthServer

_TICK_S = 0.2
_LONGEST_END_S = 8.0

log = logging.getLogger(__name__)


def run(folder: SiteFolder, stopped: Callable[[], bool]) -> None:
    """Answer for the site in `folder` until `stopped` says so.

    Raises:
        SettingError, LedgerBusyError, HealthError: The agent cannot begin.
    """
    with ExitStack() as stack:
        agent = stack.enter_context(Agent(folder))
        if agent.port:
            stack.enter_context(HealthServer(agent.port, agent.health, agent.registry))
        agent.serve(stopped)


class Agent(Collector):
    """Answers one request after the other, whatever happens in one.

    The policy is read anew for each request. With a policy or a ledger that cannot be used nothing
    is answered, until it can: the agent goes on, and tries again with the next request.
    """

    def __init__(self, folder: SiteFolder) -> None:
        """Take over the site in `folder`.

        Raises:
            SettingError: `site.yaml` cannot be used.
            LedgerBusyError: Another process owns the ledger.
        """
        self._folder = folder
        self._config = folder.config()
        agent = self._config.agent
        self.port = agent.port
        """Of health and metrics; 0 for none."""
        self._journeys = StoredJourneys(folder.visits, self._config.name, agent.holdout)
        self._since = time.time()
        self._last_request: float | None = None
        self._rounds: set[tuple[str, int]] = set()
        self._turns = _Turns()
        self._publishing = threading.Lock()
        self._work: _Work | None = None
        self._refusals = Refusals(folder.audit_log)
        self._site: tuple[SitePolicy, Site] | None = None
        self._ledger: Ledger | None = None
        self._ledger_fault = ""
        self._spent: tuple[object, float] | None = None
        self.registry = CollectorRegistry()
        """The figures for monitoring."""
        self.registry.register(self)
        try:
            self._own_ledger()
        except LedgerBusyError:
            raise
        except LedgerError as error:
            log.error("nothing is answered until this is repaired: %s", error)
        if fault := self._policy_fault():
            log.error("nothing is answered until this is repaired: %s", fault)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have the ledger."""
        if self._ledger is not None:
            self._ledger.close()

    def serve(self, stopped: Callable[[], bool]) -> None:
        """Listen on the site's socket until `stopped` says so, then end what is at work.

        Raises:
            SettingError: The socket cannot be made, or another agent listens on it.
        """
        threads: list[threading.Thread] = []
        path = self._folder.socket(self._config)
        with Listener(path, self._config.agent, self._turned_away) as listener:
            log.info("site %s listens on %s", self._config.name, path)
            while not stopped():
                connection = listener.accept(_TICK_S)
                if connection is not None:
                    threads = [thread for thread in threads if thread.is_alive()]
                    threads.append(
                        threading.Thread(
                            target=self._attend, args=(connection, stopped), daemon=True
                        )
                    )
                    threads[-1].start()
                self._refusals.tell_of_more()
        ends = time.monotonic() + _LONGEST_END_S
        for thread in threads:
            thread.join(max(0.0, ends - time.monotonic()))
        self._refusals.tell_of_more(at_once=True)
        log.info("site %s has stopped", self._config.name)

    def health(self) -> tuple[bool, dict[str, object]]:
        """Whether policy and ledger are in order, and what is wrong with each."""
        faults = {"policy": self._policy_fault(), "ledger": self._ledger_fault}
        return not any(faults.values()), {name: why or "in order" for name, why in faults.items()}

    def status(self) -> dict[str, object]:
        """How the agent is, for who runs the site."""
        healthy, order = self.health()
        work = self._work
        return {
            "site": self._config.name,
            "since": _iso(self._since),
            "healthy": healthy,
            **order,
            "epsilon": self._epsilon(),
            "rounds": len(self._rounds),
            "refusals": self._refusals.count,
            "last_request": None if self._last_request is None else _iso(self._last_request),
            "at_work": None if work is None else work.told(),
            "model": self._newest_model(),
        }

    def collect(self) -> Iterator[Metric]:
        """The figures for monitoring, without those that are unknown at the moment."""
        epsilon = self._epsilon()
        figures = {
            "rounds": len(self._rounds),
            "refusals": self._refusals.count,
            "epsilon_left": None if epsilon is None else epsilon["left"],
            "last_request_timestamp_seconds": self._last_request,
            "busy": self._work is not None,
        }
        for name, (family, meaning) in _FIGURES.items():
            value = figures[name]
            if value is not None:
                yield family(f"conversion_site_{name}", meaning, value=float(value))

    # ------------------------------------------------------------------------ answering

    def _attend(self, connection: Connection, stopped: Callable[[], bool]) -> None:
        """Answer one connection. Whatever happens, it is closed and the agent goes on."""
        kind, parts = "frame", None
        with connection:
            try:
                received = connection.receive(self._limits(), stopped)
                if received is None:
                    return
                kind, asked = received
                parts = self._answer(
                    kind, asked, connection, lambda: stopped() or connection.is_gone()
                )
            except TrainingStopped:
                log.info("stopped before its end: %s", kind)
                connection.fail("stopped before its end; it is answered when it is asked again")
            except BaseException as error:  # A panic of a library in Rust is no Exception.
                told = self._told(error)
                self._refuse(
                    kind, "cannot be read" if isinstance(error, WireError) else told, error
                )
                connection.fail(told)
            if parts is not None:
                try:
                    connection.answer(parts)
                except OSError:
                    # The ledger keeps it for when it is asked for again.
                    log.warning("nobody took the answer")

    def _answer(
        self, kind: str, asked: Parts, connection: Connection, gone: Callable[[], bool]
    ) -> Parts:
        if kind == "status":
            if not connection.of_site:
                raise _NotForThem("the status is for the site's own user and root")
            return Parts({"status": json.dumps(self.status(), allow_nan=False)}, None)
        self._last_request = time.time()
        if kind == "publish":
            # Beside the training of another run, which goes on.
            with self._publishing:
                try:
                    return accept(self._folder, asked, int(time.time()))
                except PublicationRefused as refused:
                    self._refuse(kind, str(refused))
                    return reply_parts({PUBLISH: SiteRefusal(self._config.name, 0, str(refused))})
        return self._do(asked, gone)

    def _do(self, asked: Parts, gone: Callable[[], bool]) -> Parts:
        """Describe, evaluate, train."""
        request = read_request(asked)
        with self._turns.take(gone) as stopped:
            plan = max(request.plans.values(), key=lambda plan: plan.round)
            self._work = work = _Work(", ".join(request.plans), shown(plan.run), plan.round)
            try:
                replies = self._current_site().answer(request, stopped)
            except LedgerError as error:
                self._give_up_ledger(error)
                raise
            finally:
                self._work = None
        for ask, reply in replies.items():
            if isinstance(reply, SiteRefusal):
                self._refuse(ask, reply.reason)
            elif isinstance(reply, SiteUpdate):
                # One that is asked for again is one.
                self._rounds.add((plan.run, reply.round))
        log.info("answered %s", work)
        return reply_parts(replies)

    def _limits(self) -> dict[str, Limits]:
        try:
            most = 4 * self._folder.policy().max_parameters
        except PolicyError:
            most = 0
        return {
            "ask": Limits(LARGEST_TEXT, most + SLACK),
            "publish": Limits(LARGEST_TEXT, LARGEST_BYTES),
            "status": Limits(SLACK, 0),
        }

    # ------------------------------------------------------------------------ what is owned

    def _current_site(self) -> Site:
        """The site under the policy of this moment. Raises `PolicyError`, `LedgerError`."""
        policy, ledger = self._folder.policy(), self._own_ledger()
        if self._site is None or self._site[0] != policy:
            name = self._config.name
            site = Site(name, self._journeys, policy, ledger, check_cut=check_cut)
            self._site = policy, site
        return self._site[1]

    def _own_ledger(self) -> Ledger:
        """The ledger, opened anew if it was given up. Raises `LedgerError`."""
        if self._ledger is not None:
            return self._ledger
        try:
            if not self._folder.ledger.exists():
                # Begun anew it would know nothing of what was spent.
                raise LedgerError(
                    f"{self._folder.ledger}: is gone; put back the newest copy of it and of the "
                    "files beside it"
                )
            self._ledger = Ledger(self._folder.ledger)
        except LedgerError as error:
            self._ledger_fault = self._told(error)
            raise
        self._ledger_fault = ""
        return self._ledger

    def _give_up_ledger(self, error: LedgerError) -> None:
        """Have the ledger read from the disk, and checked, before anything is answered again."""
        self._ledger_fault = self._told(error)
        if self._ledger is not None:
            self._ledger.close()
        self._ledger = self._site = None

    def _policy_fault(self) -> str:
        try:
            self._folder.policy()
        except PolicyError as error:
            return str(error)
        return ""

    def _epsilon(self) -> dict[str, float] | None:
        """A visitor's loss by all that was released, and what is left; None if that is unknown."""
        ledger = self._ledger
        try:
            policy = self._folder.policy()
        except PolicyError:
            return None
        if ledger is None:
            return None
        # Composing takes from 20 ms to seconds.
        known, spent = (ledger.head, policy.delta), self._spent
        if spent is None or spent[0] != known:
            self._spent = spent = known, ledger.epsilon(policy.delta)
        if spent[1] == math.inf:
            return None
        left = max(0.0, policy.epsilon - spent[1])
        return {"spent": spent[1], "left": left, "delta": policy.delta}

    def _newest_model(self) -> str | None:
        """The run of which a published model was last taken in."""
        found = self._folder.path.glob("models/[!.]*/model.safetensors")
        newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
        return None if newest is None else newest.parent.name

    # ------------------------------------------------------------------------ telling

    def _told(self, error: BaseException) -> str:
        """What may be said of an error to the coordinator: no path, nothing of a visit."""
        if isinstance(error, PolicyError):
            return "policy.yaml cannot be used; nothing is answered until it can"
        if isinstance(error, StoreError | JourneyDataError):
            return "the site's visits cannot be read; nothing is answered until they can"
        if isinstance(error, (LedgerError, *_TOLD)):
            return shown(str(error).replace(f"{self._folder.path}/", ""))
        return f"the site failed: {type(error).__name__}"

    def _refuse(self, asked: str, reason: str, error: BaseException | None = None) -> None:
        if self._refusals.note(asked, reason):
            # What is told says all there is, or a name from outside makes the rest too long.
            more = None if isinstance(error, _TOLD) else error
            log.warning("refused, %s: %s", asked, shown(reason), exc_info=more)

    def _turned_away(self, reason: str) -> None:
        self._refuse("connection", reason)


_FIGURES: dict[str, tuple[type[CounterMetricFamily | GaugeMetricFamily], str]] = {
    "rounds": (CounterMetricFamily, "Rounds that were trained for"),
    "refusals": (CounterMetricFamily, "Requests refused, and peers turned away"),
    "epsilon_left": (GaugeMetricFamily, "Privacy loss that is left to a visitor"),
    "last_request_timestamp_seconds": (GaugeMetricFamily, "When the coordinator last asked"),
    "busy": (GaugeMetricFamily, "1 while a request is at work"),
}
"""What monitoring is told; counters get the suffix `_total`."""


class _NotForThem(Exception):  # noqa: N818  (a refusal is an answer, not a fault)
    """Who asks may not."""


_TOLD = (FrameError, WireError, _NotForThem)
"""Errors whose message says all, and may be told: shortened, where it repeats what was sent."""


@dataclass
class _Work:
    """What is being answered."""

    asked: str
    run: str
    round: int

    def __post_init__(self) -> None:
        self._began = time.monotonic()

    def __str__(self) -> str:
        return f"{self.asked} of run {self.run}, round {self.round}, in {self._seconds():.1f} s"

    def told(self) -> dict[str, object]:
        return {
            "asked": self.asked,
            "run": self.run,
            "round": self.round,
            "seconds": round(self._seconds(), 1),
        }

    def _seconds(self) -> float:
        return time.monotonic() - self._began


class _Turns:
    """One request at a time. One that comes later stops the one before.

    A coordinator that asks again does not wait for the first answer any more.
    """

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._counting = threading.Lock()
        self._newest = 0

    @contextmanager
    def take(self, gone: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
        """Wait for the turn; within, whether to stop. Raises `TrainingStopped` if that comes first.

        `gone`: whether nobody waits for the answer.
        """
        with self._counting:
            self._newest = mine = self._newest + 1

        def stopped() -> bool:
            return mine != self._newest or gone()

        while not self._busy.acquire(timeout=_TICK_S):
            if stopped():
                raise TrainingStopped
        try:
            if stopped():
                raise TrainingStopped
            yield stopped
        finally:
            self._busy.release()


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
