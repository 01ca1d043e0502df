"""A two-layer network on the mean of touchpoint embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from conf.schema import MlpConfig
from journeys.features import FeatureSpec
from models.batch import JourneyBatch
from models.embedding import TouchpointBag, output_layer


class Mlp(nn.Module):
    """Blind to order, but not to combinations.

    The mean of embeddings is a linear layer on the bag of touchpoints: the same function as an
    embedding table with mean pooling, with a per-example gradient that is one outer product.
    """

    def __init__(self, config: MlpConfig, spec: FeatureSpec) -> None:
        super().__init__()
        self.bag = TouchpointBag(spec)
        self.embedding = nn.Linear(self.bag.width, config.embedding)
        self.hidden = nn.Linear(config.embedding, config.hidden)
        self.output = output_layer(config.hidden, config.base_rate)

    def forward(self, batch: JourneyBatch) -> Tensor:
        """Logits, float32 (B,)."""
        pooled = torch.tanh(self.embedding(self.bag(batch)))
        logits: Tensor = self.output(torch.relu(self.hidden(pooled)))
        return logits.squeeze(1)
