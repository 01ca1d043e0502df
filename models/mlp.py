"""A two-layer network on the mean of touchpoint embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from conf.schema import MlpConfig
from journeys.features import FeatureSpec
from models.embedding import output_layer
from models.feed_forward import FeedForward


class Mlp(FeedForward):
    """Blind to order, but not to combinations.

    The mean of embeddings is a linear layer on the bag of touchpoints: the same function as an
    embedding table with mean pooling, with a per-example gradient that is one outer product.
    """

    def __init__(self, config: MlpConfig, spec: FeatureSpec) -> None:
        super().__init__(spec)
        self.embedding = nn.Linear(self.bag.width, config.embedding)
        self.tanh = nn.Tanh()
        self.hidden = nn.Linear(config.embedding, config.hidden)
        self.relu = nn.ReLU()
        self.output = output_layer(config.hidden, config.base_rate)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Embedding, hidden layer, output."""
        return self.embedding, self.tanh, self.hidden, self.relu, self.output
