from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from conf.schema import GROUPS, OptimizerConfig
from journeys.examples import Examples, concatenate
from journeys.features import FeatureSpec
from models.bags import PackedBags, PlainBags
from models.batch import JourneyBatch, to_batch
from models.registry import build
from models.weights import set_weights
from privacy.accountant import PrivacyEvent, epsilon
from privacy.randomness import SeededRandomness
from privacy.training import LocalTraining, Trainer, Weights

torch.set_num_threads(1)

TOUCHPOINTS, VALUES, NUMERIC = 5, 7, 3


def seed(number: int = 7) -> SeededRandomness:
    return SeededRandomness(number)


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


each_engine = pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])


@each_engine
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
    engine: str, optimizer: OptimizerConfig, proximal_mu: float
) -> None:
    plain = replace(
        TRAINING,
        noise_multiplier=0,
        optimizer=optimizer,
        proximal_mu=proximal_mu,
        clipping_engine=engine,
    )
    private = replace(plain, noise_multiplier=ALMOST_NO_NOISE, clipping_norm=1e3)
    weights = new_weights()
    expected = Trainer(Net()).train(weights, EXAMPLES, plain, seed())
    trained = Trainer(Net()).train(weights, EXAMPLES, private, seed())
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
    trained = Trainer(Net()).train(weights, EXAMPLES, training, seed())
    for name, p in net.named_parameters():
        np.testing.assert_allclose(trained[name], p.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_an_empty_batch_is_a_step_without_protection_too() -> None:
    decay = OptimizerConfig(momentum=0.0, learning_rate=0.5, weight_decay=0.2)
    training = replace(TRAINING, steps=3, noise_multiplier=0.0, optimizer=decay)
    weights = new_weights()
    trained = Trainer(Net()).train(weights, some_examples(0), training, seed())
    for name in weights:
        np.testing.assert_allclose(trained[name], weights[name] * 0.9**3, rtol=1e-5)


def test_proximal_term_pulls_towards_the_round_s_weights() -> None:
    free = replace(TRAINING, noise_multiplier=0, steps=20)
    weights = new_weights()
    moved = distance(Trainer(Net()).train(weights, EXAMPLES, free, seed()), weights)
    held = replace(free, proximal_mu=1.0)
    assert distance(Trainer(Net()).train(weights, EXAMPLES, held, seed()), weights) < 0.7 * moved


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


@each_engine
@pytest.mark.parametrize("journeys", [1, 20])
@pytest.mark.parametrize("outlier", [1.0, 1e4, 1e38, math.inf, math.nan])
def test_one_visitor_moves_the_result_by_no_more_than_the_clipping_norm(
    engine: str, journeys: int, outlier: float
) -> None:
    newcomer = some_examples(journeys, seed=1)
    newcomer = replace(
        newcomer,
        numeric=np.full_like(newcomer.numeric, outlier),
        visitor=np.full(journeys, 5),
    )
    training = replace(
        TRAINING,
        sample_rate=1.0,
        steps=1,
        noise_multiplier=ALMOST_NO_NOISE,
        clipping_norm=0.1,
        clipping_engine=engine,
        optimizer=OptimizerConfig(momentum=0.0, learning_rate=40.0),
    )
    weights, trainer = new_weights(), Trainer(Net())
    without = trainer.train(weights, EXAMPLES, training, seed())
    with_one = trainer.train(weights, concatenate([EXAMPLES, newcomer]), training, seed())
    moved = distance(without, with_one)
    assert moved <= 0.1 * (1 + 1e-4)
    if not math.isfinite(outlier):
        assert moved < 1e-5


@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
def test_same_seed_same_bits(noise_multiplier: float) -> None:
    training = replace(TRAINING, noise_multiplier=noise_multiplier)
    weights, trainer = new_weights(), Trainer(Net())
    first = trainer.train(weights, EXAMPLES, training, seed(712))
    for _ in range(2):
        again = trainer.train(weights, EXAMPLES, training, seed(712))
        assert all((first[name] == again[name]).all() for name in first)
    other = trainer.train(weights, EXAMPLES, training, seed(713))
    assert distance(first, other) > 1e-3
    assert distance(weights, new_weights()) == 0


def test_one_trainer_serves_private_and_plain_training_in_turn() -> None:
    plain = replace(TRAINING, noise_multiplier=0)
    weights, trainer = new_weights(), Trainer(Net())
    for training in (plain, TRAINING, plain, TRAINING):
        trained = trainer.train(weights, EXAMPLES, training, seed())
        fresh = Trainer(Net()).train(weights, EXAMPLES, training, seed())
        assert all((trained[name] == fresh[name]).all() for name in trained)
        assert all(getattr(p, "grad_sample", None) is None for p in trainer.model.parameters())


@each_engine
@pytest.mark.parametrize("noise_multiplier", [0.0, ALMOST_NO_NOISE])
def test_microbatches_only_round(engine: str, noise_multiplier: float) -> None:
    training = replace(
        TRAINING,
        noise_multiplier=noise_multiplier,
        clipping_norm=0.1,
        clipping_engine=engine,
    )
    small = replace(training, optimizer=replace(training.optimizer, microbatch=7))
    weights = new_weights()
    whole, net = Trainer(Net()).train(weights, EXAMPLES, training, seed()), Net()
    parts = Trainer(net).train(weights, EXAMPLES, small, seed())
    assert max(net.batch_sizes) == 7
    assert distance(whole, weights) > 0.01
    assert distance(whole, parts) < 1e-5


def test_each_visitor_is_drawn_independently_at_the_sample_rate() -> None:
    steps, rate = 1000, 0.2
    net = Net()
    training = replace(TRAINING, steps=steps, noise_multiplier=0)
    Trainer(net).train(new_weights(), EXAMPLES, training, seed())
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
    trained = Trainer(wide).train(weights, examples, training, seed())
    walk = (trained["weight"] - weights["weight"]).astype(np.float64)
    assert walk.std() == pytest.approx(math.sqrt(4) * 2.0 * 0.5 / 10, rel=5 / math.sqrt(2 * 9e4))
    unprotected = replace(training, noise_multiplier=0)
    assert distance(Trainer(wide).train(weights, examples, unprotected, seed()), weights) == 0


def test_rounds_spend_more_than_one_round() -> None:
    assert TRAINING.event == PrivacyEvent(1.0, 0.2, 8)
    assert epsilon([TRAINING.event] * 20, 1e-5) > 2 * epsilon([TRAINING.event], 1e-5)


@each_engine
def test_a_model_that_mixes_visitors_up_is_refused(engine: str) -> None:
    model, training = TouchpointsAsVisitors(), replace(TRAINING, clipping_engine=engine)
    with pytest.raises(RuntimeError, match="first dimension"):
        Trainer(model).train(new_weights(model), EXAMPLES, training, seed())


def test_an_unknown_layer_is_refused_with_a_way_out() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(TypeError, match=r"0 \(BatchNorm1d\).*privacy\.clipping_engine=opacus"):
        Trainer(model)._engine("bookkeeping")


def repeated(examples: Examples, times: int) -> Examples:
    """Each visitor with the same journey several times, out of order."""
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(len(examples)), times))
    return replace(examples.take(rows), visitor=rows * 3 - 7)


