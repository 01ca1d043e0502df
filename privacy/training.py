"""A site's training in one round, with DP-SGD or without protection.

Guarantee of private training. The privacy unit is the visitor, with all its examples. A step draws
each visitor independently with probability q (Poisson sampling), averages the gradients of a drawn
visitor's examples, cuts this mean to L2 norm C and adds Gaussian noise of deviation noise
multiplier x C to the sum. Adding or removing one visitor changes the sum, if that visitor is drawn,
by one clipped gradient: the sensitivity is C. A step is therefore a Poisson-sampled Gaussian
mechanism and `steps` of them are the `PrivacyEvent` of `LocalTraining.event` (Abadi et al., "Deep
Learning with Differential Privacy", 2016). For this to hold the sample rate, the steps and the
expected batch size must not depend on the visitors: they come from public config and a released,
noised count.

A visitor's gradient is the mean of its examples', not the sum, so that it has the size of one
example's whatever their number: the same C fits, and who has more journeys weighs no more.

Everything after the noise (division by the expected batch size, momentum, Adam, weight decay,
FedProx's proximal term) reads only released quantities: post-processing, at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from conf.schema import OptimizerConfig
from journeys.examples import Examples
from models.bags import KeptBags
from models.batch import JourneyBatch, to_batch
from models.embedding import TouchpointBag
from models.flat import FlatParameters
from privacy.accountant import PrivacyEvent
from privacy.allocator import keep_freed_memory
from privacy.descent import Descent
from privacy.randomness import Randomness
from privacy.sampling import draw_steps

if TYPE_CHECKING:
    from privacy.engines import Engine
    from privacy.optimizer import VisitorDPOptimizer

AHEAD = 4096
"""Examples that are read at once, for several steps."""

Weights = dict[str, npt.NDArray[np.float32]]
"""A model's parameters by name."""

_Part = tuple[npt.NDArray[np.int64], int]
"""Rows of examples, those of a visitor in a row; and how many each visitor has."""
_Step = list[tuple[JourneyBatch, int]]
"""The same as batches: all of a step, none if nobody was drawn."""


