"""What models have in common whose layers come one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from journeys.features import FeatureSpec
from models.batch import JourneyBatch
from models.embedding import TouchpointBag


class FeedForward(nn.Module):
    """Layers one after the other on the bag of a journey's touchpoints: blind to their order."""

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        self.bag = TouchpointBag(spec)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """In order, the last with one output. All parameters are theirs."""
        raise NotImplementedError

    def forward(self, batch: JourneyBatch) -> Tensor:
        """Logits, float32 (B,)."""
        x: Tensor = self.bag(batch)
        for layer in self.layers:
            x = layer(x)
        return x.squeeze(1)
