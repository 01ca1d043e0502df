from __future__ import annotations

import os
import signal
import socket as socket_
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from flwr.app import Message, MessageType, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.serverapp import Grid

from client import fleet, supernode
from client.agent_socket import AgentError, AgentUnreachable, Listener, ask_agent
from client.fleet import Asked, Fleet, HubError, MessageError, RunOverError
from client.frames import Limits
from client.node import NodeFolder
from client.supernode import MOST_AT_WORK, SuperNode
from conf.site import AgentConfig
from protocol.exchange import Parts
from protocol.records import from_records, to_records
from server.certificates import create_authority
from tests.superlink import Hub, open_superlink

ROOT = Path(__file__).parents[2]
PARTS = Parts({"train": "{}"}, b"model")


def until(holds: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ------------------------------------------------------------------------ the loop, apart from all


def asked(id_: str, ttl: float = 60.0) -> Asked:
    metadata = Metadata(1, id_, 1, 7, "", "", time.time(), ttl, "train")
    return Asked(make_message(metadata, RecordDict()), ())


@dataclass
class FakeHub:
    messages: Queue[Asked] = field(default_factory=Queue)
    answers: dict[str, Parts | str] = field(default_factory=dict)
    beats: int = 0
    fault: Exception | None = None
    """What `fetch` raises."""

    def beat(self) -> None:
        self.beats += 1

    def receive(self) -> Asked | None:
        return None if self.messages.empty() else self.messages.get()

    def fetch(self, asked: Asked) -> Parts:
        if self.fault:
            raise self.fault
        return Parts({"train": asked.id}, None)

    def answer(self, asked: Asked, answer: Parts | str, seconds: float) -> None:
        assert 0 <= seconds < 20
        self.answers[asked.id] = answer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    for name in ("_SHORT_POLL_S", "_LONG_POLL_S", "_POLL_AT_WORK_S", "_TICK_S"):
        monkeypatch.setattr(supernode, name, 0.01)
    return FakeHub()


@contextmanager
def running(hub: Any, ask: supernode.Ask, **more: Any) -> Iterator[threading.Event]:
    """A SuperNode in a thread; what it raises is raised at the block's end."""
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(SuperNode(hub, ask, stopped, **more).run)
        try:
            yield stopped
        finally:
            stopped.set()
        future.result(timeout=5)


def echo(parts: Parts, _: float, __: Callable[[], bool]) -> Parts:
    return parts


def test_what_is_asked_goes_to_the_agent_and_the_answer_back(hub: FakeHub) -> None:
    contacts: list[float] = []
    with running(hub, echo, in_contact=lambda: contacts.append(time.monotonic())):
        for id_ in "abc":
            hub.messages.put(asked(id_))
        until(lambda: len(hub.answers) == 3)
    assert hub.answers == {id_: Parts({"train": id_}, None) for id_ in "abc"}
    # Of many polls.
    assert len(contacts) == 1


def test_the_agent_has_as_long_as_the_coordinator_waits(hub: FakeHub) -> None:
    given: list[float] = []

    def ask(parts: Parts, seconds: float, _: Callable[[], bool]) -> Parts:
        given.append(seconds)
        return parts

    with running(hub, ask):
        hub.messages.put(asked("a", ttl=30))
        hub.messages.put(asked("b", ttl=float("inf")))
        until(lambda: len(hub.answers) == 2)
    assert 29 < min(given) <= 30
    assert max(given) == 86_400


@pytest.mark.parametrize("ttl", [0.0, -5.0, float("nan")])
def test_what_nobody_waits_for_is_not_done(hub: FakeHub, ttl: float) -> None:
    def ask(*_: Any) -> Parts:
        raise AssertionError("asked")

    with running(hub, ask):
        hub.messages.put(asked("a", ttl=ttl))
        until(lambda: hub.answers)
    assert hub.answers == {"a": "a message that came too late"}


def test_what_the_agent_does_not_answer_is_an_error(hub: FakeHub) -> None:
    def ask(*_: Any) -> Parts:
        raise AgentError("the site failed: MemoryError")

    with running(hub, ask):
        hub.messages.put(asked("a"))
        until(lambda: hub.answers)
    assert hub.answers == {"a": "the site failed: MemoryError"}


def test_an_agent_that_starts_again_is_waited_for(hub: FakeHub) -> None:
    tries = iter([AgentUnreachable("gone")] * 3)

    def ask(parts: Parts, _: float, __: Callable[[], bool]) -> Parts:
        for error in tries:
            raise error
        return parts

    with running(hub, ask):
        hub.messages.put(asked("a"))
        until(lambda: hub.answers)
    assert hub.answers == {"a": Parts({"train": "a"}, None)}
    assert next(tries, None) is None


def test_an_agent_that_stays_away_is_not_waited_for_ever(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supernode, "PATIENCE_S", 0.1)

    def ask(*_: Any) -> Parts:
        raise AgentUnreachable("the site's agent cannot be reached")

    with running(hub, ask):
        hub.messages.put(asked("a"))
        until(lambda: hub.answers)
    assert hub.answers == {"a": "the site's agent cannot be reached"}


def test_a_bad_message_is_answered_with_what_is_wrong(hub: FakeHub) -> None:
    hub.fault = MessageError("a message of more than 1,000 objects")
    with running(hub, echo):
        hub.messages.put(asked("a"))
        until(lambda: hub.answers)
    assert hub.answers == {"a": "a message of more than 1,000 objects"}


def test_a_run_that_is_over_gets_no_answer_and_the_next_one_does(hub: FakeHub) -> None:
    hub.fault = RunOverError()
    with running(hub, echo):
        hub.messages.put(asked("a"))
        until(hub.messages.empty)
        time.sleep(0.05)
        hub.fault = None
        hub.messages.put(asked("b"))
        until(lambda: hub.answers)
    assert list(hub.answers) == ["b"]


def test_messages_are_handed_on_side_by_side_and_the_oldest_of_too_many_is_given_up(
    hub: FakeHub,
) -> None:
    begun: list[str] = []
    finished = threading.Event()

    def ask(parts: Parts, _: float, cancelled: Callable[[], bool]) -> Parts:
        begun.append(parts.texts["train"])
        until(lambda: finished.is_set() or cancelled())
        if cancelled():
            raise AgentError("the request was withdrawn")
        return parts

    with running(hub, ask):
        for number in range(MOST_AT_WORK):
            hub.messages.put(asked(str(number)))
        until(lambda: len(begun) == MOST_AT_WORK)
        assert hub.answers == {}
        hub.messages.put(asked("newest"))
        until(lambda: "newest" in begun)
        assert hub.answers == {"0": "the request was withdrawn"}
        finished.set()
        until(lambda: len(hub.answers) == MOST_AT_WORK + 1)


def test_it_stops_soon_and_answers_nothing_then(hub: FakeHub) -> None:
    begun = threading.Event()

    def ask(_: Parts, __: float, cancelled: Callable[[], bool]) -> Parts:
        begun.set()
        until(cancelled)
        raise AgentError("the request was withdrawn")

    with running(hub, ask) as stopped:
        hub.messages.put(asked("a"))
        assert begun.wait(5)
        began = time.monotonic()
        stopped.set()
    assert time.monotonic() - began < 1
    assert hub.answers == {}


@pytest.mark.parametrize("fault", [HubError(3, "away"), KeyError("a fault of ours")])
def test_a_fault_while_answering_ends_it(hub: FakeHub, fault: Exception) -> None:
    hub.fault = fault
    hub.messages.put(asked("a"))
    with pytest.raises(type(fault)):
        SuperNode(hub, echo, threading.Event()).run()


def test_heartbeats_go_on_while_the_agent_works(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supernode, "BEAT_S", 0.05)

    def ask(parts: Parts, _: float, __: Callable[[], bool]) -> Parts:
        before = hub.beats
        until(lambda: hub.beats > before + 3)
        return parts

    with running(hub, ask):
        hub.messages.put(asked("a"))
        until(lambda: hub.answers)


def test_a_quiet_hub_is_asked_less_often() -> None:
    assert [supernode._poll(quiet, False) for quiet in (0, 60, 120, 360, 86_400)] == [
        0.5,
        0.5,
        1.0,
        3.0,
        3.0,
    ]
    assert supernode._poll(0, True) == 2.0


# ------------------------------------------------------------------------ a real SuperLink


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with open_superlink(tmp_path_factory.mktemp("superlink")) as hub:
        yield hub


@pytest.fixture
def node(tmp_path: Path) -> NodeFolder:
    return NodeFolder.create(tmp_path / "node", "acme")


@contextmanager
def agent(path: Path) -> Iterator[None]:
    """Answers each request with itself, on the agent's socket."""
    limits = dict.fromkeys(("ask", "publish"), Limits(1_000_000, 10_000_000))
    over = threading.Event()
    with Listener(path, AgentConfig(), lambda _: None) as listener:

        def serve() -> None:
            while not over.is_set():
                connection = listener.accept(0.05)
                if connection is not None:
                    with connection:
                        received = connection.receive(limits)
                        assert received is not None
                        connection.answer(received[1])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def exchange(grid: Grid, node_id: int, parts: Parts) -> Message:
    """Send a request, and wait for the answer."""
    message = Message(to_records(parts), node_id, MessageType.TRAIN, ttl=60)
    [id_] = grid.push_messages([message])
    answers: list[Message] = []
    until(lambda: answers or answers.extend(grid.pull_messages([id_])) or answers)
    [answer] = answers
    return answer


class Carrying:
    """`python -m client carry`, as a process."""

    def __init__(self, node: NodeFolder, address: str, authority: Path, socket: Path) -> None:
        self.node = node
        self.log = node.path.parent / "carry.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "client", "carry", str(node.path)),
                    *("--superlink", address, "--root-certificates", str(authority)),
                    *("--socket", str(socket)),
                ],
                cwd=ROOT,
                stderr=output,
            )

    def is_connected(self) -> bool:
        assert self.process.poll() is None, self.said
        return "connected to" in self.said

    @property
    def said(self) -> str:
        return self.log.read_text()

    def __enter__(self) -> Carrying:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.mark.slow