@dataclass(frozen=True)
class LocalTraining:
    """What a site does in one round. Nothing in it may depend on the site's visitors."""

    sample_rate: float
    """Probability with which a step draws each visitor, in (0, 1]; not each example."""
    steps: int
    """Optimizer steps, 1 or more."""
    expected_batch_size: float
    """What the summed gradient is divided by. Public or already released, above 0."""
    noise_multiplier: float
    """Noise's standard deviation / clipping norm. 0: unprotected, neither clipped nor noised."""
    clipping_norm: float
    """C: L2 bound on one visitor's gradient, above 0."""
    optimizer: OptimizerConfig
    """What turns gradients into steps; started anew each round."""
    clipping_engine: str = "bookkeeping"
    """How visitors' gradients are made, `bookkeeping` or `opacus`: the same but for rounding."""
    proximal_mu: float = 0.0
    """Weight of FedProx's proximal term mu/2 x |w - w_round|², 0 or more."""

    def __post_init__(self) -> None:
        for name in ("steps", "expected_batch_size", "clipping_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        if not self.proximal_mu >= 0:
            raise ValueError(f"proximal_mu={self.proximal_mu}: must be 0 or more")
        _ = self.event

    @property
    def event(self) -> PrivacyEvent:
        """What the round's training spends."""
        return PrivacyEvent(self.noise_multiplier, self.sample_rate, self.steps)


class TrainingStopped(Exception):  # noqa: N818  (asked for, not a fault)
    """Training ended before its last step, because it was asked to. Nothing came of it."""


def never() -> bool:
    """For training that nobody stops."""
    return False


class Trainer:
    """Trains one model architecture, for any number of sites and rounds, on this thread.

    The model is wrapped for per-visitor gradients once, when it first trains privately: wrapped
    anew for each site and round, memory would grow with every one.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take over `model`, which maps a `JourneyBatch` of B journeys to float32 (B,) logits.

        Every layer with parameters must see the batch as its first dimension, and every parameter
        must take part in every forward pass; private training checks both.
        """
        keep_freed_memory()
        self.model = model
        self._parameters = FlatParameters(model)
        self._engines: dict[str, Engine] = {}
        bag = getattr(model, "bag", None)
        self._bags = KeptBags(bag) if isinstance(bag, TouchpointBag) else None

    @property
    def parameters(self) -> int:
        """Number of the model's parameters."""
        return len(self._parameters.vector)

    def train(
        self,
        weights: Mapping[str, npt.NDArray[np.float32]],
        examples: Examples,
        training: LocalTraining,
        randomness: Randomness,
        stopped: Callable[[], bool] = never,
    ) -> Weights:
        """The weights after `training` on `examples` from `weights`.

        Guarantee: with a noise multiplier above 0, the result is `training.event` under add or
        remove one visitor (see this module). With 0 there is none.

        The loss is the binary cross entropy, the mean over each visitor's examples, summed over the
        drawn visitors and divided by `training.expected_batch_size`.

        Args:
            weights: of the model, by name. Left as they are.
            examples: of any number of visitors.
            training: what to do.
            randomness: decides who is drawn, and the noise. From the same seed come the same bits.
            stopped: asked before each step; once it is true, training ends.

        Raises:
            TrainingStopped: `stopped` said so.
            RuntimeError: `weights` do not fit the model, or the model does not keep visitors apart.
            TypeError: `training.clipping_engine` has no way to clip a layer of the model.
        """
        self._parameters.set(weights)
        if not self.model.training:
            self.model.train()
        optimizer = Descent(self._parameters.vector, training.optimizer, training.proximal_mu)
        steps = _until(stopped, self._steps(examples, training, randomness))
        if training.noise_multiplier > 0:
            private = _make_private(optimizer, self._parameters, training, randomness)
            self._train_privately(steps, training, private)
        else:
            self._train_plainly(steps, training, optimizer)
        return self._parameters.get()

    def _train_privately(
        self, steps: Iterator[_Step], training: LocalTraining, optimizer: VisitorDPOptimizer
    ) -> None:
        engine = self._engine(training.clipping_engine)
        for step in steps:
            for batch, each in step:
                logits = engine.forward(batch)
                gradient = _loss_gradient(logits, batch, each)
                optimizer.clip_and_accumulate(engine.visitor_gradients(logits, gradient, each))
            optimizer.step()

    def _train_plainly(
        self, steps: Iterator[_Step], training: LocalTraining, optimizer: Descent
    ) -> None:
        for step in steps:
            self._parameters.gradient.zero_()
            for batch, each in step:
                logits = self.model(batch)
                share = each * training.expected_batch_size
                torch.autograd.backward(logits, _loss_gradient(logits, batch, share))
            optimizer.step()

    def _steps(
        self, examples: Examples, training: LocalTraining, randomness: Randomness
    ) -> Iterator[_Step]:
        """The batches of each step. Those of several are read at once, which costs less."""
        visitors = _Visitors(examples)
        steps = (
            list(visitors.parts(drawn, training.optimizer.microbatch))
            for drawn in self._draw(visitors.number, training, randomness)
        )
        bags = None if self._bags is None else self._bags.of(examples)
        if bags is not None:
            for parts in steps:
                yield [(bags.take(rows), each) for rows, each in parts]
            return
        waiting: list[list[_Part]] = []
        ahead = 0
        for parts in steps:
            waiting.append(parts)
            ahead += sum(len(rows) for rows, _ in parts)
            if ahead >= AHEAD:
                yield from self._read(examples, waiting)
                waiting, ahead = [], 0
        yield from self._read(examples, waiting)

    def _draw(
        self, visitors: int, training: LocalTraining, randomness: Randomness
    ) -> Iterator[npt.NDArray[np.int64]]:
        """Who takes part in each step, below `visitors`."""
        return draw_steps(visitors, training.sample_rate, training.steps, randomness)

    def _read(self, examples: Examples, waiting: list[list[_Part]]) -> Iterator[_Step]:
        parts = [rows for step in waiting for rows, _ in step]
        batches: Iterator[JourneyBatch] = iter(())
        if parts:
            batch = to_batch(examples, np.concatenate(parts))
            if self._bags is not None:
                batch = replace(batch, bag=self._bags.bag(batch))
            batches = batch.split([len(rows) for rows in parts])
        for step in waiting:
            yield [(next(batches), each) for _, each in step]

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            # The import takes 2 s, which unprotected training need not wait for.
            from privacy.engines import ENGINES

            self._engines[name] = ENGINES[name](self.model)
        return self._engines[name]


class _Visitors:
    """A site's examples, visitor by visitor."""

    def __init__(self, examples: Examples) -> None:
        self.number = len(examples)
        self._one_each = examples.visitor is None
        if not self._one_each:
            self._rows, self._count = examples.by_visitor()
            self._start = np.cumsum(self._count) - self._count
            self.number = len(self._count)

    def parts(self, drawn: npt.NDArray[np.int64], microbatch: int) -> Iterator[_Part]:
        """Those who were drawn, in parts that fit in memory and have equally many examples each."""
        if self._one_each:
            for start in range(0, len(drawn), microbatch):
                yield drawn[start : start + microbatch], 1
            return
        count = self._count[drawn]
        for each in np.unique(count).tolist():
            alike = drawn[count == each]
            size = max(1, microbatch // each)
            for start in range(0, len(alike), size):
                first = self._start[alike[start : start + size]]
                yield self._rows[(first[:, None] + np.arange(each)).ravel()], each


def _until(stopped: Callable[[], bool], steps: Iterator[_Step]) -> Iterator[_Step]:
    for step in steps:
        if stopped():
            raise TrainingStopped
        yield step


def _loss_gradient(logits: Tensor, batch: JourneyBatch, share: float) -> Tensor:
    """(R,) the derivative of the summed binary cross entropy / `share` by each logit."""
    gradient = torch.sigmoid(logits.detach()).sub_(batch.label)
    return gradient if share == 1 else gradient.div_(share)


def _make_private(
    optimizer: Descent,
    parameters: FlatParameters,
    training: LocalTraining,
    randomness: Randomness,
) -> VisitorDPOptimizer:
    from privacy.optimizer import VisitorDPOptimizer

    return VisitorDPOptimizer(
        optimizer,
        parameters,
        noise_multiplier=training.noise_multiplier,
        clipping_norm=training.clipping_norm,
        expected_batch_size=training.expected_batch_size,
        randomness=randomness,
    )
