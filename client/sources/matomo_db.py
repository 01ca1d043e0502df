"""Visits out of Matomo's own database, MariaDB or MySQL.

Nothing but SELECTs is sent, all in transactions that may only read, and of the tables only the
columns named here: an account that was granted just these is enough. To a server that is not on
this machine all of it, the password first, goes by TLS, once certificate and host name are right.

Visits are read once they are settled: those whose last action falls into a window of time that
ended `settle_minutes` ago, in ranges of `idvisit`. The next window begins where the last one
ended. A visit that goes on after all comes again, with the same `visit_id`.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pymysql
from pymysql.cursors import SSCursor

from client.secret import read_password
from client.sources.matomo import DEVICE, DEVICES, RECORDS, REFERRERS, to_visits
from client.sources.source import Batch, Cursor, SourceError
from conf.site import MatomoDbSource


@dataclass(frozen=True)
class _Column:
    """One of Matomo's columns, and how it is selected."""

    name: str
    kind: pl.DataType
    sql: str = "{}"
    needed: bool = False
    """Not needed: a Matomo without it is read all the same, as if it were empty."""


Columns = dict[str, _Column]

# The server turns any text, also a broken one, into sound UTF-8.
_TEXT = "CONVERT({} USING utf8mb4)"

_COLUMNS = {
    "visit_id": _Column("idvisit", pl.UInt64(), needed=True),
    "visitor_id": _Column("idvisitor", pl.String(), "LOWER(HEX({}))", needed=True),
    # Without a look at the session's time zone; a date of zeros becomes null.
    "time": _Column(
        "visit_first_action_time",
        pl.Int64(),
        "TIMESTAMPDIFF(SECOND, '1970-01-01', {})",
        needed=True,
    ),
    "duration_s": _Column("visit_total_time", pl.Int64(), needed=True),
    "page_views": _Column("visit_total_actions", pl.Int64(), needed=True),
    "visit_number": _Column("visitor_count_visits", pl.Int64()),
    "referrer_type": _Column("referer_type", pl.Int64(), needed=True),
    "referrer_name": _Column("referer_name", pl.String(), _TEXT, needed=True),
    "referrer_keyword": _Column("referer_keyword", pl.String(), _TEXT),
    "campaign_name": _Column("campaign_name", pl.String(), _TEXT),
    "campaign_source": _Column("campaign_source", pl.String(), _TEXT),
    "campaign_medium": _Column("campaign_medium", pl.String(), _TEXT),
    "campaign_keyword": _Column("campaign_keyword", pl.String(), _TEXT),
    "device": _Column("config_device_type", pl.Int64()),
    "country": _Column("location_country", pl.String(), _TEXT),
}
_FILTERED = ("idsite", "visit_last_action_time")
_CONVERSION = ("idvisit", "idsite", "idgoal", "revenue")

# Keeps the server from looking through a site's whole index for each range of ids; a hint would do
# so too, but not where the account is given a view.
_BY_ID = "idsite + 0 = %s"

_NAMES = {name: f'column "{column.name}"' for name, column in _COLUMNS.items()}
_DEVICE = {number: DEVICE[name] for number, name in enumerate(DEVICES)}

_PROBLEMS = {
    1044: "the account may not use this database",
    1045: "the user or the password is wrong",
    1049: "there is no such database",
    1054: "a column is missing",
    1142: "the account may not read a table: it needs SELECT on {prefix}log_visit and "
    "{prefix}log_conversion",
    1143: "the account may not read a column that Matomo's tables have",
    1146: "a table is missing",
    2003: "the server cannot be reached",
    2006: "the server is gone",
    2013: "the connection was lost",
    2026: "the server offers no TLS, which source.tls_ca asks for",
}


