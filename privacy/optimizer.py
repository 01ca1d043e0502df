"""The step of DP-SGD: clip each visitor's gradient, sum, add noise, divide by a public number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from opacus.optimizers import DPOptimizer

from models.flat import FlatParameters
from privacy.descent import Descent
from privacy.gradients import LARGEST_NORM, VisitorGradients, together
from privacy.randomness import NORMAL_GRID, Randomness

SMALLEST_CLIPPING_NORM = 1e-10
"""Below it, gradients whose squares vanish in float32 could pass it unseen."""


class VisitorDPOptimizer(DPOptimizer):  # type: ignore[misc]
    """Hands a torch optimizer the gradient (sum of clipped gradients + noise) / expected batch.

    Guarantee: a step is a Gaussian mechanism of L2 sensitivity `clipping_norm` and noise multiplier
    `noise_multiplier` under add or remove one visitor, with all its examples; what the torch
    optimizer makes of its result (momentum, weight decay, Adam) is post-processing. (Abadi et al.,
    "Deep Learning with Differential Privacy", 2016, Algorithm 1; the norm is over all parameters
    together.)

    Call `clip_and_accumulate` after the backward pass of each part of a batch, and `step` once
    a batch, also after an empty one.

    ===========================  ======================================================
    gradient                     what it adds to the sum
    ===========================  ======================================================
    finite                       itself times min(1, C / norm): norm at most C(1 + 1e-6), and
                                 less than C by rounding: float32's, 6e-8 a parameter, and what
                                 rounding the sum to the noise's grid may add
    with a NaN or an infinity    exactly 0
    norm above 1.8e19            exactly 0: it has no float32 square; so where what went into a
                                 layer, or the gradient of what came out, is as large
    none: an empty batch         0; the noise is added all the same
    ===========================  ======================================================
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | Descent,
        parameters: FlatParameters,
        *,
        noise_multiplier: float,
        clipping_norm: float,
        expected_batch_size: float,
        randomness: Randomness,
    ) -> None:
        """Wrap `optimizer`, which steps the vector of a model's parameters.

        Args:
            optimizer: makes the step from the noised gradient.
            parameters: of the model.
            noise_multiplier: noise's standard deviation / clipping norm.
            clipping_norm: C, L2 bound on what one visitor adds to the sum; at least 1e-10.
            expected_batch_size: divides the noised sum. Public or already released: never the
                size of the batch that was drawn.
            randomness: source of the noise.

        Raises:
            ValueError: `clipping_norm` is too small; or `noise_multiplier` too large for so many
                parameters, of which rounding alone would move the sum by half of C.
        """
        if not clipping_norm >= SMALLEST_CLIPPING_NORM:
            raise ValueError(f"clipping_norm={clipping_norm}: must be {SMALLEST_CLIPPING_NORM} up")
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clipping_norm,
            expected_batch_size=expected_batch_size,
        )
        self._randomness = randomness
        self._vector = parameters.vector
        size = len(self._vector)
        self._deviation = noise_multiplier * clipping_norm
        # Two sums move apart by up to this when they are rounded to the noise's grid.
        rounding = self._deviation * NORMAL_GRID * math.sqrt(size)
        if not rounding <= clipping_norm / 2:
            raise ValueError(f"noise_multiplier={noise_multiplier}: too large for this model")
        # In whatever order it is summed, a norm of n numbers is off by less than this share.
        share = size * torch.finfo(self._vector.dtype).eps / 2
        self._largest_norm = (clipping_norm - rounding) / (1 + share)
        self._sum, self._sums = parameters.total.zero_(), parameters.totals

    def clip_and_accumulate(self, gradients: Sequence[VisitorGradients]) -> None:
        """Add each visitor's gradient, clipped, to the sum.

        Args:
            gradients: of the same visitors, each of other parameters, together of all.

        Raises:
            RuntimeError: A parameter has no gradient, or has two.
        """
        parameters = [p for g in gradients for p in g.parameters]
        if len(parameters) != len(self._sums) or set(parameters) != self._sums.keys():
            raise RuntimeError("each parameter needs exactly one gradient a visitor")
        norms = together([g.norms() for g in gradients])
        # A sum over visitors, to look at one number: seldom is any broken.
        if not float(norms.sum()) <= LARGEST_NORM:
            sound = norms <= LARGEST_NORM
            gradients = [g.without(~sound) for g in gradients]
            norms = norms.masked_fill(~sound, math.inf)
        factors = norms.reciprocal().mul_(self._largest_norm).clamp_(max=1.0).to(self._sum.dtype)
        for g in gradients:
            g.add_weighted(factors, self._sums)

    def add_noise(self) -> None:
        """Add noise of deviation multiplier x C to the sum, both on the grid of the noise."""
        if self._deviation > 0:
            unit = self._deviation * NORMAL_GRID
            units = self._sum.double().div_(unit).round_()
            noise = torch.from_numpy(self._randomness.normal(len(units)))
            self._sum.copy_(units.add_(noise, alpha=1 / NORMAL_GRID).mul_(unit))

    def scale_grad(self) -> None:
        """Set the vector's gradient to the sum / the expected batch size."""
        torch.div(self._sum, self.expected_batch_size, out=self._vector.grad)
        self._sum.zero_()

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Turn the sum so far into the noised gradient."""
        self.add_noise()
        self.scale_grad()
        return True
