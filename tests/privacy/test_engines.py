from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from conf.schema import AttentionConfig, GruConfig, LogisticConfig, MlpConfig, ModelConfig
from journeys.examples import Examples
from journeys.features import FeatureSpec
from models.batch import JourneyBatch, to_batch
from models.flat import FlatParameters
from models.registry import build
from privacy.engines import ENGINES, BookKeeping, Engine, OpacusHooks
from privacy.gradients import VisitorGradients, together
from privacy.optimizer import VisitorDPOptimizer
from privacy.randomness import SeededRandomness

torch.set_num_threads(1)

SPEC = FeatureSpec((("channel", 5), ("campaign", 40)), ("gap", "age"), 6)
CONFIGS: dict[str, ModelConfig] = {
    "logistic": LogisticConfig(),
    "mlp": MlpConfig(embedding=6, hidden=5),
    "gru": GruConfig(embedding=5, hidden=6),
    "attention": AttentionConfig(embedding=6, heads=2, layers=2),
}


def new(name: str, spec: FeatureSpec = SPEC, seed: int = 0) -> nn.Module:
    """A model whose weights are all far from their start, so that nothing is zero by accident."""
    torch.manual_seed(seed)
    model = build(CONFIGS[name], spec)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model.train()


def some_examples(lengths: list[int], spec: FeatureSpec = SPEC, seed: int = 0) -> Examples:
    """Journeys of `lengths`, 0 for one that is all padding; values occur several times in one."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), spec.max_touchpoints)
    length = np.array(lengths, dtype=np.int32)
    present = (np.arange(shape[1]) < length[:, None])[..., None]
    values = [rng.integers(1, size, shape) % 4 for _, size in spec.categorical]
    return Examples(
        categorical=(np.stack(values, axis=2) * present).astype(np.uint16),
        numeric=(rng.random((*shape, len(spec.numeric))) * present).astype(np.float32),
        length=length,
        label=(rng.random(len(lengths)) < 0.5).astype(np.float32),
    )


def doubled(batch: JourneyBatch) -> JourneyBatch:
    return replace(batch, numeric=batch.numeric.double(), label=batch.label.double())


def loss(logits: Tensor, batch: JourneyBatch) -> Tensor:
    return binary_cross_entropy_with_logits(logits, batch.label, reduction="sum")


@dataclass
class Clipped:
    """What an engine says of some visitors."""

    norms: Tensor
    """(V,)."""
    total: Tensor
    """(parameters,) the sum of all gradients, each times its weight."""


def visitor_gradients(engine: Engine, batch: Any, each: int = 1) -> list[VisitorGradients]:
    logits = engine.forward(batch)
    own = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(own, batch) / each, own)
    return engine.visitor_gradients(logits, gradient, each)


def by_engine(engine: Engine, model: nn.Module, batch: Any, each: int, weights: Tensor) -> Clipped:
    gradients = visitor_gradients(engine, batch, each)
    sums = {p: torch.zeros_like(p, requires_grad=False) for p in model.parameters()}
    for g in gradients:
        g.add_weighted(weights, sums)
    flat = torch.cat([total.flatten() for total in sums.values()])
    return Clipped(together([g.norms() for g in gradients]), flat)


def by_loop(model: nn.Module, batch: JourneyBatch, each: int, weights: Tensor) -> Clipped:
    """One visitor after the other, by autograd alone."""
    parameters, rows = list(model.parameters()), []
    for own in batch.split([each] * (len(batch) // each)):
        gradients = torch.autograd.grad(loss(model(own), own) / each, parameters)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    size = sum(p.numel() for p in parameters)
    stacked = torch.stack(rows) if rows else torch.zeros(0, size, dtype=weights.dtype)
    return Clipped(stacked.norm(dim=1), weights @ stacked)


def assert_close(got: Clipped, expected: Clipped, tolerance: float) -> None:
    assert got.norms.shape == expected.norms.shape
    error = (got.norms - expected.norms).abs()
    assert (error <= tolerance * expected.norms).all()
    scale = float(expected.total.abs().max()) or 1.0
    assert float((got.total - expected.total).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), max_size=5),
    each=st.integers(1, 3),
    seed=st.integers(0, 2**16),
    numeric=st.integers(0, 2),
    kept=st.sampled_from([0, 3, 10**6]),
)
def test_each_engine_gives_the_gradients_of_a_loop_over_visitors(
    name: str, lengths: list[int], each: int, seed: int, numeric: int, kept: int
) -> None:
    if name in ("logistic", "mlp"):
        # Their input has the logarithm of the length.
        lengths = [max(length, 1) for length in lengths]
    spec = replace(SPEC, numeric=SPEC.numeric[:numeric])
    model = new(name, spec, seed).double()
    examples = some_examples(lengths * each, spec, seed)
    batch = doubled(to_batch(examples, slice(None)))
    weights = torch.rand(len(lengths), dtype=torch.float64, generator=torch.manual_seed(seed))
    expected = by_loop(model, batch, each, weights)
    with patch("privacy.gradients.KEPT", kept):
        kept_books = BookKeeping(model)
        assert_close(by_engine(kept_books, model, batch, each, weights), expected, 1e-9)
        kept_books.remove_hooks()
        single = copy.deepcopy(model).float()
        batch = to_batch(examples, slice(None))
        got = by_engine(BookKeeping(single), single, batch, each, weights.float())
        assert_close(got, expected, 1e-5)
    if lengths:
        batch = doubled(batch)
        assert_close(by_engine(OpacusHooks(model), model, batch, each, weights), expected, 1e-9)


class Twice(nn.Module):
    """Uses layers in ways that the product's models do not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm((3, 4))
        self.plain = nn.LayerNorm(4, bias=False)
        self.shared = nn.Linear(4, 4, bias=False)
        self.output = nn.Linear(4, 1)

    def forward(self, batch: JourneyBatch) -> Tensor:
        first, second = batch.categorical[:, :3, 0], batch.categorical[:, 0, 1] % 5
        steps = self.plain(self.shared(self.norm(self.table(first))))
        newest = self.shared(self.table(second) + steps.mean(1)).relu_()
        logits: Tensor = self.output(newest + self.shared(steps).sum(1).tanh_())
        return logits.squeeze(1)


