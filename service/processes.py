"""Child processes that nothing outlives, restarted when they die."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from service import keeper

FIRST_PAUSE_S = 0.5
"""Before a command that died is started again; doubled each time."""
LONGEST_PAUSE_S = 10.0
"""The pause grows no further."""
HEALTHY_S = 60.0
"""A command that ran so long begins with the first pause again."""

_START_S = 30.0
_STUCK_S = keeper.GIVE_UP_S + 1.0


class ProcessError(RuntimeError):
    """A command cannot be started or ended. The message names it and says why."""


@dataclass(frozen=True)
class Command:
    """What to run."""

    name: str
    """For people."""
    argv: tuple[str, ...]
    """The program, searched for in the environment's PATH, and its arguments."""
    environment: Mapping[str, str]
    """The whole of it; nothing is inherited."""
    log: Path | None = None
    """Gets what the command writes, after what is there. None: the command writes where we do."""
    folder: Path | None = None
    """Where it runs. None: where we do."""


class Process:
    """A command that runs, and its keeper (`service.keeper`): a process between this and it.

    Whoever is killed by SIGKILL, nothing of the command goes on:
    - this process: the keeper ends the command and all its descendants;
    - the command: the keeper ends its descendants;
    - the keeper: the kernel kills the command at once, `poll` and `stop` the rest of its session.

    Not covered: descendants, once this process and the keeper were killed at the same time, or
    those with a session of their own (daemons), once the keeper was; processes that went over to
    another user, unless this one is root's; a child that this process forks without exec may hold
    the keeper's socket open and so stand for it. Linux only.
    """

    def __init__(self, command: Command) -> None:
        """Start it.

        Raises:
            ProcessError: It cannot be run, or its log cannot be written.
        """
        self.name = command.name
        self._code: int | None = None
        self._keeper, self._channel = _start_keeper(command)
        try:
            self.pid = _command_pid(self._channel, command)
        except BaseException:
            self._kill_keeper()
            os.waitid(os.P_PID, self._keeper.pid, os.WEXITED | os.WNOWAIT)
            self.poll()
            raise

    def poll(self) -> int | None:
        """The code with which it ended, 128 + n after signal n; None while anything of it runs."""
        if self._code is None and _is_over(self._keeper.pid):
            # The keeper is not reaped yet, so that no other session has its number.
            _end_session(self._keeper.pid)
            self._channel.close()
            code = self._keeper.wait()
            self._code = code if code >= 0 else 128 - code
        return self._code

    def stop(self, grace_s: float = 10.0) -> None:
        """SIGTERM, and SIGKILL for what is left of it after `grace_s`; gone when this returns.

        Raises:
            ProcessError: It hangs in the kernel.
        """
        if self.poll() is not None:
            return
        with suppress(OSError):
            self._channel.sendall(f"{grace_s}\n".encode())
        # The keeper says nothing more: what comes is its end.
        if not _readable(self._channel.fileno(), grace_s + _STUCK_S):
            self._kill_keeper()
        deadline = time.monotonic() + _STUCK_S
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise ProcessError(f"{self.name}: process {self.pid} cannot be killed")
            time.sleep(0.001)

    def _kill_keeper(self) -> None:
        # Not by Popen, which would reap one that has just ended.
        os.kill(self._keeper.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


@dataclass
class _Kept:
    command: Command
    process: Process | None = None
    started: float = 0.0
    pause: float = field(default_factory=lambda: FIRST_PAUSE_S)
    due: float = 0.0
    restarts: int = 0


class Supervisor:
    """Runs commands side by side, and again those that end. All is stopped at its exit."""

    def __init__(self, commands: Sequence[Command], tell: Callable[[str], None]) -> None:
        """`tell` hears of each end, in a line for people."""
        self._kept = {command.name: _Kept(command) for command in commands}
        if len(self._kept) < len(commands):
            raise ValueError("two commands have one name")
        self._tell = tell

    def __enter__(self) -> Self:
        """Start all, in order.

        Raises:
            ProcessError: One of them cannot be run; those before it are stopped.
        """
        try:
            for kept in self._kept.values():
                _start(kept)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop all, the last one first."""
        self._stop()

    def check(self) -> None:
        """Start again what ended, if its pause is over. To be called again and again."""
        for kept in self._kept.values():
            now = time.monotonic()
            if kept.process is not None:
                code = kept.process.poll()
                if code is not None:
                    kept.process = None
                    if now - kept.started >= HEALTHY_S:
                        kept.pause = FIRST_PAUSE_S
                    self._again(kept, f"{kept.command.name} ended with {code}")
            elif now >= kept.due:
                kept.restarts += 1
                try:
                    _start(kept)
                except ProcessError as error:
                    self._again(kept, str(error))

    @property
    def pids(self) -> dict[str, int]:
        """Of the commands that run, by name; without those that wait for their next start."""
        return {
            name: process.pid
            for name, kept in self._kept.items()
            if (process := kept.process) is not None
        }

    @property
    def restarts(self) -> dict[str, int]:
        """How often each was started again, by name."""
        return {name: kept.restarts for name, kept in self._kept.items()}

    def _again(self, kept: _Kept, why: str) -> None:
        self._tell(f"{why}; started again in {kept.pause:g} s")
        kept.due = time.monotonic() + kept.pause
        kept.pause = min(2 * kept.pause, LONGEST_PAUSE_S)

    def _stop(self) -> None:
        # One that cannot be stopped does not keep the others.
        with ExitStack() as stack:
            for kept in self._kept.values():
                if kept.process is not None:
                    stack.callback(kept.process.stop)
                    kept.process = None


class Stopped:
    """Set by a signal. Like a `threading.Event`, whose lock a signal handler may not take."""

    def __init__(self) -> None:
        self._set = False
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def is_set(self) -> bool:
        """Whether the process is to end."""
        return self._set

    def wait(self, timeout_s: float) -> bool:
        """Wait, at most so long, until the process is to end; whether it is."""
        return self._set or _readable(self._read, timeout_s)

    def set(self) -> None:
        """The process is to end."""
        if not self._set:
            self._set = True
            os.write(self._write, b".")

    def _close(self) -> None:
        self._set = True
        os.close(self._read)
        os.close(self._write)


@contextmanager
def until_stopped() -> Iterator[Stopped]:
    """What SIGTERM and SIGINT set, instead of ending the process. For the main thread only."""
    stopped = Stopped()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stopped._close()


def _start(kept: _Kept) -> None:
    kept.process = Process(kept.command)
    kept.started = time.monotonic()


def _start_keeper(command: Command) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The keeper, and this process's end of the socket between the two."""
    ours, theirs = socket.socketpair()
    with ExitStack() as stack:
        stack.enter_context(theirs)
        log = None
        if command.log is not None:
            try:
                log = stack.enter_context(command.log.open("ab"))
            except OSError as error:
                ours.close()
                raise ProcessError(
                    f"{command.name}: {command.log}: cannot be written: {error.strerror}"
                ) from error
        try:
            started = subprocess.Popen(
                [sys.executable, "-I", "-S", keeper.__file__, *command.argv],
                env=dict(command.environment),
                cwd=command.folder,
                stdin=theirs.fileno(),
                stdout=log,
                stderr=log,
                # Ctrl-C on the terminal is for this process, which then stops its own in order.
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            ours.close()
            raise ProcessError(f"{command.name}: cannot be started: {error}") from error
    return started, ours


def _command_pid(channel: socket.socket, command: Command) -> int:
    """What the keeper says first."""
    said = b""
    if _readable(channel.fileno(), _START_S):
        with suppress(ConnectionError):
            said = channel.recv(64)
    what, _, number = said.decode().partition(" ")
    if what == "pid":
        return int(number)
    reason = os.strerror(int(number)) if what == "error" else "its keeper did not start"
    raise ProcessError(f"{command.name}: {command.argv[0]} cannot be run: {reason}")


def _readable(fd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _is_over(pid: int) -> bool:
    """Whether a child ended; it is not reaped."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _end_session(session: int) -> None:
    """Kill what a killed keeper left; one that ended by itself left nothing."""
    deadline = time.monotonic() + keeper.GIVE_UP_S
    while time.monotonic() < deadline:
        left = [
            pid for pid, state, _, its in keeper.processes() if its == session and state not in "ZX"
        ]
        if not left:
            return
        for pid in left:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
