"""Touchpoints as vectors: the first layer of every model."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from journeys.features import FeatureSpec
from models.batch import JourneyBatch


class TouchpointEmbedding(nn.Module):
    """Each touchpoint becomes the sum of its features' embeddings.

    One table serves all categorical features (each has its own range of rows), looked up as
    `nn.Embedding` without `padding_idx`: padding is masked by the caller, because per-example
    gradients with `padding_idx` are wrong in some engines (see docs/decisions).
    """

    def __init__(self, spec: FeatureSpec, width: int) -> None:
        super().__init__()
        self.offsets = _offsets(spec)
        self.table = nn.Embedding(_vocabulary(spec), width)
        self.numeric = nn.Linear(len(spec.numeric), width) if spec.numeric else None
        nn.init.normal_(self.table.weight, std=0.5 / max(len(spec.categorical), 1) ** 0.5)

    def forward(self, batch: JourneyBatch) -> Tensor:
        """float32 (B, T, width); rows of padding are zero."""
        rows = batch.categorical + self.offsets
        vectors: Tensor = self.table(rows).sum(dim=2)
        if self.numeric is not None:
            vectors = vectors + self.numeric(batch.numeric)
        return vectors * batch.mask().unsqueeze(2)


class TouchpointBag(nn.Module):
    """A journey as one row: how often each value occurs, and each numeric feature's mean and last.

    Fixed (no parameters), so that a linear layer on top is a plain linear layer per journey.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        self.offsets = _offsets(spec)
        vocabulary, numeric = _vocabulary(spec), len(spec.numeric)
        self.widths = [vocabulary, vocabulary, numeric, numeric, 1]
        self.width = sum(self.widths)
        # Packed, a row is counts and the newest values as whole numbers, padded to 4 bytes; then
        # length, label, and what else is in the bag, as float32.
        self._whole = torch.uint8 if spec.max_touchpoints < 2**8 else torch.int32
        self._at = -(-2 * vocabulary * self._whole.itemsize // 4) * 4
        self.packed = self._at + 4 * (2 + sum(self.widths[2:]))
        """Bytes of a packed row."""

    def forward(self, batch: JourneyBatch) -> Tensor:
        """float32 (B, width): share of touchpoints with each value, values of the newest
        touchpoint, numeric means, numeric newest, log of the length / 3.
        """
        if batch.bag is not None:
            return batch.bag
        mask = batch.mask()
        size = len(batch)
        touchpoints = _length(batch)
        share = mask / touchpoints
        newest = (batch.length - 1).clamp(min=0)
        picked = torch.arange(size)
        result = mask.new_zeros(size, self.width)
        bag, last, mean, final, length = torch.split(result, self.widths, dim=1)
        for values, first in zip(batch.categorical.unbind(2), self.offsets.tolist(), strict=True):
            bag[:, first:].scatter_add_(1, values, mask)
        bag.div_(touchpoints)
        last.scatter_(1, batch.categorical[picked, newest] + self.offsets, 1.0)
        mean.copy_(torch.bmm(share.unsqueeze(1), batch.numeric).squeeze(1))
        final.copy_(batch.numeric[picked, newest])
        length.copy_((batch.length.to(mask.dtype).log() / 3.0).unsqueeze(1))
        return result

    def pack(self, batch: JourneyBatch) -> Tensor:
        """uint8 (B, packed): bags with their labels, in as little memory as is quick to read."""
        bag, length, known = self(batch), _length(batch), self.widths[0]
        packed = torch.zeros(len(batch), self.packed, dtype=torch.uint8)
        whole, numbers = self._parts(packed)
        whole[:, :known] = (bag[:, :known] * length).round()
        whole[:, known : 2 * known] = bag[:, known : 2 * known]
        numbers[:, :1], numbers[:, 1], numbers[:, 2:] = length, batch.label, bag[:, 2 * known :]
        return packed

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """float32 (B, width) and (B,): bags and labels that were packed, the same bits."""
        whole, numbers = self._parts(packed)
        known = self.widths[0]
        bag = torch.empty(len(packed), self.width)
        bag[:, : 2 * known] = whole[:, : 2 * known]
        bag[:, :known].div_(numbers[:, :1])
        bag[:, 2 * known :] = numbers[:, 2:]
        return bag, numbers[:, 1]

    def _parts(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        return packed[:, : self._at].view(self._whole), packed[:, self._at :].view(torch.float32)


def _length(batch: JourneyBatch) -> Tensor:
    """float32 (B, 1): touchpoints, at least 1."""
    return batch.length.clamp(min=1).to(torch.float32).unsqueeze(1)


def _vocabulary(spec: FeatureSpec) -> int:
    return sum(size for _, size in spec.categorical)


def _offsets(spec: FeatureSpec) -> Tensor:
    """int64 (C,): the first row of each categorical feature in the common table."""
    sizes = [size for _, size in spec.categorical]
    # Not by torch's cumsum: on the meta device it loads torch's compiler (`models.registry`).
    return torch.tensor(list(itertools.accumulate(sizes[:-1], initial=0)))


def newest(sequence: Tensor, batch: JourneyBatch) -> Tensor:
    """(B, W): of a (B, T, W) sequence the row of each journey's newest touchpoint."""
    rows = torch.arange(len(batch))
    return sequence[rows, (batch.length - 1).clamp(min=0)]


def output_layer(width: int, base_rate: float) -> nn.Linear:
    """Logit from `width` features, small at first, with the bias at `base_rate`."""
    layer = nn.Linear(width, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, float(torch.logit(torch.tensor(base_rate, device="cpu"))))
    return layer
