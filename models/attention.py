"""Causal self-attention over the touchpoints, read at the newest one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

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
        # Counted back from the newest touchpoint: what matters is how recent one is.
        steps = torch.arange(batch.categorical.shape[1])
        recency = (batch.length.unsqueeze(1) - 1 - steps).clamp(min=0)
        position = self.position(recency) * batch.mask().unsqueeze(2)
        sequence = self.embedding(batch) + position
        *earlier, last = self.blocks
        for block in earlier:
            sequence = block(sequence)
        assert isinstance(last, Block)
        logits: Tensor = self.output(self.norm(last.newest(sequence, batch)))
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
        query, key, value = (heads.transpose(1, 2) for heads in self._query_key_value(sequence))
        # Padding is at the end, so what is causal never sees it from a real touchpoint.
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self._feed(sequence + self.join(seen.transpose(1, 2).flatten(2)))

    def newest(self, sequence: Tensor, batch: JourneyBatch) -> Tensor:
        """float32 (B, width): of `forward`'s result the row of each journey's newest touchpoint."""
        query, key, value = self._query_key_value(sequence)
        steps = torch.arange(sequence.shape[1])
        later = steps >= batch.length.clamp(min=1).unsqueeze(1)
        scores = (newest(query, batch).unsqueeze(1) * key).sum(dim=3) / query.shape[3] ** 0.5
        weights = scores.masked_fill(later.unsqueeze(2), float("-inf")).softmax(dim=1)
        seen = (weights.unsqueeze(3) * value).sum(dim=1).flatten(1)
        return self._feed(newest(sequence, batch) + self.join(seen))

    def _query_key_value(self, sequence: Tensor) -> tuple[Tensor, ...]:
        """Three of (B, T, heads, width of a head)."""
        joint: Tensor = self.query_key_value(self.attend_norm(sequence))
        size, steps, width = sequence.shape
        return joint.view(size, steps, 3, self.heads, width // self.heads).unbind(2)

    def _feed(self, sequence: Tensor) -> Tensor:
        fed: Tensor = self.narrow(torch.relu(self.widen(self.feed_norm(sequence))))
        return sequence + fed
