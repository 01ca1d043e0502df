from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from privacy.gradients import (
    LARGEST_NORM,
    Kept,
    Lookups,
    Products,
    VisitorGradients,
    embedding_gradients,
    linear_gradients,
    together,
)

torch.set_num_threads(1)

magnitudes = st.sampled_from([1e-40, 1e-30, 1e-20, 1e-6, 1.0, 1e6, 1e15, 1e20, 1e30])


def weighted_sums(gradients: VisitorGradients, weights: Tensor) -> list[Tensor]:
    sums = {p: torch.zeros_like(p, requires_grad=False) for p in gradients.parameters}
    gradients.add_weighted(weights, sums)
    return list(sums.values())


def clipped(gradients: VisitorGradients, clipping_norm: float) -> float:
    """Norm of what one visitor adds when it is clipped as the optimizer does it."""
    norms = together([gradients.norms()])
    if not (norms <= LARGEST_NORM).all():
        return 0.0
    weights = (clipping_norm / norms).clamp(max=1.0).float()
    parts = [total.double().flatten() for total in weighted_sums(gradients, weights)]
    return float(torch.cat(parts).norm())


def cancelling(positions: int, width: int, other: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs (1, 2P, I) and outputs (1, 2P, O) whose products add up to 0, but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(1, positions, width, generator=generator)
    outputs = torch.randn(1, positions, other, generator=generator)
    order = torch.randperm(2 * positions, generator=generator)
    return torch.cat([inputs, inputs], 1)[:, order], torch.cat([outputs, -outputs], 1)[:, order]


@settings(max_examples=40, deadline=None)
@example(sizes=(1e-24, 1e18), positions=1, bias=False, clipping_norm=1e-10, seed=0)
@example(sizes=(1e18, 1e-24), positions=1, bias=True, clipping_norm=1e-10, seed=0)
@example(sizes=(1e-24, 1e18), positions=2, bias=False, clipping_norm=1e-10, seed=0)
@given(
    sizes=st.tuples(magnitudes, magnitudes),
    positions=st.integers(1, 4),
    bias=st.booleans(),
    clipping_norm=st.sampled_from([1e-10, 1e-3, 1.0]),
    seed=st.integers(0, 99),
)
def test_products_of_any_size_end_within_the_clipping_norm(
    sizes: tuple[float, float], positions: int, bias: bool, clipping_norm: float, seed: int
) -> None:
    """Promise 3, where the gradient never exists."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(1, positions, 5, generator=generator) * sizes[0]
    outputs = torch.randn(1, positions, 6, generator=generator) * sizes[1]
    gradients = Products(nn.Linear(5, 6, bias=bias), inputs, outputs)
    assert clipped(gradients, clipping_norm) <= clipping_norm * (1 + 1e-6)


@settings(max_examples=40, deadline=None)
@given(
    positions=st.integers(1, 12), size=st.sampled_from([1.0, 1e9, 1e15]), seed=st.integers(0, 99)
)
def test_what_cancels_in_the_norm_but_not_in_the_sum_is_clipped(
    positions: int, size: float, seed: int
) -> None:
    """A server may choose weights that make a visitor's positions cancel."""
    inputs, outputs = cancelling(positions, 30, 40, seed)
    products = Products(nn.Linear(30, 40), inputs, outputs * size)
    assert clipped(products, 1e-4) <= 1e-4 * (1 + 1e-6)
    rows = torch.zeros(1, 2 * positions, 1, dtype=torch.int64)
    assert clipped(Lookups(nn.Embedding(9, 40), rows, outputs * size), 1e-4) <= 1e-4 * (1 + 1e-6)


def test_rounding_is_all_that_a_norm_is_above() -> None:
    inputs, outputs = torch.rand(7, 9, 30), torch.randn(7, 9, 40)
    layer = nn.Linear(30, 40)
    exact = Kept([(layer.weight, (outputs.mT @ inputs)), (layer.bias, outputs.sum(1))]).norms()
    norms = Products(layer, inputs, outputs).norms()
    assert (norms >= exact * (1 - 1e-6)).all()
    assert (norms <= exact * (1 + 2e-5)).all()


def test_an_input_beyond_squares_counts_as_broken() -> None:
    inputs = torch.tensor([[[1e20]], [[1.0]]])
    outputs = torch.tensor([[[1e-30]], [[1.0]]])
    norms = Products(nn.Linear(1, 1), inputs, outputs).norms()
    assert norms.isinf().tolist() == [True, False]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_without_a_visitor_its_weight_and_gradient_no_longer_matter(broken: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 2, 4, generator=generator)
    outputs = torch.randn(3, 2, 5, generator=generator)
    rows = torch.randint(0, 6, (3, 2, 2), generator=generator)
    layer, table = nn.Linear(4, 5), nn.Embedding(6, 5)
    weights = torch.tensor([0.5, 0.0, 2.0])

    def sums(inputs: Tensor, outputs: Tensor, *out: bool) -> list[Tensor]:
        every: list[VisitorGradients] = [
            Products(layer, inputs, outputs),
            Lookups(table, rows, outputs),
            Kept([(layer.weight, outputs.mT @ inputs)]),
        ]
        if out:
            every = [gradients.without(torch.tensor(out)) for gradients in every]
        return [total for g in every for total in weighted_sums(g, weights)]

    expected = sums(inputs, outputs)
    inputs[1, 0, 0] = outputs[1, 1, 2] = broken
    for got, wanted in zip(sums(inputs, outputs, False, True, False), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kept", [0, 3])
def test_embeddings_that_are_summed_share_a_gradient(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privacy.gradients.KEPT", kept)
    generator = torch.Generator().manual_seed(0)
    table = nn.Embedding(6, 5)
    rows = torch.randint(0, 6, (4, 3, 2), generator=generator)
    shared = torch.randn(4, 3, 1, 5, generator=generator).expand(4, 3, 2, 5)
    weights = torch.rand(4, generator=generator)
    short = embedding_gradients(table, [(rows, shared)], 1)
    long = embedding_gradients(table, [(rows, shared.contiguous())], 1)
    torch.testing.assert_close(short.norms(), long.norms(), rtol=1e-5, atol=0)
    (one,), (other,) = weighted_sums(short, weights), weighted_sums(long, weights)
    torch.testing.assert_close(one, other)
    if kept == 0:
        assert isinstance(short, Lookups)
        assert short.indices.shape == (4, 3, 2)
        assert isinstance(long, Lookups)
        assert long.indices.shape == (4, 6, 1)


def test_the_closed_form_takes_over_where_the_gradient_is_larger_than_its_parts() -> None:
    kinds = [
        type(linear_gradients(nn.Linear(40, 40), [(torch.ones(2, p, 40), torch.ones(2, p, 40))], 1))
        for p in (1, 6, 7)
    ]
    assert kinds == [Products, Products, Kept]
