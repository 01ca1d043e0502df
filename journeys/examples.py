"""Encoded journeys: what training and evaluation read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Examples:
    """N journeys, right-padded to T touchpoints, oldest touchpoint first.

    One row is one decision about one visitor; with one contribution a visitor, one row is one
    visitor. Arrays may be memory-mapped.
    """

    categorical: npt.NDArray[np.uint16]
    """(N, T, C) index into each categorical feature's vocabulary; 0 is padding."""
    numeric: npt.NDArray[np.float32]
    """(N, T, F) scaled to [0, 1]; 0 on padding."""
    length: npt.NDArray[np.int32]
    """(N,) touchpoints in the journey, 1 to T."""
    label: npt.NDArray[np.float32]
    """(N,) 1 where the visitor converts within the horizon, else 0."""

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Examples:
        """The examples at `rows`, copied."""
        return Examples(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def save(self, folder: Path) -> None:
        """Write one `.npy` file a field into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for f in fields(self):
            np.save(folder / f"{f.name}.npy", getattr(self, f.name), allow_pickle=False)

    @classmethod
    def open(cls, folder: Path) -> Examples:
        """Open examples that `save` wrote, memory-mapped and read-only."""
        return cls(
            **{
                f.name: np.load(folder / f"{f.name}.npy", mmap_mode="r", allow_pickle=False)
                for f in fields(cls)
            }
        )


def concatenate(parts: list[Examples]) -> Examples:
    """All examples of `parts`, in order."""
    return Examples(
        **{
            f.name: np.concatenate([getattr(part, f.name) for part in parts])
            for f in fields(Examples)
        }
    )
