"""Logistic regression on the bag of a journey's touchpoints."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from conf.schema import LogisticConfig
from journeys.features import FeatureSpec
from models.embedding import output_layer
from models.feed_forward import FeedForward


class Logistic(FeedForward):
    """Convex: the baseline that every other model has to beat."""

    def __init__(self, config: LogisticConfig, spec: FeatureSpec) -> None:
        super().__init__(spec)
        self.output = output_layer(self.bag.width, config.base_rate)
        nn.init.zeros_(self.output.weight)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """One."""
        return (self.output,)
