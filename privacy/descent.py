"""What turns a gradient into a step: SGD or Adam, from its start."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from conf.schema import OptimizerConfig


class Descent:
    """Steps one vector by its gradient.

    The arithmetic is that of `torch.optim`, with its defaults. What its classes do around it at
    each step takes longer than the step of a small model.
    """

    def __init__(
        self, vector: nn.Parameter, config: OptimizerConfig, proximal_mu: float = 0.0
    ) -> None:
        """Start at `vector`, of which `grad` is what to step by.

        Args:
            vector: (P,).
            config: which optimizer, its step size, momentum and weight decay.
            proximal_mu: weight of FedProx's term mu/2 x |vector - start|², which adds to the
                gradient; 0 or more.
        """
        # What Opacus looks for in an optimizer.
        self.param_groups = [{"params": [vector]}]
        self._config = config
        self._vector, self._gradient = vector.detach(), vector.grad
        self._mu = proximal_mu
        self._start = self._vector.clone() if proximal_mu > 0 else self._vector
        self._momentum: list[Tensor | None] = [None]
        if config.name == "adam":
            self._moments = [torch.zeros_like(self._vector) for _ in range(2)]
            self._steps = torch.zeros(())

    def step(self) -> None:
        """Move the vector; its gradient is left changed by the proximal term alone."""
        assert self._gradient is not None
        if self._mu > 0:
            self._gradient.add_(self._vector - self._start, alpha=self._mu)
        config = self._config
        if config.name == "sgd":
            sgd(
                [self._vector],
                [self._gradient],
                self._momentum,
                foreach=False,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                lr=config.learning_rate,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
        else:
            first, second = self._moments
            adam(
                [self._vector],
                [self._gradient],
                [first],
                [second],
                [],
                [self._steps],
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                eps=1e-8,
                maximize=False,
            )
