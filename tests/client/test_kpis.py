from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.kpis import ALL, KPIS, kpis
from journeys.store import VISITS, Store, StoreError

START = datetime(2026, 1, 30, tzinfo=UTC)


def visit(visitor: str, days: float, channel: str = "email", **changes: Any) -> dict[str, Any]:
    ordinary = {
        "site": "acme",
        "visitor_id": visitor,
        "time": START + timedelta(days=days),
        "channel": channel,
        "converted": False,
        "revenue": 0.0,
    }
    return ordinary | changes


def figures(*appended: list[dict[str, Any]], lookback_days: float = 30) -> pl.DataFrame:
    """The figures of a store to which one list of visits after the other was appended."""
    with TemporaryDirectory() as folder, Store(Path(folder)) as store:
        for visits in appended:
            store.append(pl.DataFrame(visits, schema=VISITS), None, {})
        return kpis(store, lookback_days)


def row(table: pl.DataFrame, month: str, channel: str) -> dict[str, Any]:
    return table.row(by_predicate=_is(month, channel), named=True)


def _is(month: str, channel: str) -> pl.Expr:
    return (pl.col("month") == month) & (pl.col("channel") == channel)


def test_figures_of_a_few_visits() -> None:
    table = figures(
        [
            visit("ann", 0, duration_s=10, bounced=True),
            visit("ann", 1, "direct", duration_s=20, bounced=False, converted=True, revenue=5),
            visit("bob", 1.5, bounced=False),
        ],
        [
            visit("ann", 3.25, duration_s=60, converted=True, revenue=2.5),
            visit("bob", 2.5, "direct", converted=True),
        ],
    )
    assert table.schema == KPIS
    assert table.select("month", "channel").rows() == [
        ("2026-01", "direct"),
        ("2026-01", "email"),
        ("2026-01", ALL),
        ("2026-02", "direct"),
        ("2026-02", "email"),
        ("2026-02", ALL),
        (ALL, "direct"),
        (ALL, "email"),
        (ALL, ALL),
    ]
    assert row(table, "2026-01", "email") == {
        "month": "2026-01",
        "channel": "email",
        "visits": 2,
        "visitors": 2,
        "conversions": 0,
        "conversion_rate": 0.0,
        "duration_s": 10.0,
        "bounce_rate": 0.5,
        "revenue": 0.0,
        "conversion_lag_days": None,
    }
    assert row(table, ALL, ALL) == {
        "month": ALL,
        "channel": ALL,
        "visits": 5,
        "visitors": 2,
        "conversions": 3,
        "conversion_rate": 0.6,
        "duration_s": 30.0,
        "bounce_rate": pytest.approx(1 / 3),
        "revenue": 7.5,
        "conversion_lag_days": 1.0,
    }
    # Nobody knows how long these were, nor whether they were bounces.
    unknown = row(table, "2026-02", "direct")
    assert (unknown["duration_s"], unknown["bounce_rate"]) == (None, None)
    # From a visit of another month and channel.
    assert unknown["conversion_lag_days"] == 1.0
    assert row(table, "2026-02", ALL)["conversion_lag_days"] == (1.0 + 3.25) / 2


def test_the_lookback_ends_just_after_its_length_before_the_conversion() -> None:
    second = 1 / 86400
    for first, expected in ((0.0, 0.0), (second, 30 - second)):
        table = figures([visit("ann", first), visit("ann", 30, converted=True)])
        assert row(table, ALL, ALL)["conversion_lag_days"] == pytest.approx(expected, abs=1e-9)
    table = figures([visit("ann", 0), visit("ann", 2, converted=True)], lookback_days=1)
    assert row(table, ALL, ALL)["conversion_lag_days"] == 0


def test_visitors_are_not_added_up() -> None:
    table = figures([visit(v, d, c) for v in "ab" for d in (0, 5) for c in ("email", "direct")])
    assert table["visitors"].to_list() == [2] * 9
    assert row(table, ALL, ALL)["visits"] == 8


