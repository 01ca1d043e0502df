"""Plans and replies as Flower records: the form in which they travel."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from protocol.plan import RoundPlan
from protocol.replies import (
    Reply,
    SiteDescription,
    SiteEvaluation,
    SiteRefusal,
    SiteUpdate,
    Weights,
)
from protocol.wire import WireError, from_text, to_text

REPLIES: dict[str, type[Reply]] = {
    kind.__name__: kind for kind in (SiteDescription, SiteEvaluation, SiteUpdate, SiteRefusal)
}


def plan_records(plan: RoundPlan, weights: Weights | None = None) -> RecordDict:
    """A plan, with the round's model where there is one."""
    return _records("RoundPlan", to_text(plan), weights)


def read_plan(records: RecordDict) -> tuple[RoundPlan, Weights]:
    """The plan and the model (empty where there is none). Raises `WireError`."""
    kind, text = _text(records)
    if kind != "RoundPlan":
        raise WireError(f"{kind}: expected a plan")
    return from_text(RoundPlan, text), _weights(records)


def reply_records(reply: Reply) -> RecordDict:
    """A site's answer."""
    kind = type(reply).__name__
    if isinstance(reply, SiteUpdate):
        return _records(kind, to_text(reply, leave_out=("weights",)), reply.weights)
    return _records(kind, to_text(reply))


def read_reply(records: RecordDict) -> Reply:
    """The answer that `reply_records` wrote. Raises `WireError`."""
    kind, text = _text(records)
    if kind not in REPLIES:
        raise WireError(f"{kind}: no such reply")
    if kind == "SiteUpdate":
        return from_text(SiteUpdate, text, weights=_weights(records))
    return from_text(REPLIES[kind], text)


def _records(kind: str, text: str, weights: Weights | None = None) -> RecordDict:
    records = RecordDict({"text": ConfigRecord({kind: text})})
    if weights is not None:
        records["weights"] = ArrayRecord({name: Array(value) for name, value in weights.items()})
    return records


def _text(records: RecordDict) -> tuple[str, object]:
    record = records.config_records.get("text")
    if record is None or len(record) != 1:
        raise WireError("a message without text, or with more than one")
    return next(iter(record.items()))


def _weights(records: RecordDict) -> Weights:
    record = records.array_records.get("weights")
    if record is None:
        return {}
    try:
        arrays = {name: array.numpy() for name, array in record.items()}
    except Exception as error:
        # Whatever numpy raises on hostile bytes: ValueError, BadZipFile, MemoryError and more.
        raise WireError("weights: an array that cannot be read") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise WireError(f"weights.{name}: an archive instead of an array")
        if array.dtype != np.float32:
            raise WireError(f"weights.{name}: {array.dtype} instead of float32")
    return arrays
