"""Files of lines (CSV, TSV, newline-delimited JSON), plain or gzipped, read in flat memory."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import polars as pl
from polars.exceptions import PanicException, PolarsError

from journeys.errors import JourneyDataError

BLOCK = 4 << 20
"""Bytes read at once."""
LONGEST = 64 << 20
"""Bytes of the longest piece; a line that is longer is refused."""
MOST_BROKEN = 10_000
"""A piece with more broken lines is taken for a file of another kind."""

POLARS_ERRORS = (PolarsError, PanicException)
"""What polars raises for text that it cannot read. Its messages may quote cells."""


@dataclass(frozen=True)
class Lines:
    """Some whole lines of a file."""

    text: bytes
    """UTF-8; no blank lines."""
    offset: int
    """Where the next lines begin, in bytes of the text, uncompressed."""


@dataclass(frozen=True)
class Parsed:
    """The rows of some lines."""

    table: pl.DataFrame
    broken: pl.Series
    """Boolean, one a row: it cannot be taken apart (all of its cells are null)."""


def read_lines(path: Path, count: int, offset: int = 0, *, quoted: bool = False) -> Iterator[Lines]:
    """The lines of a file from `offset` on, about `count` at once.

    With `quoted` a line break between quotes ends no line, as far as the quotes are balanced.

    Raises:
        JourneyDataError: The file cannot be opened, is a gzip file that was cut off or damaged, is
            not UTF-8, or has a line of more than 64 MB.
    """
    blocks: list[bytes] = []
    size = lines = 0
    try:
        with _open(path) as file:
            file.seek(offset)
            at_end = False
            while not at_end:
                block = file.read(BLOCK)
                at_end = not block
                blocks.append(block)
                size += len(block)
                lines += block.count(b"\n")
                if not (at_end or lines >= count or size >= LONGEST):
                    continue
                buffer = b"".join(blocks)
                while buffer and (at_end or lines >= count or len(buffer) >= LONGEST):
                    end = _cut(buffer, count, at_end=at_end, quoted=quoted)
                    if not end:
                        problem = f"has a line of more than {LONGEST >> 20} MB"
                        raise JourneyDataError(path.name, problem)
                    offset += end
                    yield Lines(_checked(buffer[:end], path.name), offset)
                    buffer = buffer[end:]
                    lines = buffer.count(b"\n")
                blocks, size = [buffer], len(buffer)
    except (OSError, EOFError, zlib.error) as error:
        if path.suffix == ".gz" and path.is_file() and not isinstance(error, PermissionError):
            problem = "is not a sound gzip file, or was cut off; write or copy it again"
            raise JourneyDataError(path.name, problem) from None
        reason = error.strerror if isinstance(error, OSError) else None
        raise JourneyDataError(path.name, f"cannot be read: {reason}") from None


def parse_fields(
    text: bytes,
    names: Sequence[str],
    wanted: Sequence[str],
    file: str,
    *,
    separator: str = ",",
    quoted: bool = True,
) -> Parsed:
    """The columns `wanted` of separated lines, as text; empty cells are null.

    `names` are the header's, each of `wanted` among them. A row with more fields than the header
    is broken, one with fewer has nulls at its end.

    Raises:
        JourneyDataError: Nearly nothing can be taken apart.
    """
    # Names of their own, so that a header that repeats one does no harm, and one column more, in
    # which a row that is too long shows.
    header = separator.join([*(f"c{i}" for i in range(len(names))), "x"]).encode() + b"\n"
    places = {f"c{names.index(name)}": name for name in wanted}

    def fields(lines: bytes) -> pl.DataFrame:
        return pl.read_csv(
            header + lines,
            columns=[*places, "x"],
            infer_schema=False,
            truncate_ragged_lines=True,
            separator=separator,
            quote_char='"' if quoted else None,
        )

    def parse(lines: bytes) -> pl.DataFrame:
        try:
            return fields(lines)
        except POLARS_ERRORS:
            # Polars refuses a quotation mark within a field, as in 24" screens.
            if quoted and lines.count(b"\n") == 1:
                return fields(_requoted(lines, separator))
            raise

    parsed = _parse(text, parse, file, "is not sound CSV")
    too_long = parsed.table["x"].is_not_null() | parsed.broken
    return Parsed(parsed.table.select(*places).rename(places), too_long)


def parse_json(text: bytes, schema: Mapping[str, pl.DataType], file: str) -> Parsed:
    """The fields of `schema` of lines of JSON. A field that a line lacks is null.

    A line that is no JSON is broken; a value of another type than the schema's is null.

    Raises:
        JourneyDataError: Nearly nothing is JSON.
    """

    def parse(lines: bytes) -> pl.DataFrame:
        table = pl.read_ndjson(lines, schema=dict(schema), ignore_errors=True)
        if len(table) != lines.count(b"\n"):
            raise PolarsError
        return table

    return _parse(text, parse, file, "is not newline-delimited JSON")


# ---------------------------------------------------------------------------- pieces


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _cut(buffer: bytes, count: int, *, at_end: bool, quoted: bool) -> int:
    """Where to end a piece of about `count` lines. 0: no line ends in `buffer`."""
    breaks = np.flatnonzero(np.frombuffer(buffer, np.uint8) == ord("\n"))
    if len(breaks) <= count and at_end:
        return len(buffer)
    if not len(breaks):
        return 0
    end = int(breaks[min(count, len(breaks)) - 1]) + 1
    return _outside_quotes(buffer, end) if quoted else end


def _outside_quotes(buffer: bytes, end: int) -> int:
    """The line's end nearest to `end` with an even number of quotes before it; else `end`.

    The buffer begins outside quotes. So does, before its last quote, a text with an odd number.
    """
    back = end
    while back and buffer.count(b'"', 0, back) % 2:
        back = buffer.rfind(b"\n", 0, buffer.rfind(b'"', 0, back)) + 1
    if back:
        return back
    ahead = end
    while ahead and buffer.count(b'"', 0, ahead) % 2:
        quote = buffer.find(b'"', ahead)
        ahead = buffer.find(b"\n", quote) + 1 if quote >= 0 else 0
    return ahead or end


def _checked(text: bytes, file: str) -> bytes:
    try:
        text.decode()
    except UnicodeDecodeError:
        raise JourneyDataError(file, "is not UTF-8 text") from None
    if not text.endswith(b"\n"):
        text += b"\n"
    if text.startswith((b"\n", b"\r\n")) or b"\n\n" in text or b"\n\r\n" in text:
        text = re.sub(rb"(?m)^\r?\n", b"", text)
    return text


# ---------------------------------------------------------------------------- rows


def _parse(text: bytes, parse: Callable[[bytes], pl.DataFrame], file: str, problem: str) -> Parsed:
    # One broken line makes polars refuse them all: search for it by halves.
    parts: list[Parsed] = [_whole(parse(b""))]
    broken = 0
    waiting = [text]
    while waiting:
        lines = waiting.pop()
        try:
            parts.append(_whole(parse(lines)))
        except POLARS_ERRORS:
            middle = lines.find(b"\n", len(lines) // 2, -1) + 1 or lines.find(b"\n", 0, -1) + 1
            if middle:
                waiting += [lines[middle:], lines[:middle]]
                continue
            broken += 1
            if broken > MOST_BROKEN:
                raise JourneyDataError(file, problem) from None
            parts.append(Parsed(parts[0].table.clear(1), pl.Series([True])))
    return Parsed(
        pl.concat([part.table for part in parts]), pl.concat([part.broken for part in parts])
    )


def _requoted(line: bytes, separator: str) -> bytes:
    """A line of CSV with each field quoted. Raises `PolarsError` where quotes are broken."""
    written = io.StringIO()
    try:
        rows = csv.reader([line.decode()], delimiter=separator, strict=True)
        writer = csv.writer(written, delimiter=separator, quoting=csv.QUOTE_ALL)
        writer.writerows(rows)
    except csv.Error:
        raise PolarsError from None
    return written.getvalue().encode()


def _whole(table: pl.DataFrame) -> Parsed:
    return Parsed(table, pl.repeat(False, len(table), dtype=pl.Boolean, eager=True))
