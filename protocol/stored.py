"""Models and replies as bytes, to travel and for a ledger to keep: safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from protocol.replies import REPLIES, Reply, SiteUpdate, Weights
from protocol.wire import from_text, to_text


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
    end = 8 + int.from_bytes(data[:8], "little")
    places = {name: told["data_offsets"] for name, told in json.loads(data[8:end]).items()}
    return data[:end], sorted(places, key=places.__getitem__)


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
    length = int.from_bytes(data[:8], "little")
    ((kind, text),) = json.loads(data[8 : 8 + length])["__metadata__"].items()
    if REPLIES[kind] is SiteUpdate:
        return from_text(SiteUpdate, text, weights=safetensors.numpy.load(data))
    return from_text(REPLIES[kind], text)
