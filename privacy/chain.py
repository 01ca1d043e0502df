"""Linear layers one after the other, differentiated without autograd.

What modules and autograd take to find out what there is to do is, for a small model, as much as
the doing. Of a chain it is known: each layer's derivative by what went in, from last to first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

LinearUse = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of a linear layer: weight, bias, what went in (R, I), the gradient of what came out (R, O)."""
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
        # The parameters themselves: a module takes its time to find its attributes.
        self._steps = [(layer.weight, layer.bias, activation) for layer, activation in steps]
        self.layers = [layer for layer, _ in steps]
        self._passed: list[Tensor] = []

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(R, O) what comes out for `x` (R, I); keeps what went in and out of each layer."""
        self._passed = [x]
        for weight, bias, activation in self._steps:
            x = linear(x, weight, bias)
            if activation is not None:
                x = activation[0](x)
            self._passed.append(x)
        return x

    @torch.no_grad()
    def backward(self, gradient: Tensor) -> list[LinearUse]:
        """Each layer's use, from last to first; the gradient is that before the activation.

        Args:
            gradient: (R, O), by the result of the last call of `forward`.
        """
        uses: list[LinearUse] = []
        came_out = self._passed.pop()
        for weight, bias, activation in reversed(self._steps):
            if activation is not None:
                gradient = activation[1](gradient, came_out)
            came_out = self._passed.pop()
            uses.append((weight, bias, came_out, gradient))
            if self._passed:
                gradient = gradient @ weight
        return uses
