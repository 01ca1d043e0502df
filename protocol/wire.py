"""Plans and replies as JSON text. An unknown, missing or mistyped field is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from conf.schema import GROUPS, ModelConfig, PrivacyConfig
from evaluation.histogram import ScoreHistogram

T = TypeVar("T")

LARGEST_TEXT = 1_000_000
"""Characters; a longer text is refused unread."""

_CHOICES: dict[type, dict[str, type]] = {
    ModelConfig: GROUPS["model"],
    PrivacyConfig: GROUPS["privacy"],
}

_ENCODER = json.JSONEncoder(allow_nan=False)


class WireError(ValueError):
    """A text that is no sound plan or reply. The message names the field."""


def to_text(value: object, leave_out: tuple[str, ...] = ()) -> str:
    """A dataclass as JSON, without its top-level fields `leave_out`. NaN is refused."""
    fields = {
        field.name: _plain(getattr(value, field.name))
        for field in dataclasses.fields(typing.cast(Any, value))
        if field.name not in leave_out
    }
    return _ENCODER.encode(fields)


def from_text(kind: type[T], text: object, **given: object) -> T:
    """The dataclass that `to_text` wrote; `given` are the fields that it left out.

    Raises `WireError`.
    """
    if not isinstance(text, str) or len(text) > LARGEST_TEXT:
        raise WireError(f"{kind.__name__}: no text, or one that is too long")
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{kind.__name__}: not JSON") from error
    return typing.cast(T, _built(kind, read, kind.__name__, given))


def _plain(value: Any) -> Any:
    if isinstance(value, ScoreHistogram):
        return {"negative": value.negative.tolist(), "positive": value.positive.tolist()}
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value


def _built(kind: type, read: object, name: str, given: dict[str, object]) -> object:
    if not isinstance(read, dict):
        raise WireError(f"{name}: not an object")
    if kind in _CHOICES:
        chosen = _CHOICES[kind].get(str(read.get("name")))
        if chosen is None:
            raise WireError(f"{name}.name: no such choice")
        kind = chosen
    if kind is ScoreHistogram:
        return _histogram(read, name)
    hints = _hints(kind)
    expected = _fields(kind) - given.keys()
    for key in expected ^ read.keys():
        raise WireError(f"{name}.{key}: {'missing' if key in expected else 'unknown field'}")
    values = {key: _value(hints[key], read[key], f"{name}.{key}") for key in expected}
    try:
        return kind(**values, **given)
    except ValueError as error:
        raise WireError(f"{name}: {error}") from error


def _value(hint: Any, read: object, name: str) -> object:
    allowed = _allowed(hint)
    if not allowed:
        return _composed(hint, read, name)
    if type(read) is int and float in allowed:
        read = _float(read)
    if type(read) not in allowed or (isinstance(read, float) and not math.isfinite(read)):
        raise WireError(f"{name}: not of type {hint}")
    if isinstance(read, str) and not read.isascii() and any(map(_is_half, read)):
        raise WireError(f"{name}: half a character, which no report could hold")
    return read


def _composed(hint: Any, read: object, name: str) -> object:
    if dataclasses.is_dataclass(hint):
        return _built(typing.cast(type, hint), read, name, {})
    if typing.get_origin(hint) is list and isinstance(read, list):
        (of,) = typing.get_args(hint)
        return [_value(of, one, f"{name}[{place}]") for place, one in enumerate(read)]
    if typing.get_origin(hint) is dict and isinstance(read, dict):
        of = typing.get_args(hint)[1]
        return {_value(str, key, name): _value(of, one, f"{name}.*") for key, one in read.items()}
    raise WireError(f"{name}: not of type {hint}")


@lru_cache
def _allowed(hint: Any) -> tuple[Any, ...]:
    """The types of a value without parts; none if it has parts."""
    if dataclasses.is_dataclass(hint) or typing.get_origin(hint) in (list, dict):
        return ()
    return typing.get_args(hint) or (hint,)


def _is_half(letter: str) -> bool:
    return "\ud800" <= letter <= "\udfff"


@lru_cache
def _fields(kind: type) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(kind))


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _float(read: int) -> float:
    try:
        return float(read)
    except OverflowError:
        return math.inf


def _histogram(read: dict[Any, Any], name: str) -> ScoreHistogram:
    if set(read) != {"negative", "positive"}:
        raise WireError(f"{name}: a histogram has negative and positive counts")
    if not all(
        isinstance(counts, list) and set(map(type, counts)) <= {int, float}
        for counts in read.values()
    ):
        raise WireError(f"{name}: counts that are not lists of numbers")
    try:
        return ScoreHistogram(**{k: np.asarray(v, dtype=np.float64) for k, v in read.items()})
    except (ValueError, OverflowError) as error:
        raise WireError(f"{name}: {error}") from error