def test_an_empty_store_has_no_figures(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        table = kpis(store)
    assert table.is_empty()
    assert table.schema == KPIS


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.append(pl.DataFrame([visit("ann", 0), visit("ann", 9)], schema=VISITS), None, {})
    path = tmp_path / "2026-02" / "1.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with (
        pytest.raises(StoreError, match=r"2026-02/1\.parquet: damaged"),
        Store(tmp_path, read_only=True) as store,
    ):
        kpis(store)


def test_a_file_that_the_manifest_does_not_name_does_not_count(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.append(pl.DataFrame([visit("ann", 0)], schema=VISITS), None, {})
        (tmp_path / "2026-01" / "9.parquet").write_bytes(
            (tmp_path / "2026-01" / "1.parquet").read_bytes()
        )
        assert row(kpis(store), ALL, ALL)["visits"] == 1


# ---------------------------------------------------------------------------- a plain loop


def looped(visits: list[dict[str, Any]], lookback_days: float) -> Iterator[dict[str, Any]]:
    months = sorted({f"{v['time']:%Y-%m}" for v in visits})
    channels = sorted({v["channel"] for v in visits})
    for month in [*months, ALL]:
        for channel in [*channels, ALL]:
            these = [
                v
                for v in visits
                if month in (ALL, f"{v['time']:%Y-%m}") and channel in (ALL, v["channel"])
            ]
            if these:
                yield {"month": month, "channel": channel} | of(these, visits, lookback_days)


def of(
    these: list[dict[str, Any]], visits: list[dict[str, Any]], lookback_days: float
) -> dict[str, Any]:
    lookback = timedelta(days=lookback_days)
    converted = [v for v in these if v["converted"]]
    lags = []
    for v in converted:
        seen = [
            w["time"]
            for w in visits
            if w["visitor_id"] == v["visitor_id"] and v["time"] - lookback < w["time"] <= v["time"]
        ]
        lags.append((v["time"] - min(seen)) / timedelta(days=1))
    return {
        "visits": len(these),
        "visitors": len({v["visitor_id"] for v in these}),
        "conversions": len(converted),
        "conversion_rate": len(converted) / len(these),
        "duration_s": known(statistics.fmean, [v["duration_s"] for v in these]),
        "bounce_rate": known(statistics.fmean, [v["bounced"] for v in these]),
        "revenue": sum(v["revenue"] for v in these),
        "conversion_lag_days": known(statistics.median, lags),
    }


def known(figure: Callable[[list[Any]], float], values: list[Any]) -> float | None:
    there = [value for value in values if value is not None]
    return figure(there) if there else None


VISIT = st.builds(
    lambda visitor, hours, second, channel, duration, bounced, converted, revenue: visit(
        visitor,
        (hours * 3600 + second) / 86400,
        channel,
        duration_s=duration,
        bounced=bounced,
        converted=converted,
        revenue=revenue,
    ),
    visitor=st.sampled_from(["a", "b", "c"]),
    hours=st.integers(0, 24 * 65),
    second=st.sampled_from([0, 0, 1]),
    channel=st.sampled_from(["direct", "email", "ai assistant"]),
    duration=st.none() | st.integers(0, 4000),
    bounced=st.none() | st.booleans(),
    converted=st.booleans(),
    revenue=st.integers(0, 100),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(VISIT, min_size=1, max_size=15), max_size=3), st.sampled_from([1, 7, 30]))
def test_figures_are_those_of_a_plain_loop(
    appended: list[list[dict[str, Any]]], lookback_days: float
) -> None:
    table = figures(*appended, lookback_days=lookback_days)
    expected = list(looped([v for visits in appended for v in visits], lookback_days))
    places = ["month", "channel"]
    assert table.select(places).rows() == [(e.pop("month"), e.pop("channel")) for e in expected]
    for found, wanted in zip(table.drop(places).to_dicts(), expected, strict=True):
        for name, value in wanted.items():
            assert found[name] == (value if value is None else pytest.approx(value, rel=1e-9)), name
