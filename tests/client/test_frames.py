from __future__ import annotations

import contextlib
import io
import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from client.frames import KINDS, MOST_TEXTS, FrameError, Limits, read_frame, to_frame
from protocol.exchange import Parts

LIMITS = dict.fromkeys(KINDS, Limits(10_000, 1_000))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
HEADER = struct.Struct(">5sBIq")


def reader(data: bytes) -> Callable[[int], bytes]:
    stream = io.BytesIO(data)

    def read(length: int) -> bytes:
        part = stream.read(length)
        if len(part) < length:
            raise FrameError("cut short")
        return part

    return read


def frame(content: bytes, model: bytes = b"", /, **changes: Any) -> bytes:
    """A frame of whatever is in it."""
    header = {"magic": b"SITE\x01", "kind": 0, "text": len(content), "weights": len(model)}
    return HEADER.pack(*(header | changes).values()) + content + model


@given(
    kind=st.sampled_from(KINDS),
    texts=st.dictionaries(TEXT, TEXT, max_size=MOST_TEXTS),
    weights=st.none() | st.binary(max_size=100),
)
def test_a_frame_is_read_as_it_was_written(
    kind: str, texts: dict[str, str], weights: bytes | None
) -> None:
    data = to_frame(kind, Parts(texts, weights))
    assert read_frame(reader(data), LIMITS) == (kind, Parts(texts, weights))


@given(st.binary(max_size=200))
@example(b"")
def test_whatever_comes_is_a_frame_or_a_frame_error(data: bytes) -> None:
    with contextlib.suppress(FrameError):
        read_frame(reader(data), LIMITS)


@given(st.binary(max_size=200) | TEXT.map(str.encode), st.binary(max_size=20))
@example(b'{"a": "\\ud800"}', b"")
@example(b"[" * 5000, b"")
@example(b"9" * 9000, b"")
@example("{}".encode("utf-16"), b"")
def test_whatever_text_comes_is_of_texts_or_a_frame_error(text: bytes, weights: bytes) -> None:
    with contextlib.suppress(FrameError):
        _, parts = read_frame(reader(frame(text, weights)), LIMITS)
        assert parts.texts == json.loads(text)
        assert parts.weights == weights


@given(st.data())
def test_no_byte_is_read_that_a_damaged_frame_does_not_announce(data: st.DataObject) -> None:
    whole = bytearray(to_frame("ask", Parts({"train": "{}"}, b"model")))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= 1 << data.draw(st.integers(0, 7))
    asked: list[int] = []

    def read(length: int) -> bytes:
        asked.append(length)
        return reader(bytes(whole[sum(asked[:-1]) :]))(length)

    with contextlib.suppress(FrameError):
        read_frame(read, LIMITS)
    assert sum(asked) <= HEADER.size + 10_000 + 1_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (frame(b"{}", magic=b"HTTP/"), "no frame, or one of another version"),
        (frame(b"{}", magic=b"SITE\x02"), "no frame, or one of another version"),
        (frame(b"{}", kind=9), "a frame of kind 9, which is not for here"),
        (frame(b"{}", text=10_001), "10001 bytes of text, at most 10000 are read"),
        (frame(b"{}", text=2**32 - 1), "4294967295 bytes of text"),
        (frame(b"{}", weights=1_001), "1001 bytes of weights, at most 1000 are read"),
        (frame(b"{}", weights=2**63 - 1), "bytes of weights, at most 1000"),
        (frame(b"{}", weights=-2), "weights of a negative length"),
        (frame(b""), "not JSON"),
        (frame(b"\xff{}"), "not UTF-8"),
        (frame(b"[]"), "no JSON object of texts"),
        (frame(b'"train"'), "no JSON object of texts"),
        (frame(b'{"train": 1.5}'), "no JSON object of texts"),
        (frame(b'{"train": {"a": "b"}}'), "no JSON object of texts"),
        (frame(b'{"train": null}'), "no JSON object of texts"),
        (frame(b'{"train": NaN}'), "not JSON"),
        (frame(b'{"train": -Infinity}'), "not JSON"),
        (frame(b'{"a": "1", "a": "1"}'), "two texts of one name"),
        (frame(json.dumps({str(i): "" for i in range(9)}).encode()), "9 texts, 8 are allowed"),
        (frame(b'{"a": "\\ud800"}'), "half a character"),
        (frame(b'{"\\udfff": ""}'), "half a character"),
    ],
)
def test_what_is_wrong_with_a_frame_is_named(data: bytes, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        read_frame(reader(data), LIMITS)


def test_nothing_is_read_beyond_a_length_that_is_too_large() -> None:
    asked: list[int] = []

    def read(length: int) -> bytes:
        asked.append(length)
        return frame(b"{}", weights=2_000)[:length]

    with pytest.raises(FrameError):
        read_frame(read, LIMITS)
    assert asked == [HEADER.size]


def test_a_kind_that_is_not_for_this_side_is_refused() -> None:
    data = to_frame("status", Parts({}, None))
    with pytest.raises(FrameError, match="not for here"):
        read_frame(reader(data), {"answer": Limits(100, 0)})


@pytest.mark.parametrize(
    ("texts", "message"),
    [({"a": "\ud800"}, "half a character"), ({str(i): "" for i in range(9)}, "9 texts")],
)
def test_what_would_be_refused_is_not_sent(texts: dict[str, str], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        to_frame("ask", Parts(texts, None))
