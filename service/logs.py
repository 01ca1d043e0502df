"""What a process writes to its log: a line a record, without the values in foreign errors."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import traceback
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

OWN = (
    "client",
    "conf",
    "evaluation",
    "journeys",
    "models",
    "privacy",
    "protocol",
    "server",
    "service",
    "simulation",
)
"""The packages whose errors keep their messages: these never hold personal values."""

_ROOT = Path(__file__).parents[1]
# Loggers that their libraries give handlers: each record would be written twice.
_WITH_HANDLERS = ("flwr", "uvicorn", "uvicorn.access", "uvicorn.error")
_LONGEST_CHAIN = 10
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")

log = logging.getLogger(__name__)


def configure(as_json: bool) -> None:
    """Log to standard error, times in UTC: lines for people, or one JSON object each.

    Our own packages from INFO on, all others from WARNING on. Of an error that is not one of ours
    the type and the places in our code are written, never its message: it may quote a visit. So it
    is for errors that nobody caught. A value that a library writes into a message of its own, not
    into an error, is not seen here.

    To be called after flwr is imported, which gives its logger a handler of its own.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if as_json else _Text())
    handler.addFilter(_is_wanted)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    for name in _WITH_HANDLERS:
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    sys.excepthook = _uncaught
    threading.excepthook = lambda of: _uncaught(of.exc_type, of.exc_value, of.exc_traceback)
    sys.unraisablehook = lambda of: _uncaught(of.exc_type, of.exc_value, of.exc_traceback)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%d %H:%M:%S")
        text = f"{time} {record.levelname} {record.name}: {_message(record)}"
        if error := _error(record):
            text += f": {error}"
        # One record, one line: what others say cannot be taken for a record of ours.
        return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
        }
        if error := _error(record):
            said["error"] = error
        return json.dumps(said)


def _is_wanted(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.split(".")[0] in (*OWN, "__main__")


def _message(record: logging.LogRecord) -> str:
    arguments: Any = record.args
    if isinstance(arguments, tuple):
        arguments = tuple(map(_shown, arguments))
    try:
        return str(_shown(record.msg)) % arguments if arguments else str(_shown(record.msg))
    except (TypeError, ValueError, KeyError):
        return f"{record.msg} (and arguments that do not fit)"


def _shown(value: object) -> object:
    return _described(value) if isinstance(value, BaseException) else value


def _error(record: logging.LogRecord) -> str:
    error = record.exc_info[1] if record.exc_info else None
    return _described(error) if error else ""


def _described(error: BaseException) -> str:
    """`ValueError at client/site.py:120; caused by KeyError`; messages of our own errors only."""
    chain: list[str] = []
    one: BaseException | None = error
    while one is not None and len(chain) < _LONGEST_CHAIN:
        chain.append(_described_alone(one))
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return "; caused by ".join(chain)


def _described_alone(error: BaseException) -> str:
    module, name = type(error).__module__, type(error).__qualname__
    text = name if module == "builtins" else f"{module}.{name}"
    if module.split(".")[0] in OWN:
        text += f": {error}"
    places = ", ".join(_places(error.__traceback__))
    if places:
        text += f" at {places}"
    if isinstance(error, BaseExceptionGroup):
        text += f" [{'; '.join(_described(one) for one in error.exceptions[:_LONGEST_CHAIN])}]"
    return text


def _places(trace: TracebackType | None) -> list[str]:
    """Where in our code, the innermost place first."""
    places = []
    for frame, line in traceback.walk_tb(trace):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(_ROOT) and file.relative_to(_ROOT).parts[0] in OWN:
            places.append(f"{file.relative_to(_ROOT)}:{line}")
    return places[::-1]


def _uncaught(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    if not issubclass(kind, KeyboardInterrupt | SystemExit):
        log.critical("an error that nobody caught", exc_info=(kind, error or kind(), trace))
