from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError

from client.secret import SecretError
from client.sources.source import VISITS, Batch, Cursor, SourceError
from client.sources.sql import Sql
from conf.site import SqlSource, VisitColumns
from tests.mariadb import Database, mariadb

SECRET = "s3cret"
DAY = 86400
START = 1_772_323_200
"""2026-03-01 UTC."""
NOW = START + 30 * DAY
COLUMNS = VisitColumns(visitor_id="who", time="at", converted="bought", visit_id="id")


def iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def warehouse(folder: Path, rows: Sequence[tuple[Any, ...]], types: str = "") -> Path:
    """An SQLite file with a table `visits` of who, at, bought, id, page."""
    path = folder / "w.db"
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"CREATE TABLE visits ({types or 'who, at, bought, id, page'})")
        connection.executemany("INSERT INTO visits VALUES (?, ?, ?, ?, ?)", rows)
    return path


def days(count: int, start: int = 0) -> list[tuple[Any, ...]]:
    """A visit a day, the newest first."""
    return [
        (f"v{day % 3}", iso(START + day * DAY), day % 2, day, SECRET)
        for day in reversed(range(start, start + count))
    ]


def source(folder: Path, query: str = "SELECT * FROM visits", **more: Any) -> Sql:
    config = {"url": "sqlite:///w.db", "columns": COLUMNS} | more
    return Sql(SqlSource(query=query, **config), folder)


def read(folder: Path, cursor: Cursor | None = None, now: int = NOW, **more: Any) -> list[Batch]:
    batches = list(source(folder, **more).batches(cursor, now))
    for batch in batches:
        assert batch.visits.schema == VISITS
        json.dumps(batch.cursor)
    return batches


def ids(batches: list[Batch]) -> list[int]:
    return [int(name) for batch in batches for name in batch.visits["visit_id"]]


def test_rows_become_visits_in_order_of_time(tmp_path: Path) -> None:
    warehouse(tmp_path, days(5))
    source(tmp_path).check()
    batches = read(tmp_path, batch=2)
    assert [len(batch.visits) for batch in batches] == [2, 2, 1]
    assert ids(batches) == [0, 1, 2, 3, 4]
    assert batches[1].visits.select("visitor_id", "time", "converted").rows() == [
        ("v2", START + 2 * DAY, False),
        ("v0", START + 3 * DAY, True),
    ]


def test_the_database_is_opened_for_reading_only(tmp_path: Path) -> None:
    path = warehouse(tmp_path, days(3))
    before = path.read_bytes()
    read(tmp_path)
    for query in ("SELECT 1; DROP TABLE visits", "WITH x AS (SELECT 1) DELETE FROM visits"):
        with pytest.raises(SourceError, match=r"^source\.query: "):
            read(tmp_path, query=query)
    with pytest.raises(OperationalError), source(tmp_path)._engine.connect() as connection:
        connection.exec_driver_sql("DELETE FROM visits")
    assert path.read_bytes() == before
    with pytest.raises(SourceError, match="no file none"):
        source(tmp_path, url="sqlite:///none.db")
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM visits;",
        "  -- all\n select who, at, bought, id from visits  ;\n",
        "/* all */ WITH v AS (SELECT * FROM visits) SELECT * FROM v",
        "SELECT *, ':name' AS a, '10:30' AS b, '100%' AS c FROM visits WHERE page <> ':x'",
        'SELECT who AS "the :who", who, at, bought, id FROM visits ORDER BY id DESC',
        "SELECT * FROM visits WHERE page LIKE '%' UNION SELECT * FROM visits",
    ],
)
def test_queries(tmp_path: Path, query: str) -> None:
    warehouse(tmp_path, days(3))
    assert ids(read(tmp_path, query=query)) == [0, 1, 2]


def test_only_mapped_columns_are_asked_for(tmp_path: Path) -> None:
    # A column that cannot be had breaks a query that asks for it.
    broken = "SELECT who, at, bought, id, abs(-9223372036854775807 - 1) AS page FROM visits"
    warehouse(tmp_path, days(3))
    assert ids(read(tmp_path, query=broken)) == [0, 1, 2]


def test_cells_of_every_kind(tmp_path: Path) -> None:
    rows = [
        (7, "2026-03-01 00:00:00", 1, "a", None),
        ("v", "2026-03-01T02:00:00+01:00", "yes", 2, None),
        (b"\x01\xff", "2026-03-01 02:00:00.5", 0.0, None, None),
        (None, "2026-03-01T03:00:00Z", 0, 4, None),
        ("v", "2026-03-01T04", 0, 5, None),
        ("v", None, 0, 6, None),
        ("v", "2026-03-01T05:00:00Z", SECRET, 7, None),
    ]
    warehouse(tmp_path, rows)
    (batch,) = read(tmp_path)
    assert batch.rows == 7
    assert sorted((one.reason, one.count) for one in batch.skipped) == [
        ('column "at": is empty', 1),
        ('column "at": not ISO-8601', 1),
        ('column "bought": not true/false, 1/0 or yes/no', 1),
        ('column "who": is empty', 1),
    ]
    assert {one.first.partition(", ")[0] for one in batch.skipped} == {"source.query"}
    told = batch.visits.sort("time").select("time", "converted", "visit_id").rows()
    assert told == [
        (START, True, "a"),
        (START + 3600, True, "2"),
        (START + 7200, False, None),
    ]