class MatomoDb:
    """The visits of one site in Matomo's database."""

    def __init__(self, config: MatomoDbSource, folder: Path) -> None:
        """`folder`: what `password_file` and `tls_ca` are relative to. Raises `SecretError`."""
        self._config = config
        self._folder = folder
        file = config.password_file
        self._password = read_password(folder / file) if file else ""

    def check(self) -> None:
        """See `Source.check`. Reads no visit."""
        with closing(self._connect()) as connection:
            columns = self._columns(connection)
            # The server looks at the rights before it finds that there is nothing to read.
            self._read(connection, columns, _Window(None, 0), 1, 0)

    def batches(self, cursor: Cursor | None, now: int) -> Iterator[Batch]:
        """See `Source.batches`."""
        settled = now - 60 * self._config.settle_minutes
        windows = [_Window(None, settled)]
        if cursor is not None:
            begun = _Window(**cursor)
            windows = [begun, _Window(begun.until, settled)]
        with closing(self._connect()) as connection:
            columns = self._columns(connection)
            for window in windows:
                yield from self._batches(connection, columns, window)

    def _batches(self, connection: Any, columns: Columns, window: _Window) -> Iterator[Batch]:
        last = window.last
        low, high = self._span(connection, window, last)
        while low <= high:
            # Ids are shared by all of Matomo's sites, so that a range may hold few of ours.
            parts, rows = [], 0
            while low <= high and rows <= self._config.batch // 2:
                last = min(low + self._config.batch - 1, high)
                part = self._read(connection, columns, window, low, last)
                low = last + 1
                if part.is_empty():
                    low, high = self._span(connection, window, last)
                parts.append(part)
                rows += part.height
            visits, skipped = to_visits(pl.concat(parts), _NAMES)
            if rows:
                yield Batch(visits, rows, skipped, _Window(window.since, window.until, last).cursor)

    # ------------------------------------------------------------------------ statements

    def _columns(self, connection: Any) -> Columns:
        """The columns to select, by our names. Raises `SourceError` where a needed one lacks."""
        visits, conversions = (f"{self._config.prefix}{t}" for t in ("log_visit", "log_conversion"))
        wanted = _COLUMNS | {
            name: _Column(column, pl.String(), _TEXT, needed=True)
            for name, column in (
                ("consent", self._config.consent_column),
                ("purposes", self._config.purposes_column),
            )
            if column
        }
        needed = [(visits, c.name) for c in wanted.values() if c.needed]
        needed += [(visits, name) for name in _FILTERED]
        needed += [(conversions, name) for name in _CONVERSION]
        there = set(
            self._ask(
                connection,
                "SELECT table_name, column_name FROM information_schema.columns "
                "WHERE table_schema = %s AND table_name IN (%s, %s)",
                (self._config.database, visits, conversions),
            )
        )
        for table in (visits, conversions):
            if table not in {name for name, _ in there}:
                raise self._error(
                    f'table "{table}": there is none, or the account may not read it'
                    + self._other_prefixes(connection)
                )
        for table, name in needed:
            if (table, name) not in there:
                raise self._error(
                    f'table "{table}", column "{name}": there is none, or the account may not '
                    "read it"
                )
        return {name: c for name, c in wanted.items() if (visits, c.name) in there}

    def _other_prefixes(self, connection: Any) -> str:
        found = self._ask(
            connection,
            "SELECT table_name FROM information_schema.tables "
            "WHERE table_schema = %s AND table_name LIKE %s ORDER BY table_name LIMIT 5",
            (self._config.database, r"%log\_visit"),
        )
        names = ", ".join(name for (name,) in found)
        return f"; source.prefix may be wrong, there is {names}" if names else ""

    def _span(self, connection: Any, window: _Window, last: int) -> tuple[int, int]:
        """Smallest and largest id above `last` in the window; (1, 0) where there is none."""
        where, values = self._where(window)
        [(low, high)] = self._ask(
            connection,
            f"SELECT MIN(idvisit), MAX(idvisit) FROM `{self._config.prefix}log_visit` "
            f"WHERE {where} AND idvisit > %s",
            (*values, last),
        )
        return (1, 0) if low is None else (low, high)

    def _read(
        self, connection: Any, columns: Columns, window: _Window, low: int, high: int
    ) -> pl.DataFrame:
        """The window's visits with ids of `low` to `high`, shaped as `RECORDS`."""
        where, values = self._where(window, site=_BY_ID)
        selected = ", ".join(c.sql.format(f"`{c.name}`") for c in columns.values())
        goals = self._config.goals
        counted = "idgoal >= 0"
        if goals:
            counted += f" AND idgoal IN ({', '.join(['%s'] * len(goals))})"
        # Both statements see the same moment.
        self._ask(connection, "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
        visits = self._frame(
            connection,
            f"SELECT {selected} FROM `{self._config.prefix}log_visit` "
            f"WHERE {where} AND idvisit BETWEEN %s AND %s ORDER BY idvisit",
            (*values, low, high),
            {name: c.kind for name, c in columns.items()},
        )
        conversions = self._frame(
            connection,
            # Rounded as Matomo does: the column is a single-precision number.
            f"SELECT idvisit, SUM(ROUND(revenue, 2)) + 0e0 "
            f"FROM `{self._config.prefix}log_conversion` WHERE {_BY_ID} "
            f"AND idvisit BETWEEN %s AND %s AND {counted} GROUP BY idvisit",
            (self._config.site_id, low, high, *goals),
            {"visit_id": pl.UInt64(), "revenue": pl.Float64()},
        )
        self._ask(connection, "ROLLBACK")
        return _records(visits, conversions)

    def _where(self, window: _Window, site: str = "idsite = %s") -> tuple[str, tuple[Any, ...]]:
        where = f"{site} AND visit_last_action_time < %s"
        values: tuple[Any, ...] = (self._config.site_id, _utc(window.until))
        if window.since is not None:
            where += " AND visit_last_action_time >= %s"
            values += (_utc(window.since),)
        return where, values

    # ------------------------------------------------------------------------ connection

    def _connect(self) -> Any:
        tls = self._tls()
        try:
            return pymysql.connect(
                host=self._config.host,
                port=self._config.port,
                user=self._config.user,
                # A text would be sent as Latin-1.
                password=self._password.encode(),
                database=self._config.database,
                charset="utf8mb4",
                ssl=tls,
                connect_timeout=10,
                read_timeout=3600,
                cursorclass=SSCursor,
            )
        except (pymysql.MySQLError, OSError, RuntimeError) as error:
            problem = self._problem(error)
        raise self._error(problem)

    def _tls(self) -> ssl.SSLContext | None:
        """What checks the server's certificate and host name; None without `tls_ca`."""
        file = self._config.tls_ca
        if not file:
            return None
        try:
            context = ssl.create_default_context(cafile=self._folder / file)
        except ssl.SSLError:
            problem = "holds no certificate; it must be PEM text"
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        else:
            # Certificates made as the databases' guides say lack extensions that Python 3.13 wants.
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
            return context
        raise self._error(f"source.tls_ca={file}: {problem}")

    def _ask(self, connection: Any, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            with connection.cursor() as cursor:
                cursor.execute(sql, values)
                return list(cursor.fetchall())
        except (pymysql.MySQLError, OSError) as error:
            problem = self._problem(error)
        raise self._error(problem)

    def _frame(
        self, connection: Any, sql: str, values: Sequence[Any], schema: dict[str, pl.DataType]
    ) -> pl.DataFrame:
        frames = [pl.DataFrame(schema=schema)]
        try:
            with connection.cursor() as cursor:
                cursor.execute(sql, values)
                # Rows of a whole batch would be many times the size of its frame.
                while rows := cursor.fetchmany(20_000):
                    frames.append(pl.DataFrame(rows, schema, orient="row"))
                return pl.concat(frames)
        except (pymysql.MySQLError, OSError) as error:
            problem = self._problem(error)
        raise self._error(problem)

    def _problem(self, error: Exception) -> str:
        cause = getattr(error, "original_exception", None)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"its certificate is refused ({cause.verify_message}); source.tls_ca must be the "
                "authority that signed it, and source.host a name that is in it"
            )
        if isinstance(cause, ssl.SSLError):
            return "TLS failed"
        # The server's own words may quote what they like.
        code = error.args[0] if error.args else None
        known = _PROBLEMS.get(code) if isinstance(code, int) else None
        if known is None:
            return f"failed with error {code}" if isinstance(code, int) else "failed"
        return known.format(prefix=self._config.prefix)

    def _error(self, problem: str) -> SourceError:
        c = self._config
        return SourceError(f'database "{c.database}" at {c.host}:{c.port}: {problem}')


@dataclass(frozen=True)
class _Window:
    """Visits whose last action is at `since` or later, and before `until` (UTC seconds)."""

    since: int | None
    until: int
    last: int = 0
    """Ids up to this one were read."""

    @property
    def cursor(self) -> Cursor:
        return {"since": self.since, "until": self.until, "last": self.last}


def _utc(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"


def _records(visits: pl.DataFrame, conversions: pl.DataFrame) -> pl.DataFrame:
    known = conversions.with_columns(converted=True)
    records = visits.join(known, on="visit_id", how="left", maintain_order="left").with_columns(
        pl.col("visit_id").cast(pl.String),
        pl.col("referrer_type").replace_strict(REFERRERS, default=None, return_dtype=pl.String),
        pl.col("converted").fill_null(False),
        pl.col("revenue").fill_null(0.0),
    )
    if "device" in visits.columns:
        other = pl.when(pl.col("device").is_not_null()).then(pl.lit("other"))
        records = records.with_columns(
            pl.col("device").replace_strict(_DEVICE, default=other, return_dtype=pl.String)
        )
    return records.select(
        pl.col(name) if name in records.columns else pl.lit(None, kind).alias(name)
        for name, kind in RECORDS.items()
    )
