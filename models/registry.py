"""Models by the name of their config."""

from __future__ import annotations

from torch import nn

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