def test_a_site_takes_part_in_a_run_and_does_so_again_after_a_kill(
    superlink: Hub, node: NodeFolder, tmp_path: Path
) -> None:
    id_ = superlink.admit(node)
    socket = tmp_path / "agent.sock"
    address = superlink.address
    model = Parts({"train": "{}", "evaluate": "{}"}, os.urandom(1_000_000))
    with agent(socket), superlink.superlink.open_grid() as grid:
        with Carrying(node, address, superlink.authority, socket) as carrying:
            until(carrying.is_connected)
            assert node.node_id == id_
            answer = exchange(grid, id_, model)
            assert from_records(answer.content) == model
            assert answer.metadata.src_node_id == id_
            carrying.process.kill()
            carrying.process.wait()
        assert superlink.is_online(id_)
        # Flower alone would not let it in for a minute.
        with Carrying(node, address, superlink.authority, socket) as carrying:
            until(carrying.is_connected)
            assert from_records(exchange(grid, id_, PARTS).content) == PARTS
            state = node.state
            assert state is not None
            assert (state.connected, state.text) == (True, f"node {id_}")

            began = time.monotonic()
            carrying.process.send_signal(signal.SIGTERM)
            assert carrying.process.wait(timeout=10) == 0, carrying.said
            assert time.monotonic() - began < 2
    assert not superlink.is_online(id_)
    assert "message" in carrying.said
    state = node.state
    assert state is not None
    assert (state.connected, state.text) == (False, "stopped")


