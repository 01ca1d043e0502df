"""A model's parameters as named arrays, the form in which they travel and are saved."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn


def get_weights(model: nn.Module) -> dict[str, npt.NDArray[np.float32]]:
    """Copies of the parameters, float32, by name."""
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}


def set_weights(model: nn.Module, weights: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Copy `weights` into `model`.

    Raises:
        RuntimeError: A name or a shape differs from the model's.
    """
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
