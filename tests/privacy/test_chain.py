from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conf.schema import MlpConfig
from journeys.features import FeatureSpec
from models.batch import JourneyBatch
from models.mlp import Mlp
from models.registry import build
from privacy.chain import Chain
from privacy.engines import BookKeeping
from tests.privacy.test_engines import (
    CONFIGS,
    SPEC,
    assert_close,
    by_engine,
    by_loop,
    doubled,
    some_examples,
    to_batch,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("name", CONFIGS)
def test_which_models_are_differentiated_without_autograd(name: str) -> None:
    model = build(CONFIGS[name], SPEC)
    books = BookKeeping(model)
    batch = to_batch(some_examples([1, 2, 3]), slice(None))
    chained = name in ("logistic", "mlp")
    assert books(batch).requires_grad is not chained
    assert any(layer._forward_hooks for layer in model.modules()) is not chained


@settings(max_examples=50, deadline=None)
@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    activations=st.lists(st.sampled_from([nn.Tanh, nn.ReLU, None]), min_size=4, max_size=4),
    rows=st.integers(0, 4),
    seed=st.integers(0, 2**16),
)
def test_a_chain_does_what_autograd_does(
    widths: list[int], activations: list[type[nn.Module] | None], rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, activation in zip(range(len(widths) - 1), activations, strict=False):
        layers.append(nn.Linear(widths[i], widths[i + 1], dtype=torch.float64))
        layers += [activation()] if activation else []
    chain = Chain.of(layers)
    assert chain is not None
    x = torch.randn(rows, widths[0], dtype=torch.float64)
    gradient = torch.randn(rows, widths[-1], dtype=torch.float64)

    entered: dict[nn.Module, Tensor] = {}
    came_out: dict[nn.Module, Tensor] = {}
    value = x
    for layer in layers:
        entered[layer] = value.detach()
        came_out[layer] = value = layer(value)
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    expected = torch.autograd.grad(value, [came_out[layer] for layer in linear], gradient)

    before = x.clone()
    torch.testing.assert_close(chain.forward(x), value.detach(), rtol=1e-12, atol=1e-12)
    assert chain.layers == linear
    uses = list(reversed(chain.backward(gradient)))
    assert torch.equal(x, before)
    for layer, of_output, (weight, bias, *use) in zip(linear, expected, uses, strict=True):
        assert weight is layer.weight
        assert bias is layer.bias
        torch.testing.assert_close(use, [entered[layer], of_output], rtol=1e-9, atol=1e-12)


def test_other_layers_are_no_chain() -> None:
    one, tanh, relu = nn.Linear(3, 3), nn.Tanh(), nn.ReLU()
    assert Chain.of([one, tanh]) is not None
    for layers in (
        [],
        [tanh],
        [tanh, one],
        [one, tanh, relu],
        [one, one],
        [one, nn.LayerNorm(3)],
        [one, nn.Sigmoid()],
        [nn.Linear(3, 3, bias=False)],
    ):
        assert Chain.of(layers) is None


class Doubled(Mlp):
    """Does more than its layers."""

    def forward(self, batch: JourneyBatch) -> Tensor:
        return 2 * super().forward(batch)


class Added(Mlp):
    """Has a layer beside them."""

    def __init__(self, config: MlpConfig, spec: FeatureSpec) -> None:
        super().__init__(config, spec)
        self.more = nn.Linear(self.bag.width, 1)

    def forward(self, batch: JourneyBatch) -> Tensor:
        more: Tensor = self.more(self.bag(batch))
        return super().forward(batch) + more.squeeze(1)


@pytest.mark.parametrize("kind", [Doubled, Added])
def test_a_model_that_does_more_than_its_layers_goes_by_autograd(kind: type[Mlp]) -> None:
    torch.manual_seed(0)
    model = kind(MlpConfig(embedding=6, hidden=5), SPEC).double()
    batch = doubled(to_batch(some_examples([1, 2, 3, 4]), slice(None)))
    weights = torch.rand(4, dtype=torch.float64)
    expected = by_loop(model, batch, 1, weights)
    assert_close(by_engine(BookKeeping(model), model, batch, 1, weights), expected, 1e-9)
