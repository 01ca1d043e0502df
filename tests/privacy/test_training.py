from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from conf.schema import OptimizerConfig
from journeys.examples import Examples, concatenate
from models.batch import JourneyBatch, to_batch
from models.weights import set_weights
from privacy.accountant import PrivacyEvent, epsilon
from privacy.training import LocalTraining, Trainer, Weights, _streams

torch.set_num_threads(1)

TOUCHPOINTS, VALUES, NUMERIC = 5, 7, 3
SEED = np.random.SeedSequence(7)
ALMOST_NO_NOISE = 1e-12


class Net(nn.Module):
    """Embedding and Linear layers over journeys, masked mean, logits (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.channel = nn.Embedding(VALUES, 4)
        self.numeric = nn.Linear(NUMERIC, 4)
        self.hidden = nn.Linear(4, 6)
        self.out = nn.Linear(6, 1)
        self.batch_sizes: list[int] = []

    def forward(self, batch: JourneyBatch) -> Tensor:
        self.batch_sizes.append(len(batch))
        mask = batch.mask().unsqueeze(2).to(self.out.weight.dtype)
        numeric = self.numeric(batch.numeric.to(self.out.weight.dtype))
        touchpoints = self.channel(batch.categorical[:, :, 0]) + numeric
        journey = (touchpoints * mask).sum(1) / mask.sum(1)
        logits: Tensor = self.out(torch.tanh(self.hidden(journey))).squeeze(1)
        return logits


class TouchpointsAsVisitors(Net):
    """Flattens journeys, so that a layer sees touchpoints as the first dimension."""

    def forward(self, batch: JourneyBatch) -> Tensor:
        flat = self.numeric(batch.numeric.flatten(0, 1)).view(len(batch), -1, 4)
        logits: Tensor = self.out(torch.tanh(self.hidden(flat.mean(1)))).squeeze(1)
        unused: Tensor = self.channel(batch.categorical[:, :, 0]).sum((1, 2))
        return logits + 0 * unused


def some_examples(visitors: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    length = rng.integers(1, TOUCHPOINTS + 1, visitors).astype(np.int32)
    mask = np.arange(TOUCHPOINTS) < length[:, None]
    shape = (visitors, TOUCHPOINTS)
    return Examples(
        categorical=(rng.integers(1, VALUES, (*shape, 1)) * mask[..., None]).astype(np.uint16),
        numeric=(rng.random((*shape, NUMERIC)) * mask[..., None]).astype(np.float32),
        length=length,
        label=(rng.random(visitors) < 0.3).astype(np.float32),
    )


def new_weights(model: nn.Module | None = None) -> Weights:
    torch.manual_seed(0)
    model = Net() if model is None else model
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


def distance(one: Weights, other: Weights) -> float:
    return math.sqrt(sum(((one[n].astype(np.float64) - other[n]) ** 2).sum() for n in one))


EXAMPLES = some_examples(200)
TRAINING = LocalTraining(
    sample_rate=0.2,
    steps=8,
    expected_batch_size=40.0,
    noise_multiplier=1.0,
    clipping_norm=1.0,
    optimizer=OptimizerConfig(momentum=0.0, learning_rate=0.5),
)


@pytest.mark.parametrize(
    ("optimizer", "proximal_mu"),
    [
        (OptimizerConfig(momentum=0.0), 0.0),
        (OptimizerConfig(momentum=0.9, weight_decay=0.1), 0.0),
        (OptimizerConfig(momentum=0.0), 0.5),
        (OptimizerConfig(name="adam", learning_rate=0.01, weight_decay=0.01), 0.0),
    ],
)
def test_without_clipping_and_noise_it_is_plain_training(
    optimizer: OptimizerConfig, proximal_mu: float
) -> None:
    plain = replace(TRAINING, noise_multiplier=0, optimizer=optimizer, proximal_mu=proximal_mu)
    private = replace(plain, noise_multiplier=ALMOST_NO_NOISE, clipping_norm=1e3)
    weights = new_weights()
    expected = Trainer(Net()).train(weights, EXAMPLES, plain, SEED)
    trained = Trainer(Net()).train(weights, EXAMPLES, private, SEED)
    assert distance(expected, weights) > 0.01
    for name in weights:
        np.testing.assert_allclose(trained[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "textbook"),
    [
        (OptimizerConfig(momentum=0.0), lambda p: torch.optim.SGD(p, 0.5)),
        (
            OptimizerConfig(momentum=0.9, weight_decay=0.1),
            lambda p: torch.optim.SGD(p, 0.5, momentum=0.9, weight_decay=0.1),
        ),
        (
            OptimizerConfig(name="adam", learning_rate=0.01, weight_decay=0.1),
            lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
        ),
    ],
)
def test_plain_training_is_the_textbook_loop(
    config: OptimizerConfig, textbook: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> None:
    training = replace(TRAINING, sample_rate=1.0, steps=3, noise_multiplier=0.0, optimizer=config)
    weights, net = new_weights(), Net()
    set_weights(net, weights)
    optimizer = textbook(list(net.parameters()))
    batch = to_batch(EXAMPLES, slice(None))
    for _ in range(3):
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(net(batch), batch.label, reduction="sum")
        torch.autograd.backward(loss / 40)
        optimizer.step()
    trained = Trainer(Net()).train(weights, EXAMPLES, training, SEED)
    for name, p in net.named_parameters():
        np.testing.assert_allclose(trained[name], p.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_an_empty_batch_is_a_step_without_protection_too() -> None:
    decay = OptimizerConfig(momentum=0.0, learning_rate=0.5, weight_decay=0.2)
    training = replace(TRAINING, steps=3, noise_multiplier=0.0, optimizer=decay)
    weights = new_weights()
    trained = Trainer(Net()).train(weights, some_examples(0), training, SEED)
    for name in weights:
        np.testing.assert_allclose(trained[name], weights[name] * 0.9**3, rtol=1e-5)


def test_proximal_term_pulls_towards_the_round_s_weights() -> None:
    free = replace(TRAINING, noise_multiplier=0, steps=20)
    weights = new_weights()
    moved = distance(Trainer(Net()).train(weights, EXAMPLES, free, SEED), weights)
    held = replace(free, proximal_mu=1.0)
    assert distance(Trainer(Net()).train(weights, EXAMPLES, held, SEED), weights) < 0.7 * moved


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_per_visitor_gradients_equal_a_float64_loop() -> None:
    net = Net().double()
    wrapped = GradSampleModule(net, loss_reduction="sum")
    batch = to_batch(EXAMPLES, np.arange(50))
    loss = binary_cross_entropy_with_logits(wrapped(batch), batch.label.double(), reduction="sum")
    torch.autograd.backward(loss)
    for visitor in range(50):
        alone = Net().double()
        alone.load_state_dict(net.state_dict())
        one = to_batch(EXAMPLES, np.array([visitor]))
        torch.autograd.backward(binary_cross_entropy_with_logits(alone(one), one.label.double()))
        for p, q in zip(net.parameters(), alone.parameters(), strict=True):
            per_visitor = getattr(p, "grad_sample")  # noqa: B009
            torch.testing.assert_close(per_visitor[visitor], q.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("outlier", [1.0, 1e4, 1e38, math.inf, math.nan])
def test_one_visitor_moves_the_result_by_no_more_than_the_clipping_norm(outlier: float) -> None:
    newcomer = some_examples(1, seed=1)
    newcomer = replace(newcomer, numeric=np.full_like(newcomer.numeric, outlier))
    training = replace(
        TRAINING,
        sample_rate=1.0,
        steps=1,
        noise_multiplier=ALMOST_NO_NOISE,
        clipping_norm=0.1,
        optimizer=OptimizerConfig(momentum=0.0, learning_rate=40.0),
    )
    weights, trainer = new_weights(), Trainer(Net())
    without = trainer.train(weights, EXAMPLES, training, SEED)
    with_one = trainer.train(weights, concatenate([EXAMPLES, newcomer]), training, SEED)
    moved = distance(without, with_one)
    assert moved <= 0.1 * (1 + 1e-4)
    if not math.isfinite(outlier):
        assert moved < 1e-5


@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
def test_same_seed_same_bits(noise_multiplier: float) -> None:
    training = replace(TRAINING, noise_multiplier=noise_multiplier)
    weights, trainer = new_weights(), Trainer(Net())
    first = trainer.train(weights, EXAMPLES, training, np.random.SeedSequence([7, 1, 2]))
    seed = np.random.SeedSequence([7, 1, 2])
    for _ in range(2):
        again = trainer.train(weights, EXAMPLES, training, seed)
        assert all((first[name] == again[name]).all() for name in first)
    other = trainer.train(weights, EXAMPLES, training, np.random.SeedSequence([7, 1, 3]))
    assert distance(first, other) > 1e-3
    assert distance(weights, new_weights()) == 0


def test_draws_say_nothing_about_the_noise() -> None:
    sampling, noise = _streams(SEED)
    together = np.corrcoef(sampling.random(10_000), noise.random(10_000))[0, 1]
    assert abs(together) < 5 / math.sqrt(10_000)


def test_one_trainer_serves_private_and_plain_training_in_turn() -> None:
    plain = replace(TRAINING, noise_multiplier=0)
    weights, trainer = new_weights(), Trainer(Net())
    for training in (plain, TRAINING, plain, TRAINING):
        trained = trainer.train(weights, EXAMPLES, training, SEED)
        fresh = Trainer(Net()).train(weights, EXAMPLES, training, SEED)
        assert all((trained[name] == fresh[name]).all() for name in trained)
        assert all(getattr(p, "grad_sample", None) is None for p in trainer.model.parameters())


@pytest.mark.parametrize("noise_multiplier", [0.0, ALMOST_NO_NOISE])
def test_microbatches_only_round(noise_multiplier: float) -> None:
    training = replace(TRAINING, noise_multiplier=noise_multiplier, clipping_norm=0.1)
    small = replace(training, optimizer=replace(training.optimizer, microbatch=7))
    weights = new_weights()
    whole, net = Trainer(Net()).train(weights, EXAMPLES, training, SEED), Net()
    parts = Trainer(net).train(weights, EXAMPLES, small, SEED)
    assert max(net.batch_sizes) == 7
    assert distance(whole, weights) > 0.01
    assert distance(whole, parts) < 1e-5


def test_each_visitor_is_drawn_independently_at_the_sample_rate() -> None:
    steps, rate = 1000, 0.2
    net = Net()
    training = replace(TRAINING, steps=steps, noise_multiplier=0)
    Trainer(net).train(new_weights(), EXAMPLES, training, SEED)
    sizes = np.array(net.batch_sizes)
    variance = len(EXAMPLES) * rate * (1 - rate)
    assert len(sizes) == steps
    assert sizes.mean() == pytest.approx(200 * rate, abs=5 * math.sqrt(variance / steps))
    # Of a binomial's sample variance the relative standard error is about sqrt(2 / steps).
    assert sizes.var() == pytest.approx(variance, rel=5 * math.sqrt(2 / steps))


@pytest.mark.parametrize("examples", [some_examples(0), some_examples(1)])
def test_noise_of_a_whole_round(examples: Examples) -> None:
    """Also where nobody is drawn: the weights do a random walk of the accounted deviation."""
    training = LocalTraining(
        1e-9, 4, 10.0, 2.0, 0.5, OptimizerConfig(momentum=0.0, learning_rate=1.0)
    )
    wide = nn.Linear(300, 300)
    weights = new_weights(wide)
    trained = Trainer(wide).train(weights, examples, training, SEED)
    walk = (trained["weight"] - weights["weight"]).astype(np.float64)
    assert walk.std() == pytest.approx(math.sqrt(4) * 2.0 * 0.5 / 10, rel=5 / math.sqrt(2 * 9e4))
    unprotected = replace(training, noise_multiplier=0)
    assert distance(Trainer(wide).train(weights, examples, unprotected, SEED), weights) == 0


def test_rounds_spend_more_than_one_round() -> None:
    assert TRAINING.event == PrivacyEvent(1.0, 0.2, 8)
    assert epsilon([TRAINING.event] * 20, 1e-5) > 2 * epsilon([TRAINING.event], 1e-5)


def test_a_model_that_mixes_visitors_up_is_refused() -> None:
    model = TouchpointsAsVisitors()
    with pytest.raises(RuntimeError, match="first dimension"):
        Trainer(model).train(new_weights(model), EXAMPLES, TRAINING, SEED)


def test_weights_of_another_model_are_refused() -> None:
    weights = new_weights()
    weights["out.bias"] = np.zeros(2, np.float32)
    with pytest.raises(RuntimeError, match=r"out\.bias"):
        Trainer(Net()).train(weights, EXAMPLES, TRAINING, SEED)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sample_rate", 0.0),
        ("steps", 0),
        ("expected_batch_size", 0.0),
        ("noise_multiplier", -1.0),
        ("clipping_norm", math.nan),
        ("proximal_mu", -0.1),
    ],
)
def test_impossible_training_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        replace(TRAINING, **{field: value})  # type: ignore[arg-type]


def test_plain_training_does_not_import_opacus() -> None:
    code = """
import sys, numpy, torch
from conf.schema import OptimizerConfig
from journeys.examples import Examples
from privacy.training import LocalTraining, Trainer

nobody = Examples(*(numpy.zeros(0, numpy.float32) for _ in range(4)))
training = LocalTraining(0.1, 1, 1.0, 0.0, 1.0, OptimizerConfig())
weights = {"weight": numpy.zeros((1, 1)), "bias": numpy.zeros(1)}
Trainer(torch.nn.Linear(1, 1)).train(weights, nobody, training, numpy.random.SeedSequence(0))
sys.exit("opacus" in sys.modules)
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
