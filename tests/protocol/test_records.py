from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import GruConfig, OptimizerConfig, VisitorDP
from evaluation.histogram import ScoreHistogram
from protocol.plan import RoundPlan
from protocol.records import REPLIES, plan_records, read_plan, read_reply, reply_records
from protocol.replies import (
    Reply,
    SiteDescription,
    SiteEvaluation,
    SiteRefusal,
    SiteUpdate,
    Weights,
)
from protocol.wire import LARGEST_TEXT, WireError, to_text

PLAN = RoundPlan("r", 1, 3, GruConfig(), OptimizerConfig(), VisitorDP())
EVALUATION = SiteEvaluation("shop", 0, ScoreHistogram.empty())
WEIGHTS: Weights = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([-0.0, 1e-40], np.float32),
}
UPDATE = SiteUpdate("shop", 1, WEIGHTS, 0.5, EVALUATION)


def npy(array: np.ndarray[Any, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def weights_records(data: bytes, stype: str = "numpy.ndarray") -> RecordDict:
    records = plan_records(PLAN, WEIGHTS)
    records["weights"] = ArrayRecord({"a": Array("float32", (2, 3), stype, data)})
    return records


def test_a_plan_and_its_model_come_back_to_the_last_bit() -> None:
    plan, weights = read_plan(plan_records(PLAN, WEIGHTS))
    assert plan == PLAN
    assert weights.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert weights[name].dtype == np.float32
        assert weights[name].tobytes() == value.tobytes()


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


def test_only_an_update_carries_arrays() -> None:
    for reply in (SiteDescription("a", 1.0), EVALUATION, SiteRefusal("a", 1, "no")):
        assert not reply_records(reply).array_records
    assert set(reply_records(UPDATE).array_records) == {"weights"}
    assert "weights" not in json.loads(
        str(reply_records(UPDATE).config_records["text"]["SiteUpdate"])
    )


def test_replies_are_all_kinds_of_reply() -> None:
    assert set(REPLIES.values()) == set(Reply.__args__)


def text_records(kind: str, text: Any) -> RecordDict:
    return RecordDict({"text": ConfigRecord({kind: text})})


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (RecordDict(), "without text"),
        (RecordDict({"text": ConfigRecord()}), "without text"),
        (RecordDict({"text": ConfigRecord({"A": "1", "B": "2"})}), "more than one"),
        (RecordDict({"other": ConfigRecord({"SiteRefusal": "{}"})}), "without text"),
        (RecordDict({"text": MetricRecord({"SiteRefusal": 1})}), "without text"),
        (text_records("RoundPlan", to_text(PLAN)), "RoundPlan: no such reply"),
        (text_records("SiteFailure", "{}"), "SiteFailure: no such reply"),
        (text_records("", "{}"), "no such reply"),
        (text_records("SiteRefusal", b"{}"), "no text"),
        (text_records("SiteRefusal", 3), "no text"),
        (text_records("SiteRefusal", ["{}"]), "no text"),
        (text_records("SiteRefusal", "[" * 100_000), "not JSON"),
        (text_records("SiteRefusal", " " * (LARGEST_TEXT + 1)), "too long"),
        (text_records("SiteEvaluation", '{"site": "a"}'), "missing"),
        (text_records("SiteDescription", '{"site": "a", "visitors": NaN}'), "visitors"),
        (text_records("SiteUpdate", "{}"), "missing"),
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


@pytest.mark.parametrize("form", ["object array", "pickle alone", "archive"])
def test_a_pickle_is_never_run(form: str, tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    data = npy(np.array([trap], dtype=object), allow_pickle=True)
    if form == "pickle alone":
        data = pickle.dumps(trap)
    elif form == "archive":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.npy", data)
        data = file.getvalue()
    with pytest.raises(WireError, match=r"^weights"):
        read_plan(weights_records(data))
    assert not trap.file.exists()


SOUND = npy(WEIGHTS["a"])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        SOUND[:-1],
        SOUND[:40],
        SOUND.replace(b"(2, 3)", b"(2, 4)"),
        SOUND.replace(b"(2, 3), }", b"(2**9,)}"),
        SOUND.replace(b"'fortran_order': False", b"'fortran_order': 'yes' "),
        SOUND.replace(b"'<f4'", b"'<q9'"),
        SOUND.replace(b"\x93NUMPY\x01", b"\x93NUMPY\x09"),
        b"PK\x03\x04" + b"\0" * 60,
        b"PK\x05\x06" + b"\0" * 18,
        pickle.dumps([1, 2, 3]),
        b"\xff" * 200,
    ],
    ids=range(13),
)
def test_an_array_that_cannot_be_read_is_refused(data: bytes) -> None:
    with pytest.raises(WireError, match=r"^weights"):
        read_plan(weights_records(data))


def test_an_array_that_claims_more_than_there_is_is_refused() -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (10**15,)}
    )
    with pytest.raises(WireError, match=r"^weights"):
        read_plan(weights_records(header.getvalue() + b"\0" * 16))


@pytest.mark.parametrize("stype", ["", "torch", "pickle"])
def test_another_serialisation_is_refused(stype: str) -> None:
    with pytest.raises(WireError, match=r"^weights"):
        read_plan(weights_records(SOUND, stype))


@pytest.mark.parametrize("dtype", ["float64", "float16", ">f4", "int32", "complex64", "U3", "bool"])
def test_another_number_format_is_refused(dtype: str) -> None:
    records = weights_records(npy(np.zeros((2, 3)).astype(dtype)))
    with pytest.raises(WireError, match=r"^weights\.a: .* instead of float32"):
        read_plan(records)
    update = reply_records(UPDATE)
    update["weights"] = records["weights"]
    with pytest.raises(WireError, match=r"^weights\.a: "):
        read_reply(update)


@given(data=st.binary(max_size=200))
@settings(deadline=None, max_examples=300)
def test_any_bytes_as_an_array_are_refused(data: bytes) -> None:
    with pytest.raises(WireError, match=r"^weights"):
        read_plan(weights_records(data))


@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=4
    )
)
@settings(deadline=None, max_examples=500)
def test_any_changed_bytes_of_an_array_give_float32_or_are_refused(
    changes: list[tuple[int, int]],
) -> None:
    data = bytearray(SOUND)
    for position, value in changes:
        data[position] = value
    try:
        _, weights = read_plan(weights_records(bytes(data)))
    except WireError:
        return
    assert weights["a"].dtype == np.float32
