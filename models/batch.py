"""The one input type of every model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from journeys.examples import Examples


@dataclass(frozen=True)
class JourneyBatch:
    """B journeys, right-padded to T touchpoints, oldest first. B may be 0."""

    categorical: Tensor
    """int64 (B, T, C): index into each categorical feature's vocabulary; 0 is padding."""
    numeric: Tensor
    """float32 (B, T, F): scaled to [0, 1]; 0 on padding."""
    length: Tensor
    """int64 (B,): touchpoints in the journey, 1 to T."""
    label: Tensor
    """float32 (B,): 1 converted within the horizon, 0 not."""
    bag: Tensor | None = None
    """float32 (B, width): of `models.embedding.TouchpointBag`, where it is already known. Who reads
    it needs no touchpoints: the other tensors but the label may then be empty."""

    def __len__(self) -> int:
        return len(self.label)

    def mask(self) -> Tensor:
        """float32 (B, T): 1 on touchpoints, 0 on padding."""
        steps = torch.arange(self.categorical.shape[1])
        return (steps < self.length.unsqueeze(1)).to(self.numeric.dtype)

    def split(self, sizes: list[int]) -> Iterator[JourneyBatch]:
        """Batches of `sizes` journeys, one after the other, without copying."""
        start = 0
        for size in sizes:
            part = slice(start, start + size)
            yield JourneyBatch(
                self.categorical[part],
                self.numeric[part],
                self.length[part],
                self.label[part],
                None if self.bag is None else self.bag[part],
            )
            start += size


def to_batch(examples: Examples, rows: npt.NDArray[np.int64] | slice) -> JourneyBatch:
    """The examples at `rows` as tensors, cut to the longest journey among them."""
    part = examples.take(rows)
    longest = int(part.length.max(initial=1))
    return JourneyBatch(
        categorical=torch.from_numpy(part.categorical[:, :longest].astype(np.int64)),
        numeric=torch.from_numpy(np.ascontiguousarray(part.numeric[:, :longest])),
        length=torch.from_numpy(part.length.astype(np.int64)),
        label=torch.from_numpy(part.label),
    )
