"""The agent's Unix socket: a connection is one request and its answer.

Who asks imports this alone: no torch, no journeys. Linux only (the peer's user is told by it).
"""

from __future__ import annotations

import contextlib
import errno
import grp
import json
import os
import pwd
import select
import socket
import stat
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from client.frames import FrameError, Limits, read_frame, to_frame
from conf.schema import SettingError
from conf.site import AgentConfig
from protocol.exchange import Parts

LONGEST_FRAME_S = 30.0
"""Longest time that a frame may take on its way, once a connection is made."""
MOST_CONNECTIONS = 4
"""Connections of one user at once."""
LARGEST_TEXT = 8_000_000
"""Most bytes of a frame's text."""
SLACK = 1_000_000
"""Bytes that a model may take beyond its parameters: their names and shapes."""
LONGEST_ERROR = 300
"""Characters of an error that is answered."""

_LONGEST_PATH = 107
_TICK_S = 0.1
_CHUNK = 1 << 20


class AgentError(RuntimeError):
    """The agent does not answer what was asked. The message may be told to the coordinator."""


class AgentUnreachable(AgentError):  # noqa: N818  (a word, as in "the agent is unreachable")
    """Nobody listens on the socket, or it may not be reached."""


def socket_path(site: Path, config: AgentConfig) -> Path:
    """Where the agent of the site in folder `site` listens."""
    return site / (config.socket or "agent.sock")


# ---------------------------------------------------------------------------- who asks


def _never() -> bool:
    return False


def ask_agent(
    socket: Path, parts: Parts, timeout_s: float, cancelled: Callable[[], bool] = _never
) -> Parts:
    """The agent's answer to a request.

    Returns or raises within `timeout_s`, and soon after `cancelled` says so; the agent then stops
    what it was doing.

    Raises:
        AgentError: There is no answer. Nothing in the message comes from a journey.
        AgentUnreachable: Nobody listens.
    """
    kind = "publish" if "publish" in parts.texts else "ask"
    # An answer is a model of the same shapes, or none.
    limits = Limits(LARGEST_TEXT, len(parts.weights or b"") + SLACK)
    return _ask(socket, kind, parts, limits, timeout_s, cancelled)


def ask_status(socket: Path, timeout_s: float = 5.0) -> dict[str, Any]:
    """How the agent is (`client.agent.Agent.status`), for its own user and root. As `ask_agent`."""
    answer = _ask(socket, "status", Parts({}, None), Limits(LARGEST_TEXT, 0), timeout_s, _never)
    status = json.loads(answer.texts["status"])
    assert isinstance(status, dict)
    return status


def _ask(
    path: Path,
    kind: str,
    parts: Parts,
    limits: Limits,
    timeout_s: float,
    cancelled: Callable[[], bool],
) -> Parts:
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
        try:
            end.settimeout(timeout_s)
            end.connect(os.fspath(path))
        except OSError as error:
            raise AgentUnreachable(
                f"the site's agent cannot be reached: {error.strerror or error}"
            ) from None
        line = _Line(end, deadline, cancelled)
        try:
            # Who is turned away is told so before all is sent.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                line.send(to_frame(kind, parts))
            answered, answer = read_frame(
                line.receive, {"answer": limits, "error": Limits(SLACK, 0)}
            )
        except TimeoutError:
            raise AgentError(f"no answer from the site's agent in {timeout_s:.0f} s") from None
        except _Withdrawn:
            raise AgentError("the request was withdrawn") from None
        except FrameError as error:
            raise AgentError(f"between SuperNode and agent: {error}") from None
        except OSError:
            raise AgentError("the site's agent ended before it had answered") from None
    if answered == "error":
        raise AgentError(answer.texts.get("error", "the site failed")[:LONGEST_ERROR])
    return answer


class _Withdrawn(Exception):  # noqa: N818  (asked for, not a fault)
    """Who wanted to read or write does not want to any more."""


class _Line:
    """Reads and writes on a socket until a deadline."""

    def __init__(
        self, end: socket.socket, deadline: float, cancelled: Callable[[], bool] = _never
    ) -> None:
        end.setblocking(False)
        self._end = end
        self._deadline = deadline
        self._cancelled = cancelled
        self.received = 0

    def send(self, data: bytes) -> None:
        """All of `data`. Raises `OSError` (`TimeoutError` among them) and `_Withdrawn`."""
        rest = memoryview(data)
        while rest:
            self._wait(select.POLLOUT)
            with contextlib.suppress(BlockingIOError):
                rest = rest[self._end.send(rest[:_CHUNK]) :]

    def receive(self, length: int) -> bytes:
        """So many bytes; memory grows with what came. Raises as `send`."""
        data = bytearray()
        while len(data) < length:
            self._wait(select.POLLIN)
            with contextlib.suppress(BlockingIOError):
                part = self._end.recv(min(_CHUNK, length - len(data)))
                if not part:
                    raise ConnectionResetError(errno.ECONNRESET, "ended within a frame")
                data += part
                self.received += len(part)
        return bytes(data)

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._end, event)
        while not self._cancelled():
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if poll.poll(1000 * min(left, _TICK_S)):
                return
        raise _Withdrawn


