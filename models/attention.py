"""Causal self-attention over the touchpoints, read at the newest one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from conf.schema import AttentionConfig
from journeys.features import FeatureSpec
from models.batch import JourneyBatch
from models.embedding import TouchpointEmbedding, newest, output_layer


class Attention(nn.Module):
    """Vaswani et al. 2017, pre-norm blocks; each touchpoint sees itself and earlier ones only."""

    def __init__(self, config: AttentionConfig, spec: FeatureSpec) -> None:
        super().__init__()
        self.embedding = TouchpointEmbedding(spec, config.embedding)
        self.position = nn.Embedding(spec.max_touchpoints, config.embedding)
        nn.init.normal_(self.position.weight, std=0.1)
        self.blocks = nn.ModuleList(
            Block(config.embedding, config.heads) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.embedding)
        self.output = output_layer(config.embedding, config.base_rate)

    def forward(self, batch: JourneyBatch) -> Tensor:
        """Logits, float32 (B,)."""
        present = batch.mask().unsqueeze(2)
        # Counted back from the newest touchpoint: what matters is how recent one is.
        steps = torch.arange(batch.categorical.shape[1])
        recency = (batch.length.unsqueeze(1) - 1 - steps).clamp(min=0)
        sequence = self.embedding(batch) + self.position(recency) * present
        for block in self.blocks:
            sequence = block(sequence)
        logits: Tensor = self.output(self.norm(newest(sequence, batch)))
        return logits.squeeze(1)


class Block(nn.Module):
    """One attention layer and one feed-forward layer, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attend_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, sequence: Tensor) -> Tensor:
        """float32 (B, T, width) to the same."""
        size, steps, width = sequence.shape
        shape = (size, steps, 3, self.heads, width // self.heads)
        query, key, value = (
            self.query_key_value(self.attend_norm(sequence)).reshape(shape).permute(2, 0, 3, 1, 4)
        )
        scores = query @ key.transpose(2, 3) / (width // self.heads) ** 0.5
        # Padding is at the end, so what is causal never sees it from a real touchpoint.
        future = torch.ones(steps, steps, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=3)
        seen = (weights @ value).transpose(1, 2).reshape(size, steps, width)
        sequence = sequence + self.join(seen)
        fed: Tensor = self.narrow(torch.relu(self.widen(self.feed_norm(sequence))))
        return sequence + fed
