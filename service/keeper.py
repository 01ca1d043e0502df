"""Keeps one command and all that it starts: `python -I -S keeper.py COMMAND ...`.

Started by `service.processes`, whose end of a socket is this process's standard input. Nothing of
the command outlives the keeper, and the keeper does not outlive its parent: the end of the socket
says that the parent is gone. Ends with the command's code, 128 + n where signal n ended it.

A file of few imports, run without the site packages: it must be there within milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from math import ceil, inf

GRACE_S = 3.0
"""From SIGTERM to SIGKILL, where the parent says nothing else: it is gone, or the command is."""
GIVE_UP_S = 2.0
"""What is still there so long after SIGKILL hangs in the kernel and ends once it is let go."""

_LOOK_AGAIN_S = 0.02
_CANNOT_RUN = 127
_ENDED = 128 + signal.SIGKILL
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_HANDLED = (*_STOPS, signal.SIGCHLD)

_prctl = ctypes.CDLL(None, use_errno=True).prctl
_prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


class Keeper:
    """Hears the parent, signals and the ends of children; see the module."""

    def __init__(self) -> None:
        # Neither is inherited by the command, whose standard input is empty.
        self._parent = os.dup(0)
        self._signals, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in _HANDLED:
            signal.signal(number, lambda *_: None)
        # Whatever the parent had blocked.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self._events = select.poll()
        self._events.register(self._parent, select.POLLIN)
        self._events.register(self._signals, select.POLLIN)

    def keep(self, argv: list[str]) -> int:
        """Run the command until nothing of it is left; its code."""
        try:
            # Orphans among the command's descendants become children of this process.
            _set(_PR_SET_CHILD_SUBREAPER, 1)
            command = _start(argv)
        except OSError as error:
            self._tell(f"error {error.errno}")
            return _CANNOT_RUN
        self._tell(f"pid {command}")
        code: int | None = None
        kill_at = inf
        asked: set[int] = set()
        while True:
            ended, any_left = _reap()
            code = ended.get(command, code)
            now = time.monotonic()
            if not any_left or now >= kill_at + GIVE_UP_S:
                return _ENDED if code is None else code
            if code is not None:
                kill_at = min(kill_at, now + GRACE_S)
            if kill_at < inf:
                # The command first: it may want to end its own children in good order. A process
                # that ends leaves its children to this one, so that each gets its turn.
                for pid in [command] if code is None else _children():
                    if now >= kill_at:
                        _signal(pid, signal.SIGKILL)
                    elif pid not in asked:
                        asked.add(pid)
                        _signal(pid, signal.SIGTERM)
            grace = self._wait(inf if kill_at == inf else _LOOK_AGAIN_S)
            kill_at = min(kill_at, time.monotonic() + grace)

    def _wait(self, longest_s: float) -> float:
        """Wait for an event; the grace with which the end was asked for, infinite if it was not."""
        grace = inf
        for fd, _ in self._events.poll(None if longest_s == inf else ceil(longest_s * 1000)):
            if fd == self._signals:
                if any(number in _STOPS for number in os.read(fd, 4096)):
                    grace = min(grace, GRACE_S)
                continue
            said = b""
            with suppress(OSError):
                said = os.read(fd, 4096)
            if not said:
                self._events.unregister(fd)
            grace = min(grace, *map(float, said.split())) if said else min(grace, GRACE_S)
        return grace

    def _tell(self, line: str) -> None:
        # A parent that is gone already shows at the next read.
        with suppress(OSError):
            os.write(self._parent, f"{line}\n".encode())


def processes() -> Iterator[tuple[int, str, int, int]]:
    """Number, state, parent and session of each process that can be seen."""
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        yield int(name), fields[0].decode(), int(fields[1]), int(fields[3])


def _start(argv: list[str]) -> int:
    """The command's number, once it runs. Raises OSError if it cannot be run."""
    keeper = os.getpid()
    failure, says_failure = os.pipe2(os.O_CLOEXEC)
    # In between a signal would reach the child with this process's handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    child = os.fork()
    if child == 0:
        try:
            # Whoever kills the keeper kills the command.
            _set(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == keeper:
                # A command that signals its own process group does not mean the keeper.
                os.setpgid(0, 0)
                signal.set_wakeup_fd(-1)
                for number in (*_HANDLED, signal.SIGPIPE, signal.SIGXFSZ):
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
                os.execvpe(argv[0], argv, _environment())
        except OSError as error:
            os.write(says_failure, str(error.errno).encode())
        finally:
            os._exit(_CANNOT_RUN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.close(says_failure)
    said = os.read(failure, 64)
    os.close(failure)
    if said:
        raise OSError(int(said), os.strerror(int(said)))
    return child


def _environment() -> dict[bytes, bytes]:
    """As it was given: where it names no locale, Python adds one to its own."""
    with open("/proc/self/environ", "rb") as file:
        entries = file.read().split(b"\0")
    return dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)


def _set(option: int, value: int) -> None:
    if _prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _reap() -> tuple[dict[int, int], bool]:
    """The codes of the children that ended, and whether there are others."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended, False
        if pid == 0:
            return ended, True
        code = os.waitstatus_to_exitcode(status)
        ended[pid] = code if code >= 0 else 128 - code


def _children() -> list[int]:
    me = os.getpid()
    return [pid for pid, _, parent, _ in processes() if parent == me]


def _signal(pid: int, number: int) -> None:
    # A child that has not been reaped keeps its number: nobody else is hit. It may have gone over
    # to another user.
    with suppress(OSError):
        os.kill(pid, number)


if __name__ == "__main__":
    sys.exit(Keeper().keep(sys.argv[1:]))
