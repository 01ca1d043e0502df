from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.histogram import EXACT, NOISED, Bins, ScoreHistogram
from protocol.replies import SiteDescription, SiteEvaluation, SiteUpdate, Weights
from protocol.stored import (
    reply_from_bytes,
    reply_to_bytes,
    weights_from_bytes,
    weights_to_bytes,
)
from protocol.wire import WireError

WEIGHTS: Weights = {
    "a": np.arange(6, dtype=np.float32).reshape(3, 2).T,
    "b": np.array([-0.0, 1e-40, np.nan], np.float32),
    "one number": np.asarray(np.float32(3)),
    "__metadata": np.zeros((0, 4), np.float32),
}


shapes = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    max_size=5,
)


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> Weights:
    draw = np.random.default_rng(seed).random
    return {name: np.asarray(draw(shape, dtype=np.float32)) for name, shape in shapes.items()}


@given(shapes, st.integers(0, 2**16))
def test_a_model_is_written_as_the_library_writes_it(
    shapes: dict[str, tuple[int, ...]], seed: int
) -> None:
    model = drawn(shapes, seed)
    assert weights_to_bytes(model) == safetensors.numpy.save(model)
    turned = {name: np.asarray(value, order="F") for name, value in model.items()}
    assert weights_to_bytes(turned) == safetensors.numpy.save(model)


@given(shapes, st.integers(0, 2**16))
def test_a_model_is_read_as_the_library_reads_it(
    shapes: dict[str, tuple[int, ...]], seed: int
) -> None:
    model = drawn(shapes, seed)
    data = safetensors.numpy.save(model, {"text": "beside"} if seed % 2 else None)
    found = weights_from_bytes(data)
    assert found.keys() == model.keys()
    for name, value in model.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == np.float32
        assert not found[name].flags.writeable


@settings(max_examples=300)
@given(data=st.data())
def test_whatever_comes_is_a_model_or_refused(data: st.DataObject) -> None:
    content = bytearray(weights_to_bytes(WEIGHTS))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content)) | st.just(len(content))) :]
    try:
        found = weights_from_bytes(bytes(content))
    except WireError:
        return
    assert all(value.dtype == np.float32 for value in found.values())


@pytest.mark.parametrize("place", [-4, 8, 2**40, "0", None])
def test_a_name_twice_cannot_lead_beyond_the_end(place: object) -> None:
    one = '{"dtype":"F32","shape":[1],"data_offsets":[%s,%s]}'
    first = f'"a":{one % (json.dumps(place), 4)}'
    for told in (f'{{{first},"a":{one % (0, 4)}}}', f'{{"a":{one % (0, 4)},{first}}}'):
        head = told.encode()
        try:
            found = weights_from_bytes(len(head).to_bytes(8, "little") + head + b"\0" * 4)
        except WireError:
            continue
        assert found["a"].shape == (1,)


@pytest.mark.parametrize("epsilon", [0.1 + 0.2, None])
def test_an_update_comes_back_to_the_last_bit(epsilon: float | None) -> None:
    back = reply_from_bytes(reply_to_bytes(SiteUpdate("shöp \U0001f600", 3, WEIGHTS, epsilon)))
    assert isinstance(back, SiteUpdate)
    assert (back.site, back.round, back.epsilon) == ("shöp \U0001f600", 3, epsilon)
    assert back.weights.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert back.weights[name].shape == value.shape
        assert back.weights[name].tobytes() == value.tobytes()


@pytest.mark.parametrize("bins", [EXACT, NOISED], ids=["exact", "noised"])
def test_an_evaluation_comes_back_to_the_last_bit(bins: Bins) -> None:
    counts = np.random.default_rng(0).normal(0, 1e3, (2, bins.count))
    back = reply_from_bytes(
        reply_to_bytes(SiteEvaluation("shop", 3, ScoreHistogram(*counts), 2.5, None))
    )
    assert isinstance(back, SiteEvaluation)
    assert (back.site, back.round, back.noise, back.epsilon) == ("shop", 3, 2.5, None)
    assert back.histogram.negative.tobytes() == counts[0].tobytes()
    assert back.histogram.positive.tobytes() == counts[1].tobytes()


def test_a_description_comes_back_equal() -> None:
    told = SiteDescription("shop", 0.1 + 0.2)
    assert reply_from_bytes(reply_to_bytes(told)) == told


def test_the_same_reply_gives_the_same_bytes() -> None:
    told = SiteUpdate("shop", 3, WEIGHTS, None)
    assert reply_to_bytes(told) == reply_to_bytes(told)
