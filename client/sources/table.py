"""Rows of any table of visits, columns mapped by name, as `VISITS`: what files and queries share.

What a cell may say, by column; a row that says anything else is left out and counted (`Skipped`):

- `visitor_id`: text or a number, not empty; bytes are told in hexadecimal digits.
- `time`: ISO 8601 text, or a timestamp or date, from 1990 to 2100; without an offset it is local
  time in the source's `timezone`. A local time that the clocks skip is a bad one; of one that they
  repeat the earlier is meant.
- `converted`: true/false, 1/0 or yes/no. `do_not_track` and `opted_out`: the same, or empty.
- `duration_s`, `page_views`, `visit_number`: a number from 0 to a milliard, or empty; of the last
  two a whole one.
- `revenue`: a finite number; empty is 0, and a negative one counts as 0, because a refund is no
  revenue of a conversion.

The others cannot be wrong: an empty one is null, `channel`, `source`, `medium`, `campaign` and
`keyword` are cut to 200 characters, `device`, `country`, `referrer_type` and `click_id` are null
(`device`: other) where they are no such thing. A `click_id` that is no name might be a click's, so
that it is never kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import polars as pl

from client.sources.source import LONGEST_NAME, VISITS, Skipped, SourceError
from conf.site import REFERRER_TYPES, VisitColumns
from journeys.table import EARLIEST, LATEST, iso_seconds, nearest

LARGEST = 1e9
"""The largest duration, number of pages or of visits that is believed."""
REQUIRED = ("visitor_id", "time", "converted")
"""Columns that a table must have."""

NEEDED = (*REQUIRED, "do_not_track", "opted_out")
"""Columns that must be there where they are mapped, even in a format that leaves out nulls: were
one's name misspelt, a refusal would be missed."""

_DEVICES = {
    "desktop": ("desktop", "computer", "pc", "laptop"),
    "mobile": ("mobile", "smartphone", "phone", "mobile phone", "feature phone", "phablet"),
    "tablet": ("tablet", "ipad"),
}
_SECONDS = "\0seconds"
# 01 and 00 are bits of MySQL's, in hexadecimal digits.
_YES = ("true", "1", "yes", "1.0", "01")
_NO = ("false", "0", "no", "0.0", "00")


@dataclass(frozen=True)
class Piece:
    """Some rows of a table, as it holds them."""

    table: pl.DataFrame
    place: str
    """The file's name, or what else the rows are rows of."""
    row: int
    """Rows that came before."""
    broken: pl.Series | None = None
    """Boolean, one a row: it cannot be taken apart. None: all can."""


def mapped(columns: VisitColumns) -> dict[str, str]:
    """The table's column of each column of `VISITS` that it has."""
    names = {field.name: str(getattr(columns, field.name)) for field in fields(columns)}
    return {name: column for name, column in names.items() if column}


def refuse_missing(
    wanted: Iterable[str],
    there: Sequence[str],
    place: str,
    advice: str = "correct source.columns in site.yaml",
) -> None:
    """Raise `SourceError` for the first of `wanted` that is not `there`, with those nearest."""
    for column in wanted:
        if column not in there:
            raise SourceError(
                f'{place}: has no column "{column}"{nearest(column, there)}; {advice}'
            )


def read_visits(
    piece: Piece, columns: VisitColumns, timezone: str
) -> tuple[pl.DataFrame, tuple[Skipped, ...]]:
    """The good rows as visits (`VISITS`), and what was left out.

    Raises:
        SourceError: A column is missing, or of a type that cannot be what it is mapped to.
    """
    names = mapped(columns)
    refuse_missing((names[name] for name in REQUIRED), piece.table.columns, piece.place)
    reader = _Reader(piece.table.schema, timezone, piece.place)
    for name, column in names.items():
        if column in piece.table.columns:
            reader.read(name, column)
    return reader.sort_out(piece)


