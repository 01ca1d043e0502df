"""Replies as bytes, for a ledger to keep: safetensors, with the text among its metadata."""

from __future__ import annotations

import json

import numpy as np
import safetensors.numpy

from protocol.replies import Reply, SiteDescription, SiteEvaluation, SiteUpdate
from protocol.wire import from_text, to_text

_KINDS: dict[str, type[Reply]] = {
    kind.__name__: kind for kind in (SiteDescription, SiteEvaluation, SiteUpdate)
}


def reply_to_bytes(reply: Reply) -> bytes:
    """An answer that carries data, whole."""
    weights = reply.weights if isinstance(reply, SiteUpdate) else {}
    tensors = {name: np.asarray(value, order="C") for name, value in weights.items()}
    text = to_text(reply, leave_out=("weights",))
    return safetensors.numpy.save(tensors, metadata={type(reply).__name__: text})


def reply_from_bytes(data: bytes) -> Reply:
    """The answer that `reply_to_bytes` wrote, to the last bit."""
    length = int.from_bytes(data[:8], "little")
    ((kind, text),) = json.loads(data[8 : 8 + length])["__metadata__"].items()
    if _KINDS[kind] is SiteUpdate:
        return from_text(SiteUpdate, text, weights=safetensors.numpy.load(data))
    return from_text(_KINDS[kind], text)
