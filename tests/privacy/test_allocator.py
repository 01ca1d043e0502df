from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource
import numpy as np
import torch
from conf.schema import GruConfig, OptimizerConfig
from journeys.features import FeatureSpec
from journeys.examples import Examples
from models.registry import build
from models.weights import get_weights
from privacy import training
from privacy.randomness import SeededRandomness

torch.set_num_threads(1)
model = build(GruConfig(), FeatureSpec((("channel", 12),), ("gap",), 20))
trainer = training.Trainer(model)
rng = np.random.default_rng(0)
examples = Examples(
    rng.integers(1, 12, (2000, 20, 1)).astype(np.uint16),
    rng.random((2000, 20, 1), dtype=np.float32),
    np.full(2000, 20, dtype=np.int32),
    np.zeros(2000, dtype=np.float32),
)
steps = training.LocalTraining(0.25, 20, 500.0, 1.0, 1.0, OptimizerConfig())
weights = get_weights(model)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    trainer.train(weights, examples, steps, SeededRandomness(0))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(3):
    last = faults()
print(last)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_training_uses_the_memory_again_that_it_freed() -> None:
    """Where glibc gives it back, these 20 steps of a GRU have tens of thousands of page faults."""
    root = Path(__file__).parents[2]
    words = [sys.executable, "-c", FAULTS]
    done = subprocess.run(words, cwd=root, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 1000