def test_a_site_whose_agent_is_away_says_so(
    superlink: Hub, node: NodeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supernode, "PATIENCE_S", 0.5)
    id_ = superlink.admit(node)
    stopped = threading.Event()
    authority = superlink.authority.read_bytes()
    connection = Fleet(superlink.address, authority, node.private_key(), "acme", stopped)
    assert connection.activate(None) == id_
    socket = tmp_path / "agent.sock"
    with (
        superlink.superlink.open_grid() as grid,
        running(connection, lambda parts, s, cancelled: ask_agent(socket, parts, s, cancelled)),
    ):
        answer = exchange(grid, id_, PARTS)
        assert answer.has_error()
        assert "the site's agent cannot be reached" in (answer.error.reason or "")
        with agent(socket):
            assert from_records(exchange(grid, id_, PARTS).content) == PARTS
    connection.deactivate()
    assert not superlink.is_online(id_)
    connection.close()


def ends(carrying: Carrying, code: int, *said: str) -> None:
    with carrying:
        assert carrying.process.wait(timeout=30) == code, carrying.said
    for text in said:
        assert text in carrying.said
    assert "Traceback" not in carrying.said
    assert carrying.said.count("ERROR") == 1
    state = carrying.node.state
    assert state is not None
    assert not state.connected
    assert state.text in carrying.said


