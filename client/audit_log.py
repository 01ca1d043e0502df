"""What was done with a site's visits: one line an event, each with the hash of all before it.

Holds no id, no pseudonym and no visit. What is released is in the ledger (`privacy.ledger`), which
has its own chain; the two are read together by `python -m client audit`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_NOTHING = "0" * 64


class AuditLogError(RuntimeError):
    """The log cannot be written, or is not what was written. Names the first bad line."""


@dataclass(frozen=True)
class Event:
    """One line of the log."""

    number: int
    """From 1."""
    time: str
    """ISO 8601, UTC."""
    kind: str
    """`ingest`, `erasure begun`, `erasure`, ..."""
    content: dict[str, Any]
    hash: str
    """SHA-256 over the hash before and all of this line."""


class AuditLog:
    """The log in `path`; its head file beside it says how long it is, so that a cut shows.

    What is not detected: that both files were put back to one older state, or written anew by
    somebody who may write at the site; the hashes have no key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, kind: str, content: dict[str, Any]) -> Event:
        """Add an event; on disk when this returns.

        Raises:
            AuditLogError: The log is damaged, or cannot be written.
        """
        try:
            with _head(self.path).open("a+b") as head:
                fcntl.flock(head, fcntl.LOCK_EX)
                events, end = _read(self.path)
                last = events[-1].hash if events else _NOTHING
                time = datetime.now(UTC).isoformat(timespec="seconds")
                said: dict[str, Any] = {
                    "number": len(events) + 1,
                    "time": time,
                    "kind": kind,
                    "content": content,
                }
                event = Event(**said, hash=_chained(last, said))
                with self.path.open("ab") as file:
                    # What a killed process left of a line that it had not finished.
                    file.truncate(end)
                    file.write(json.dumps({**said, "hash": event.hash}).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                head.truncate(0)
                head.write(f"{event.number} {event.hash}\n".encode())
                head.flush()
                os.fsync(head.fileno())
                return event
        except OSError as error:
            raise AuditLogError(f"{self.path}: cannot be written: {error.strerror}") from error

    def events(self) -> tuple[Event, ...]:
        """All events, checked. None where there is no log yet.

        Raises:
            AuditLogError: The log is not what was written.
        """
        try:
            return tuple(_read(self.path)[0])
        except OSError as error:
            raise AuditLogError(f"{self.path}: cannot be read: {error.strerror}") from error


def _read(path: Path) -> tuple[list[Event], int]:
    """The events, and where the last whole line ends."""
    content = path.read_bytes() if path.exists() else b""
    events: list[Event] = []
    end = content.rfind(b"\n") + 1
    for number, line in enumerate(content[:end].splitlines(), start=1):
        last = events[-1].hash if events else _NOTHING
        try:
            event = Event(**json.loads(line))
            said = {key: value for key, value in vars(event).items() if key != "hash"}
            sound = event.number == number and event.hash == _chained(last, said)
        except (ValueError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise AuditLogError(f"{path}: line {number} is not what was written")
        events.append(event)
    head = _head(path)
    said_head = head.read_bytes().decode(errors="replace").split() if head.exists() else []
    if not said_head:
        # The very first event may not have reached its head.
        if len(events) > 1:
            raise AuditLogError(f"{head}: is missing or empty")
        return events, end
    number_said, hash_said = [*said_head, ""][:2]
    length = int(number_said) if number_said.isdecimal() else -1
    if not 1 <= length <= len(events) or events[length - 1].hash != hash_said:
        raise AuditLogError(f"{path}: was cut or put back, its head file says otherwise")
    return events, end


def _head(path: Path) -> Path:
    return path.with_suffix(".head")


def _chained(before: str, said: dict[str, Any]) -> str:
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()