# ---------------------------------------------------------------------------- going on


def test_every_cursor_goes_on_without_a_gap(tmp_path: Path) -> None:
    warehouse(tmp_path, days(20))
    batches = read(tmp_path, batch=3)
    assert ids(batches) == list(range(20))
    for done, batch in enumerate(batches, start=1):
        rest = ids(read(tmp_path, batch.cursor, batch=3))
        before = ids(batches[:done])
        assert sorted({*before, *rest}) == list(range(20))
        # Two days again, and no more.
        assert rest == list(range(max(before[-1] - 2, 0), 20))


def test_late_rows_and_those_of_other_zones_are_found(tmp_path: Path) -> None:
    """The order of texts is that of local times, which may be 26 hours from that of time."""
    newest = START + 10 * DAY
    table = days(10)
    path = warehouse(tmp_path, [*table, ("v", iso(newest), 0, 10, "")])
    *_, last = read(tmp_path)
    west = "2026-03-10T00:00:00-11:00"
    assert west < iso(newest)
    with closing(sqlite3.connect(path)) as connection, connection:
        rows = [("v", iso(newest - 40 * 3600), 0, 11, ""), ("w", west, 0, 12, "")]
        connection.executemany("INSERT INTO visits VALUES (?, ?, ?, ?, ?)", rows)
    assert {11, 12} <= set(ids(read(tmp_path, last.cursor)))


def test_visits_that_may_go_on_are_left(tmp_path: Path) -> None:
    rows = [("v", iso(NOW - minutes * 60), 0, minutes, "") for minutes in (-9, 30, 59, 61, 90)]
    warehouse(tmp_path, rows)
    batches = read(tmp_path)
    assert ids(batches) == [90, 61]
    later = read(tmp_path, batches[-1].cursor, now=NOW + 3600)
    assert ids(later) == [90, 61, 59, 30]


def test_no_visits(tmp_path: Path) -> None:
    warehouse(tmp_path, [])
    assert read(tmp_path) == []
    warehouse(tmp_path, [("v", "soon", 0, 1, "")] * 3)
    (batch,) = read(tmp_path)
    assert batch.cursor == {"since": None}
    assert len(read(tmp_path, batch.cursor)) == 1


# ---------------------------------------------------------------------------- refusing


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"query": "DELETE FROM visits"}, r"source\.query: must be a SELECT"),
        ({"query": "SELECT * FROM visit"}, r"source\.query: there is no table visit$"),
        ({"query": "SELECT whom FROM visits"}, r"source\.query: there is no column whom$"),
        ({"query": f"SELECT {SECRET} FROM"}, r"source\.query: the database refused it"),
        ({"query": "SELECT who, at, bought AS buys, id FROM visits"}, '"bought"; nearest: buys'),
        ({"url": "nonsense"}, r"source\.url: is no address"),
        ({"url": f"nosuchdb://me@h/{SECRET}db"}, r"source\.url: SQLAlchemy knows no nosuchdb"),
        ({"url": f"mysql+pymysql://me:{SECRET}@h/d"}, "holds a password; put it into"),
        ({"url": "postgresql+psycopg2cffi://me@h/d"}, "needs the Python package psycopg2cffi"),
        ({"url": "mysql+pymysql://me@127.0.0.1:1/d"}, r"^mysql\+pymysql 127.0.0.1/d: cannot be"),
    ],
)
def test_what_cannot_be_used(tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    warehouse(tmp_path, days(2))
    with pytest.raises(SourceError, match=problem) as caught:
        source(tmp_path, **settings).check()
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_read_that_breaks_off_says_nothing_of_cells(tmp_path: Path) -> None:
    path = warehouse(tmp_path, days(3))
    with closing(sqlite3.connect(path)) as connection, connection:
        # Text that is not UTF-8, which the driver would quote.
        cell = SECRET.encode() + b"\xff"
        connection.execute("UPDATE visits SET who = CAST(? AS TEXT) WHERE id = 2", (cell,))
    with pytest.raises(SourceError, match=r"^source\.query: the database refused") as caught:
        read(tmp_path)
    assert SECRET not in str(caught.value)


def test_password_files(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    url = "mysql+pymysql://me@127.0.0.1:1/d"
    with pytest.raises(SecretError):
        source(tmp_path, url=url, password_file="password")
    secret.write_text(SECRET + "\n")
    os.chmod(secret, 0o644)
    with pytest.raises(SecretError, match="chmod 600"):
        source(tmp_path, url=url, password_file="password")
    os.chmod(secret, 0o600)
    with pytest.raises(SourceError, match="with this password") as caught:
        source(tmp_path, url=url, password_file="password").check()
    assert SECRET not in str(caught.value)


# ---------------------------------------------------------------------------- any rows at all

CELLS = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.binary(max_size=8),
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.sampled_from(["2026-03-01", "2026-03-01T10:00:00+01:00", "9999-12-31 23:59", "yes", "0"]),
)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.lists(st.tuples(CELLS, CELLS, CELLS, CELLS, CELLS), min_size=5, max_size=20))
def test_any_rows(tmp_path: Path, rows: list[tuple[Any, ...]]) -> None:
    warehouse(tmp_path, rows)
    columns = VisitColumns(
        visitor_id="who", time="at", converted="bought", campaign="id", revenue="page"
    )
    batches = read(tmp_path, now=4_000_000_000, columns=columns, timezone="Asia/Tehran", batch=7)
    assert sum(batch.rows for batch in batches) == len(rows)
    for batch in batches:
        needed = batch.visits.select("visitor_id", "time", "converted")
        assert needed.null_count().sum_horizontal().item() == 0
        assert batch.visits["revenue"].is_finite().all()


