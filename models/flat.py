"""A model's parameters as one vector: one step, one noise, one sum for all of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from models.weights import copy_weights


class FlatParameters:
    """All parameters of a model, one after the other; the model's own become views of them."""

    def __init__(self, model: nn.Module) -> None:
        """Take over the parameters of `model`, and their gradients, which begin at 0."""
        named = dict(model.named_parameters())
        self._parameters = list(named.values())
        self._sizes = [p.numel() for p in self._parameters]
        self.vector = nn.Parameter(torch.cat([p.detach().flatten() for p in self._parameters]))
        """(P,) all of them; what an optimizer steps."""
        self.gradient = torch.zeros_like(self.vector, requires_grad=False)
        """(P,) the vector's, and in parts that of each parameter."""
        self.vector.grad = self.gradient
        gradients = self.split(self.gradient)
        for p, part in self.split(self.vector.detach()).items():
            p.data, p.grad = part, gradients[p]
        self.total = torch.zeros_like(self.vector, requires_grad=False)
        """(P,) where one optimizer adds gradients up, apart from where a backward pass writes."""
        self.totals = self.split(self.total)
        """The part of each parameter."""
        self._arrays = {name: p.detach().numpy() for name, p in named.items()}

    def split(self, vector: Tensor) -> dict[Tensor, Tensor]:
        """Of a vector (P,) the part of each parameter, in its shape, as a view."""
        parts = torch.split(vector, self._sizes)
        return {p: part.view(p.shape) for p, part in zip(self._parameters, parts, strict=True)}

    def set(self, weights: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Copy `weights` into the parameters. Raises as `models.weights.set_weights`."""
        copy_weights(weights, self._arrays)

    def get(self) -> dict[str, npt.NDArray[np.float32]]:
        """Copies of the parameters, by name."""
        return {name: array.copy() for name, array in self._arrays.items()}
