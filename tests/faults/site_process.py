"""A real site in a process of its own, which stops where a test says, to be killed there.

The process opens the site that lies in a folder (its policy in YAML, its ledger on disk, noise from
the operating system) and answers Flower messages through the ClientApp. Everything between it and
the test is JSON over a pipe:

- in: an `Ask`;
- out: first `{"opened": true, ...}` or `{"error": ..., "message": ...}`. Then, for each `Ask`, an
  answer (`reply`, the bytes that leave; or `refused`, the reason; or `error`) or, where the site
  stops, `{"at": ...}`; and before it `{"ran": ...}` each time that something is done with journeys.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, wraps
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import client
from client.app import client_app
from client.policy import SitePolicy
from client.site import Site, local_training
from conf.schema import LogisticConfig, OptimizerConfig, VisitorDP
from journeys.examples import Examples
from journeys.site import SiteJourneys
from models.registry import initial_weights
from privacy.accountant import PrivacyEvent, epsilon
from privacy.ledger import Ledger, Request, Reservation
from privacy.mechanisms import GaussianCount, GaussianHistogram
from privacy.optimizer import VisitorDPOptimizer
from privacy.training import LocalTraining, Trainer
from protocol import exchange
from protocol.exchange import read_replies, request_parts
from protocol.plan import RoundPlan
from protocol.records import from_records, to_records
from protocol.replies import SiteRefusal, Weights
from protocol.stored import reply_to_bytes
from tests.shop import CUT, SPEC, Untouchable

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
BUNDLE = ("client", "conf", "evaluation", "journeys", "models", "privacy", "protocol")
"""The folders that a site runs."""

VISITORS, ROUNDS, EVALUATIONS, DELTA = 1000, 9, 3, 1e-5
PROMISE = VisitorDP(epsilon=2.0, delta=DELTA, count_noise=20.0)
PLAN = RoundPlan(
    "shops",
    "conversion-model",
    "spring",
    0,
    ROUNDS,
    EVALUATIONS,
    LogisticConfig(),
    # Two steps a round, whatever the noise on the number of visitors.
    OptimizerConfig(batch_size=VISITORS // 2),
    PROMISE,
    CUT,
)
POLICY = """\
federations: [shops]
purposes: [conversion-model]
releases: [count, weights, histogram]
models: [logistic]
epsilon: {epsilon}
run_epsilon: 2
delta: 1.0e-5
min_noise_multiplier: 0.3
max_sample_rate: 0.5
max_clipping_norm: 3
max_steps: 2
max_parameters: 1000
min_visitors: 100
"""

# Calibrated here once, for all processes that fork after this import.
TRAINING = local_training(PLAN, VISITORS)

POINTS = (
    "before reserve",
    "reserving",
    "reserved, head behind",
    "reserved",
    "in the middle",
    "before commit",
    "committing",
    "committed, head behind",
    "committed",
)
"""Where a site can be stopped, in the order in which it gets there. Records and head are two files;
in between, the head is behind."""


@dataclass(frozen=True)
class Ask:
    """A question to the site."""

    kind: str
    """`describe`, `train` or `evaluate`."""
    round: int
    run: str = PLAN.run
    epsilon: float = PROMISE.epsilon
    """That the plan promises."""
    stop_at: str = ""
    """Point at which the site says so and waits for its end."""
    full_at: str = ""
    """Point from which on nothing can be written to a file any more."""

    @property
    def plan(self) -> RoundPlan:
        promise = replace(PROMISE, epsilon=self.epsilon)
        return replace(PLAN, run=self.run, round=self.round, privacy=promise)


# ------------------------------------------------------------------ the process


def serve(connection: Connection, folder: str, node: int, readable: bool) -> None:
    """Open the site in `folder` and answer what is asked, until `connection` closes."""
    asked = Ask("nothing yet", 0)

    def tell(**message: object) -> None:
        connection.send_bytes(json.dumps(message).encode())

    def reach(kind: str, point: str) -> None:
        if kind != asked.kind:
            return
        if point == asked.full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        if point == asked.stop_at:
            tell(at=point)
            connection.recv_bytes()

    def run(kind: str, event: PrivacyEvent) -> None:
        tell(ran=kind, event=[event.noise_multiplier, event.sample_rate, event.count])

    _announce(reach, run)
    try:
        journeys = (
            SiteJourneys("shop", _examples(VISITORS, 1), _examples(200, 2))
            if readable
            else cast(SiteJourneys, Untouchable())
        )
        site = Site(
            "shop",
            lambda _: journeys,
            SitePolicy.load(Path(folder) / "policy.yaml"),
            Ledger(Path(folder) / "ledger.sqlite"),
        )
    except Exception as error:
        tell(error=type(error).__name__, message=str(error))
        return
    app = client_app(lambda _: nullcontext(site))
    tell(opened=True, node=node, code=str(Path(client.__file__).parent), cwd=str(Path.cwd()))
    with suppress(EOFError):
        while True:
            asked = Ask(**json.loads(connection.recv_bytes()))
            try:
                reply = app(_message(asked, node), Context(1, node, {}, RecordDict(), {}))
            except Exception as error:
                tell(error=type(error).__name__, message=str(error))
                continue
            [content] = read_replies(from_records(reply.content)).values()
            if isinstance(content, SiteRefusal):
                tell(refused=content.reason, arrays=len(reply.content.array_records))
            else:
                tell(reply=reply_to_bytes(content).hex())
    site.close()


def fork_sites(control: socket.socket) -> None:
    """Fork a process for each site that `control` asks for, until it closes."""
    while True:
        request, descriptors, *_ = socket.recv_fds(control, 4096, 1)
        if not request:
            return
        asked = json.loads(request)
        if "wait" in asked:
            pid, _ = os.waitpid(asked["wait"], 0)
        elif pid := os.fork():
            os.close(descriptors[0])
        else:
            control.close()
            try:
                serve(Connection(descriptors[0]), **asked)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        control.send(str(pid).encode())


def _announce(reach: Callable[[str, str], None], run: Callable[[str, PrivacyEvent], None]) -> None:
    """Have this process's ledger and mechanisms say where they are, and what they do."""
    kind, steps = "", 0
    head_behind = ""

    @_around(Ledger, "reserve")
    def reserve(original: Any, ledger: Ledger, request: Request) -> Any:
        nonlocal kind
        kind = request.kind
        reach(kind, "before reserve")
        reserved = original(ledger, request)
        reach(kind, "reserved")
        return reserved

    @_around(Ledger, "commit")
    def commit(original: Any, ledger: Ledger, reservation: Reservation, *reply: Any) -> None:
        nonlocal kind
        kind = reservation.request.kind
        reach(kind, "before commit")
        original(ledger, reservation, *reply)
        reach(kind, "committed")

    @_around(Ledger, "_append")
    def append(original: Any, ledger: Ledger, database: Any, content: dict[str, Any]) -> Any:
        nonlocal head_behind
        number = original(ledger, database, content)
        reserving = "reserve" in content
        reach(kind, "reserving" if reserving else "committing")
        head_behind = f"{'reserved' if reserving else 'committed'}, head behind"
        return number

    @_around(Ledger, "_write_head")
    def write_head(original: Any, ledger: Ledger) -> None:
        reach(kind, head_behind)
        original(ledger)

    @_around(GaussianCount, "release")
    def count(original: Any, mechanism: GaussianCount, *args: Any) -> Any:
        run("describe", mechanism.event)
        reach("describe", "in the middle")
        return original(mechanism, *args)

    @_around(GaussianHistogram, "release")
    def histogram(original: Any, mechanism: GaussianHistogram, *args: Any) -> Any:
        run("evaluate", mechanism.event)
        reach("evaluate", "in the middle")
        return original(mechanism, *args)

    @_around(Trainer, "train")
    def train(original: Any, trainer: Trainer, *args: Any) -> Any:
        nonlocal steps
        steps = 0
        training: LocalTraining = args[2]
        run("train", training.event)
        return original(trainer, *args)

    @_around(VisitorDPOptimizer, "step")
    def step(original: Any, *args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == TRAINING.steps:
            reach("train", "in the middle")
        return original(*args)


def _around(owner: type, name: str) -> Callable[[Callable[..., Any]], None]:
    """Call the decorated function instead of the method, with the method before its arguments."""

    def put(instead: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        @wraps(original)
        def call(*args: Any) -> Any:
            return instead(original, *args)

        setattr(owner, name, call)

    return put


def _message(ask: Ask, node: int) -> Message:
    TaskIdentity.task_id = TaskIdentity.run_id = 1
    TaskIdentity.node_id = node
    kind = "query" if ask.kind == "describe" else ask.kind
    model = {} if ask.kind == "describe" else _weights(ask.round)
    content = to_records(request_parts(exchange.Request({ask.kind: ask.plan}, model)))
    message = Message(content, node, kind, group_id=str(ask.round), ttl=60.0)
    message.metadata.__dict__["_message_id"] = "asked"
    return message


@cache
def _weights(round_: int) -> Weights:
    """Some model that a round begins with; another one each round."""
    return initial_weights(PLAN.model, SPEC, round_)


@cache
def _examples(n: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    steps, sizes = SPEC.max_touchpoints, [size for _, size in SPEC.categorical]
    return Examples(
        np.stack([rng.integers(1, size, (n, steps)) for size in sizes], axis=2).astype(np.uint16),
        rng.random((n, steps, len(SPEC.numeric)), dtype=np.float32),
        np.full(n, steps, np.int32),
        (rng.random(n) < 0.3).astype(np.float32),
    )


# ------------------------------------------------------------------ the test's side


class Forks:
    """A process that has imported all that a site needs, and forks one process a site at once."""

    def __init__(self, code: Path = ROOT) -> None:
        """Run the code that lies in the folder `code`, in that folder."""
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.site_process", str(theirs.fileno())],
                cwd=code,
                pass_fds=[theirs.fileno()],
            )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()

    def start(self, folder: Path, *, node: int = 1, readable: bool = True) -> SiteProcess:
        """Fork a process that runs `serve`."""
        connection, theirs = multiprocessing.Pipe()
        with theirs:
            arguments = {"folder": str(folder), "node": node, "readable": readable}
            pid = self._ask(arguments, theirs.fileno())
        return SiteProcess(self, connection, pid)

    def wait(self, pid: int) -> None:
        """Return when a process that was forked is gone."""
        self._ask({"wait": pid})

    def _ask(self, request: dict[str, object], *descriptors: int) -> int:
        socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
        return int(self._control.recv(64))


class SiteProcess:
    """The process of a site, as the test sees it."""

    def __init__(self, forks: Forks, connection: Connection, pid: int) -> None:
        self._forks, self._pid = forks, pid
        self.connection = connection
        self.opened = self.hear()

    def send(self, ask: Ask) -> None:
        """Ask and do not wait."""
        self.connection.send_bytes(json.dumps(asdict(ask)).encode())

    def hear(self) -> dict[str, Any]:
        """What the process says next. Raises `EOFError` if it is dead and said nothing."""
        if not self.connection.poll(60):
            raise TimeoutError("the site says nothing")
        return cast(dict[str, Any], json.loads(self.connection.recv_bytes()))

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        os.kill(self._pid, signal.SIGKILL)
        self._forks.wait(self._pid)

    def end(self) -> None:
        """Let it close the site and end."""
        self.connection.close()
        self._forks.wait(self._pid)


class Watched:
    """A site over all its processes: what was asked of it, what ran, and what left."""

    def __init__(self, folder: Path, forks: Forks, epsilon: float) -> None:
        """A new site in `folder`, which allows `epsilon` in all."""
        self.folder = folder
        self.forks = forks
        self.ledger = folder / "ledger.sqlite"
        self.ran: defaultdict[tuple[str, str, int], list[PrivacyEvent]] = defaultdict(list)
        """What was done with journeys, by (run, kind, round)."""
        self.left: defaultdict[tuple[str, str, int], set[bytes]] = defaultdict(set)
        """The replies that came out, by the same."""
        self._process: SiteProcess | None = None
        self._asked: Ask | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.allow(epsilon)

    def allow(self, epsilon: float) -> None:
        """Write the site's policy, with another budget."""
        (self.folder / "policy.yaml").write_text(POLICY.format(epsilon=epsilon))

    def start(self, **how: Any) -> dict[str, Any]:
        """Start a process; what it says first."""
        self._process = self.forks.start(self.folder, **how)
        return self._process.opened

    def ask(self, kind: str, round_: int = 0, **more: Any) -> dict[str, Any]:
        """Ask, and give what the site says."""
        self.send(kind, round_, **more)
        return self.hear()

    def reply(self, kind: str, round_: int = 0, **more: Any) -> bytes:
        """Ask, and give what left."""
        return bytes.fromhex(self.ask(kind, round_, **more)["reply"])

    def send(self, kind: str, round_: int, **more: Any) -> None:
        """Ask and do not wait."""
        assert self._process is not None
        self._asked = Ask(kind, round_, **more)
        self._process.send(self._asked)

    def hear(self) -> dict[str, Any]:
        """What the site answers, or where it stops. Raises `EOFError` if it died before."""
        assert self._process is not None
        assert self._asked is not None
        run, round_ = self._asked.run, self._asked.round
        while "ran" in (said := self._process.hear()):
            kind = said["ran"]
            key = run, kind, 0 if kind == "describe" else round_
            self.ran[key].append(PrivacyEvent(*said["event"]))
        if "reply" in said:
            self.left[run, self._asked.kind, round_].add(bytes.fromhex(said["reply"]))
        return said

    def kill(self) -> None:
        """Kill the process by SIGKILL; what it had sent before has left."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        if self._asked is not None:
            self._process = process
            # Reset, not ended, is a pipe whose question nobody had read.
            with suppress(EOFError, ConnectionResetError):
                while True:
                    self.hear()
            self._process = None
        process.connection.close()

    def end(self) -> None:
        """End the process in good order."""
        process, self._process = self._process, None
        assert process is not None
        process.end()

    def spent(self, run: str | None = None, also: Sequence[PrivacyEvent] = ()) -> float:
        """A visitor's true loss, by what really left, as often as it left differently.

        Among the visitors that train, by `also` too.
        """
        losses = []
        # The ledger's order: of kinds composed in another, the last digit may differ.
        for kinds, more in ((("describe", "train"), also), (("evaluate",), ())):
            events: list[PrivacyEvent] = []
            for (of, kind, round_), replies in self.left.items():
                if kind in kinds and run in (None, of):
                    (event,) = set(self.ran[of, kind, round_])
                    events += [event] * len(replies)
            losses.append(epsilon([*events, *more], DELTA))
        return max(losses)

    def recorded(self, run: str | None = None) -> float:
        """What the ledger says, looked at from outside."""
        return Ledger(self.ledger, read_only=True).epsilon(DELTA, run=run)

    def charges(self) -> Counter[tuple[str, str, int]]:
        """How often each (run, kind, round) is in the ledger."""
        entries = Ledger(self.ledger, read_only=True).entries()
        requests = [entry.request for entry in entries]
        return Counter((r.run.partition("/")[2], r.kind, r.round) for r in requests)

    def last_kept(self) -> bytes | None:
        """The reply that was put on record last."""
        file = f"file:{self.ledger}?mode=ro"
        with closing(sqlite3.connect(file, uri=True)) as database:
            row = database.execute("SELECT body FROM replies ORDER BY number DESC").fetchone()
        return None if row is None else bytes(row[0])


if __name__ == "__main__":
    fork_sites(socket.socket(fileno=int(sys.argv[1])))