@each_engine
@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
def test_who_has_the_same_journey_twice_weighs_and_is_drawn_as_before(
    engine: str, noise_multiplier: float
) -> None:
    training = replace(
        TRAINING, noise_multiplier=noise_multiplier, clipping_norm=0.1, clipping_engine=engine
    )
    weights, net = new_weights(), Net()
    once = Trainer(Net()).train(weights, EXAMPLES, training, seed())
    twice = Trainer(net).train(weights, repeated(EXAMPLES, 2), training, seed())
    assert distance(once, weights) > 0.01
    assert distance(once, twice) < 1e-4
    assert all(size % 2 == 0 for size in net.batch_sizes)


def test_visitors_with_more_and_fewer_journeys_train_together() -> None:
    several = [repeated(EXAMPLES.take(np.arange(50 * i, 50 * i + 50)), i + 1) for i in range(4)]
    training = replace(TRAINING, noise_multiplier=ALMOST_NO_NOISE, sample_rate=1.0, steps=3)
    weights = new_weights()
    small = replace(training, optimizer=replace(training.optimizer, microbatch=3))
    expected = Trainer(Net()).train(weights, EXAMPLES, training, seed())
    for same in (training, small):
        trained = Trainer(Net()).train(weights, concatenate(several), same, seed())
        assert distance(expected, trained) < 1e-4


