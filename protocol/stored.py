"""Models and replies as bytes, to travel and for a ledger to keep: safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from protocol.replies import REPLIES, Reply, SiteUpdate, Weights
from protocol.wire import WireError, from_text, to_text


def weights_to_bytes(weights: Weights) -> bytes:
    """A model."""
    shapes = tuple((name, value.shape) for name, value in weights.items())
    start, order = _form(shapes)
    parts = [weights[name].astype("<f4", "C", copy=False).data for name in order]
    return b"".join([start, *parts])


@lru_cache(maxsize=8)
def _form(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[bytes, list[str]]:
    """What comes before the numbers of a model of such arrays, and the arrays' order.

    It is the same each time, and takes longer to make than the numbers of a small model to copy.
    """
    empty = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes}
    data = safetensors.numpy.save(empty)
    start = _start(data)
    places = {name: told["data_offsets"] for name, told in json.loads(start[8:]).items()}
    return start, sorted(places, key=places.__getitem__)


def weights_from_bytes(data: bytes) -> Weights:
    """The model that `weights_to_bytes` wrote; its arrays are read-only.

    Raises:
        WireError: It is none, or not of float32.
    """
    start = _start(data)
    return {
        name: np.frombuffer(data, "<f4", math.prod(shape), len(start) + at).reshape(shape)
        for name, shape, at in _layout(start, len(data) - len(start))
    }


def _start(data: bytes) -> bytes:
    """All before the numbers: 8 bytes that say how long the JSON is, and the JSON."""
    return data[: 8 + int.from_bytes(data[:8], "little")]


@lru_cache(maxsize=2)
def _layout(start: bytes, size: int) -> list[tuple[str, tuple[int, ...], int]]:
    """Name, shape and place of each array, by what comes before `size` bytes of numbers."""
    try:
        arrays = safetensors.numpy.load(start + bytes(size))
        told = json.loads(start[8:])
        places = {name: told[name]["data_offsets"][0] for name in arrays}
        sound = all(0 <= places[name] <= size - a.nbytes for name, a in arrays.items())
    except Exception as error:
        # Whatever hostile bytes raise: SafetensorError, KeyError of an unknown type and more.
        raise WireError("weights: arrays that cannot be read") from error
    if not sound:
        raise WireError("weights: an array beyond the end")
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise WireError(f"weights.{name}: {array.dtype} instead of float32")
    return [(name, array.shape, places[name]) for name, array in arrays.items()]


def tensors_to_bytes(tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Named arrays of any kind, with text beside them."""
    # Not ascontiguousarray: it would turn a single number into an array of one.
    whole = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    return safetensors.numpy.save(whole, metadata=dict(metadata))


def reply_to_bytes(reply: Reply) -> bytes:
    """An answer, whole: the text is among the metadata."""
    weights = reply.weights if isinstance(reply, SiteUpdate) else {}
    text = to_text(reply, leave_out=("weights",))
    return tensors_to_bytes(weights, {type(reply).__name__: text})


def reply_from_bytes(data: bytes) -> Reply:
    """The answer that `reply_to_bytes` wrote, to the last bit."""
    ((kind, text),) = json.loads(_start(data)[8:])["__metadata__"].items()
    if REPLIES[kind] is SiteUpdate:
        return from_text(SiteUpdate, text, weights=safetensors.numpy.load(data))
    return from_text(REPLIES[kind], text)
