"""Files of visits, one row a visit: Parquet, CSV or newline-delimited JSON.

A file that was read is read again, whole, once its size or time of change is another: visits that
are stored already are found by their id. Its name is told by the order in which files are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl

from client.sources.export import File, columns_of, files, read_pieces
from client.sources.source import Batch, Cursor, SourceError
from client.sources.table import NEEDED, mapped, read_visits, refuse_missing
from conf.site import FilesSource


class Files:
    """The source `files`.

    Its cursor: `done`, the stamp of each file that was read, by name; and of the file in work its
    `name`, its `stamp`, the rows read (`row`) and where the next begins (`offset`).
    """

    def __init__(self, config: FilesSource, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._names = mapped(config.columns)

    def check(self) -> None:
        """Look at the newest file by name. Raises `SourceError`."""
        found = files(self._folder, self._config.path)
        if not found:
            raise SourceError(f"no file fits source.path={self._config.path}")
        self._check_columns(found[-1])

    def batches(self, cursor: Cursor | None, now: int) -> Iterator[Batch]:
        """The visits of files that are new or have changed. Raises `SourceError`."""
        found = files(self._folder, self._config.path)
        if not found and cursor is None:
            raise SourceError(f"no file fits source.path={self._config.path}")
        cursor = cursor or {}
        read = cursor.get("done", {})
        done = {file.name: file.stamp for file in found if read.get(file.name) == file.stamp}
        for file in found:
            if file.name in done:
                continue
            in_work = cursor.get("name") == file.name and cursor.get("stamp") == file.stamp
            row, offset = (cursor["row"], cursor["offset"]) if in_work else (0, 0)
            last = None
            for batch in self._batches_of(file, row, offset):
                if last is not None:
                    yield replace(last, cursor={"done": done, **last.cursor})
                last = batch
            done = {**done, file.name: file.stamp}
            if last is not None:
                yield replace(last, cursor={"done": done})

    def _batches_of(self, file: File, row: int, offset: int) -> Iterator[Batch]:
        self._check_columns(file)
        wanted = {column: pl.String() for column in self._names.values()}
        for piece in read_pieces(file, wanted, self._config.batch, row=row, offset=offset):
            visits, skipped = read_visits(piece, self._config.columns, self._config.timezone)
            rows = len(piece.table)
            place = {"stamp": file.stamp, "row": piece.row + rows, "offset": piece.offset}
            yield Batch(visits, rows, skipped, {"name": file.name, **place})

    def _check_columns(self, file: File) -> None:
        there = columns_of(file, list(self._names.values()))
        if file.kind == "json" and not there:
            return  # No line, or none that is JSON.
        needed = NEEDED if file.kind == "json" else tuple(self._names)
        wanted = [self._names[name] for name in needed if name in self._names]
        refuse_missing(wanted, there, file.name)
