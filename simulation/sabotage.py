"""The product's trainer, whole or with one thing broken, for the audit to judge.

All of it wraps the product from outside: what a trainer draws from and what tells it visitors'
gradients. The product has no switch for any of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from journeys.features import FIRST
from models.batch import JourneyBatch
from models.embedding import TouchpointBag
from privacy.engines import Engine
from privacy.gradients import Sums, VisitorGradients
from privacy.randomness import Randomness
from privacy.training import LocalTraining, Trainer

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Build:
    """The product's training, as it is or with one thing broken."""

    name: str
    noise: float = 1.0
    """Share of the accounted noise that is really added."""
    clips: bool = True
    """Whether a visitor's gradient is cut to the clipping norm."""
    poisson: bool = True
    """Whether visitors are drawn independently, not dealt into batches of one size."""
    remembers: bool = True
    """Whether the claim counts all rounds, not the last one alone."""


@dataclass(frozen=True)
class LoudCanaries:
    """Canaries that choose their gradient: each has one entry of one parameter to itself."""

    parameter: str
    """Name of the parameter."""
    entries: Ints
    """(m,) indices into it, flat: those of canary 0, 1, ..."""
    norm: float
    """L2 norm of the gradient that each hands in, before clipping."""


class BrokenRandomness:
    """What a build draws from in one round. Only for a simulation, like `honest`."""

    repeatable = True

    def __init__(self, honest: Randomness, build: Build) -> None:
        """Draw from `honest`."""
        self._honest = honest
        self._build = build

    def uniform(self, n: int) -> Floats:
        """(n,) uniform draws, as they should be."""
        return self._honest.uniform(n)

    def normal(self, n: int) -> npt.NDArray[np.float32]:
        """(n,) normals with the build's share of deviation 1."""
        return self._honest.normal(n) * np.float32(self._build.noise)

    def rounded_normal(self, deviation: float, n: int) -> Ints:
        """(n,) rounded normals, as they should be."""
        return self._honest.rounded_normal(deviation, n)


class BrokenTrainer(Trainer):
    """Trains as a build does. Canaries are known by the last categorical feature: FIRST + i."""

    def __init__(self, model: nn.Module, build: Build, loud: LoudCanaries | None) -> None:
        """Take over `model`; `loud` says how canaries choose their gradient, if they do."""
        super().__init__(model)
        self._build = build
        self._loud = loud

    def _engine(self, name: str) -> Engine:
        return _BrokenEngine(super()._engine(name), self.model, self._build, self._loud)

    def _draw(
        self, visitors: int, training: LocalTraining, randomness: Randomness
    ) -> Iterator[Ints]:
        if self._build.poisson:
            yield from super()._draw(visitors, training, randomness)
            return
        batches = round(1 / training.sample_rate)
        for step in range(training.steps):
            turn = step % batches
            if turn == 0:
                dealt = np.argsort(randomness.uniform(visitors)) % batches
            yield np.flatnonzero(dealt == turn)


class _BrokenEngine:
    def __init__(
        self, engine: Engine, model: nn.Module, build: Build, loud: LoudCanaries | None
    ) -> None:
        self._inner = engine
        self._model = model
        self._build = build
        self._loud = loud
        self._parameter = dict(model.named_parameters())[loud.parameter] if loud else None
        self._canary = torch.zeros(0, dtype=torch.int64)

    def forward(self, batch: JourneyBatch) -> Tensor:
        self._canary = _canary(batch, self._model)
        return self._inner.forward(batch)

    def visitor_gradients(
        self, output: Tensor, gradient: Tensor, each: int
    ) -> list[VisitorGradients]:
        gradients = self._inner.visitor_gradients(output, gradient, each)
        if self._loud is not None and self._parameter is not None:
            canary = self._canary[::each]
            gradients = [_Loud(g, self._parameter, self._loud, canary) for g in gradients]
        return gradients if self._build.clips else [_Unclipped(g) for g in gradients]


def _canary(batch: JourneyBatch, model: nn.Module) -> Tensor:
    """int64 (B,): which canary each journey is, below 0 for none."""
    if batch.bag is None:
        return batch.categorical[:, 0, -1] - FIRST
    bag = model.bag
    assert isinstance(bag, TouchpointBag)
    first = int(bag.offsets[-1])
    return batch.bag[:, first : bag.widths[0]].argmax(dim=1) - FIRST


class _Wrapped:
    def __init__(self, inner: VisitorGradients) -> None:
        self.inner = inner

    @property
    def parameters(self) -> Sequence[Tensor]:
        return self.inner.parameters

    def norms(self) -> Tensor:
        return self.inner.norms()

    def add_weighted(self, weights: Tensor, sums: Sums) -> None:
        self.inner.add_weighted(weights, sums)


class _Loud(_Wrapped):
    """Canaries hand in their chosen gradient where it is of these parameters, elsewhere zero."""

    def __init__(
        self,
        inner: VisitorGradients,
        parameter: nn.Parameter,
        loud: LoudCanaries,
        canary: Tensor,
    ) -> None:
        super().__init__(inner.without(canary >= 0))
        self._chosen = (parameter, loud, canary)
        self._own = any(p is parameter for p in inner.parameters)

    def norms(self) -> Tensor:
        _, loud, canary = self._chosen
        return super().norms() + (loud.norm * self._own) * (canary >= 0)

    def add_weighted(self, weights: Tensor, sums: Sums) -> None:
        super().add_weighted(weights, sums)
        parameter, loud, canary = self._chosen
        if self._own:
            loudest = canary >= 0
            entries = torch.from_numpy(loud.entries)[canary[loudest]]
            sums[parameter].view(-1).index_add_(0, entries, loud.norm * weights[loudest])

    def without(self, broken: Tensor) -> VisitorGradients:
        parameter, loud, canary = self._chosen
        return _Loud(self.inner.without(broken), parameter, loud, canary.masked_fill(broken, -1))


class _Unclipped(_Wrapped):
    """Norms that are too small: whatever they belong to passes the clipping as it is."""

    def norms(self) -> Tensor:
        norms = super().norms()
        return torch.where(norms.isfinite(), torch.zeros_like(norms), norms)

    def without(self, broken: Tensor) -> VisitorGradients:
        return _Unclipped(self.inner.without(broken))
