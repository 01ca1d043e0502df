"""A model's logits for encoded journeys."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from journeys.examples import Examples
from models.batch import to_batch

BATCH = 4096


def logits(model: nn.Module, examples: Examples) -> npt.NDArray[np.float32]:
    """float32 (N,): the logit of each example's conversion."""
    training = model.training
    model.eval()
    with torch.inference_mode():
        parts = [
            model(to_batch(examples, slice(start, start + BATCH))).numpy()
            for start in range(0, len(examples), BATCH)
        ]
    model.train(training)
    return np.concatenate([np.zeros(0, np.float32), *parts])
