"""Linear layers one after the other, differentiated without autograd.

What modules and autograd take to find out what there is to do is, for a small model, as much as
the doing. Of a chain it is known: each layer's derivative by what went in, from last to first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_Activation = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]

_ACTIVATIONS: dict[type[nn.Module], _Activation] = {
    nn.Tanh: (torch.tanh_, torch.ops.aten.tanh_backward),
    nn.ReLU: (torch.relu_, lambda gradient, y: torch.ops.aten.threshold_backward(gradient, y, 0)),
}
"""y of x, in its place; and the gradient by x, from that by y and y."""


class Chain:
    """Linear layers with a bias, each with an activation after it or none."""

    @classmethod
    def of(cls, layers: Sequence[nn.Module]) -> Chain | None:
        """Of `layers`, in order; None where others are among them, or one twice."""
        steps: list[tuple[nn.Linear, _Activation | None]] = []
        for layer in layers:
            if type(layer) is nn.Linear and layer.bias is not None:
                steps.append((layer, None))
            elif type(layer) in _ACTIVATIONS and steps and steps[-1][1] is None:
                steps[-1] = (steps[-1][0], _ACTIVATIONS[type(layer)])
            else:
                return None
        return cls(steps) if len({layer for layer, _ in steps}) == len(steps) > 0 else None

    def __init__(self, steps: Sequence[tuple[nn.Linear, _Activation | None]]) -> None:
        self._steps = steps
        self._passed: list[Tensor] = []

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(R, O) what comes out for `x` (R, I); keeps what went in and out of each layer."""
        self._passed = [x]
        for layer, activation in self._steps:
            x = linear(x, layer.weight, layer.bias)
            if activation is not None:
                x = activation[0](x)
            self._passed.append(x)
        return x

    @torch.no_grad()
    def backward(self, gradient: Tensor) -> list[tuple[nn.Linear, Tensor, Tensor]]:
        """Each layer with what went in (R, I), and the gradient of what came out before activation.

        Args:
            gradient: (R, O), by the result of the last call of `forward`.
        """
        layers: list[tuple[nn.Linear, Tensor, Tensor]] = []
        came_out = self._passed.pop()
        for layer, activation in reversed(self._steps):
            if activation is not None:
                gradient = activation[1](gradient, came_out)
            came_out = self._passed.pop()
            layers.append((layer, came_out, gradient))
            if self._passed:
                gradient = gradient @ layer.weight
        return layers