# ---------------------------------------------------------------------------- a real server


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    with mariadb(tmp_path_factory.mktemp("mariadb")) as server:
        server.execute("CREATE DATABASE shop CHARACTER SET utf8mb4")
        server.execute(
            "CREATE TABLE shop.visits (who binary(2), at datetime(3), day date, bought bit, "
            "id bigint unsigned, paid decimal(10, 2), page varchar(99))"
        )
        rows = [
            (bytes([1, day]), datetime.fromtimestamp(START + day * DAY, UTC), day, "9.50")
            for day in range(9)
        ]
        server.execute(
            "INSERT INTO shop.visits VALUES (%s, %s, NULL, 1, %s, %s, '')",
            [(who, at.replace(tzinfo=None), number, paid) for who, at, number, paid in rows],
        )
        server.execute("UPDATE shop.visits SET day = at")
        server.execute(f"CREATE USER reader@'127.0.0.1' IDENTIFIED BY '{SECRET}@/:'")
        server.execute("GRANT SELECT ON shop.visits TO reader@'127.0.0.1'")
        yield server


def in_mariadb(folder: Path, database: Database, password: str = f"{SECRET}@/:") -> dict[str, Any]:
    (folder / "password").write_text(password)
    os.chmod(folder / "password", 0o600)
    columns = VisitColumns(
        visitor_id="who", time="at", converted="bought", visit_id="id", revenue="paid"
    )
    url = f"mysql+pymysql://reader@127.0.0.1:{database.port}/shop"
    return {"url": url, "password_file": "password", "columns": columns}


@pytest.mark.parametrize("time", ["at", "day"])
def test_mariadb(tmp_path: Path, database: Database, time: str) -> None:
    config = in_mariadb(tmp_path, database)
    columns = replace(config["columns"], time=time)
    query = "SELECT * FROM visits WHERE page NOT LIKE '%:x'"
    config |= {"columns": columns, "query": query, "batch": 4}
    with database.listening() as heard:
        batches = read(tmp_path, **config)
    assert ids(batches) == list(range(9))
    (visit,) = batches[0].visits.head(1).to_dicts()
    assert (visit["visitor_id"], visit["time"], visit["revenue"]) == ("0100", START, 9.5)
    selected = [one for one in heard if one.startswith("SELECT visits.") and "ORDER BY" in one]
    assert len(selected) == 1
    assert "page" not in selected[0].partition("FROM")[0]

    with database.listening() as heard:
        rest = read(tmp_path, batches[0].cursor, **config)
    assert ids(rest) == list(range(1, 9))
    assert any("2026-03-02" in one for one in heard)


def test_mariadb_refuses(tmp_path: Path, database: Database) -> None:
    config = in_mariadb(tmp_path, database)
    for query, problem in (
        ("SELECT * FROM orders", "source.query: "),
        ("SELECT whom FROM visits", "there is no column whom"),
        ("DELETE FROM visits RETURNING *", "must be a SELECT"),
    ):
        with pytest.raises(SourceError, match=problem):
            read(tmp_path, **config, query=query)
    wrong = in_mariadb(tmp_path, database, password="another" + SECRET)
    with pytest.raises(SourceError, match="is this account allowed with this password") as caught:
        source(tmp_path, **wrong).check()
    assert SECRET not in str(caught.value)
