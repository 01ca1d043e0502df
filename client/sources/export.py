"""Files of an export: which there are, and their rows, piece by piece."""

from __future__ import annotations

import csv
import glob
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from client.sources.source import SourceError
from client.sources.table import Piece
from journeys.errors import JourneyDataError
from journeys.lines import POLARS_ERRORS, parse_fields, parse_json, read_lines
from journeys.table import refuse_unsound_parquet

KINDS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".csv.gz": "csv",
    **{name + end: "json" for name in (".ndjson", ".jsonl", ".json") for end in ("", ".gz")},
}
"""What a file holds, by the end of its name."""

FIRST_LINES = 1_000
"""Lines of a JSON file in which a field must show, to be taken for one that the file has."""


@dataclass(frozen=True)
class File:
    """A file of an export, as it was when it was listed."""

    path: Path
    name: str
    """Relative to the site's folder."""
    stamp: list[int]
    """Size in bytes and time of its last change in ns: another one is another file."""

    @property
    def kind(self) -> str:
        """parquet, csv or json. Raises `SourceError`."""
        for end, kind in KINDS.items():
            if self.path.name.lower().endswith(end):
                return kind
        raise SourceError(f"{self.name}: must be one of {', '.join(KINDS)}")


@dataclass(frozen=True)
class FilePiece(Piece):
    """Some rows of a file."""

    offset: int = 0
    """Where the next piece begins: in rows (Parquet) or in bytes of the text (else)."""


def files(folder: Path, pattern: str) -> list[File]:
    """The files that `pattern`, meant from `folder`, fits, in order of their names."""
    found = []
    for name in sorted(glob.glob(pattern, root_dir=folder, recursive=True)):
        path = folder / name
        try:
            stat = path.stat()
        except OSError:
            continue
        if path.is_file():
            found.append(File(path, name, [stat.st_size, stat.st_mtime_ns]))
    return found


def columns_of(file: File, wanted: Sequence[str]) -> list[str]:
    """The names of the file's columns; of a JSON file, the fields of its first lines.

    Of a Parquet file the columns `wanted` are decoded once, in a process of their own, so that a
    damaged one does no harm here.

    Raises:
        SourceError: The file cannot be read.
    """
    with _telling(file):
        match file.kind:
            case "parquet":
                refuse_unsound_parquet(file.path, wanted, file.name)
                return list(pl.scan_parquet(file.path, glob=False).collect_schema())
            case "csv":
                return _header(file)[0]
        return _fields(next((lines.text for lines in read_lines(file.path, FIRST_LINES)), b""))


def read_pieces(
    file: File, columns: Mapping[str, pl.DataType], rows: int, *, row: int = 0, offset: int = 0
) -> Iterator[FilePiece]:
    """Those of `columns` that the file has, about `rows` rows at once.

    Args:
        file: A file that `columns_of` could read.
        columns: Names and, for JSON, types; Parquet has its own, and CSV has text.
        rows: Rows of a piece.
        row: Rows that were read before.
        offset: `FilePiece.offset` of the last piece that was read before.

    Raises:
        SourceError: The file cannot be read (any further).
    """
    with _telling(file):
        match file.kind:
            case "parquet":
                yield from _parquet_pieces(file, columns, rows, offset)
            case "csv":
                names, start = _header(file)
                wanted = [name for name in columns if name in names]
                for lines in read_lines(file.path, rows, offset or start, quoted=True):
                    parsed = parse_fields(lines.text, names, wanted, file.name)
                    yield FilePiece(parsed.table, file.name, row, parsed.broken, lines.offset)
                    row += len(parsed.broken)
            case _:
                for lines in read_lines(file.path, rows, offset):
                    parsed = parse_json(lines.text, columns, file.name)
                    yield FilePiece(parsed.table, file.name, row, parsed.broken, lines.offset)
                    row += len(parsed.broken)


def _parquet_pieces(
    file: File, columns: Mapping[str, pl.DataType], rows: int, offset: int
) -> Iterator[FilePiece]:
    table = pl.scan_parquet(file.path, glob=False)
    there = table.collect_schema()
    table = table.select(name for name in columns if name in there)
    end = table.select(pl.len()).collect().item()
    for start in range(offset, end, rows):
        piece = table.slice(start, rows).collect()
        yield FilePiece(piece, file.name, start, None, start + len(piece))


def _header(file: File) -> tuple[list[str], int]:
    """The names in a CSV file's first line, and where the next line begins."""
    for lines in read_lines(file.path, 1, quoted=True):
        text = lines.text.decode("utf-8-sig")
        try:
            names = next(csv.reader(io.StringIO(text, newline="")), [])
        except csv.Error:
            break
        return [name.strip() for name in names], lines.offset
    raise SourceError(f"{file.name}: has no header line")


def _fields(text: bytes) -> list[str]:
    names: dict[str, None] = {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            names |= dict.fromkeys(row)
    return list(names)


@contextmanager
def _telling(file: File) -> Iterator[None]:
    """Tell what is wrong with a file as a `SourceError`, without what polars says of cells."""
    try:
        yield
    except JourneyDataError as error:
        where = f"{file.name}, row {error.row}" if error.row else file.name
        raise SourceError(f"{where}: {error.problem}") from None
    except POLARS_ERRORS:
        raise SourceError(f"{file.name}: is not a sound {file.kind} file") from None
    except OSError as error:
        raise SourceError(f"{file.name}: cannot be read: {error.strerror}") from None
