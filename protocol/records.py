"""Plans and replies as Flower records: the form in which they travel."""

from __future__ import annotations

import numpy as np
import safetensors.numpy
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from protocol.plan import RoundPlan
from protocol.replies import REPLIES, Reply, SiteUpdate, Weights
from protocol.stored import weights_to_bytes
from protocol.wire import WireError, from_text, to_text

_SAFETENSORS = "safetensors"


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
        data = weights_to_bytes(weights)
        records["weights"] = ArrayRecord({_SAFETENSORS: Array("", (), _SAFETENSORS, data)})
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
    if set(record) != {_SAFETENSORS} or record[_SAFETENSORS].stype != _SAFETENSORS:
        raise WireError("weights: not in the format of safetensors")
    try:
        weights = safetensors.numpy.load(record[_SAFETENSORS].data)
    except Exception as error:
        # Whatever hostile bytes raise: SafetensorError, KeyError of an unknown type and more.
        raise WireError("weights: arrays that cannot be read") from error
    for name, array in weights.items():
        if array.dtype != np.float32:
            raise WireError(f"weights.{name}: {array.dtype} instead of float32")
    return weights
