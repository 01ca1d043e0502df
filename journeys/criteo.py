"""The Criteo Attribution Modeling for Bidding data set: impressions of banners, one a line.

A TSV of 22 columns with a header, gzipped or not, in order of time (Diemert et al., "Attribution
Modeling Increases Efficiency of Bidding in Display Advertising", AdKDD 2017). Times are seconds
from the beginning of the 30 days that it covers; when that was is not told.

An impression is a touchpoint. A conversion is told at each impression that it may be due to; here
the last of these, by time and then by line, is the touchpoint that converted, at its own time. Of
the other columns those that are only known afterwards, such as `click_nb`, are no features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from conf.schema import ColumnNames, CriteoData, TableData
from journeys.errors import JourneyDataError
from journeys.hashing import hash_text
from journeys.lines import parse_fields, read_lines
from journeys.table import encode_rows, in_order, with_derived

HEADER = (
    "timestamp",
    "uid",
    "campaign",
    "conversion",
    "conversion_timestamp",
    "conversion_id",
    "attribution",
    "click",
    "click_pos",
    "click_nb",
    "cost",
    "cpo",
    "time_since_last_click",
    *(f"cat{i}" for i in range(1, 10)),
)
"""Names of the columns."""

EPOCH = 946_684_800
"""2000-01-01 UTC in seconds: what second 0 counts as. A constant of ours, so that hours and
weekdays are right but for a shift that is the same for all."""
LATEST = 10 * 365 * 86400
"""A later time (in seconds from the beginning) is taken for an error."""

ROWS = 500_000
"""Lines read at once."""


@dataclass(frozen=True)
class Impressions:
    """Some lines of the file."""

    table: pl.DataFrame
    """`uid` String, `timestamp` Int64 (seconds from the beginning), `campaign` String, `conversion`
    Boolean, `conversion_id` String, and further columns as text; null where a cell is bad."""
    broken: pl.Series
    """Boolean: the line has more columns than the header."""
    row: int
    """Lines before, the header not counted."""
    offset: int
    """Where the next lines begin, in bytes of the text."""


PROBLEMS: tuple[tuple[str, str, pl.Expr], ...] = (
    ("uid", "is empty", pl.col("uid").is_null()),
    ("timestamp", f"not whole seconds from 0 to {LATEST}", pl.col("timestamp").is_null()),
    ("campaign", "is empty", pl.col("campaign").is_null()),
    ("conversion", "not 0 or 1", pl.col("conversion").is_null()),
    ("conversion_id", "is empty", pl.col("conversion_id").is_null()),
)
"""What may be wrong with an impression: column, problem, and where it is."""


def read_impressions(
    path: Path,
    further: tuple[str, ...] = (),
    *,
    limit: int = 0,
    rows: int = ROWS,
    row: int = 0,
    offset: int = 0,
) -> Iterator[Impressions]:
    """The impressions of the file at `path`, about `rows` at once.

    Args:
        path: `.tsv` or `.tsv.gz`.
        further: Columns that are wanted as text.
        limit: The last line that is read; 0 reads all.
        rows: Lines of a piece.
        row: Lines that were read before.
        offset: `Impressions.offset` of the last that were read.

    Raises:
        JourneyDataError: The file cannot be read, or has not the 22 columns.
    """
    start = _after_header(path)
    wanted: tuple[str, ...] = ("timestamp", "uid", "campaign", "conversion", "conversion_id")
    wanted += tuple(name for name in further if name not in wanted)
    seconds = pl.col("timestamp").cast(pl.Int64, strict=False)
    flag = pl.col("conversion")
    for lines in read_lines(path, rows, offset or start):
        parsed = parse_fields(lines.text, HEADER, wanted, path.name, separator="\t", quoted=False)
        table = parsed.table.with_columns(
            timestamp=pl.when(seconds.is_between(0, LATEST)).then(seconds),
            conversion=pl.when(flag.is_in(["0", "1"])).then(flag == "1"),
        )
        end = limit - row if limit else len(table)
        yield Impressions(table.head(end), parsed.broken.head(end), row, lines.offset)
        row += len(table)
        if limit and row >= limit:
            return


def converting_rows(path: Path, limit: int = 0) -> npt.NDArray[np.int64]:
    """The lines, counted from 0 and in order, that are the last of a visitor's conversion.

    With a `limit`, as if the file ended there. Raises `JourneyDataError` as `read_impressions`.
    """
    last = pl.DataFrame(schema={"key": pl.UInt64(), "timestamp": pl.Int64(), "row": pl.Int64()})
    bad = pl.any_horizontal(there for _, _, there in PROBLEMS)
    for piece in read_impressions(path, limit=limit):
        rows = piece.table.with_columns(
            key=hash_text(pl.format("{}\t{}", "uid", "conversion_id")),
            row=piece.row + pl.int_range(pl.len()),
        )
        rows = rows.filter(pl.col("conversion"), ~bad, ~piece.broken).select(last.columns)
        last = pl.concat([last, rows]).sort("timestamp", "row").unique("key", keep="last")
    return np.sort(last["row"].to_numpy())


def is_converting(piece: Impressions, converting: npt.NDArray[np.int64]) -> pl.Series:
    """Boolean, one a row of `piece`: is it one of `converting`?"""
    begin, end = np.searchsorted(converting, [piece.row, piece.row + len(piece.table)])
    marks = np.zeros(len(piece.table), dtype=np.bool_)
    marks[converting[begin:end] - piece.row] = True
    return pl.Series("converted", marks)


def read_criteo(config: CriteoData) -> pl.DataFrame:
    """The first `config.limit` impressions (0: all) as an encoded touchpoint frame, in order.

    Its channels are `config.features.channels`: a campaign's id falls into one by its hash.

    Raises:
        JourneyDataError: The file cannot be read, or has a bad row, which is named, and its
            column, but never the value.
    """
    path, table = Path(config.path), as_table(config)
    converting = converting_rows(path, config.limit)
    channels = pl.Series(config.features.channels)
    further = (*config.features.categorical, *config.features.numeric)
    frames = []
    for piece in read_impressions(path, further, limit=config.limit):
        _refuse_bad_rows(piece, path.name)
        bucket = piece.table.select(hash_text(pl.col("campaign")) % len(channels)).to_series()
        rows = piece.table.with_columns(
            visitor_id="uid",
            time=pl.from_epoch(EPOCH + pl.col("timestamp")),
            channel=channels.gather(bucket),
            converted=is_converting(piece, converting),
        )
        try:
            frames.append(encode_rows(rows.lazy(), table, path.name))
        except JourneyDataError as error:
            row = None if error.row is None else piece.row + error.row
            problem, column = error.problem, error.column
            raise JourneyDataError(path.name, problem, row=row, column=column) from None
    if not frames:
        raise JourneyDataError(path.name, "has no rows")
    return in_order(with_derived(pl.concat(frames), table))


def as_table(config: CriteoData) -> TableData:
    """What `config` says, as of a table whose columns have the product's names."""
    return TableData(
        path=config.path,
        features=config.features,
        lookback_days=config.lookback_days,
        horizon_days=config.horizon_days,
        contributions=config.contributions,
        holdout=config.holdout,
        holdout_from=config.holdout_from,
        columns=ColumnNames(campaign="campaign"),
        dirichlet_sites=config.dirichlet_sites,
        dirichlet_alpha=config.dirichlet_alpha,
    )


def _after_header(path: Path) -> int:
    for lines in read_lines(path, 1):
        names = lines.text.decode("utf-8-sig").rstrip("\r\n").split("\t")
        for place, name in enumerate(HEADER):
            if place >= len(names) or names[place].strip() != name:
                problem = f'is not Criteo\'s data set: column {place + 1} must be "{name}"'
                raise JourneyDataError(path.name, problem)
        if len(names) > len(HEADER):
            raise JourneyDataError(path.name, "is not Criteo's data set: has more than 22 columns")
        return lines.offset
    raise JourneyDataError(path.name, "has no header line")


def _refuse_bad_rows(piece: Impressions, file: str) -> None:
    bad = piece.table.select(there.alias(column) for column, _, there in PROBLEMS)
    found = [
        (first, place)
        for place, cells in enumerate([piece.broken, *bad.get_columns()])
        if cells.any() and (first := cells.arg_max()) is not None
    ]
    if not found:
        return
    first, place = min(found)
    row = piece.row + first + 1
    if place == 0:
        raise JourneyDataError(file, "has more columns than the header", row=row)
    column, problem, _ = PROBLEMS[place - 1]
    raise JourneyDataError(file, problem, row=row, column=column)
