"""A gated recurrent network over the touchpoints in order."""

from __future__ import annotations

from torch import Tensor, nn

from conf.schema import GruConfig
from journeys.features import FeatureSpec
from models.batch import JourneyBatch
from models.embedding import TouchpointEmbedding, output_layer
from models.recurrence import last_state


class Gru(nn.Module):
    """Cho et al. 2014, with the reset gate after the product as in `torch.nn.GRU`.

    Built of linear layers, so that per-example gradients are those of linear layers.
    """

    def __init__(self, config: GruConfig, spec: FeatureSpec) -> None:
        super().__init__()
        self.embedding = TouchpointEmbedding(spec, config.embedding)
        self.from_input = nn.Linear(config.embedding, 3 * config.hidden)
        self.from_state = nn.Linear(config.hidden, 3 * config.hidden)
        self.output = output_layer(config.hidden, config.base_rate)

    def forward(self, batch: JourneyBatch) -> Tensor:
        """Logits, float32 (B,)."""
        inputs = self.from_input(self.embedding(batch))
        logits: Tensor = self.output(last_state(inputs, batch.length, self.from_state))
        return logits.squeeze(1)