@pytest.mark.parametrize("kept", [0, 3, 10**6])
@pytest.mark.parametrize("each", [1, 2])
def test_a_layer_used_several_times_is_one_layer(
    each: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privacy.gradients.KEPT", kept)
    torch.manual_seed(1)
    model = Twice().double()
    batch = doubled(to_batch(some_examples([6, 5, 4, 3, 6, 6]), slice(None)))
    weights = torch.rand(6 // each, dtype=torch.float64)
    expected = by_loop(model, batch, each, weights)
    assert expected.norms.min() > 0.01
    assert_close(by_engine(BookKeeping(model), model, batch, each, weights), expected, 1e-9)


def test_the_wrapped_model_stays_usable_and_learns_nothing_of_its_wrapper() -> None:
    model = new("gru")
    books, batch = BookKeeping(model), to_batch(some_examples([3, 4]), slice(None))
    first = by_engine(books, model, batch, 1, torch.ones(2))
    torch.autograd.backward(loss(model(batch), batch))
    grown = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(first.total, grown, rtol=1e-4, atol=1e-6)
    again = by_engine(books, model, batch, 1, torch.ones(2))
    assert torch.equal(first.total, again.total)
    with torch.inference_mode():
        model(batch)
    books.remove_hooks()
    assert not any(layer._forward_hooks for layer in model.modules())


class RawParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.Conv1d(2, 2, 1), r"0\.inner \(Conv1d\) has parameters"),
        (lambda: nn.GRU(2, 2), r"0\.inner \(GRU\) has parameters"),
        (lambda: nn.MultiheadAttention(2, 1), r"0\.inner \(MultiheadAttention\) has parameters"),
        (RawParameter, r"0\.inner \(RawParameter\) has parameters"),
        (lambda: nn.EmbeddingBag(2, 2), r"0\.inner \(EmbeddingBag\) has parameters"),
        (lambda: nn.BatchNorm1d(2), r"0\.inner \(BatchNorm1d\) keeps a buffer"),
        (lambda: nn.BatchNorm1d(2, affine=False), r"0\.inner \(BatchNorm1d\) keeps a buffer"),
        (lambda: nn.Embedding(2, 2, padding_idx=0), r"0\.inner \(Embedding\) does more"),
        (lambda: nn.Embedding(2, 2, max_norm=1.0), r"0\.inner \(Embedding\) does more"),
        (Tied, "share a parameter"),
    ],
)
def test_a_layer_that_is_not_known_is_refused_by_name(
    layer: Callable[[], nn.Module], reason: str
) -> None:
    model = nn.Sequential(nn.Module(), nn.Linear(2, 2))
    model[0].add_module("inner", layer())
    with pytest.raises(TypeError, match=f"{reason}.*privacy.clipping_engine=opacus"):
        BookKeeping(model)
    assert not any(module._forward_hooks for module in model.modules())


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, batch: JourneyBatch) -> Tensor:
        return self.used(batch.numeric[:, 0]).squeeze(1)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.touchpoint = nn.Linear(2, 1)

    def forward(self, batch: JourneyBatch) -> Tensor:
        return self.touchpoint(batch.numeric.flatten(0, 1)).view(len(batch), -1).sum(1)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("engine", ENGINES.values())
@pytest.mark.parametrize(("model", "layer"), [(Unused, "unused"), (Flat, "touchpoint")])
def test_gradients_that_are_not_per_visitor_are_refused(
    engine: Callable[[nn.Module], Engine], model: Callable[[], nn.Module], layer: str
) -> None:
    batch = to_batch(some_examples([3, 4]), slice(None))
    wrapped = engine(model())
    with pytest.raises(RuntimeError, match=f"{layer}.* has no gradient for each visitor"):
        visitor_gradients(wrapped, batch)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("outlier", [1.0, 1e3, 1e19, 1e38, math.inf, math.nan])
def test_a_visitor_of_twenty_journeys_adds_no_more_than_the_clipping_norm(
    engine: str, outlier: float
) -> None:
    """Two neighbouring data sets; the sums are taken in one pass over the larger one's parts."""
    model = new("gru")
    wrapped = ENGINES[engine](model)
    parameters = FlatParameters(model)
    optimizer = VisitorDPOptimizer(
        torch.optim.SGD([parameters.vector], lr=1.0),
        parameters,
        noise_multiplier=0.0,
        clipping_norm=0.05,
        expected_batch_size=1.0,
        randomness=SeededRandomness(0),
    )
    examples = some_examples([1, 2, 3, 4, 5, 6] * 4, seed=3)
    examples.numeric[4:, 0] = outlier
    (others, heavy) = to_batch(examples, slice(None)).split([4, 20])

    def add(batch: JourneyBatch, each: int) -> Tensor:
        before = optimizer._sum.clone()
        optimizer.clip_and_accumulate(visitor_gradients(wrapped, batch, each))
        return (optimizer._sum - before).double()

    moved = float(add(heavy, 20).norm())
    assert moved <= 0.05 * (1 + 1e-6)
    if math.isfinite(outlier):
        assert moved > 0.049 or outlier > 1e3
    else:
        assert moved == 0
    assert float(add(others, 1).norm()) > 0.05
