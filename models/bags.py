"""Sites' journeys as bags of touchpoints, made once: no round changes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol
from weakref import ref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from journeys.examples import Examples
from models.batch import JourneyBatch, to_batch
from models.embedding import TouchpointBag

KEPT_BYTES = 2**24
"""Of bags as a model reads them."""
PACKED_BYTES = 2**30
"""Of packed bags, which take about a third of that and 0.1 µs an example to unpack."""

_AT_ONCE = 4096
"""Examples that are made into bags together."""


class Bags(Protocol):
    """Examples, all as bags."""

    def take(self, rows: npt.NDArray[np.int64]) -> JourneyBatch:
        """Those at `rows`."""


class PlainBags:
    """Bags as a model reads them."""

    def __init__(self, bag: TouchpointBag, examples: Examples) -> None:
        self._bag = torch.empty(len(examples), bag.width)
        self._label = torch.empty(len(examples))
        for rows, batch in _batches(examples):
            self._bag[rows], self._label[rows] = bag(batch), batch.label

    def take(self, rows: npt.NDArray[np.int64]) -> JourneyBatch:
        """Those at `rows`."""
        index = torch.from_numpy(rows)
        return _bagged(self._bag.index_select(0, index), self._label.index_select(0, index))


class PackedBags:
    """Bags in less memory, for larger sites; the same bits."""

    def __init__(self, bag: TouchpointBag, examples: Examples) -> None:
        self._unpack = bag.unpack
        self._packed = torch.empty(len(examples), bag.packed, dtype=torch.uint8)
        for rows, batch in _batches(examples):
            self._packed[rows] = bag.pack(batch)

    def take(self, rows: npt.NDArray[np.int64]) -> JourneyBatch:
        """Those at `rows`."""
        return _bagged(*self._unpack(self._packed.index_select(0, torch.from_numpy(rows))))


_Kind = type[PlainBags] | type[PackedBags]


class KeptBags:
    """Those of the examples that come first, as far as there is room, while the examples exist."""

    def __init__(self, bag: TouchpointBag) -> None:
        self.bag = bag
        self._kept: dict[int, tuple[ref[Examples], Bags]] = {}
        self._each: dict[_Kind, int] = {PlainBags: 4 * (bag.width + 1), PackedBags: bag.packed}
        self._free: dict[_Kind, int] = {PlainBags: KEPT_BYTES, PackedBags: PACKED_BYTES}

    def of(self, examples: Examples) -> Bags | None:
        """All of `examples`; None if that is too much."""
        key = id(examples)
        if key in self._kept:
            return self._kept[key][1]
        for kind, free in self._free.items():
            if (size := self._each[kind] * len(examples)) <= free:
                return self._keep(kind, examples, size)
        return None

    def _keep(self, kind: _Kind, examples: Examples, size: int) -> Bags:
        bags, key = kind(self.bag, examples), id(examples)
        examples.unload()
        self._free[kind] -= size

        def drop(_: object) -> None:
            del self._kept[key]
            self._free[kind] += size

        self._kept[key] = ref(examples, drop), bags
        return bags


# Of the touchpoints there is nothing left.
_NONE = torch.empty(0, 0, 0, dtype=torch.int64), torch.empty(0, 0, 0)
_NO_LENGTH = torch.empty(0, dtype=torch.int64)


def _bagged(bag: Tensor, label: Tensor) -> JourneyBatch:
    return JourneyBatch(*_NONE, _NO_LENGTH, label, bag)


def _batches(examples: Examples) -> Iterator[tuple[slice, JourneyBatch]]:
    for start in range(0, len(examples), _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        yield rows, to_batch(examples, rows)
