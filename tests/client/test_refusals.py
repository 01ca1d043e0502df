from __future__ import annotations

import logging
from pathlib import Path

import pytest

from client import refusals
from client.audit_log import AuditLog
from client.refusals import Refusals, shown


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    return AuditLog(tmp_path / "audit.jsonl")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("client.refusals.time.monotonic", clock)
    return clock


def test_a_refusal_is_put_on_record(log: AuditLog) -> None:
    assert Refusals(log).note("train", "privacy.epsilon=9: at most 3")
    [event] = log.events()
    assert event.kind == "refusal"
    assert event.content == {"asked": "train", "reason": "privacy.epsilon=9: at most 3"}


def test_beyond_a_hundred_an_hour_they_are_counted(
    log: AuditLog, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "MOST", 3)
    noted = Refusals(log)
    assert [noted.note("train", "no") for _ in range(10)] == [True] * 3 + [False] * 7
    noted.tell_of_more()
    assert len(log.events()) == 3
    clock.now = 3601
    noted.tell_of_more()
    noted.tell_of_more()
    assert noted.note("train", "anew")
    assert [event.content for event in log.events()[3:]] == [
        {"not listed": 7},
        {"asked": "train", "reason": "anew"},
    ]
    assert noted.count == 11


def test_at_the_end_they_are_told_at_once(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "MOST", 1)
    noted = Refusals(log)
    noted.note("train", "no")
    noted.note("train", "no")
    noted.tell_of_more(at_once=True)
    assert log.events()[-1].content == {"not listed": 1}


def test_what_comes_from_outside_is_short_and_can_be_shown(log: AuditLog) -> None:
    Refusals(log).note("train", "federation=\x1b[31m\n" + "x" * 10_000)
    [event] = log.events()
    assert event.content["reason"] == "federation=?[31m?" + "x" * 283
    assert shown("grün ✓\u2028\ud800") == "grün ✓??"


def test_a_log_that_cannot_be_written_stops_nothing(
    log: AuditLog, caplog: pytest.LogCaptureFixture
) -> None:
    log.path.write_text("nonsense\n")
    with caplog.at_level(logging.ERROR):
        assert Refusals(log).note("train", "no")
    assert "a refusal is not on record" in caplog.text
