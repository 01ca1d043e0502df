"""Models and replies as bytes, to travel and for a ledger to keep: safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import safetensors.numpy

from protocol.replies import REPLIES, Reply, SiteUpdate, Weights
from protocol.wire import from_text, to_text


def weights_to_bytes(weights: Weights, metadata: Mapping[str, str] | None = None) -> bytes:
    """Named arrays, with text beside them."""
    # Not ascontiguousarray: it would turn a single number into an array of one.
    tensors = {name: np.asarray(value, order="C") for name, value in weights.items()}
    return safetensors.numpy.save(tensors, metadata=None if metadata is None else dict(metadata))


def reply_to_bytes(reply: Reply) -> bytes:
    """An answer, whole: the text is among the metadata."""
    weights = reply.weights if isinstance(reply, SiteUpdate) else {}
    text = to_text(reply, leave_out=("weights",))
    return weights_to_bytes(weights, {type(reply).__name__: text})


def reply_from_bytes(data: bytes) -> Reply:
    """The answer that `reply_to_bytes` wrote, to the last bit."""
    length = int.from_bytes(data[:8], "little")
    ((kind, text),) = json.loads(data[8 : 8 + length])["__metadata__"].items()
    if REPLIES[kind] is SiteUpdate:
        return from_text(SiteUpdate, text, weights=safetensors.numpy.load(data))
    return from_text(REPLIES[kind], text)
