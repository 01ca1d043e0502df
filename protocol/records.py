"""Requests and answers as Flower records: the form in which they travel."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from protocol.exchange import Parts
from protocol.wire import WireError

_SAFETENSORS = "safetensors"


def to_records(parts: Parts) -> RecordDict:
    """The texts as one record, the model as one array: each array costs 0.2 ms a site."""
    records = RecordDict({"text": ConfigRecord(dict(parts.texts))})
    if parts.weights is not None:
        array = Array("", (), _SAFETENSORS, parts.weights)
        records["weights"] = ArrayRecord({_SAFETENSORS: array})
    return records


def from_records(records: RecordDict) -> Parts:
    """What `to_records` was given; nothing of it is read yet. Raises `WireError`."""
    texts: dict[str, str] = {}
    for ask, one in records.config_records.get("text", {}).items():
        if not isinstance(one, str):
            raise WireError(f"{ask}: no text")
        texts[ask] = one
    record = records.array_records.get("weights")
    if record is None:
        return Parts(texts, None)
    if set(record) != {_SAFETENSORS} or record[_SAFETENSORS].stype != _SAFETENSORS:
        raise WireError("weights: not in the format of safetensors")
    return Parts(texts, bytes(record[_SAFETENSORS].data))