@pytest.mark.slow
def test_what_is_wrong_with_the_hub_is_said_in_a_line(
    superlink: Hub, node: NodeFolder, tmp_path: Path
) -> None:
    address = superlink.address
    with agent(tmp_path / "agent.sock"):
        unknown = Carrying(node, address, superlink.authority, tmp_path / "agent.sock")
        ends(unknown, fleet.NOT_ADMITTED, "not registered", "give acme.pub to the coordinator")
        (tmp_path / "another").mkdir()
        create_authority(tmp_path / "another", "another", int(time.time()))
        ca = tmp_path / "another" / "ca.crt"
        untrusted = Carrying(node, address, ca, tmp_path / "agent.sock")
        ends(untrusted, fleet.UNTRUSTED, "is not trusted")
        (node.path / "key").chmod(0o644)
        opened = Carrying(node, address, superlink.authority, tmp_path / "agent.sock")
        ends(opened, supernode.UNUSABLE, "others can read it")


def test_a_site_that_is_removed_is_told_so(
    superlink: Hub, node: NodeFolder, tmp_path: Path
) -> None:
    id_ = superlink.admit(node)
    with agent(tmp_path / "agent.sock"):
        carrying = Carrying(node, superlink.address, superlink.authority, tmp_path / "agent.sock")
        until(carrying.is_connected)
        superlink.superlink.unregister(id_)
        ends(carrying, fleet.NOT_ADMITTED, "key is not registered")


def test_a_second_supernode_on_the_folder_leaves_the_first_alone(
    superlink: Hub, node: NodeFolder, tmp_path: Path
) -> None:
    with node.held(), agent(tmp_path / "agent.sock"):
        node.say(True, "node 5")
        second = Carrying(node, superlink.address, superlink.authority, tmp_path / "agent.sock")
        with second:
            assert second.process.wait(timeout=30) == supernode.UNUSABLE
        assert "another SuperNode runs on it" in second.said
        state = node.state
        assert state is not None
        assert state.text == "node 5"


def test_no_agent_no_hub(node: NodeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernode, "PATIENCE_S", 0.1)
    authority = tmp_path / "ca.crt"
    authority.write_text("unread")
    socket = tmp_path / "agent.sock"
    assert (
        supernode._carry(node, "localhost:1", authority, socket, threading.Event())
        == supernode.NO_AGENT
    )
    state = node.state
    assert state is not None
    assert "agent.sock: no agent listens" in state.text


def test_it_ends_when_it_is_stopped_while_it_waits(node: NodeFolder, tmp_path: Path) -> None:
    authority = tmp_path / "ca.crt"
    authority.write_text("unread")
    carrying = Carrying(node, "localhost:1", authority, tmp_path / "agent.sock")
    with carrying:
        until(lambda: (node.path / ".lock").exists())
        carrying.process.send_signal(signal.SIGTERM)
        assert carrying.process.wait(timeout=10) == 0, carrying.said


def test_a_hub_that_hangs_does_not_keep_it(
    superlink: Hub, node: NodeFolder, tmp_path: Path
) -> None:
    with socket_.create_server(("127.0.0.1", 0)) as silent, agent(tmp_path / "agent.sock"):
        address = f"localhost:{silent.getsockname()[1]}"
        with Carrying(node, address, superlink.authority, tmp_path / "agent.sock") as carrying:
            connection, _ = silent.accept()
            began = time.monotonic()
            carrying.process.send_signal(signal.SIGTERM)
            assert carrying.process.wait(timeout=10) == 0, carrying.said
            assert time.monotonic() - began < supernode.STOP_S + 1
            connection.close()


def test_no_torch_is_imported(node: NodeFolder, tmp_path: Path) -> None:
    # To the first call to the hub, whose authority is none.
    (tmp_path / "ca.crt").write_text("no certificate")
    with agent(tmp_path / "agent.sock"):
        ended = subprocess.run(
            [
                *(sys.executable, "-X", "importtime", "-m", "client", "carry", str(node.path)),
                *("--superlink", "localhost:1", "--root-certificates", str(tmp_path / "ca.crt")),
                *("--socket", str(tmp_path / "agent.sock")),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode == fleet.UNTRUSTED
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "flwr" in imported
    for heavy in ("torch", "opacus", "polars", "scipy", "client.site", "privacy"):
        assert heavy not in imported
