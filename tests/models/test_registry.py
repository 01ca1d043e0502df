from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conf.compose import load
from conf.schema import GROUPS, GruConfig
from journeys.features import FeatureSpec, feature_spec
from models.registry import build, initial_weights, shapes

SPEC: FeatureSpec = feature_spec(load([]).data.features)
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", GROUPS["model"])
def test_shapes_are_those_of_the_model(name: str) -> None:
    config = load([f"model={name}"]).model

    model = build(config, SPEC)

    assert shapes(config, SPEC) == {n: tuple(v.shape) for n, v in model.state_dict().items()}


def test_shapes_of_a_model_that_no_memory_would_hold() -> None:
    sizes = shapes(GruConfig(hidden=65_536), SPEC)

    assert sum(map(math.prod, sizes.values())) > 10**10


@pytest.mark.parametrize("name", GROUPS["model"])
def test_initial_weights_are_of_the_seed_and_leave_torchs_generator(name: str) -> None:
    config, before = load([f"model={name}"]).model, torch.get_rng_state()

    first, again, other = (initial_weights(config, SPEC, seed) for seed in (1, 1, 2))

    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == shapes(config, SPEC).keys()
    assert all((first[key] == again[key]).all() for key in first)
    # Logistic regression begins at 0.
    same = all((first[key] == other[key]).all() for key in first)
    assert same == (name == "logistic")


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPS["model"])
def test_private_training_does_not_load_torchs_compiler(name: str) -> None:
    code = f"""
import sys, numpy
from conf.compose import load
from journeys.examples import Examples
from journeys.features import feature_spec
from models.registry import build, initial_weights, shapes
from privacy.randomness import SeededRandomness
from privacy.training import LocalTraining, Trainer

config = load(["model={name}"])
spec = feature_spec(config.data.features)
steps = spec.max_touchpoints
examples = Examples(
    numpy.ones((40, steps, len(spec.categorical)), numpy.uint16),
    numpy.ones((40, steps, len(spec.numeric)), numpy.float32),
    numpy.full(40, steps, numpy.int32),
    numpy.ones(40, numpy.float32),
)
training = LocalTraining(0.5, 2, 20.0, 1.0, 1.0, config.optimizer)
weights = initial_weights(config.model, spec, 0)
shapes(config.model, spec)
trainer = Trainer(build(config.model, spec))
trainer.train(weights, examples, training, SeededRandomness(0))
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
