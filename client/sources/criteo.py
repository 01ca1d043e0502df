"""Visits from the Criteo Attribution Modeling for Bidding data set: an impression is a visit.

Its times count from 2000-01-01 (`journeys.criteo.EPOCH`): a site that takes it needs a
`preparation.retention_days` that reaches back to then. There is nothing about consent in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from client.sources.export import File, files
from client.sources.source import VISITS, Batch, Cursor, SourceError
from client.sources.table import Piece, keep_good
from conf.site import CriteoSource
from journeys.criteo import (
    EPOCH,
    PROBLEMS,
    Impressions,
    converting_rows,
    is_converting,
    read_impressions,
)
from journeys.errors import JourneyDataError


class Criteo:
    """The source `criteo`.

    Its cursor: the file's `stamp`, the lines read (`row`), and where the next begins (`offset`);
    None when all are read.
    """

    def __init__(self, config: CriteoSource, folder: Path) -> None:
        self._config = config
        self._folder = folder

    def check(self) -> None:
        """Look at the first lines. Raises `SourceError`."""
        try:
            next(read_impressions(self._file().path, rows=1), None)
        except JourneyDataError as error:
            raise SourceError(str(error)) from None

    def batches(self, cursor: Cursor | None, now: int) -> Iterator[Batch]:
        """The impressions that were not read. Raises `SourceError`."""
        file = self._file()
        row = offset = 0
        if cursor is not None and cursor["stamp"] == file.stamp:
            if cursor["offset"] is None:
                return
            row, offset = cursor["row"], cursor["offset"]
        last = None
        try:
            converting = converting_rows(file.path)
            for piece in read_impressions(
                file.path, rows=self._config.batch, row=row, offset=offset
            ):
                if last is not None:
                    yield last
                last = _batch(piece, file, converting)
        except JourneyDataError as error:
            raise SourceError(str(error)) from None
        if last is not None:
            yield replace(last, cursor={**last.cursor, "offset": None})

    def _file(self) -> File:
        for file in files(self._folder, self._config.path):
            if file.path.name.endswith((".tsv", ".tsv.gz")):
                return file
        raise SourceError(f"source.path={self._config.path}: there is no such .tsv or .tsv.gz file")


def _batch(piece: Impressions, file: File, converting: npt.NDArray[np.int64]) -> Batch:
    table = piece.table.with_columns(
        is_converting(piece, converting), row=piece.row + pl.int_range(pl.len())
    )
    known = {
        "visitor_id": pl.col("uid"),
        "visit_id": pl.col("row").cast(pl.String),
        "time": EPOCH + pl.col("timestamp"),
        "referrer_type": pl.lit("campaign"),
        "source": pl.lit("criteo"),
        "medium": pl.lit("display"),
        "campaign": pl.col("campaign"),
        "converted": pl.col("converted"),
        "revenue": pl.lit(0.0),
    }
    visits, skipped = keep_good(
        Piece(table, file.name, piece.row, piece.broken),
        [known.get(name, pl.lit(None, kind)).alias(name) for name, kind in VISITS.items()],
        [(f'column "{column}": {problem}', there) for column, problem, there in PROBLEMS],
    )
    place = {"stamp": file.stamp, "row": piece.row + len(table), "offset": piece.offset}
    return Batch(visits, len(table), skipped, place)
