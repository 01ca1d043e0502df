from __future__ import annotations

import io
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import GruConfig, OptimizerConfig, VisitorDP
from evaluation.histogram import NOISED, ScoreHistogram
from protocol.exchange import Request, read_replies, read_request, reply_parts, request_parts
from protocol.plan import RoundPlan
from protocol.records import from_records, to_records
from protocol.replies import (
    REPLIES,
    Reply,
    SiteDescription,
    SiteEvaluation,
    SiteRefusal,
    SiteUpdate,
    Weights,
)
from protocol.wire import LARGEST_TEXT, WireError, to_text
from tests.shop import CUT

PLAN = RoundPlan("f", "p", "r", 1, 3, 2, GruConfig(), OptimizerConfig(), VisitorDP(), CUT)
EVALUATION = SiteEvaluation("shop", 0, ScoreHistogram.empty(NOISED), 2.5, 0.5)
WEIGHTS: Weights = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([-0.0, 1e-40], np.float32),
    "one number": np.asarray(np.float32(3)),
    "turned": np.arange(6, dtype=np.float32).reshape(3, 2).T,
    "none": np.zeros((0, 4), np.float32),
    "": np.ones(1, np.float32),
}
UPDATE = SiteUpdate("shop", 1, WEIGHTS, 0.5)


def plan_records(plan: RoundPlan, weights: Weights | None = None) -> RecordDict:
    return to_records(request_parts(Request({"train": plan}, weights or {})))


def read_plan(records: RecordDict) -> tuple[RoundPlan, Weights]:
    request = read_request(from_records(records))
    return request.plans["train"], request.weights


def reply_records(reply: Reply) -> RecordDict:
    return to_records(reply_parts({"train": reply}))


def read_reply(records: RecordDict) -> Reply:
    return read_replies(from_records(records))["train"]


def weights_records(data: bytes, stype: str = "safetensors", name: str = "safetensors") -> Any:
    records = plan_records(PLAN, WEIGHTS)
    records["weights"] = ArrayRecord({name: Array("", (), stype, data)})
    return records


def test_a_plan_and_its_model_come_back_to_the_last_bit() -> None:
    plan, weights = read_plan(plan_records(PLAN, WEIGHTS))
    assert plan == PLAN
    assert weights.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert weights[name].dtype == np.float32
        assert weights[name].shape == value.shape
        assert weights[name].tobytes() == value.tobytes()


def test_a_model_travels_as_one_array_however_many_it_has() -> None:
    assert len(plan_records(PLAN, WEIGHTS).array_records["weights"]) == 1


def test_a_model_that_came_is_shared_and_cannot_be_changed() -> None:
    (_, one), (_, other) = (read_plan(plan_records(PLAN, WEIGHTS)) for _ in range(2))
    for name, value in one.items():
        assert value is other[name]
        with pytest.raises(ValueError, match="read-only"):
            value[...] = 0


def test_a_plan_without_a_model() -> None:
    assert read_plan(plan_records(PLAN)) == (PLAN, {})


@pytest.mark.parametrize(
    "reply",
    [SiteDescription("shop", 9.5), SiteRefusal("shop", 1, "privacy.epsilon=9, at most 3")],
    ids=lambda reply: type(reply).__name__,
)
def test_a_reply_comes_back_equal(reply: Reply) -> None:
    assert read_reply(reply_records(reply)) == reply


def test_replies_with_arrays_come_back_equal() -> None:
    back = read_reply(reply_records(UPDATE))
    assert isinstance(back, SiteUpdate)
    assert (back.site, back.round, back.epsilon) == ("shop", 1, 0.5)
    assert back.weights["b"].tobytes() == WEIGHTS["b"].tobytes()
    evaluation = read_reply(reply_records(EVALUATION))
    assert isinstance(evaluation, SiteEvaluation)
    assert np.array_equal(evaluation.histogram.positive, EVALUATION.histogram.positive)
    assert (evaluation.noise, evaluation.epsilon) == (2.5, 0.5)


