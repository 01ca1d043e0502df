"""Visits from a query to any database that SQLAlchemy reaches, one row a visit.

The site's query is read as a table, its mapped columns alone, in order of the time column. The
next ingest goes on two days before the newest visit that was read: rows may come late, and times
that are text may be in several zones, so that their order is not quite that of time. What is read
twice is stored once. A visit that begins later than `settle_minutes` before now is left for later.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote
from zoneinfo import ZoneInfo

import polars as pl
import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from client.secret import read_password
from client.sources.source import Batch, Cursor, SourceError
from client.sources.table import Piece, mapped, read_visits, refuse_missing
from conf.site import SqlSource

OVERLAP = 2 * 86400
"""Seconds before the newest visit at which the next ingest goes on. More than 26 hours, by which
two local times alike can differ."""

AT_ONCE = 20_000
"""Rows in memory as Python's objects, which take ten times the room of a frame's."""

_NAMED = re.compile(
    r"(?:no such (table|column): |unknown (column) '|(table) '|(relation|column) \")([\w.$]+)",
    re.IGNORECASE,
)
"""How SQLite, MariaDB, MySQL and PostgreSQL name what is not there."""


class Sql:
    """The source `sql`. Its cursor: `since`, UTC seconds."""

    def __init__(self, config: SqlSource, folder: Path) -> None:
        """Raises `SourceError` and `SecretError`."""
        self._config = config
        self._names = mapped(config.columns)
        try:
            url = _address(sa.make_url(config.url), folder)
        except ArgumentError:
            raise SourceError(
                "source.url: is no address that SQLAlchemy knows; "
                "write dialect+driver://user@host/database"
            ) from None
        # Without a password: this is what errors show.
        self._shown = f"{url.drivername} {url.host or ''}/{url.database or ''}"
        if config.password_file:
            url = url.set(password=read_password(folder / config.password_file))
        query = config.query.strip().rstrip(";")
        if not re.match(r"(?:\s|--.*\n|/\*.*?\*/|\()*(?:select|with|values)\b", query, re.I):
            raise SourceError("source.query: must be a SELECT")
        # A colon in it is no parameter of SQLAlchemy's.
        self._query = query.replace(":", r"\:")
        try:
            self._engine = sa.create_engine(url, poolclass=sa.NullPool, hide_parameters=True)
        except NoSuchModuleError:
            raise SourceError(
                f"source.url: SQLAlchemy knows no {url.drivername}; install its dialect or "
                "correct the name"
            ) from None
        except ImportError as error:
            raise SourceError(
                f"source.url: {url.drivername} needs the Python package {error.name}; install it"
            ) from None
        except (SQLAlchemyError, TypeError, ValueError):
            raise SourceError("source.url: has options that its dialect does not know") from None

    def check(self) -> None:
        """Connect, and look for the mapped columns. Raises `SourceError`."""
        with self._connect() as connection:
            self._refuse_missing_columns(connection)

    def batches(self, cursor: Cursor | None, now: int) -> Iterator[Batch]:
        """The visits that began, at the earliest, two days before the newest that was read."""
        since: int | None = (cursor or {}).get("since")
        until = now - 60 * self._config.settle_minutes
        row = 0
        with self._connect() as connection:
            self._refuse_missing_columns(connection)
            names, result = self._read(connection, since)
            for table in _tables(names, result, self._config.batch):
                piece = Piece(table, "source.query", row)
                row += len(table)
                visits, skipped = read_visits(piece, self._config.columns, self._config.timezone)
                visits = visits.filter(pl.col("time") < until)
                if len(visits):
                    newest = visits["time"].max()
                    assert isinstance(newest, int)
                    since = max(newest - OVERLAP, since or 0)
                yield Batch(visits, len(table), skipped, {"since": since})

    def _read(
        self, connection: sa.Connection, since: int | None
    ) -> tuple[list[str], sa.Result[Any]]:
        names = list(dict.fromkeys(self._names.values()))
        columns: list[sa.ColumnClause[Any]] = [sa.column(name) for name in names]
        visits = sa.text(self._query).columns(*columns).subquery("visits")
        time = visits.c[self._config.columns.time]
        statement = sa.select(*(visits.c[name] for name in names)).order_by(time)
        if since is not None:
            first = connection.execute(sa.select(time).where(time.is_not(None)).limit(1)).scalar()
            statement = statement.where(time >= _like(first, since, self._config.timezone))
        streaming = {"stream_results": True, "max_row_buffer": AT_ONCE}
        return names, connection.execution_options(**streaming).execute(statement)

    def _refuse_missing_columns(self, connection: sa.Connection) -> None:
        everything = sa.select(sa.text("*")).select_from(
            sa.text(self._query).columns().subquery("visits")
        )
        there = list(connection.execute(everything.limit(0)).keys())
        refuse_missing(self._names.values(), there, "source.query")

    @contextmanager
    def _connect(self) -> Iterator[sa.Connection]:
        """A connection; whatever the database refuses is told without what it says of data."""
        try:
            connection = self._engine.connect()
        except (SQLAlchemyError, OSError):
            raise SourceError(
                f"{self._shown}: cannot be reached; is source.url right, is the database running, "
                "is this account allowed with this password?"
            ) from None
        try:
            with connection:
                yield connection
        except DBAPIError as error:
            raise SourceError(f"source.query: {_said(error)}") from None
        except (SQLAlchemyError, OSError):
            raise SourceError("source.query: cannot be run as a SELECT; try it by itself") from None


def _address(url: sa.URL, folder: Path) -> sa.URL:
    if url.password is not None:
        raise SourceError("source.url: holds a password; put it into source.password_file")
    if url.get_backend_name() != "sqlite" or url.query:
        return url
    # Opened for reading only, and never created.
    path = folder / (url.database or "")
    if not path.is_file():
        raise SourceError(f"source.url: there is no file {path.name} at this place")
    return url.set(database=f"file:{quote(str(path))}", query={"mode": "ro", "uri": "true"})


def _said(error: DBAPIError) -> str:
    """What a database refused, as far as that cannot quote a cell."""
    if found := _NAMED.search(str(error.orig)):
        kind = next(word for word in found.groups() if word).lower()
        return f"there is no {kind} {found[5]}"
    return f"the database refused it or broke off ({type(error.orig).__name__}); try it by itself"


def _like(example: object, since: int, timezone: str) -> object:
    """`since` as what the column of times holds, such as `example`."""
    moment = datetime.fromtimestamp(since, UTC)
    match example:
        case datetime():
            local = moment.astimezone(ZoneInfo(timezone))
            return local if example.tzinfo is not None else local.replace(tzinfo=None)
        case date():
            return moment.date()
    # ISO 8601 begins with the date, whatever follows.
    return f"{moment:%Y-%m-%d}"


def _tables(names: Sequence[str], result: sa.Result[Any], rows: int) -> Iterator[pl.DataFrame]:
    """What a query gives, in tables of about `rows` rows."""
    parts: list[pl.DataFrame] = []
    for some in result.partitions(min(rows, AT_ONCE)):
        parts.append(_frame(names, some))
        if sum(map(len, parts)) >= rows:
            yield pl.concat(parts)
            parts = []
    if parts:
        yield pl.concat(parts)


def _frame(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> pl.DataFrame:
    """All as text: a driver may give cells of several kinds for one column."""
    columns = zip(names, zip(*rows, strict=True), strict=True)
    return pl.DataFrame(
        [pl.Series(name, [_told(c) for c in cells], dtype=pl.String) for name, cells in columns]
    )


def _told(cell: Any) -> str | None:
    if cell is None or isinstance(cell, str):
        return cell
    if isinstance(cell, date):
        return cell.isoformat()
    return bytes(cell).hex() if isinstance(cell, bytes | bytearray | memoryview) else str(cell)
