"""A site's training in one round, with DP-SGD or without protection.

Guarantee of private training. The privacy unit is the visitor and each visitor has one example.
A step draws each visitor independently with probability q (Poisson sampling), cuts each drawn
visitor's gradient to L2 norm C and adds Gaussian noise of deviation noise multiplier x C to the
sum. Adding or removing one visitor changes the sum, if that visitor is drawn, by one clipped
gradient: the sensitivity is C. A step is therefore a Poisson-sampled Gaussian mechanism and
`steps` of them are the `PrivacyEvent` of `LocalTraining.event` (Abadi et al., "Deep Learning with
Differential Privacy", 2016). For this to hold the sample rate, the steps and the expected batch
size must not depend on the visitors: they come from public config and a released, noised count.

Everything after the noise (division by the expected batch size, momentum, Adam, weight decay,
FedProx's proximal term) reads only released quantities: post-processing, at no cost.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from conf.schema import OptimizerConfig
from journeys.examples import Examples
from models.batch import to_batch
from models.weights import get_weights, set_weights
from privacy.accountant import PrivacyEvent

if TYPE_CHECKING:
    from opacus import GradSampleModule

    from privacy.optimizer import VisitorDPOptimizer

Weights = dict[str, npt.NDArray[np.float32]]
"""A model's parameters by name."""


@dataclass(frozen=True)
class LocalTraining:
    """What a site does in one round. Nothing in it may depend on the site's visitors."""

    sample_rate: float
    """Probability with which a step draws each visitor, in (0, 1]."""
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
        self.model = model
        self._wrapped: GradSampleModule | None = None

    def train(
        self,
        weights: Mapping[str, npt.NDArray[np.float32]],
        examples: Examples,
        training: LocalTraining,
        seed: np.random.SeedSequence,
    ) -> Weights:
        """The weights after `training` on `examples` from `weights`.

        Guarantee: with a noise multiplier above 0, the result is `training.event` under add or
        remove one visitor (see this module). With 0 there is none.

        The loss is the binary cross entropy, summed over the batch and divided by
        `training.expected_batch_size`. The same seed gives the same bits: `seed` feeds two
        independent streams, one that draws visitors and one that draws noise. Seeded training is
        for simulation: who knows the seed knows who was drawn and can take the noise off.

        Args:
            weights: of the model, by name. Left as they are.
            examples: one a visitor.
            training: what to do.
            seed: of this run, site and round.

        Raises:
            RuntimeError: `weights` do not fit the model, or the model does not keep visitors apart.
        """
        self._load(weights)
        sampling, noise = _streams(seed)
        base = _optimizer(self.model, training)
        private = _make_private(base, training, noise) if training.noise_multiplier > 0 else None
        if private is None:
            model, optimizer, scale = self._plain(), base, 1 / training.expected_batch_size
        else:
            model, optimizer, scale = self._per_visitor(), private, 1.0

        with warnings.catch_warnings():
            # Torch says so of layers whose input needs no gradient; their own is right.
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            for _ in range(training.steps):
                optimizer.zero_grad(set_to_none=False)
                rows = np.flatnonzero(sampling.random(len(examples)) < training.sample_rate)
                for start in range(0, len(rows), training.optimizer.microbatch):
                    batch = to_batch(examples, rows[start : start + training.optimizer.microbatch])
                    losses = binary_cross_entropy_with_logits(
                        model(batch), batch.label, reduction="sum"
                    )
                    torch.autograd.backward(losses * scale)
                    if private is not None:
                        private.clip_and_accumulate(len(batch))
                optimizer.step()
        return get_weights(self.model)

    def _load(self, weights: Mapping[str, npt.NDArray[np.float32]]) -> None:
        set_weights(self.model, weights)
        self.model.train()
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)

    def _per_visitor(self) -> nn.Module:
        if self._wrapped is None:
            # The import takes 2 s, which unprotected training need not wait for.
            from opacus import GradSampleModule

            self._wrapped = GradSampleModule(self.model, loss_reduction="sum")
        self._wrapped.enable_hooks()
        wrapped: nn.Module = self._wrapped
        return wrapped

    def _plain(self) -> nn.Module:
        if self._wrapped is not None:
            self._wrapped.disable_hooks()
        return self.model


def _streams(seed: np.random.SeedSequence) -> tuple[np.random.Generator, np.random.Generator]:
    # Not seed.spawn, which answers anew each time.
    sampling, noise = (
        np.random.default_rng(np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, i)))
        for i in range(2)
    )
    return sampling, noise


def _optimizer(model: nn.Module, training: LocalTraining) -> torch.optim.Optimizer:
    config = training.optimizer
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer
    if config.name == "sgd":
        optimizer = torch.optim.SGD(
            parameters, config.learning_rate, config.momentum, weight_decay=config.weight_decay
        )
    else:
        optimizer = torch.optim.Adam(
            parameters, config.learning_rate, weight_decay=config.weight_decay
        )
    if training.proximal_mu > 0:
        round_weights = [p.detach().clone() for p in parameters]

        def add_proximal_term(*_: object) -> None:
            for p, at_start in zip(parameters, round_weights, strict=True):
                assert p.grad is not None
                p.grad.add_(p.detach() - at_start, alpha=training.proximal_mu)

        optimizer.register_step_pre_hook(add_proximal_term)
    return optimizer


def _make_private(
    optimizer: torch.optim.Optimizer, training: LocalTraining, rng: np.random.Generator
) -> VisitorDPOptimizer:
    from privacy.optimizer import VisitorDPOptimizer

    return VisitorDPOptimizer(
        optimizer,
        noise_multiplier=training.noise_multiplier,
        clipping_norm=training.clipping_norm,
        expected_batch_size=training.expected_batch_size,
        rng=rng,
    )
