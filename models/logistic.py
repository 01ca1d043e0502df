"""Logistic regression on the bag of a journey's touchpoints."""

from __future__ import annotations

from torch import Tensor, nn

from conf.schema import LogisticConfig
from journeys.features import FeatureSpec
from models.batch import JourneyBatch
from models.embedding import TouchpointBag, output_layer


class Logistic(nn.Module):
    """Convex: the baseline that every other model has to beat."""

    def __init__(self, config: LogisticConfig, spec: FeatureSpec) -> None:
        super().__init__()
        self.bag = TouchpointBag(spec)
        self.output = output_layer(self.bag.width, config.base_rate)
        nn.init.zeros_(self.output.weight)

    def forward(self, batch: JourneyBatch) -> Tensor:
        """Logits, float32 (B,)."""
        logits: Tensor = self.output(self.bag(batch))
        return logits.squeeze(1)