def keep_good(
    piece: Piece, values: Sequence[pl.Expr], problems: Sequence[tuple[str, pl.Expr]]
) -> tuple[pl.DataFrame, tuple[Skipped, ...]]:
    """`values` of the rows without a problem; of the others, how many have which first problem.

    Args:
        piece: The rows.
        values: What is wanted of a good row; no column may be called `problem`.
        problems: What may be wrong with a row, and where it is.
    """
    table = piece.table
    if piece.broken is not None and piece.broken.any():
        table = table.with_columns(piece.broken.alias("\0broken"))
        problems = [("cannot be taken apart into its columns", pl.col("\0broken")), *problems]
    codes = [
        pl.when(there).then(pl.lit(code, pl.UInt8)) for code, (_, there) in enumerate(problems)
    ]
    frame = table.select(*values, problem=pl.coalesce(codes))
    bad = frame["problem"]
    frame = frame.drop("problem")
    if bad.null_count() == len(bad):
        return frame, ()
    found = (
        bad.to_frame()
        .with_row_index("row", piece.row + 1)
        .drop_nulls()
        .group_by("problem")
        .agg(pl.len(), pl.col("row").min())
        .sort("problem")
    )
    skipped = tuple(
        Skipped(problems[code][0], count, f"{piece.place}, row {row}")
        for code, count, row in found.iter_rows()
    )
    return frame.filter(bad.is_null()), skipped


# ---------------------------------------------------------------------------- columns


