from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.flat import FlatParameters
from privacy.gradients import Kept
from privacy.optimizer import VisitorDPOptimizer
from privacy.randomness import NORMAL_GRID, SeededRandomness

torch.set_num_threads(1)

float32 = st.floats(width=32, allow_nan=True, allow_infinity=True)


def optimizer_over(
    *shapes: tuple[int, ...],
    noise_multiplier: float = 0.0,
    clipping_norm: float = 1.0,
    batch: float = 1,
) -> VisitorDPOptimizer:
    """An optimizer of step size 1 from 0 over one parameter a shape."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])
    parameters = FlatParameters(model)
    return VisitorDPOptimizer(
        torch.optim.SGD([parameters.vector], lr=1.0),
        parameters,
        noise_multiplier=noise_multiplier,
        clipping_norm=clipping_norm,
        expected_batch_size=batch,
        randomness=SeededRandomness(0),
    )


def accumulate(optimizer: VisitorDPOptimizer, *gradients: Tensor) -> None:
    """Clip and add gradients of (B, ...), one a parameter."""
    pairs = zip(optimizer._sums, gradients, strict=True)
    optimizer.clip_and_accumulate([Kept([(p, gradient.clone())]) for p, gradient in pairs])


def clipped_sum(*gradients: Tensor, clipping_norm: float = 1.0) -> Tensor:
    """(P,) what the gradients of (B, ...) add up to, all parameters in one vector."""
    optimizer = optimizer_over(*(g.shape[1:] for g in gradients), clipping_norm=clipping_norm)
    accumulate(optimizer, *gradients)
    optimizer.step()
    return -optimizer.params[0].detach()


def norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector.double()))


@settings(max_examples=200, deadline=None)
@given(
    entries=st.lists(float32, min_size=1, max_size=12),
    clipping_norm=st.sampled_from([1e-10, 1e-3, 1.0, 50.0]),
)
def test_one_visitor_stays_within_the_clipping_norm(
    entries: list[float], clipping_norm: float
) -> None:
    """Promise 3."""
    gradient = torch.tensor([entries])
    added = clipped_sum(gradient, gradient[:, :1], clipping_norm=clipping_norm)
    assert norm(added) <= clipping_norm * (1 + 1e-6)
    if not gradient.isfinite().all():
        assert (added == 0).all()


@pytest.mark.parametrize("size", [1e38, 1e20, 1e15, 1.0, 1e-20, 1e-42])
@pytest.mark.parametrize("parameters", [1, 5000, 500_000])
def test_clipping_at_any_magnitude(size: float, parameters: int) -> None:
    # All entries alike: the worst case of rounding, each addition off to the same side.
    gradient = torch.full((1, parameters), size)
    added = clipped_sum(gradient)
    assert norm(added) <= 1 + 1e-6
    if norm(gradient) < 0.9:
        assert (added == gradient[0]).all()
    elif norm(gradient) < 1e19:
        assert norm(added) >= 1 - 1.1e-7 * (parameters + 10)


def test_norm_is_over_all_parameters_together() -> None:
    added = clipped_sum(torch.full((1, 2, 2), 3.0), torch.full((1, 3), 4.0))
    full_norm = math.sqrt(4 * 9 + 3 * 16)
    expected = torch.tensor([3.0] * 4 + [4.0] * 3) / full_norm
    torch.testing.assert_close(added, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_gradient_adds_nothing_and_spares_the_others(bad: float) -> None:
    good = torch.tensor([[0.25, 0.5], [0.5, 0.0]])
    broken = torch.tensor([[0.25, 0.5], [bad, 0.0], [0.5, 0.0]])
    unharmed = torch.tensor([[0.1], [0.2], [0.3]])
    added = clipped_sum(broken, unharmed)
    assert (added == clipped_sum(good, unharmed[[0, 2]])).all()


def noise_deviation(noise_multiplier: float) -> float:
    """Over 10^6 coordinates, of what a step adds at clipping norm 3 and expected batch 50."""
    optimizer = optimizer_over(
        (1000, 1000), noise_multiplier=noise_multiplier, clipping_norm=3.0, batch=50
    )
    accumulate(optimizer, torch.zeros(1, 1000, 1000))
    optimizer.step()
    return float(optimizer.params[0].detach().double().std())


@pytest.mark.parametrize("noise_multiplier", [0.7, 2.5])
def test_noise_has_the_deviation_that_is_accounted(noise_multiplier: float) -> None:
    """Promise 2: 0.35 % is five standard errors at 10^6 coordinates."""
    promised = pytest.approx(noise_multiplier * 3.0 / 50, rel=0.0035)
    assert noise_deviation(noise_multiplier) == promised
    for miscalibration in (0.98, 1.02):
        assert noise_deviation(noise_multiplier * miscalibration) != promised


def test_noise_is_normal_and_fresh_at_every_step() -> None:
    optimizer = optimizer_over((200_000,), noise_multiplier=1.0)
    steps = []
    for _ in range(2):
        before = optimizer.params[0].detach().clone()
        optimizer.step()
        steps.append((optimizer.params[0].detach() - before).double())
    first, second = steps
    assert abs((first * second).mean().item()) < 5 / math.sqrt(200_000)
    for bound, share in [(1.0, 0.317311), (2.0, 0.045500), (3.0, 0.002700)]:
        outside = (first.abs() > bound).double().mean().item()
        assert outside == pytest.approx(share, abs=5 * math.sqrt(share / 200_000))


def test_an_empty_batch_adds_noise() -> None:
    optimizer = optimizer_over((1000,), noise_multiplier=1.0, batch=10)
    optimizer.step()
    assert optimizer.params[0].detach().std().item() == pytest.approx(0.1, rel=0.12)


def test_parts_of_a_batch_add_up_and_are_forgotten_after_the_step() -> None:
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    whole = clipped_sum(gradient)
    optimizer = optimizer_over((4,))
    accumulate(optimizer, gradient[:2])
    accumulate(optimizer, gradient[2:])
    optimizer.step()
    (p,) = optimizer.params
    torch.testing.assert_close(-p.detach(), whole)
    optimizer.step()
    torch.testing.assert_close(-p.detach(), whole)


def test_the_raw_gradient_never_reaches_the_step() -> None:
    optimizer = optimizer_over((3,))
    (p,) = optimizer._sums
    assert p.grad is not None
    p.grad.fill_(1e6)
    accumulate(optimizer, torch.zeros(1, 3))
    optimizer.step()
    assert (p == 0).all()


def test_a_parameter_without_gradient_or_with_two_is_refused() -> None:
    optimizer = optimizer_over((3,), (2,))
    first, second = (Kept([(p, torch.zeros(4, *p.shape))]) for p in optimizer._sums)
    for gradients in ([first], [first, first], [first, second, second]):
        with pytest.raises(RuntimeError, match="exactly one gradient"):
            optimizer.clip_and_accumulate(gradients)
    optimizer.clip_and_accumulate([second, first])


@pytest.mark.parametrize("noise_multiplier", [0.5, 3.0, 5000.0])
def test_the_sum_is_on_the_noise_s_grid_and_the_clipping_makes_room_for_it(
    noise_multiplier: float,
) -> None:
    size, grid = 100, noise_multiplier * NORMAL_GRID
    optimizer = optimizer_over((size,), noise_multiplier=noise_multiplier)
    optimizer._randomness = Silent()
    accumulate(optimizer, torch.randn(1, size, generator=torch.Generator().manual_seed(0)))
    # Rounding two neighbours' sums moves them apart by up to the grid in each coordinate.
    assert norm(optimizer._sum) + grid * math.sqrt(size) <= 1 + 1e-7
    optimizer.step()
    added = -optimizer.params[0].detach().double()
    assert (added / grid - (added / grid).round()).abs().max() < 1e-2
    assert norm(added) > 0.93


class Silent:
    repeatable = True

    def normal(self, n: int) -> npt.NDArray[np.float32]:
        return np.zeros(n, dtype=np.float32)


def test_noise_too_large_for_its_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="noise_multiplier"):
        optimizer_over((1000, 1000), noise_multiplier=1000.0)


@pytest.mark.parametrize("clipping_norm", [0.0, -1.0, 1e-30, math.nan])
def test_impossible_clipping_norm_is_refused(clipping_norm: float) -> None:
    with pytest.raises(ValueError, match="clipping_norm"):
        optimizer_over((2,), clipping_norm=clipping_norm)
