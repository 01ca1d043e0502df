from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from service import logs
from service.health import HealthError

ROOT = Path(__file__).parents[2]
TOUCHED = ("", "client.agent", "flwr", "httpx", "uvicorn", "uvicorn.access", "uvicorn.error")


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    """Other tests of this process find logging as it was."""
    loggers = [logging.getLogger(name) for name in TOUCHED]
    before = [(of.handlers[:], of.level, of.propagate, of.disabled) for of in loggers]
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    for logger in loggers[1:]:
        # Servers that ran in this process before have set theirs.
        logger.disabled, logger.propagate = False, True
        logger.setLevel(logging.NOTSET)
    yield
    for logger, (handlers, level, propagate, disabled) in zip(loggers, before, strict=True):
        logger.handlers = handlers
        logger.setLevel(level)
        logger.propagate, logger.disabled = propagate, disabled
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks


def written(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(as_json=False)
    logging.getLogger("client.agent").info("round %d of %s", 3, "run")
    (line,) = written(capsys)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO client\.agent: round 3 of run", line)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(as_json=True)
    logging.getLogger("client.agent").warning('a "word"\nand another')
    (line,) = written(capsys)
    said = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", said.pop("time"))
    assert said == {
        "level": "WARNING",
        "logger": "client.agent",
        "message": 'a "word"\nand another',
    }


def test_a_second_configuration_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(as_json=False)
    logs.configure(as_json=True)
    logging.getLogger("client.agent").info("once")
    assert len(written(capsys)) == 1


def fail() -> None:
    try:
        dict[str, int]()["visitor 4711"]
    except KeyError:
        raise ValueError("visitor 4711 is odd") from None


@pytest.mark.parametrize("as_json", [True, False])
def test_a_foreign_error_keeps_its_text_to_itself(
    capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    logs.configure(as_json)
    log = logging.getLogger("client.agent")
    try:
        try:
            fail()
        except ValueError as error:
            raise ExceptionGroup("4711", [error, OSError(2, "4711", "/4711")]) from KeyError("4711")
    except ExceptionGroup as error:
        log.exception("failed")
        log.error("failed: %s, %r", error, ValueError("4711"))
        log.error(error)
        log.error("failed: %(error)s", {"error": "no error"}, exc_info=error)
    lines = written(capsys)
    assert len(lines) == 4
    for line in lines:
        assert "4711" not in line
        assert "failed" in line or "ExceptionGroup" in line
    for kind in ("ExceptionGroup", "ValueError", "FileNotFoundError", "KeyError"):
        assert all(kind in line for line in lines)
    if as_json:
        assert json.loads(lines[0])["error"].startswith("ExceptionGroup [ValueError; FileNotFound")


def test_an_error_of_ours_keeps_its_message_and_place(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(as_json=True)
    from service.processes import Command, Process

    try:
        try:
            Process(Command("it", ("true", "\0"), {}))
        except RuntimeError as error:
            raise HealthError("port 1: taken") from error
    except HealthError:
        logging.getLogger("client.agent").exception("failed")
    said = json.loads(written(capsys)[0])["error"]
    assert re.fullmatch(
        r"service\.health\.HealthError: port 1: taken; caused by "
        r"service\.processes\.ProcessError: it: cannot be started: embedded null byte at "
        r"service/processes\.py:\d+, service/processes\.py:\d+; caused by "
        r"ValueError at service/processes\.py:\d+",
        said,
    )


def test_a_chain_of_errors_that_is_a_ring_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(as_json=False)
    ring, other = ValueError(), KeyError()
    ring.__cause__, other.__cause__ = other, ring
    logging.getLogger("client.agent").error("failed", exc_info=ring)
    assert len(written(capsys)) == 1


def test_one_record_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(as_json=False)
    forged = "x\n2026-11-29 12:00:00 INFO privacy.ledger: all is well\r\x1b[2K\u2028"
    logging.getLogger("client.agent").info("run %s, é", forged)
    out = capsys.readouterr().err
    assert out.count("\n") == 1
    assert r"x\n2026" in out
    assert r"\r\x1b[2K\u2028, é" in out


def test_arguments_that_do_not_fit_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(as_json=False)
    logging.getLogger("client.agent").info("%d visits", "4711x")
    (line,) = written(capsys)
    assert line.endswith("%d visits (and arguments that do not fit)")


def test_libraries_speak_from_warnings_on_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("flwr", "uvicorn", "uvicorn.access"):
        logging.getLogger(name).addHandler(logging.StreamHandler())
    logging.getLogger("flwr").setLevel(logging.DEBUG)
    logs.configure(as_json=False)
    # As if flwr were imported afterwards.
    logging.getLogger("flwr").setLevel(logging.DEBUG)
    for name in ("flwr", "httpx", "uvicorn.access", "uvicorn.error", "client.agent"):
        logging.getLogger(name).debug("debug of %s", name)
        logging.getLogger(name).info("info of %s", name)
        logging.getLogger(name).warning("warning of %s", name)
    assert [line.partition(": ")[2] for line in written(capsys)] == [
        "warning of flwr",
        "warning of httpx",
        "warning of uvicorn.access",
        "warning of uvicorn.error",
        "info of client.agent",
        "warning of client.agent",
    ]


@pytest.mark.parametrize(
    "code",
    [
        "raise ValueError('4711')",
        "import threading; t = threading.Thread(target=int, args=('4711x',)); t.start(); t.join()",
        "class A:\n  def __del__(self): raise ValueError('4711')\nA()",
    ],
)
def test_an_error_that_nobody_caught_is_a_record_too(code: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", f"from service import logs; logs.configure(False)\n{code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert re.fullmatch(
        r"\S+ \S+ CRITICAL service\.logs: an error that nobody caught: ValueError\n", ran.stderr
    )
    assert ran.returncode == (1 if code.startswith("raise") else 0)


def test_our_own_are_the_packages_of_this_project() -> None:
    assert sorted(path.parent.name for path in ROOT.glob("*/__init__.py")) == list(logs.OWN)
