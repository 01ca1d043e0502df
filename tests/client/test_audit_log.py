from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from client.audit_log import AuditLog, AuditLogError


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    log = AuditLog(tmp_path / "audit.jsonl")
    for number in range(4):
        log.append("ingest", {"rows": number, "of": "[ünï]"})
    return log


def test_events_come_back_as_they_were_written(log: AuditLog) -> None:
    events = log.events()
    assert [event.number for event in events] == [1, 2, 3, 4]
    assert [event.content for event in events] == [
        {"rows": number, "of": "[ünï]"} for number in range(4)
    ]
    assert log.append("erasure", {}) == log.events()[-1]


def test_there_may_be_none(tmp_path: Path) -> None:
    assert AuditLog(tmp_path / "audit.jsonl").events() == ()


@pytest.mark.parametrize("line", [1, 2, 3, 4])
@pytest.mark.parametrize("harm", ["change", "remove", "twice", "garbage"])
def test_a_changed_line_is_found_and_nothing_is_added(log: AuditLog, line: int, harm: str) -> None:
    lines = log.path.read_bytes().splitlines(keepends=True)
    match harm:
        case "change":
            lines[line - 1] = lines[line - 1].replace(b'"rows": ', b'"rows": 1')
        case "remove":
            del lines[line - 1]
        case "twice":
            lines.insert(line, lines[line - 1])
        case "garbage":
            lines[line - 1] = b"\xff{\n"
    log.path.write_bytes(b"".join(lines))
    for act in (log.events, lambda: log.append("ingest", {})):
        with pytest.raises(AuditLogError, match="audit"):
            act()
    assert log.path.read_bytes() == b"".join(lines)


def test_a_forged_line_needs_more_than_its_own_hash(log: AuditLog) -> None:
    lines = log.path.read_text().splitlines()
    event = json.loads(lines[1])
    event["content"]["rows"] = 7
    lines[1] = json.dumps(event)
    log.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(AuditLogError, match="line 2 is not what was written"):
        log.events()


@pytest.mark.parametrize("head", [None, b"", b"9 abc\n", b"-1 x\n", b"\xff\n", b"4 0000\n"])
def test_a_head_that_says_otherwise_is_found(log: AuditLog, head: bytes | None) -> None:
    path = log.path.with_suffix(".head")
    if head is None:
        path.unlink()
    else:
        path.write_bytes(head)
    with pytest.raises(AuditLogError):
        log.events()


@pytest.mark.parametrize("left", [1, 10, -1])
def test_what_a_killed_process_left_of_a_line_is_dropped(log: AuditLog, left: int) -> None:
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + whole.splitlines()[-1][:left])
    assert len(log.events()) == 4
    assert log.append("ingest", {}).number == 5
    assert log.path.read_bytes().startswith(whole)
    assert len(log.events()) == 5


def test_a_line_that_had_not_reached_the_head_counts(log: AuditLog) -> None:
    head = log.path.with_suffix(".head")
    before = head.read_bytes()
    log.append("ingest", {})
    head.write_bytes(before)
    assert len(log.events()) == 5
    assert log.append("ingest", {}).number == 6


def test_threads_and_processes_take_turns(log: AuditLog) -> None:
    threads = [
        threading.Thread(target=lambda: [AuditLog(log.path).append("x", {}) for _ in range(10)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log.events()) == 44
