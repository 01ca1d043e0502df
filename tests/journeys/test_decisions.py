from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import ColumnNames, FeatureConfig, TableData, utc_seconds
from journeys.decisions import DAY, decide

NOON = utc_seconds("2026-03-01T12:00:00Z", "")


def table_data(**settings: Any) -> TableData:
    return TableData(path="none.csv", lookback_days=10, horizon_days=2, **settings)


def touchpoints(rows: list[tuple[int, int, bool]]) -> pl.DataFrame:
    schema = {"visitor": pl.UInt64, "time": pl.Int64, "converted": pl.Boolean}
    return pl.DataFrame(rows, schema=schema, orient="row")


DECISIONS = [
    table_data(),
    table_data(decision="snapshot", snapshot_at="2026-03-01T12:00:00Z"),
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


@pytest.mark.parametrize("config", DECISIONS, ids=["touchpoint", "snapshot"])
@given(table=tables)
@settings(deadline=None)
def test_a_decision_depends_on_that_visitor_alone(config: TableData, table: pl.DataFrame) -> None:
    together = decide(table, config)
    assert together["visitor"].is_unique().all()
    alone = [decide(rows, config) for _, rows in table.group_by("visitor")]
    expected = pl.concat([together.clear(), *alone]).sort("visitor")
    assert together.sort("visitor").equals(expected)


@given(table=tables)
@settings(deadline=None)
def test_decisions_at_a_touchpoint(table: pl.DataFrame) -> None:
    decisions = decide(table, DECISIONS[0])
    assert set(decisions["visitor"]) == set(table["visitor"])
    for visitor, decided, label in decisions.iter_rows():
        own = [(t, c) for v, t, c in table.iter_rows() if v == visitor]
        assert decided in [t for t, _ in own]
        assert label == any(c and decided <= t <= decided + 2 * DAY for t, c in own)


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


def test_visits_are_judged_by_themselves() -> None:
    config = table_data(
        decision="visit",
        columns=ColumnNames(visitor_id="", time=""),
        features=FeatureConfig(clock=False),
    )
    table = touchpoints([(3, 0, True), (1, 0, False), (2, 0, True)])
    assert decide(table, config).rows() == [(1, 0, False), (2, 0, True), (3, 0, True)]
