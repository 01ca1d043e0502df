from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import (
    ColumnNames,
    FeatureConfig,
    SettingError,
    SyntheticData,
    TableData,
    utc_seconds,
)
from journeys.decisions import DAY, decide, rows_between
from journeys.hashing import draw
from journeys.table import in_order

NOON = utc_seconds("2026-03-01T12:00:00Z", "")


def table_data(**settings: Any) -> TableData:
    return TableData(path="none.csv", lookback_days=10, horizon_days=2, **settings)


def touchpoints(rows: list[tuple[int, int, bool]]) -> pl.DataFrame:
    schema = {"visitor": pl.UInt64, "time": pl.Int64, "converted": pl.Boolean}
    return pl.DataFrame(rows, schema=schema, orient="row")


DECISIONS = [
    table_data(),
    table_data(decision="snapshot", snapshot_at="2026-03-01T12:00:00Z"),
    table_data(contributions=3),
]

tables = st.lists(
    st.tuples(
        st.integers(0, 5),
        # Both ends of the look-back (10 days) and of the horizon (2 days) among them.
        st.sampled_from([-11, -10, -9, -1, 0, 1, 2, 3]).map(lambda days: NOON + days * DAY),
        st.booleans(),
    ),
    max_size=60,
).map(touchpoints)


@pytest.mark.parametrize("config", DECISIONS, ids=["touchpoint", "snapshot", "three"])
@given(table=tables)
@settings(deadline=None)
def test_a_decision_depends_on_that_visitor_alone(config: TableData, table: pl.DataFrame) -> None:
    together = decide(table, config)
    alone = [decide(rows, config) for _, rows in table.group_by("visitor")]
    expected = pl.concat([together.clear(), *alone]).sort("visitor", maintain_order=True)
    assert together.equals(expected)


@given(table=tables, most=st.integers(1, 5))
@settings(deadline=None)
def test_decisions_at_touchpoints(table: pl.DataFrame, most: int) -> None:
    decisions = decide(table, table_data(contributions=most))
    assert not decisions.select("visitor", "decision_time").is_duplicated().any()
    for visitor in set(table["visitor"]):
        own = [(t, c) for v, t, c in in_order(table).iter_rows() if v == visitor]
        judged = decisions.filter(pl.col("visitor") == visitor)
        assert len(judged) == min(most, len({t for t, _ in own}))
        # The first is the one there would be without the others.
        place = draw(np.array([visitor], np.uint64), "decision touchpoint")[0] % len(own)
        assert judged["decision_time"][0] == own[int(place)][0]
        for _, decided, label in judged.iter_rows():
            assert decided in [t for t, _ in own]
            assert label == any(c and decided <= t <= decided + 2 * DAY for t, c in own)


@given(table=tables, most=st.integers(1, 5))
@settings(deadline=None)
def test_more_contributions_add_decisions_behind_the_others(table: pl.DataFrame, most: int) -> None:
    fewer, more = (decide(table, table_data(contributions=k)) for k in (most, most + 1))
    assert fewer.equals(more.group_by("visitor", maintain_order=True).head(most))


@given(table=tables)
@settings(deadline=None)
def test_decisions_at_a_snapshot(table: pl.DataFrame) -> None:
    expected = {}
    for visitor in set(table["visitor"]):
        own = [(t, c) for v, t, c in table.iter_rows() if v == visitor]
        if any(NOON - 10 * DAY < t < NOON for t, _ in own):
            expected[visitor] = any(c and NOON <= t <= NOON + 2 * DAY for t, c in own)
    decisions = decide(table, DECISIONS[1])
    assert dict(decisions.select("visitor", "label").iter_rows()) == expected
    assert (decisions["decision_time"] == NOON).all()


def test_each_touchpoint_of_a_visitor_is_drawn_about_equally_often() -> None:
    rows = [(visitor, NOON + i, False) for visitor in range(30_000) for i in range(3)]
    decided = decide(touchpoints(rows), DECISIONS[0])["decision_time"] - NOON
    for place in range(3):
        assert abs((decided == place).mean() - 1 / 3) < 0.014  # type: ignore[operator]


def test_each_pair_of_touchpoints_is_drawn_about_equally_often() -> None:
    rows = [(visitor, NOON + i, False) for visitor in range(30_000) for i in range(4)]
    decided = decide(touchpoints(rows), table_data(contributions=2))["decision_time"] - NOON
    drawn = decided.to_numpy().reshape(-1, 2)
    for pair in itertools.permutations(range(4), 2):
        # Five standard deviations.
        assert abs((drawn == pair).all(axis=1).mean() - 1 / 12) < 0.008


@given(
    table=tables,
    asked=st.lists(
        st.tuples(
            st.integers(0, 6),
            # Both far beyond all rows, and right at them.
            st.sampled_from([-100_000, -11, -10, -1, 0, 1, 3, 4, 100_000]),
            st.sampled_from([0, 1, 2, 9, 1_000_000]),
        ),
        max_size=9,
    ),
)
@settings(deadline=None)
def test_rows_between_two_times(table: pl.DataFrame, asked: list[tuple[int, int, int]]) -> None:
    table = in_order(table)
    visitor = np.array([v for v, _, _ in asked], dtype=np.uint64)
    since = np.array([NOON + days * DAY for _, days, _ in asked], dtype=np.int64)
    until = since + np.array([days * DAY for *_, days in asked], dtype=np.int64)
    begin, end = rows_between(table, visitor, since, until)
    for i, (key, *_) in enumerate(asked):
        expected = [
            row
            for row, (v, t, _) in enumerate(table.iter_rows())
            if v == key and since[i] <= t < until[i]
        ]
        assert list(range(begin[i], end[i])) == expected


def test_several_examples_need_decisions_at_touchpoints() -> None:
    with pytest.raises(SettingError, match=r"data.contributions=2: .*decision=snapshot"):
        replace(DECISIONS[1], contributions=2)
    with pytest.raises(SettingError, match=r"data.contributions=2: .*decision=visit"):
        table_data(decision="visit", columns=ColumnNames(visitor_id=""), contributions=2)
    with pytest.raises(SettingError, match=r"data.contributions=2: .*synthetic"):
        SyntheticData(contributions=2)
    with pytest.raises(SettingError, match=r"data.contributions=0: must be above 0"):
        table_data(contributions=0)


def test_visits_are_judged_by_themselves() -> None:
    config = table_data(
        decision="visit",
        columns=ColumnNames(visitor_id="", time=""),
        features=FeatureConfig(clock=False),
    )
    table = touchpoints([(3, 0, True), (1, 0, False), (2, 0, True)])
    assert decide(table, config).rows() == [(1, 0, False), (2, 0, True), (3, 0, True)]
