"""What travels on the agent's socket: one frame there, one frame back.

::

    magic and version | kind | length of the text | length of the weights | text | weights

The text is a JSON object of texts, the weights are a model in the format of safetensors. Each
length is held against a limit before a byte of what it announces is read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from protocol.exchange import Parts

KINDS = ("ask", "publish", "status", "answer", "error")
"""What a frame is: three that ask, two that answer."""

MOST_TEXTS = 8
"""Texts in a frame."""

_HEADER = struct.Struct(">5sBIq")
_MAGIC = b"SITE\x01"
_NO_WEIGHTS = -1


class FrameError(ValueError):
    """No sound frame. Says what is wrong, and nothing of what was sent."""


@dataclass(frozen=True)
class Limits:
    """The most bytes of a frame that are read."""

    text: int
    weights: int


def to_frame(kind: str, parts: Parts) -> bytes:
    """`parts` as a frame. Raises `FrameError` for what `read_frame` would refuse at any limit."""
    try:
        text = json.dumps(dict(parts.texts), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise FrameError("the text holds half a character") from None
    if len(parts.texts) > MOST_TEXTS:
        raise FrameError(f"{len(parts.texts)} texts, {MOST_TEXTS} are allowed")
    weights = b"" if parts.weights is None else parts.weights
    size = _NO_WEIGHTS if parts.weights is None else len(weights)
    try:
        header = _HEADER.pack(_MAGIC, KINDS.index(kind), len(text), size)
    except struct.error:
        raise FrameError("the text is too long") from None
    return header + text + weights


def read_frame(read: Callable[[int], bytes], limits: Mapping[str, Limits]) -> tuple[str, Parts]:
    """Kind and content of the next frame.

    Args:
        read: gives exactly so many bytes, or raises.
        limits: of each kind of frame that may come here.

    Raises:
        FrameError: What comes is no frame, or a longer one.
    """
    magic, number, text, weights = _HEADER.unpack(read(_HEADER.size))
    if magic != _MAGIC:
        raise FrameError("no frame, or one of another version of this program")
    kind = KINDS[number] if number < len(KINDS) else ""
    if kind not in limits:
        raise FrameError(f"a frame of kind {number}, which is not for here")
    most = limits[kind]
    if text > most.text:
        raise FrameError(f"{text} bytes of text, at most {most.text} are read")
    if weights < _NO_WEIGHTS:
        raise FrameError("weights of a negative length")
    if weights > most.weights:
        raise FrameError(f"{weights} bytes of weights, at most {most.weights} are read")
    texts = _texts(read(text))
    return kind, Parts(texts, None if weights == _NO_WEIGHTS else read(weights))


def _texts(data: bytes) -> dict[str, str]:
    try:
        read = json.loads(
            data.decode(), object_pairs_hook=_Pairs, parse_constant=_no_json, parse_int=_no_json
        )
    except UnicodeDecodeError:
        raise FrameError("the text is not UTF-8") from None
    except (ValueError, RecursionError):
        raise FrameError("the text is not JSON of texts") from None
    if not isinstance(read, _Pairs) or not all(isinstance(text, str) for _, text in read):
        raise FrameError("the text is no JSON object of texts")
    if len(read) > MOST_TEXTS:
        raise FrameError(f"{len(read)} texts, {MOST_TEXTS} are allowed")
    texts = dict(read)
    if len(texts) < len(read):
        raise FrameError("two texts of one name")
    try:
        "".join((*texts, *texts.values())).encode()
    except UnicodeEncodeError:
        raise FrameError("the text holds half a character") from None
    return texts


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it was written: with the names that stand in it twice."""


def _no_json(_: str) -> None:
    raise ValueError
