"""Models by the name of their config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from conf.schema import (
    AttentionConfig,
    GruConfig,
    LogisticConfig,
    MlpConfig,
    ModelConfig,
    SettingError,
)
from journeys.features import FeatureSpec
from models.attention import Attention
from models.gru import Gru
from models.logistic import Logistic
from models.mlp import Mlp
from models.weights import get_weights


def build(config: ModelConfig, spec: FeatureSpec) -> nn.Module:
    """A new model of `config` for journeys of `spec`, its weights drawn from torch's generator."""
    match config:
        case LogisticConfig():
            return Logistic(config, spec)
        case MlpConfig():
            return Mlp(config, spec)
        case GruConfig():
            return Gru(config, spec)
        case AttentionConfig():
            return Attention(config, spec)
    raise SettingError(f"model.name={config.name}: no such model")


def shapes(config: ModelConfig, spec: FeatureSpec) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of a model of `config`, however large, at no memory."""
    with torch.device("meta"), _Unfilled():
        return {name: tuple(v.shape) for name, v in build(config, spec).state_dict().items()}


def initial_weights(
    config: ModelConfig, spec: FeatureSpec, seed: int
) -> dict[str, npt.NDArray[np.float32]]:
    """The weights of an untrained model, drawn from `seed`; torch's generator is left as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_weights(build(config, spec))


class _Unfilled(TorchFunctionMode):
    """Draws no weights: for tensors without memory torch would load its compiler to do so, which
    takes 0.4 s and 22 MB beside Opacus, and 1 s and 71 MB without.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        return given["tensor"] if func is nn.init.normal_ else func(*args, **given)
