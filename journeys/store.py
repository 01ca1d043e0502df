"""A site's prepared visits on disk: Parquet files by month, and a manifest that says what counts.

::

    store/manifest.json            what is in the store; replaced in one step
    store/2026-11/7.parquet        some visits of a month; never changed once written
    store/erased.8.parquet         small tables that belong to the visits (`Store.table`)

A file counts if the manifest names it. So a change is whole or not at all: new files are written
first, then the manifest is replaced, then what it no longer names is deleted. What a killed process
left is deleted when the store is next opened for writing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import polars as pl

from journeys.durable import sync_folder, write_durably

VISITS = pl.Schema(
    {
        "site": pl.String(),
        "visitor_id": pl.String(),
        "visit": pl.UInt64(),
        "time": pl.Datetime("us", "UTC"),
        "channel": pl.String(),
        "campaign": pl.String(),
        "device": pl.String(),
        "region": pl.String(),
        "duration_s": pl.Float32(),
        "page_views": pl.Int32(),
        "visit_number": pl.Int32(),
        "bounced": pl.Boolean(),
        "converted": pl.Boolean(),
        "revenue": pl.Float64(),
    }
)
"""A visit in the store: all that is kept of it. A touchpoint table for `journeys.table`.

`visitor_id` is a pseudonym, `visit` a keyed hash of the visit's number. `time` is its hour, of
visits of one visitor within an hour each a second after the one before.
"""

MANIFEST = "manifest.json"
_FORMAT = 1


class StoreError(RuntimeError):
    """The store cannot be used. The message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Part:
    """A file of visits."""

    file: str
    """Relative to the store's folder."""
    month: str
    """Such as `2026-11`."""
    rows: int
    sha256: str
    generation: int
    """The first change of the store that brought visits of it."""


@dataclass(frozen=True)
class Manifest:
    """What is in the store."""

    generation: int = 0
    """Number of the change that made it; grows by one each time."""
    cursor: dict[str, Any] | None = None
    """Where the source goes on (`client.sources.source.Cursor`)."""
    parts: tuple[Part, ...] = ()
    """In the order in which they were added."""
    tables: dict[str, str] = field(default_factory=dict)
    """File of each further table, by the table's name."""

    @property
    def rows(self) -> int:
        """Visits in the store."""
        return sum(part.rows for part in self.parts)


