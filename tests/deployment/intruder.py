"""What hostile code tries at a site, as a process of its own under whatever user.

Told what to try as JSON on its standard input, says what came of it as JSON. Needs nothing but
Python: who breaks in brings their own tools.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

LONGEST_S = 60.0
_PTRACE_ATTACH = 16


def files(paths: list[str]) -> dict[str, dict[str, str]]:
    """Read, change, move and remove each path, and make others beside it."""
    return {path: _of_path(path) for path in paths}


def _of_path(path: str) -> dict[str, str]:
    return {
        "read": _outcome(lambda: _read(path)),
        "write": _outcome(lambda: open(path, "ab").close()),
        "mode": _outcome(lambda: os.chmod(path, 0o777)),
        "link": _outcome(lambda: os.link(path, f"{path}.linked")),
        "beside": _outcome(lambda: open(f"{path}.new", "xb").close()),
        "move": _outcome(lambda: os.rename(path, f"{path}.moved")),
        "remove": _outcome(lambda: os.unlink(path)),
    }


def process(pid: int) -> dict[str, str]:
    """Look into another process, and end it."""
    libc = ctypes.CDLL(None, use_errno=True)

    def attach() -> None:
        if libc.ptrace(_PTRACE_ATTACH, pid, 0, 0):
            raise OSError(ctypes.get_errno(), "")

    return {
        "memory": _outcome(lambda: _read(f"/proc/{pid}/mem")),
        "environment": _outcome(lambda: _read(f"/proc/{pid}/environ")),
        "folder": _outcome(lambda: os.listdir(f"/proc/{pid}/cwd/")),
        "descriptors": _outcome(lambda: os.listdir(f"/proc/{pid}/fd")),
        "attach": _outcome(attach),
        "stop": _outcome(lambda: os.kill(pid, signal.SIGSTOP)),
        "kill": _outcome(lambda: os.kill(pid, signal.SIGKILL)),
    }


def send(
    path: str, data: str, more: int = 0, pause_s: float = 0.0, shut: bool = False
) -> dict[str, Any]:
    """Send `data` (base64) and `more` bytes after it; what is answered, and how much was taken.

    With `pause_s`, a byte at a time. With `shut`, it is said that nothing more comes.
    """
    began, sent, answer = time.monotonic(), 0, b""
    content = base64.b64decode(data)
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(LONGEST_S)
        try:
            end.connect(path)
        except OSError as error:
            return {"connect": type(error).__name__}
        try:
            if pause_s:
                for byte in content:
                    end.sendall(bytes([byte]))
                    sent += 1
                    end.settimeout(pause_s)
                    try:
                        answer = end.recv(1 << 20)
                        break
                    except TimeoutError:
                        pass
                    end.settimeout(LONGEST_S)
            else:
                end.sendall(content)
                sent = len(content)
                filler = bytes(1 << 16)
                while sent < len(content) + more:
                    sent += end.send(filler)
            if shut:
                end.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # Hung up on; the answer may lie there all the same.
        try:
            end.settimeout(LONGEST_S)
            while part := end.recv(1 << 20):
                answer += part
        except OSError:
            pass
    seconds = time.monotonic() - began
    return {"answer": base64.b64encode(answer).decode(), "sent": sent, "seconds": seconds}


def many(path: str, number: int) -> list[str]:
    """Open so many connections and hold them; what each is told (base64), if anything."""
    ends = []
    for _ in range(number):
        ends.append(socket.socket(socket.AF_UNIX))
        ends[-1].settimeout(LONGEST_S)
        ends[-1].connect(path)
    said = []
    time.sleep(0.5)
    for end in ends:
        end.settimeout(0.01)
        try:
            said.append(base64.b64encode(end.recv(1 << 20)).decode())
        except TimeoutError:
            said.append("")
    for end in ends:
        end.close()
    return said


def flood(path: str, data: str, number: int) -> int:
    """Send the same, again and again; how often there was an answer."""
    answered = 0
    for _ in range(number):
        with socket.socket(socket.AF_UNIX) as end:
            end.settimeout(LONGEST_S)
            with contextlib.suppress(OSError):
                end.connect(path)
                end.sendall(base64.b64decode(data))
            with contextlib.suppress(OSError):
                answered += bool(end.recv(1 << 20))
    return answered


def _read(path: str) -> None:
    if os.path.isdir(path):
        os.listdir(path)
    else:
        with open(path, "rb") as file:
            file.read(1)


def _outcome(what: Callable[[], object]) -> str:
    """`done`, or the kind of error."""
    try:
        what()
    except OSError as error:
        return type(error).__name__
    return "done"


if __name__ == "__main__":
    told = json.load(sys.stdin)
    attack = {"files": files, "process": process, "send": send, "many": many, "flood": flood}
    json.dump(attack[told.pop("attack")](**told), sys.stdout)