@pytest.mark.parametrize("name", ["logistic", "mlp", "gru", "attention"])
def test_both_engines_train_the_same_model(name: str) -> None:
    spec = FeatureSpec((("channel", VALUES),), ("gap", "age", "price"), TOUCHPOINTS)
    weights = new_weights(build(GROUPS["model"][name](), spec))
    examples = concatenate([EXAMPLES, repeated(some_examples(60, seed=2), 2)])
    training = replace(TRAINING, clipping_norm=0.5, steps=12, optimizer=OptimizerConfig())
    one, other = (
        Trainer(build(GROUPS["model"][name](), spec)).train(
            weights, examples, replace(training, clipping_engine=engine), seed()
        )
        for engine in ("bookkeeping", "opacus")
    )
    assert distance(one, weights) > 0.1
    for weight in weights:
        np.testing.assert_allclose(one[weight], other[weight], atol=1e-4)


BAGS = FeatureSpec((("channel", VALUES),), ("gap", "age", "price"), TOUCHPOINTS)


def mlp_trainer() -> Trainer:
    return Trainer(build(GROUPS["model"]["mlp"](), BAGS))


@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
def test_kept_bags_train_the_same_model_as_bags_made_for_each_step(
    noise_multiplier: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = concatenate([EXAMPLES, repeated(some_examples(60, seed=2), 2)])
    training = replace(TRAINING, noise_multiplier=noise_multiplier)
    weights = new_weights(mlp_trainer().model)

    def trained() -> Weights:
        return mlp_trainer().train(weights, examples, training, seed())

    kept = trained()
    monkeypatch.setattr("models.bags.KEPT_BYTES", 0)
    packed = trained()
    monkeypatch.setattr("models.bags.PACKED_BYTES", 0)
    monkeypatch.setattr("privacy.training.AHEAD", 50)
    made = trained()
    assert distance(kept, weights) > 0.1
    for name in weights:
        np.testing.assert_array_equal(kept[name], packed[name])
        np.testing.assert_allclose(kept[name], made[name], atol=1e-6)


def test_bags_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, small, large = mlp_trainer(), some_examples(50), some_examples(70)
    assert trainer._bags is not None
    width = trainer._bags.bag.width
    trainer._bags._free = {PlainBags: 100 * 4 * (width + 1), PackedBags: 0}
    weights = new_weights(trainer.model)
    counted = Mock(wraps=trainer._bags.bag.forward)
    monkeypatch.setattr(trainer._bags.bag, "forward", counted)

    def made(examples: Examples) -> int:
        counted.reset_mock()
        trainer.train(weights, examples, TRAINING, seed())
        # Each step's forward pass asks for the bag, too, and is given what is there.
        return sum(call.args[0].bag is None for call in counted.call_args_list)

    assert [made(small), made(small)] == [1, 0]
    # There is no room for both.
    assert [made(large), made(large)] == [1, 1]
    assert made(small) == 0
    del small
    assert [made(large), made(large)] == [1, 0]


def test_the_number_of_parameters_is_known() -> None:
    assert Trainer(Net()).parameters == sum(value.size for value in new_weights().values())


def test_weights_of_another_model_are_refused() -> None:
    weights = new_weights()
    weights["out.bias"] = np.zeros(2, np.float32)
    with pytest.raises(RuntimeError, match=r"out\.bias"):
        Trainer(Net()).train(weights, EXAMPLES, TRAINING, seed())


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
from conf.schema import GROUPS, OptimizerConfig
from journeys.examples import Examples
from privacy.randomness import SeededRandomness
from privacy.training import LocalTraining, Trainer

nobody = Examples(*(numpy.zeros(0, numpy.float32) for _ in range(4)))
training = LocalTraining(0.1, 1, 1.0, 0.0, 1.0, OptimizerConfig())
weights = {"weight": numpy.zeros((1, 1)), "bias": numpy.zeros(1)}
randomness = SeededRandomness(0)
Trainer(torch.nn.Linear(1, 1)).train(weights, nobody, training, randomness)
sys.exit("opacus" in sys.modules)
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