class _Reader:
    """Collects how each column of `VISITS` comes from the table's."""

    def __init__(self, types: pl.Schema, timezone: str, place: str) -> None:
        self._types = types
        self._timezone = timezone
        self._place = place
        self._values: dict[str, pl.Expr] = {
            name: pl.lit(None, kind) for name, kind in VISITS.items()
        }
        self._values["revenue"] = pl.lit(0.0)
        self._problems: list[tuple[str, pl.Expr]] = []
        self._seconds: pl.Expr | None = None

    def read(self, name: str, column: str) -> None:
        match name:
            case "visitor_id":
                value = self._text(column)
                self._refuse(column, "is empty", value.is_null())
            case "time":
                value = self._time(column)
            case "converted" | "do_not_track" | "opted_out":
                value = self._flag(column, required=name == "converted")
            case "duration_s":
                value = self._number(column)
                self._refuse(column, "is not from 0 to 1e9", ~value.is_between(0, LARGEST))
            case "page_views" | "visit_number":
                number = self._number(column)
                self._refuse(column, "is not from 0 to 1e9", ~number.is_between(0, LARGEST))
                self._refuse(column, "is not a whole number", number != number.floor())
                value = number.cast(pl.Int64, strict=False)
            case "revenue":
                value = pl.max_horizontal(self._number(column).fill_null(0.0), pl.lit(0.0))
            case "device":
                value = device(self._text(column))
            case "country":
                value = _country(self._text(column))
            case "referrer_type":
                word = self._text(column).str.to_lowercase()
                value = pl.when(word.is_in(REFERRER_TYPES)).then(word)
            case "click_id":
                word = self._text(column)
                value = pl.when(word.str.contains(r"^[A-Za-z_]{2,20}$")).then(word)
                value = value.str.to_lowercase()
            case "visit_id" | "consent" | "purposes":
                # Whole: half a purpose might be another one.
                value = self._text(column)
            case _:
                value = cut(self._text(column))
        self._values[name] = value

    def sort_out(self, piece: Piece) -> tuple[pl.DataFrame, tuple[Skipped, ...]]:
        if self._seconds is not None:
            # Once, for the value and for each of its problems.
            piece = replace(piece, table=piece.table.with_columns(self._seconds.alias(_SECONDS)))
        values = [value.alias(name) for name, value in self._values.items()]
        return keep_good(piece, values, self._problems)

    def _refuse(self, column: str, problem: str, there: pl.Expr) -> None:
        self._problems.append((f'column "{column}": {problem}', there))

    def _text(self, column: str) -> pl.Expr:
        """The column as text without spaces around it, nothing as null."""
        kind, cell = self._types[column], pl.col(column)
        if isinstance(kind, pl.Binary):
            cell = cell.bin.encode("hex")
        elif kind.is_numeric() or isinstance(kind, (pl.Boolean, pl.Categorical, pl.Enum, pl.Null)):
            cell = cell.cast(pl.String)
        elif not isinstance(kind, pl.String):
            raise self._wrong_type(column, "where text or a number is needed")
        cell = cell.str.strip_chars()
        return pl.when(cell != "").then(cell)

    def _time(self, column: str) -> pl.Expr:
        kind, cell = self._types[column], pl.col(column)
        if isinstance(kind, pl.Datetime) and kind.time_zone is not None:
            told = value = cell.dt.epoch("s")
        elif isinstance(kind, (pl.Datetime, pl.Date)):
            told = cell.dt.epoch("s")
            value = self._utc(told)
        elif isinstance(kind, (pl.String, pl.Null)):
            cell = self._text(column)
            self._seconds = iso_seconds(cell)
            told = pl.col(_SECONDS)
            # An offset stands behind the minutes, at the earliest.
            offset = cell.str.slice(16).str.contains("[Z+-]")
            value = pl.when(offset).then(told).otherwise(self._utc(told))
        else:
            raise self._wrong_type(column, "not times; write ISO 8601 or timestamps")
        absurd = "is before 1990 or after 2100"
        self._refuse(column, "is empty", cell.is_null())
        self._refuse(column, "not ISO-8601", told.is_null())
        self._refuse(column, absurd, ~told.is_between(EARLIEST, LATEST))
        self._refuse(column, f"does not exist in {self._timezone}", value.is_null())
        return value

    def _utc(self, local: pl.Expr) -> pl.Expr:
        """UTC seconds of seconds that were counted as if local time were UTC."""
        if self._timezone == "UTC":
            return local
        sane = pl.when(local.is_between(EARLIEST, LATEST)).then(local)
        moment = (sane * 1_000_000).cast(pl.Datetime("us"))
        zoned = moment.dt.replace_time_zone(
            self._timezone, ambiguous="earliest", non_existent="null"
        )
        return zoned.dt.epoch("s")

    def _flag(self, column: str, *, required: bool) -> pl.Expr:
        if isinstance(self._types[column], pl.Boolean):
            cell = value = pl.col(column)
        else:
            cell = self._text(column).str.to_lowercase()
            value = pl.when(cell.is_in(_YES)).then(True).when(cell.is_in(_NO)).then(False)
        if required:
            self._refuse(column, "is empty", cell.is_null())
        wrong = cell.is_not_null() & value.is_null()
        self._refuse(column, "not true/false, 1/0 or yes/no", wrong)
        return value

    def _number(self, column: str) -> pl.Expr:
        """Float64, finite where the row is good."""
        kind, cell = self._types[column], pl.col(column)
        if not (kind.is_numeric() or isinstance(kind, pl.Boolean)):
            cell = self._text(column)
        value = cell.cast(pl.Float64, strict=False)
        self._refuse(column, "not a number", cell.is_not_null() & value.is_null())
        self._refuse(column, "not a finite number", ~value.is_finite())
        return value

    def _wrong_type(self, column: str, rule: str) -> SourceError:
        kind = self._types[column]
        return SourceError(f'{self._place}, column "{column}": holds {kind.base_type()}, {rule}')


def cut(text: pl.Expr) -> pl.Expr:
    """The first 200 characters."""
    return text.str.head(LONGEST_NAME)


def device(text: pl.Expr) -> pl.Expr:
    """desktop, mobile, tablet or other; null stays null."""
    known = {word: kind for kind, words in _DEVICES.items() for word in words}
    kind = text.str.to_lowercase().replace_strict(known, default="other", return_dtype=pl.String)
    return pl.when(text.is_not_null()).then(kind)


def _country(text: pl.Expr) -> pl.Expr:
    code = text.str.to_lowercase().replace("uk", "gb")
    return pl.when(code.str.contains("^[a-z]{2}$")).then(code)
