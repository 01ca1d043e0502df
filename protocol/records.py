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
        model = ArrayRecord()
        model[_SAFETENSORS] = Array("", (), _SAFETENSORS, parts.weights)
        records["weights"] = model
    return records


def from_records(records: RecordDict) -> Parts:
    """What `to_records` was given; nothing of it is read yet. Raises `WireError`."""
    # One by one: Flower makes its dictionaries of records of one kind anew each time.
    text, model = records.get("text"), records.get("weights")
    texts: dict[str, str] = {}
    for ask, one in text.items() if isinstance(text, ConfigRecord) else ():
        if not isinstance(one, str):
            raise WireError(f"{ask}: no text")
        texts[ask] = one
    if model is None:
        return Parts(texts, None)
    array = model.get(_SAFETENSORS) if isinstance(model, ArrayRecord) and len(model) == 1 else None
    if array is None or array.stype != _SAFETENSORS:
        raise WireError("weights: not in the format of safetensors")
    return Parts(texts, bytes(array.data))
