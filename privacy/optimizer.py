"""The step of DP-SGD: clip each visitor's gradient, sum, add noise, divide by a public number."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

SMALLEST_CLIPPING_NORM = 1e-10
"""Below it, gradients whose squares vanish in float32 could pass it unseen."""


class VisitorDPOptimizer(DPOptimizer):  # type: ignore[misc]
    """Hands a torch optimizer the gradient (sum of clipped gradients + noise) / expected batch.

    Guarantee: with one example a visitor, a step is a Gaussian mechanism of L2 sensitivity
    `clipping_norm` and noise multiplier `noise_multiplier` under add or remove one visitor; what
    the torch optimizer makes of its result (momentum, weight decay, Adam) is post-processing.
    (Abadi et al., "Deep Learning with Differential Privacy", 2016, Algorithm 1; the norm is over
    all parameters together.)

    Call `clip_and_accumulate` after the backward pass of each part of a batch, and `step` once
    a batch, also after an empty one.

    ===========================  ======================================================
    gradient                     what it adds to the sum
    ===========================  ======================================================
    finite                       itself times min(1, C / norm): norm at most C(1 + 1e-6), and
                                 less than C by float32's rounding, 6e-8 a parameter
    with a NaN or an infinity    exactly 0
    norm above 1.8e19            exactly 0: it has no float32 square
    none: an empty batch         0; the noise is added all the same
    ===========================  ======================================================
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        clipping_norm: float,
        expected_batch_size: float,
        rng: np.random.Generator,
    ) -> None:
        """Wrap `optimizer`, whose parameters belong to an Opacus GradSampleModule.

        Args:
            optimizer: makes the step from the noised gradient.
            noise_multiplier: noise's standard deviation / clipping norm.
            clipping_norm: C, L2 bound on what one visitor adds to the sum; at least 1e-10.
            expected_batch_size: divides the noised sum. Public or already released: never the
                size of the batch that was drawn.
            rng: source of the noise. A seeded one is for simulation: who knows the seed can take
                the noise off.
        """
        if not clipping_norm >= SMALLEST_CLIPPING_NORM:
            raise ValueError(f"clipping_norm={clipping_norm}: must be {SMALLEST_CLIPPING_NORM} up")
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clipping_norm,
            expected_batch_size=expected_batch_size,
        )
        self.rng = rng

    def clip_and_accumulate(self, visitors: int) -> None:
        """Add the clipped gradients of the last backward pass, over `visitors`, to the sum.

        Raises:
            RuntimeError: a parameter has no gradient for each visitor: it took no part, or its
                layer saw something else than visitors as the first dimension. To clip such
                gradients would protect no visitor.
        """
        gradients = [_per_visitor(p, visitors) for p in self.params]
        factor = _clipping_factors(gradients, self.max_grad_norm)
        for p, gradient in zip(self.params, gradients, strict=True):
            clipped_sum = (factor @ gradient).view_as(p)
            p.summed_grad = clipped_sum if p.summed_grad is None else p.summed_grad + clipped_sum
            p.grad_sample = None

    def add_noise(self) -> None:
        """Set each parameter's gradient to the sum plus noise of deviation multiplier x C."""
        deviation = self.noise_multiplier * self.max_grad_norm
        for p in self.params:
            noise = self.rng.standard_normal(p.shape, dtype=np.float32)
            p.grad = torch.from_numpy(noise).mul_(deviation)
            if p.summed_grad is not None:
                p.grad += p.summed_grad
                p.summed_grad = None

    def scale_grad(self) -> None:
        """Divide the noised sum by the expected batch size."""
        for p in self.params:
            p.grad /= self.expected_batch_size

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Turn the sum so far into the noised gradient."""
        self.add_noise()
        self.scale_grad()
        return True


def _per_visitor(p: nn.Parameter, visitors: int) -> Tensor:
    gradient = getattr(p, "grad_sample", None)
    if not isinstance(gradient, Tensor) or len(gradient) != visitors:
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} has no gradient for each of {visitors} "
            "visitors: every layer must see visitors as its first dimension, in every forward pass"
        )
    flat: Tensor = gradient.reshape(visitors, -1)
    return flat


def _clipping_factors(gradients: list[Tensor], clipping_norm: float) -> Tensor:
    """(B,) what to multiply each visitor's gradient by; sets those without a finite norm to 0."""
    norms: Tensor = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(g, dim=1) for g in gradients]), dim=0
    )
    broken = ~norms.isfinite()
    if broken.any():
        for gradient in gradients:
            gradient[broken] = 0
    # In whatever order it is summed, a float32 norm of n numbers is off by less than this share.
    rounding = sum(g.shape[1] for g in gradients) * 2.0**-24
    factors = clipping_norm / (norms * (1 + rounding))
    return factors.clamp(max=1.0).masked_fill(broken, 0.0)
