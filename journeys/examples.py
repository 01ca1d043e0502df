"""Encoded journeys: what training and evaluation read."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

LARGE_BYTES = 2**27
"""Of a memory-mapped array: of one above it only what is being read is in memory."""


@dataclass(frozen=True)
class Examples:
    """N journeys, right-padded to T touchpoints, oldest touchpoint first.

    One row is one decision about one visitor. Arrays may be memory-mapped.
    """

    categorical: npt.NDArray[np.uint16]
    """(N, T, C) index into each categorical feature's vocabulary; 0 is padding."""
    numeric: npt.NDArray[np.float32]
    """(N, T, F) scaled to [0, 1]; 0 on padding."""
    length: npt.NDArray[np.int32]
    """(N,) touchpoints in the journey, 1 to T."""
    label: npt.NDArray[np.float32]
    """(N,) 1 where the visitor converts within the horizon, else 0."""
    visitor: npt.NDArray[np.int64] | None = None
    """(N,) whose journey it is: any number, the same for the journeys of one visitor. None: each
    is another visitor's."""

    def __len__(self) -> int:
        return len(self.label)

    @cached_property
    def visitors(self) -> int:
        """Number of distinct visitors, at most N."""
        return len(self) if self.visitor is None else len(np.unique(self.visitor))

    def take(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_] | slice) -> Examples:
        """The examples at `rows`, copied."""
        arrays = self._arrays()
        return Examples(**{name: _take(array, rows) for name, array in arrays.items()})

    def by_visitor(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Rows in the order of their visitors, and how many each visitor has (V,), 1 or more."""
        if self.visitor is None:
            return np.arange(len(self)), np.ones(len(self), dtype=np.int64)
        if len(self.visitor) != len(self):
            raise ValueError(f"{len(self.visitor)} visitors of {len(self)} examples")
        order = np.argsort(self.visitor, kind="stable")
        return order, np.unique(self.visitor, return_counts=True)[1]

    def unload(self) -> None:
        """Give back the memory of what was read through a memory map; it can be read again."""
        for array in self._arrays().values():
            # Not every system can be told.
            if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                array.base.madvise(mmap.MADV_DONTNEED)

    def save(self, folder: Path) -> None:
        """Write one `.npy` file a field into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "visitor.npy").unlink(missing_ok=True)
        for name, array in self._arrays().items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)

    @classmethod
    def open(cls, folder: Path) -> Examples:
        """Open examples that `save` wrote, memory-mapped and read-only."""
        arrays = {}
        for f in fields(cls):
            path = folder / f"{f.name}.npy"
            if f.name != "visitor" or path.exists():
                arrays[f.name] = np.load(path, mmap_mode="r", allow_pickle=False)
        return cls(**arrays)

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: array for name, array in arrays.items() if array is not None}


def _take(
    array: npt.NDArray[Any], rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_] | slice
) -> npt.NDArray[Any]:
    """A copy of some rows; of a large file without its memory map.

    Through the map each row would bring up to 2 MB around it into this process's memory.
    """
    if not isinstance(array, np.memmap) or array.nbytes <= LARGE_BYTES:
        some = array[rows]
        # An index of numbers has copied them already.
        return np.array(some) if isinstance(rows, slice) else np.asarray(some)
    if isinstance(rows, slice):
        rows = np.arange(*rows.indices(len(array)), dtype=np.int64)
    numbers = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
    result = np.empty((len(numbers), *array.shape[1:]), array.dtype)
    into, size = memoryview(result.reshape(-1).view(np.uint8).data), array.strides[0]
    # Rows that follow one another in the file are read together.
    breaks = (np.flatnonzero(np.diff(numbers) != 1) + 1).tolist()
    starts = [0, *breaks][: len(numbers)]
    assert array.filename is not None
    with open(array.filename, "rb", buffering=0) as file:
        descriptor = file.fileno()
        for first, end in pairwise([*starts, len(numbers)]):
            part, at = into[first * size : end * size], array.offset + int(numbers[first]) * size
            while part:
                read = os.preadv(descriptor, (part,), at)
                if read == 0:
                    raise OSError(f"{array.filename}: shorter than it was")
                part, at = part[read:], at + read
    return result


def concatenate(parts: list[Examples]) -> Examples:
    """All examples of `parts`, in order. Visitors of different parts are different visitors."""
    arrays = {
        f.name: np.concatenate([getattr(part, f.name) for part in parts])
        for f in fields(Examples)
        if f.name != "visitor"
    }
    if all(part.visitor is None for part in parts):
        return Examples(**arrays)
    visitors, so_far = [], 0
    for part in parts:
        own = np.arange(len(part)) if part.visitor is None else part.visitor
        _, visitor = np.unique(own, return_inverse=True)
        visitors.append(visitor + so_far)
        so_far += int(visitor.max(initial=-1)) + 1
    return Examples(**arrays, visitor=np.concatenate(visitors))
