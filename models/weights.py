"""A model's parameters as named arrays, the form in which they travel and are saved."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import nn


def get_weights(model: nn.Module) -> dict[str, npt.NDArray[np.float32]]:
    """Copies of the parameters, float32, by name."""
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def set_weights(model: nn.Module, weights: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Copy `weights` into `model`.

    Raises:
        RuntimeError: A name or a shape differs from the model's. The model is as it was.
    """
    copy_weights(weights, {name: p.detach().numpy() for name, p in model.named_parameters()})


def copy_weights(
    weights: Mapping[str, npt.NDArray[np.float32]], arrays: Mapping[str, npt.NDArray[np.float32]]
) -> None:
    """Copy `weights` into a model's `arrays`. Raises as `set_weights`."""
    given, expected = ({name: a.shape for name, a in x.items()} for x in (weights, arrays))
    if given != expected:
        name = min(set(given.items()) ^ set(expected.items()))[0]
        raise RuntimeError(
            f"{name}: shape {given.get(name)} where the model has {expected.get(name)}"
        )
    for name, array in arrays.items():
        np.copyto(array, weights[name])