class Store:
    """A site's visits. One writer at a time; readers need no lock."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        """Open the store in `folder`, or, unless `read_only`, begin one; each file is checked.

        Raises:
            StoreError: It is damaged, not there (read-only), or another process writes to it.
        """
        self.folder = folder
        self._lock: int | None = None
        if not read_only:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _own(folder)
        try:
            if read_only or (folder / MANIFEST).exists():
                self.manifest = read_manifest(folder)
                if not read_only:
                    self._sweep()
            else:
                self._replace(Manifest())
            self._verify()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def visits(self) -> pl.LazyFrame:
        """All visits, in the order in which they came."""
        return self._scan(self.manifest.parts)

    def month(self, month: str) -> pl.LazyFrame:
        """The visits of one month."""
        return self._scan([part for part in self.manifest.parts if part.month == month])

    def part(self, part: Part) -> pl.LazyFrame:
        """The visits of one file."""
        return self._scan([part])

    def table(self, name: str, schema: pl.Schema) -> pl.DataFrame:
        """A small table that belongs to the visits; empty if there is none."""
        if name not in self.manifest.tables:
            return schema.to_frame()
        return pl.read_parquet(self.folder / self.manifest.tables[name])

    def append(
        self,
        visits: pl.DataFrame,
        cursor: dict[str, Any] | None,
        tables: dict[str, pl.DataFrame],
    ) -> None:
        """Add visits, shaped as `VISITS`, with the cursor and the tables that go with them."""
        generation = self.manifest.generation + 1
        added = [
            self._write(of_month.drop("month"), month, generation, generation)
            for (month,), of_month in visits.with_columns(month=pl.col("time").dt.strftime("%Y-%m"))
            .partition_by("month", as_dict=True, maintain_order=True)
            .items()
        ]
        self._replace(
            replace(
                self.manifest,
                generation=generation,
                cursor=cursor,
                parts=(*self.manifest.parts, *added),
                tables=self.manifest.tables | self._write_tables(tables, generation),
            )
        )

    def remove(
        self, gone: pl.Expr, tables: dict[str, pl.DataFrame], last_month: str | None = None
    ) -> int:
        """Delete the visits for which `gone` is true, and replace the tables; returns how many.

        In one step, after which no file of the store holds any of them. Months after `last_month`
        are not looked at.
        """
        generation = self.manifest.generation + 1
        parts: list[Part] = []
        for part in self.manifest.parts:
            if last_month is not None and part.month > last_month:
                parts.append(part)
                continue
            visits = pl.read_parquet(self.folder / part.file)
            kept = visits.filter(~gone)
            if kept.height == visits.height:
                parts.append(part)
            elif kept.height:
                number = f"{generation}.{len(parts)}"
                parts.append(self._write(kept, part.month, number, part.generation))
        removed = self.manifest.rows - sum(part.rows for part in parts)
        if not removed and not tables:
            return 0
        self._replace(
            replace(
                self.manifest,
                generation=generation,
                parts=tuple(parts),
                tables=self.manifest.tables | self._write_tables(tables, generation),
            )
        )
        return removed

    def compact(self, most: int = 8) -> None:
        """Make one file of each month that has more than `most`."""
        generation = self.manifest.generation + 1
        months: dict[str, list[Part]] = {}
        for part in self.manifest.parts:
            months.setdefault(part.month, []).append(part)
        merged = {
            month: self._sink(self._scan(parts), month, generation, parts)
            for month, parts in months.items()
            if len(parts) > most
        }
        if merged:
            kept = [part for part in self.manifest.parts if part.month not in merged]
            self._replace(
                replace(self.manifest, generation=generation, parts=(*kept, *merged.values()))
            )

    def _verify(self) -> None:
        for part in self.manifest.parts:
            verified(self.folder, part)

    def _scan(self, parts: Sequence[Part]) -> pl.LazyFrame:
        files = [self.folder / part.file for part in parts]
        if not files:
            return VISITS.to_frame().lazy()
        return pl.scan_parquet(files, glob=False)

    def _write(self, visits: pl.DataFrame, month: str, number: int | str, generation: int) -> Part:
        file = f"{month}/{number}.parquet"
        path = self._new(file)
        # Pseudonyms do not compress: a higher level takes longer and saves nothing.
        visits.write_parquet(path, compression_level=1)
        return Part(file, month, visits.height, _synced_hash(path), generation)

    def _sink(self, visits: pl.LazyFrame, month: str, number: int, merged: list[Part]) -> Part:
        file = f"{month}/{number}.parquet"
        path = self._new(file)
        visits.sink_parquet(path)
        rows, first = sum(part.rows for part in merged), min(part.generation for part in merged)
        return Part(file, month, rows, _synced_hash(path), first)

    def _write_tables(self, tables: dict[str, pl.DataFrame], generation: int) -> dict[str, str]:
        files = {name: f"{name}.{generation}.parquet" for name in tables}
        for name, file in files.items():
            tables[name].write_parquet(self._new(file))
            _synced_hash(self.folder / file)
        return files

    def _new(self, file: str) -> Path:
        path = self.folder / file
        path.parent.mkdir(mode=0o700, exist_ok=True)
        return path

    def _replace(self, manifest: Manifest) -> None:
        if self._lock is None:
            raise StoreError(f"{self.folder}: opened for reading only")
        for folder in {(self.folder / part.file).parent for part in manifest.parts}:
            sync_folder(folder)
        content = json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=1).encode()
        write_durably(self.folder / MANIFEST, content)
        self.manifest = manifest
        self._sweep()

    def _sweep(self) -> None:
        """Delete every file that the manifest does not name."""
        named = {part.file for part in self.manifest.parts} | set(self.manifest.tables.values())
        for path in (*self.folder.glob("*.parquet"), *self.folder.glob("*/*.parquet")):
            if path.relative_to(self.folder).as_posix() not in named:
                path.unlink()
        for folder in self.folder.iterdir():
            if folder.is_dir():
                # One that holds a file stays.
                with contextlib.suppress(OSError):
                    folder.rmdir()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the store in `folder`.

    Raises:
        StoreError: There is none, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise StoreError(f"{folder}: no store of visits") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        read = json.loads(content)
        if read.pop("format") != _FORMAT:
            raise ValueError
        parts = tuple(Part(**part) for part in read.pop("parts"))
        return Manifest(**read, parts=parts)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise StoreError(
            f"{path}: damaged; put back a copy of the whole folder, or move it away and ingest anew"
        ) from None


def verified(folder: Path, part: Part) -> Path:
    """The path of a part, once its content is what was written. Raises `StoreError`."""
    path = folder / part.file
    try:
        same = _hash(path) == part.sha256
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
    if not same:
        raise StoreError(f"{path}: damaged, its SHA-256 is not that of the manifest")
    return path


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _synced_hash(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _hash(path)


def _own(folder: Path) -> int:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StoreError(f"{folder}: another process writes to it; try again later") from None
    return descriptor
