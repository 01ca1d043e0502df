from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import DataConfig, FeatureConfig, NumericColumn, TableData
from journeys.decisions import DAY
from journeys.encode import encode
from journeys.examples import Examples
from journeys.table import touchpoint_schema

FEATURES = FeatureConfig(
    channels=["direct", "email", "paid search"],
    max_touchpoints=3,
    clock=True,
    gaps=True,
    categorical={"device": ["desktop", "mobile"]},
    numeric={
        "duration_s": NumericColumn(0, 100, known_at_end=True),
        "price": NumericColumn(0, 100),
    },
)
START = 1_767_225_600
LOOKBACK = 2 * DAY
CONFIGS = [
    TableData(path="none.csv", lookback_days=2, features=FEATURES),
    TableData(
        path="none.csv",
        lookback_days=2,
        features=FEATURES,
        decision="snapshot",
        snapshot_at="2026-01-01",
    ),
    DataConfig(name="synthetic", lookback_days=2, features=replace(FEATURES, gaps=False)),
]
SCHEMA = touchpoint_schema(FEATURES, with_site=False)
DECISION_SCHEMA = {"visitor": pl.UInt64, "decision_time": pl.Int64, "label": pl.Boolean}

# Few visitors and few times, so that ties, both ends of the window and journeys that are too long
# come up.
times = st.sampled_from([START + step * DAY // 2 for step in range(-4, 5)])
unit = st.floats(0, 1, width=32)
rows = st.tuples(
    st.integers(0, 2),
    times,
    st.booleans(),
    st.integers(1, 4),
    st.integers(2, 25),
    st.integers(2, 8),
    st.integers(1, 3),
    unit,
    unit,
)
Row = tuple[int, int, bool, int, int, int, int, float, float]


def in_window(time: int, decided: int, config: DataConfig) -> bool:
    strict = isinstance(config, TableData) and config.decision == "snapshot"
    return decided - LOOKBACK < time < decided + (0 if strict else 1)


def frame(table: list[Row]) -> pl.DataFrame:
    return pl.DataFrame(table, schema=SCHEMA, orient="row")


@st.composite
def tables_and_decisions(
    draw: st.DrawFn, contributions: int = 1
) -> tuple[list[Row], list[tuple[int, int, bool]], DataConfig]:
    config = draw(st.sampled_from(CONFIGS))
    if config is CONFIGS[0]:
        config = replace(CONFIGS[0], contributions=contributions)
    table = draw(st.lists(rows, max_size=30))
    decisions = []
    for visitor in draw(st.permutations([*range(3)] * config.contributions)):
        decided, label = draw(times), draw(st.booleans())
        if any(row[0] == visitor and in_window(row[1], decided, config) for row in table):
            decisions.append((visitor, decided, label))
    return table, decisions, config


def encode_rows(
    table: list[Row], decisions: list[tuple[int, int, bool]], config: DataConfig
) -> Examples:
    judged = pl.DataFrame(decisions, schema=DECISION_SCHEMA, orient="row")
    return encode(frame(table), judged, config)


def encode_slowly(
    table: list[Row], decisions: list[tuple[int, int, bool]], config: DataConfig
) -> Examples:
    """What `encode` promises, one touchpoint at a time."""
    categorical, numeric, lengths, labels = [], [], [], []
    for visitor, decided, label in decisions:
        journey = sorted(
            (row for row in table if row[0] == visitor and in_window(row[1], decided, config)),
            key=lambda row: row[1],
        )
        codes, numbers = [], []
        previous = None
        for _, time, _, *values, duration, price in journey:
            number = [0.0 if time == decided else duration, price]
            if config.features.gaps:
                gap = LOOKBACK if previous is None else time - previous
                number += [
                    math.log1p(seconds) / math.log1p(LOOKBACK) for seconds in (gap, decided - time)
                ]
            codes.append(values)
            numbers.append(number)
            previous = time
        codes, numbers = codes[-3:], numbers[-3:]
        lengths.append(len(codes))
        labels.append(float(label))
        padding = 3 - len(codes)
        width = len(numbers[0])
        categorical.append(codes + [[0] * 4] * padding)
        numeric.append(numbers + [[0.0] * width] * padding)
    width = 4 if config.features.gaps else 2
    whose = np.array([visitor for visitor, *_ in decisions], dtype=np.int64)
    return Examples(
        visitor=whose if config.contributions > 1 else None,
        categorical=np.array(categorical, dtype=np.uint16).reshape(-1, 3, 4),
        numeric=np.array(numeric, dtype=np.float32).reshape(-1, 3, width),
        length=np.array(lengths, dtype=np.int32),
        label=np.array(labels, dtype=np.float32),
    )


def assert_same(one: Examples, other: Examples) -> None:
    for name in ("categorical", "numeric", "length", "label"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=0)
    assert (one.visitor is None) == (other.visitor is None)
    if one.visitor is not None and other.visitor is not None:
        # By any numbers, as long as they tell the same visitors apart.
        assert one.visitor.dtype == np.int64
        same = one.visitor[:, None] == one.visitor
        np.testing.assert_array_equal(same, other.visitor[:, None] == other.visitor)


@given(st.integers(1, 3).flatmap(tables_and_decisions))
@settings(deadline=None, max_examples=400)
def test_as_the_slow_encoder_does(
    drawn: tuple[list[Row], list[tuple[int, int, bool]], DataConfig],
) -> None:
    assert_same(encode_rows(*drawn), encode_slowly(*drawn))


@given(tables_and_decisions(), st.data())
@settings(deadline=None, max_examples=300)
def test_nothing_after_the_decision_has_an_influence(
    drawn: tuple[list[Row], list[tuple[int, int, bool]], DataConfig], data: st.DataObject
) -> None:
    table, decisions, config = drawn
    decided = {visitor: time for visitor, time, _ in decisions}
    changed: list[Row] = []
    for row in table:
        visitor, time, *_ = row
        border = decided.get(visitor)
        if border is not None and time == border:
            row = (*row[:2], data.draw(st.booleans()), *row[3:7], data.draw(unit), row[8])
        elif border is None or time > border:
            if data.draw(st.booleans()):
                continue
            row = (visitor, time, *data.draw(rows)[2:])
            if border is not None:
                row = (visitor, border + data.draw(st.integers(1, 9 * DAY)), *row[2:])
        changed.append(row)
    assert_same(encode_rows(table, decisions, config), encode_rows(changed, decisions, config))


@given(st.integers(1, 3).flatmap(tables_and_decisions), st.data())
@settings(deadline=None)
def test_an_example_depends_on_its_visitor_alone(
    drawn: tuple[list[Row], list[tuple[int, int, bool]], DataConfig], data: st.DataObject
) -> None:
    table, decisions, config = drawn
    if not decisions:
        return
    leaver = data.draw(st.sampled_from(decisions))[0]
    stay = np.array([visitor != leaver for visitor, _, _ in decisions])
    without = encode_rows(
        [row for row in table if row[0] != leaver],
        [decision for decision in decisions if decision[0] != leaver],
        config,
    )
    assert_same(encode_rows(table, decisions, config).take(stay), without)


def test_a_decision_without_a_journey_is_an_error() -> None:
    table: list[Row] = [(1, START, False, 1, 2, 2, 1, 0.0, 0.0)]
    for decision, problem in (
        ((1, START - 1, False), "no touchpoint in its look-back"),
        ((1, START + LOOKBACK, False), "no touchpoint in its look-back"),
        ((2, START, False), "no touchpoint in its look-back"),
    ):
        with pytest.raises(ValueError, match=problem):
            encode_rows(table, [decision], CONFIGS[0])


def test_more_decisions_of_a_visitor_than_the_settings_allow_are_an_error() -> None:
    table: list[Row] = [(1, START, False, 1, 2, 2, 1, 0.0, 0.0)]
    for most in (1, 2):
        config = replace(CONFIGS[0], contributions=most)
        assert len(encode_rows(table, [(1, START, False)] * most, config)) == most
        with pytest.raises(ValueError, match=f"more decisions than data.contributions={most}"):
            encode_rows(table, [(1, START, False)] * (most + 1), config)


def test_no_decisions_make_no_examples() -> None:
    for table in ([], [(1, START, False, 1, 2, 2, 1, 0.0, 0.0)]):
        examples = encode_rows(table, [], CONFIGS[0])
        assert examples.categorical.shape == (0, 3, 4)
        assert examples.numeric.shape == (0, 3, 4)
