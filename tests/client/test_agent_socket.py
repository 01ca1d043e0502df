from __future__ import annotations

import contextlib
import grp
import os
import pwd
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client import agent_socket
from client.agent_socket import (
    AgentError,
    AgentUnreachable,
    Connection,
    Listener,
    ask_agent,
    ask_status,
    socket_path,
)
from client.frames import FrameError, Limits, to_frame
from conf.schema import SettingError
from conf.site import AgentConfig
from protocol.exchange import Parts

LIMITS = {
    "ask": Limits(1_000_000, 5_000_000),
    "publish": Limits(1_000, 1_000),
    "status": Limits(100, 0),
}
ASKED = Parts({"train": "{}"}, b"a model")
ROOT = Path(__file__).parents[2]
NOBODY = pwd.getpwnam("nobody")
NOGROUP = grp.getgrgid(NOBODY.pw_gid).gr_name


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for a socket, which everybody can enter."""
    with tempfile.TemporaryDirectory(prefix="agent-") as path:
        os.chmod(path, 0o755)
        yield Path(path)


@contextlib.contextmanager
def serving(
    path: Path, answer: Callable[[Connection], None], config: AgentConfig | None = None
) -> Iterator[list[str]]:
    """Answers each connection in a thread of its own; gives whom it turned away."""
    turned_away: list[str] = []
    ended = threading.Event()
    threads: list[threading.Thread] = []

    def attend(connection: Connection) -> None:
        with connection:
            answer(connection)

    def serve() -> None:
        while not ended.is_set():
            if (connection := listener.accept(0.02)) is not None:
                threads.append(threading.Thread(target=attend, args=(connection,)))
                threads[-1].start()

    with Listener(path, config or AgentConfig(), turned_away.append) as listener:
        server = threading.Thread(target=serve)
        server.start()
        try:
            yield turned_away
        finally:
            ended.set()
            server.join()
            for thread in threads:
                thread.join()


def echo(connection: Connection) -> None:
    received = connection.receive(LIMITS)
    if received is not None:
        kind, parts = received
        connection.answer(Parts({**parts.texts, "kind": kind}, parts.weights))


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---------------------------------------------------------------------------- asking


def test_a_request_and_its_answer(folder: Path) -> None:
    large = Parts({"train": "ä" * 100_000}, os.urandom(4_000_000))
    with serving(folder / "s", echo):
        assert ask_agent(folder / "s", ASKED, 10).texts == {"train": "{}", "kind": "ask"}
        answer = ask_agent(folder / "s", large, 10)
    assert answer.texts["train"] == large.texts["train"]
    assert answer.weights == large.weights


def test_a_publication_is_a_kind_of_its_own(folder: Path) -> None:
    with serving(folder / "s", echo):
        answer = ask_agent(folder / "s", Parts({"publish": "{}"}, None), 10)
    assert answer == Parts({"publish": "{}", "kind": "publish"}, None)


def test_an_error_is_told_shortened(folder: Path) -> None:
    with (
        serving(folder / "s", lambda c: c.fail("no " * 1000)),
        pytest.raises(AgentError, match=r"^no no ") as error,
    ):
        ask_agent(folder / "s", ASKED, 10)
    assert len(str(error.value)) == 300


def test_nobody_listens(folder: Path) -> None:
    with pytest.raises(AgentUnreachable, match="cannot be reached: No such file") as error:
        ask_agent(folder / "s", ASKED, 10)
    assert str(folder) not in str(error.value)
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(folder / "s"))
    dead.close()
    with pytest.raises(AgentUnreachable, match="Connection refused"):
        ask_status(folder / "s")
    with pytest.raises(AgentUnreachable, match="path too long"):
        ask_status(folder / ("s" * 108))


def test_an_agent_that_does_not_answer_in_time(folder: Path) -> None:
    ended = threading.Event()
    with serving(folder / "s", lambda _: (ended.wait(10), None)[1]):
        began = time.monotonic()
        with pytest.raises(AgentError, match="no answer from the site's agent in 0 s"):
            ask_agent(folder / "s", ASKED, 0.3)
        assert time.monotonic() - began < 2
        ended.set()


def test_who_withdraws_a_request_is_seen_to_have_gone(folder: Path) -> None:
    gone, cancelled = threading.Event(), threading.Event()

    def work(connection: Connection) -> None:
        connection.receive(LIMITS)
        assert not connection.is_gone()
        cancelled.set()
        wait_until(connection.is_gone)
        gone.set()

    with serving(folder / "s", work):
        with pytest.raises(AgentError, match="withdrawn"):
            ask_agent(folder / "s", ASKED, 10, cancelled.is_set)
        assert gone.wait(10)


def test_who_sends_more_than_a_request_counts_as_gone(folder: Path) -> None:
    gone = threading.Event()

    def work(connection: Connection) -> None:
        connection.receive(LIMITS)
        wait_until(connection.is_gone)
        gone.set()

    with serving(folder / "s", work), socket.socket(socket.AF_UNIX) as end:
        end.connect(str(folder / "s"))
        end.sendall(to_frame("ask", ASKED) + b"!")
        assert gone.wait(10)


@pytest.mark.parametrize(
    "sent", [b"", to_frame("answer", ASKED)[:-1], to_frame("ask", ASKED), b"HTTP/1.1 200 OK" * 9]
)
def test_an_agent_that_ends_or_talks_nonsense(folder: Path, sent: bytes) -> None:
    def break_off(connection: Connection) -> None:
        connection.receive(LIMITS)
        connection._end.sendall(sent)

    with serving(folder / "s", break_off), pytest.raises(AgentError) as error:
        ask_agent(folder / "s", ASKED, 10)
    assert "ended before it had answered" in str(error.value) or "frame" in str(error.value)


def test_who_asks_needs_neither_torch_nor_journeys() -> None:
    code = (
        "import sys, client.agent_socket\n"
        "heavy = {'torch', 'opacus', 'polars', 'flwr', 'scipy', 'dp_accounting'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "[]\n"


# ---------------------------------------------------------------------------- what is received


def receive(folder: Path, sent: bytes, closing: bool = True) -> BaseException | object:
    """What comes of it at the agent when `sent` is sent."""
    outcome: list[object] = []

    def take(connection: Connection) -> None:
        try:
            outcome.append(connection.receive(LIMITS))
        except FrameError as error:
            outcome.append(error)
            connection.fail(str(error))

    with serving(folder / "s", take), socket.socket(socket.AF_UNIX) as end:
        end.connect(str(folder / "s"))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            end.sendall(sent)
        if closing:
            end.shutdown(socket.SHUT_WR)
        wait_until(lambda: bool(outcome))
    return outcome[0]


def test_who_leaves_without_a_word_is_nothing_to_tell_of(folder: Path) -> None:
    assert receive(folder, b"") is None


@pytest.mark.parametrize("length", [1, 17, 18, 20])
def test_a_frame_that_ends_early(folder: Path, length: int) -> None:
    error = receive(folder, to_frame("ask", ASKED)[:length])
    assert isinstance(error, FrameError)
    assert str(error) == "a frame that ends early"


def test_a_frame_too_large_is_answered_before_it_is_read(folder: Path) -> None:
    def take(connection: Connection) -> None:
        try:
            connection.receive({"ask": Limits(100, 1_000)})
        except FrameError as error:
            connection.fail(str(error))

    with (
        serving(folder / "s", take),
        pytest.raises(AgentError, match="4000000 bytes of weights, at most 1000 are read"),
    ):
        ask_agent(folder / "s", Parts({"train": "{}"}, bytes(4_000_000)), 10)


def test_a_slow_sender_has_a_time_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_socket, "LONGEST_FRAME_S", 0.2)
    error = receive(folder, to_frame("ask", ASKED)[:20], closing=False)
    assert isinstance(error, FrameError)
    assert str(error) == "no whole frame in 0.2 s"


def test_a_peer_that_does_not_read_has_a_time_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_socket, "LONGEST_FRAME_S", 0.2)
    outcome: list[type[OSError]] = []

    def answer(connection: Connection) -> None:
        connection.receive(LIMITS)
        try:
            connection.answer(Parts({}, bytes(4_000_000)))
        except OSError as error:
            outcome.append(type(error))

    with serving(folder / "s", answer), socket.socket(socket.AF_UNIX) as end:
        end.connect(str(folder / "s"))
        end.sendall(to_frame("ask", ASKED))
        wait_until(lambda: bool(outcome))
    assert outcome == [TimeoutError]


def test_waiting_for_a_frame_ends_when_the_agent_does(folder: Path) -> None:
    outcome: list[object] = []
    with (
        serving(folder / "s", lambda c: outcome.append(c.receive(LIMITS, lambda: True))),
        socket.socket(socket.AF_UNIX) as end,
    ):
        end.connect(str(folder / "s"))
        wait_until(lambda: bool(outcome))
    assert outcome == [None]


# ---------------------------------------------------------------------------- who is let in


def test_a_user_who_may_not_ask_is_turned_away_before_a_byte_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreached(_: Connection) -> None:
        raise AssertionError("somebody was let in")

    monkeypatch.setattr(agent_socket, "_peer", lambda _: 54321)
    with serving(folder / "s", unreached) as turned_away:
        with pytest.raises(AgentError, match="user 54321 may not ask this site's agent"):
            ask_agent(folder / "s", Parts({"train": "{}"}, bytes(3_000_000)), 10)
        with pytest.raises(AgentError, match=r"agent\.users names who may"):
            ask_status(folder / "s")
    assert len(turned_away) == 2


@pytest.mark.parametrize(
    ("user", "of_site"), [(0, True), (os.geteuid(), True), (NOBODY.pw_uid, False)]
)
def test_root_the_own_user_and_those_named_are_let_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch, user: int, of_site: bool
) -> None:
    monkeypatch.setattr(agent_socket, "_peer", lambda _: user)
    monkeypatch.setattr("os.chown", lambda *_: None)
    seen: list[bool] = []

    def take(connection: Connection) -> None:
        seen.append(connection.of_site)
        echo(connection)

    with serving(folder / "s", take, AgentConfig(users=["nobody"], group=NOGROUP)):
        ask_agent(folder / "s", ASKED, 10)
    assert seen == [of_site]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("named", [False, True])
def test_another_user_of_this_machine(folder: Path, named: bool) -> None:
    code = (
        "import contextlib, os, socket, sys\n"
        "user, group = map(int, sys.argv[3:])\n"
        "os.setgroups([]), os.setgid(group), os.setuid(user)\n"
        "end = socket.socket(socket.AF_UNIX)\n"
        "end.connect(sys.argv[1])\n"
        "with contextlib.suppress(BrokenPipeError):\n"
        "    end.sendall(bytes.fromhex(sys.argv[2]))\n"
        "print(end.recv(1000))\n"
    )
    config = AgentConfig(users=["nobody"] if named else ["root"], group=NOGROUP)
    with serving(folder / "s", echo, config) as turned_away:
        words = [str(folder / "s"), to_frame("ask", ASKED).hex()]
        words += [str(NOBODY.pw_uid), str(NOBODY.pw_gid)]
        asked = subprocess.run(
            [sys.executable, "-I", "-c", code, *words], capture_output=True, text=True
        )
    assert asked.returncode == 0, asked.stderr
    assert ("may not ask" in asked.stdout) == (not named)
    assert len(turned_away) == (not named)


def test_one_user_has_a_handful_of_connections_at_once(folder: Path) -> None:
    hold = threading.Event()

    def work(connection: Connection) -> None:
        connection.receive(LIMITS)
        hold.wait(10)
        with contextlib.suppress(BrokenPipeError):
            connection.answer(ASKED)

    with serving(folder / "s", work) as turned_away, contextlib.ExitStack() as stack:
        for _ in range(4):
            end = stack.enter_context(socket.socket(socket.AF_UNIX))
            end.connect(str(folder / "s"))
            end.sendall(to_frame("ask", ASKED))
        with pytest.raises(AgentError, match="has 4 connections open"):
            ask_agent(folder / "s", ASKED, 10)
        assert len(turned_away) == 1
        hold.set()
        stack.close()
        # Each that ends makes room for another.
        wait_until(lambda: _is_answered(folder / "s"))


def _is_answered(path: Path) -> bool:
    try:
        return ask_agent(path, ASKED, 10) == ASKED
    except AgentError:
        return False


# ---------------------------------------------------------------------------- the socket's file


def test_the_socket_is_for_the_owner_alone_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        with Listener(folder / "s", AgentConfig(), print):
            mode = (folder / "s").stat().st_mode
    finally:
        os.umask(before)
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    assert not (folder / "s").exists()


def test_the_socket_is_never_open_to_more_while_it_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    chown = os.chown

    def looked_at(path: Path, user: int, group: int) -> None:
        modes.append(stat.S_IMODE(path.stat().st_mode))
        chown(path, user, group)

    monkeypatch.setattr("os.chown", looked_at)
    group = os.getegid()
    monkeypatch.setattr(agent_socket, "_group", lambda _: group)
    before = os.umask(0)
    try:
        with Listener(folder / "s", AgentConfig(users=["nobody"], group="g"), print):
            found = (folder / "s").stat()
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, group)


def test_the_socket_of_a_dead_agent_is_replaced_and_that_of_a_living_one_is_not(
    folder: Path,
) -> None:
    # One was killed while it listened, one before it did.
    for name in ("an agent", "~n agent"):
        dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        dead.bind(str(folder / name))
        dead.close()
    with serving(folder / "an agent", echo):
        with pytest.raises(SettingError, match="another agent listens there; stop it first"):
            Listener(folder / "an agent", AgentConfig(), print)
        assert ask_agent(folder / "an agent", ASKED, 10).texts["train"] == "{}"
    assert list(folder.iterdir()) == []


def test_a_socket_that_another_agent_made_since_is_left(folder: Path) -> None:
    with Listener(folder / "s", AgentConfig(), print):
        (folder / "s").rename(folder / "t")
        other = Listener(folder / "s", AgentConfig(), print)
    assert (folder / "s").exists()
    other.close()
    assert not (folder / "s").exists()
    (folder / "t").unlink()


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("s" * 108, AgentConfig(), "longer than 107 bytes"),
        ("ü" * 50, AgentConfig(), "longer than 107 bytes"),
        ("nowhere/s", AgentConfig(), "cannot be made: No such file"),
        ("file", AgentConfig(), "something else lies there"),
        ("s", AgentConfig(users=["nobody", "no such user"], group=NOGROUP), "no such user on"),
        ("s", AgentConfig(users=["nobody"], group="no such group"), "no such group on"),
    ],
)
def test_a_socket_that_cannot_be_made(
    folder: Path, name: str, config: AgentConfig, message: str
) -> None:
    (folder / "file").write_text("kept")
    with pytest.raises(SettingError, match=rf"^agent\.\w+=.*{message}"):
        Listener(folder / name, config, print)
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_where_an_agent_listens() -> None:
    assert socket_path(Path("acme"), AgentConfig()) == Path("acme/agent.sock")
    assert socket_path(Path("acme"), AgentConfig(socket="x/s")) == Path("acme/x/s")
    assert socket_path(Path("acme"), AgentConfig(socket="/run/s")) == Path("/run/s")