# ---------------------------------------------------------------------------- who answers


class Listener:
    """The agent's end: lets in whom it may, each with one request at a time limit."""

    def __init__(self, path: Path, config: AgentConfig, turned_away: Callable[[str], None]) -> None:
        """Listen on `path`; `turned_away` is told whom it does not let in, and why.

        Raises:
            SettingError: A user or group that there is none of, a path that cannot be used, or
                another agent that listens there.
        """
        self.path = path
        self._own = {os.geteuid(), 0}
        self._allowed = self._own | {_user(name) for name in config.users}
        self._turned_away = turned_away
        self._open: Counter[int] = Counter()
        self._mutex = threading.Lock()
        self._end = _bound(path, _group(config.group) if config.group else None)
        self._inode = path.stat().st_ino

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Listen no more. Connections that are open stay so."""
        self._end.close()
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    def accept(self, timeout_s: float) -> Connection | None:
        """The next connection of somebody who may ask; None if none came in time."""
        self._end.settimeout(timeout_s)
        try:
            end, _ = self._end.accept()
        except TimeoutError:
            return None
        except OSError:
            # No descriptor is free, or the peer has gone again.
            time.sleep(_TICK_S)
            return None
        user = _peer(end)
        if user not in self._allowed:
            reason = f"user {user} may not ask this site's agent; agent.users names who may"
            self._turn_away(end, reason)
            return None
        with self._mutex:
            if self._open[user] < MOST_CONNECTIONS:
                self._open[user] += 1
                return Connection(end, user in self._own, lambda: self._closed(user))
        many = f"user {user} has {MOST_CONNECTIONS} connections open, and no more are taken at once"
        self._turn_away(end, many)
        return None

    def _turn_away(self, end: socket.socket, reason: str) -> None:
        self._turned_away(reason)
        with end, contextlib.suppress(OSError):
            end.setblocking(False)
            end.send(to_frame("error", Parts({"error": reason}, None)))

    def _closed(self, user: int) -> None:
        with self._mutex:
            self._open[user] -= 1


class Connection:
    """A request that came, to be answered once."""

    def __init__(self, end: socket.socket, of_site: bool, closed: Callable[[], None]) -> None:
        self.of_site = of_site
        """Whether the site's own user, or root, asks."""
        self._end = end
        self._closed = closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()
        self._closed()

    def receive(
        self, limits: Mapping[str, Limits], cancelled: Callable[[], bool] = _never
    ) -> tuple[str, Parts] | None:
        """Kind and content of what is asked; None of a peer that has gone without a word.

        Raises:
            FrameError: No frame came, too long a one, or too slowly.
        """
        line = _Line(self._end, time.monotonic() + LONGEST_FRAME_S, cancelled)
        try:
            return read_frame(line.receive, limits)
        except _Withdrawn:
            return None
        except TimeoutError:
            raise FrameError(f"no whole frame in {LONGEST_FRAME_S:g} s") from None
        except OSError:
            if not line.received:
                return None
            raise FrameError("a frame that ends early") from None

    def answer(self, parts: Parts) -> None:
        """Send the answer. Raises `OSError` where nobody takes it in time."""
        self._send("answer", parts)

    def fail(self, reason: str) -> None:
        """Say that there is no answer, and why, to whoever still listens."""
        with contextlib.suppress(OSError):
            self._send("error", Parts({"error": reason[:LONGEST_ERROR]}, None))

    def is_gone(self) -> bool:
        """Whether the peer has hung up, or sends more than its one request."""
        try:
            self._end.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def _send(self, kind: str, parts: Parts) -> None:
        _Line(self._end, time.monotonic() + LONGEST_FRAME_S).send(to_frame(kind, parts))


def _peer(end: socket.socket) -> int:
    """The user at the other end, as the system knows it."""
    credentials = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _user(name: str) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError):
        raise SettingError(f"agent.users={name}: no such user on this machine") from None


def _group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        raise SettingError(f"agent.group={name}: no such group on this machine") from None


def _bound(path: Path, group: int | None) -> socket.socket:
    """A socket that listens on `path`, which the owner alone, or the group too, can reach."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise SettingError(
            f"agent.socket={path}: longer than {_LONGEST_PATH} bytes, which is the longest path of "
            "a socket; name a shorter one"
        )
    # Under another name, no longer than its own, until it listens: who sees it can connect.
    unready = path.with_name("~" + path.name[1:])
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        for one in (unready, path):
            _remove_dead(one)
        # From this the new file takes its mode: it is never open to more.
        os.fchmod(end.fileno(), 0o600)
        end.bind(os.fspath(unready))
        if group is not None:
            os.chown(unready, -1, group)
            os.chmod(unready, 0o660)
        end.listen(16)
        unready.rename(path)
    except OSError as error:
        end.close()
        raise SettingError(f"agent.socket={path}: cannot be made: {error.strerror}") from None
    except BaseException:
        end.close()
        raise
    return end


def _remove_dead(path: Path) -> None:
    """Remove the socket that an agent left which was killed. Refuses one that is listened on."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise SettingError(f"agent.socket={path}: something else lies there")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise SettingError(f"agent.socket={path}: another agent listens there; stop it first")
