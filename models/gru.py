"""A gated recurrent network over the touchpoints in order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from conf.schema import GruConfig
from journeys.features import FeatureSpec
from models.batch import JourneyBatch
from models.embedding import TouchpointEmbedding, output_layer


class Gru(nn.Module):
    """Cho et al. 2014, with the reset gate after the product as in `torch.nn.GRU`.

    Built of linear layers, so that per-example gradients are those of linear layers: the input's
    product is taken for all touchpoints at once, the state's once a touchpoint.
    """

    def __init__(self, config: GruConfig, spec: FeatureSpec) -> None:
        super().__init__()
        self.embedding = TouchpointEmbedding(spec, config.embedding)
        self.from_input = nn.Linear(config.embedding, 3 * config.hidden)
        self.from_state = nn.Linear(config.hidden, 3 * config.hidden)
        self.output = output_layer(config.hidden, config.base_rate)
        self.hidden = config.hidden

    def forward(self, batch: JourneyBatch) -> Tensor:
        """Logits, float32 (B,)."""
        inputs = self.from_input(self.embedding(batch))
        present = batch.mask().unsqueeze(2)
        state = inputs.new_zeros(len(batch), self.hidden)
        for step in range(inputs.shape[1]):
            reset_in, update_in, new_in = inputs[:, step].chunk(3, dim=1)
            reset_st, update_st, new_st = self.from_state(state).chunk(3, dim=1)
            reset = torch.sigmoid(reset_in + reset_st)
            update = torch.sigmoid(update_in + update_st) * present[:, step]
            new = torch.tanh(new_in + reset * new_st)
            # Padding has update 0, so the state stays that of the newest touchpoint.
            state = state + update * (new - state)
        logits: Tensor = self.output(state)
        return logits.squeeze(1)