def test_only_an_update_carries_arrays() -> None:
    for reply in (SiteDescription("a", 1.0), EVALUATION, SiteRefusal("a", 1, "no")):
        assert not reply_records(reply).array_records
    assert set(reply_records(UPDATE).array_records) == {"weights"}
    text = str(reply_records(UPDATE).config_records["text"]["train"])
    assert "weights" not in json.loads(text.removeprefix("SiteUpdate "))


def test_several_plans_and_several_replies_come_back_equal() -> None:
    plans = {"evaluate": replace(PLAN, round=0), "train": PLAN}
    records = to_records(request_parts(Request(plans, WEIGHTS)))
    assert read_request(from_records(records)).plans == plans
    replies: dict[str, Reply] = {"evaluate": SiteRefusal("shop", 0, "no"), "train": UPDATE}
    back = read_replies(from_records(to_records(reply_parts(replies))))
    assert list(back) == ["evaluate", "train"]
    assert back["evaluate"] == replies["evaluate"]
    assert isinstance(back["train"], SiteUpdate)
    assert back["train"].weights["a"].tobytes() == WEIGHTS["a"].tobytes()


def test_replies_are_all_kinds_of_reply() -> None:
    assert set(REPLIES.values()) == set(Reply.__args__)


def text_records(text: Any, ask: str = "train") -> RecordDict:
    return RecordDict({"text": ConfigRecord({ask: text})})


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (RecordDict(), "without text"),
        (RecordDict({"text": ConfigRecord()}), "without text"),
        (RecordDict({"text": ConfigRecord({"A": "1", "B": "2"})}), "something else"),
        (RecordDict({"other": ConfigRecord({"train": "SiteRefusal {}"})}), "without text"),
        (RecordDict({"text": MetricRecord({"train": 1})}), "without text"),
        (text_records(f"RoundPlan {to_text(PLAN)}"), "train: no such reply"),
        (text_records("SiteFailure {}"), "train: no such reply"),
        (text_records(" {}"), "no such reply"),
        (text_records("SiteRefusal {}", "score"), "something else"),
        (text_records(b"SiteRefusal {}"), "no text"),
        (text_records(3), "no text"),
        (text_records(["SiteRefusal {}"]), "no text"),
        (text_records("SiteRefusal"), "not JSON"),
        (text_records("SiteRefusal " + "[" * 100_000), "not JSON"),
        (text_records("SiteRefusal " + " " * (LARGEST_TEXT + 1)), "too long"),
        (text_records('SiteEvaluation {"site": "a"}'), "missing"),
        (text_records('SiteDescription {"site": "a", "visitors": NaN}'), "visitors"),
        (text_records("SiteUpdate {}"), "missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_message_that_is_no_reply_is_refused(records: RecordDict, message: str) -> None:
    with pytest.raises(WireError, match=message):
        read_reply(records)


def test_a_message_that_is_no_plan_is_refused() -> None:
    for records in (RecordDict(), reply_records(SiteDescription("a", 1.0)), reply_records(UPDATE)):
        with pytest.raises(WireError):
            read_plan(records)


class Trap:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("form", ["object array", "pickle alone"])
@pytest.mark.parametrize("stype", ["safetensors", "numpy.ndarray", "torch.tensor", "pickle", ""])
def test_a_pickle_is_never_run(form: str, stype: str, tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    data = pickle.dumps(trap)
    if form == "object array":
        file = io.BytesIO()
        np.save(file, np.array([trap], dtype=object), allow_pickle=True)
        data = file.getvalue()
    for name in ("safetensors", "a"):
        with pytest.raises(WireError, match=r"^weights: "):
            read_plan(weights_records(data, stype, name))
    assert not trap.file.exists()


def tensors(header: object, data: bytes = b"\0" * 24) -> bytes:
    """The bytes of safetensors: a header of JSON, its length before it, and the numbers."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def doubled(first: dict[str, Any], second: dict[str, Any]) -> bytes:
    """A header that names one tensor twice, which no dict could hold."""
    return f'{{"a": {json.dumps(first)}, "a": {json.dumps(second)}}}'.encode()


SOUND = tensors({"a": entry([2, 3], 0, 24)})
HOSTILE = {
    "nothing": b"",
    "length alone": SOUND[:8],
    "cut header": SOUND[:40],
    "cut data": SOUND[:-1],
    "more data": SOUND + b"\0",
    "header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "header of 90 MB": (90_000_000).to_bytes(8, "little") + b"{}",
    "header is a list": tensors([]),
    "header is nested": tensors(b"[" * 100_000),
    "entry is a number": tensors({"a": 1}),
    "entry without fields": tensors({"a": entry([6], 0, 24), "b": {}}),
    "two on the same bytes": tensors({"a": entry([6], 0, 24), "b": entry([6], 0, 24)}),
    "overlap": tensors({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}),
    "gap": tensors({"a": entry([2], 0, 8), "b": entry([2], 16, 24)}),
    "a name twice": tensors(doubled(entry([3], 0, 12), entry([3], 12, 24))),
    "backwards": tensors({"a": entry([6], 24, 0)}),
    "negative": tensors({"a": entry([-6], 0, 24)}),
    "claims 4 TB": tensors({"a": entry([2**40], 0, 2**42)}),
    "claims 2^126 numbers": tensors({"a": entry([2**63, 2**63], 0, 24)}),
    "shape beyond its bytes": tensors({"a": entry([2**20], 0, 24)}),
    "no numbers, endless shape": tensors({"a": entry([0, 2**63], 0, 0)}, b""),
    "a hundred dimensions": tensors({"a": entry([1] * 100 + [6], 0, 24)}),
    "unknown type": tensors({"a": entry([6], 0, 24, "Q32")}),
    "type that numpy lacks": tensors({"a": entry([12], 0, 24, "BF16")}),
    "half a character": tensors(b'{"\\ud800": {"dtype": "F32", "shape": [0]}}', b""),
    "numpy file": b"\x93NUMPY\x01\x00v\x00" + b" " * 200,
    "zip": b"PK\x03\x04" + b"\0" * 60,
    "noise": b"\xff" * 200,
}


def test_the_sound_bytes_are_read() -> None:
    _, weights = read_plan(weights_records(SOUND))
    assert weights["a"].shape == (2, 3)


@pytest.mark.parametrize("kind", HOSTILE)
def test_arrays_that_cannot_be_read_are_refused(kind: str) -> None:
    with pytest.raises(WireError, match=r"^weights: arrays that cannot be read"):
        read_plan(weights_records(HOSTILE[kind]))
    update = reply_records(UPDATE)
    update["weights"] = weights_records(HOSTILE[kind])["weights"]
    with pytest.raises(WireError, match=r"^weights: arrays that cannot be read"):
        read_reply(update)


@pytest.mark.parametrize(
    ("stype", "name"),
    [("", "safetensors"), ("numpy.ndarray", "safetensors"), ("safetensors", "a")],
)
def test_another_serialisation_is_refused(stype: str, name: str) -> None:
    with pytest.raises(WireError, match=r"^weights: not in the format of safetensors"):
        read_plan(weights_records(SOUND, stype, name))


def test_arrays_beside_the_one_are_refused() -> None:
    records = plan_records(PLAN, WEIGHTS)
    records["weights"] = ArrayRecord(
        {"safetensors": Array("", (), "safetensors", SOUND), "more": Array(np.ones(3))}
    )
    with pytest.raises(WireError, match=r"^weights: not in the format of safetensors"):
        read_plan(records)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "complex64", "bool"])
def test_another_number_format_is_refused(dtype: str) -> None:
    data = safetensors.numpy.save({"a": np.zeros((2, 3)).astype(dtype)})
    with pytest.raises(WireError, match=rf"^weights\.a: {dtype} instead of float32"):
        read_plan(weights_records(data))


@given(data=st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_as_arrays_are_refused(data: bytes) -> None:
    with pytest.raises(WireError, match=r"^weights"):
        read_plan(weights_records(data))


@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=4
    )
)
@settings(deadline=None, max_examples=300)
def test_any_changed_bytes_of_arrays_give_float32_or_are_refused(
    changes: list[tuple[int, int]],
) -> None:
    data = bytearray(SOUND)
    for position, value in changes:
        data[position] = value
    try:
        _, weights = read_plan(weights_records(bytes(data)))
    except WireError:
        return
    assert all(value.dtype == np.float32 for value in weights.values())
    assert sum(value.nbytes for value in weights.values()) <= len(data)
