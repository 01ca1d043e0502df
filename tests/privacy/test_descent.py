from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from conf.schema import OptimizerConfig
from privacy.descent import Descent

torch.set_num_threads(1)

Optimizer = Callable[[nn.Parameter], torch.optim.Optimizer]
SAME: dict[str, tuple[OptimizerConfig, Optimizer]] = {
    "sgd": (
        OptimizerConfig(learning_rate=0.3, momentum=0.0),
        lambda p: torch.optim.SGD([p], 0.3, foreach=False),
    ),
    "momentum and decay": (
        OptimizerConfig(learning_rate=0.3, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD([p], 0.3, momentum=0.9, weight_decay=0.1, foreach=False),
    ),
    "adam": (
        OptimizerConfig(name="adam", learning_rate=0.02, weight_decay=0.1),
        lambda p: torch.optim.Adam([p], 0.02, weight_decay=0.1, fused=True),
    ),
}


def parameter(start: torch.Tensor) -> nn.Parameter:
    vector = nn.Parameter(start.clone())
    vector.grad = torch.zeros_like(start)
    return vector


@pytest.mark.parametrize(("config", "optimizer"), SAME.values(), ids=SAME)
def test_a_step_is_that_of_torch_to_the_last_bit(
    config: OptimizerConfig, optimizer: Optimizer
) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1001, generator=generator)
    ours, theirs = parameter(start), parameter(start)
    descent, reference = Descent(ours, config), optimizer(theirs)
    for _ in range(5):
        gradient = torch.randn(1001, generator=generator)
        for p in (ours, theirs):
            assert p.grad is not None
            p.grad.copy_(gradient)
        descent.step()
        reference.step()
        assert torch.equal(ours, theirs)
        assert ours.grad is not None
        assert torch.equal(ours.grad, gradient)
    assert float((ours.detach() - start).abs().max()) > 0.01


@pytest.mark.parametrize(("config", "optimizer"), SAME.values(), ids=SAME)
def test_fedprox_adds_its_pull_to_the_gradient(
    config: OptimizerConfig, optimizer: Optimizer
) -> None:
    start = torch.tensor([1.0, -2.0, 3.0])
    ours, theirs = parameter(start), parameter(start)
    descent, reference = Descent(ours, config, proximal_mu=0.5), optimizer(theirs)
    for _ in range(4):
        for p in (ours, theirs):
            assert p.grad is not None
            p.grad.copy_(torch.ones(3))
        assert theirs.grad is not None
        theirs.grad.add_(theirs.detach() - start, alpha=0.5)
        descent.step()
        reference.step()
        assert torch.equal(ours, theirs)


def test_each_begins_anew() -> None:
    config = OptimizerConfig(learning_rate=0.3, momentum=0.9)
    first, second = parameter(torch.zeros(3)), parameter(torch.zeros(3))
    for p, steps in ((first, 3), (second, 1)):
        for _ in range(steps):
            assert p.grad is not None
            p.grad.fill_(1.0)
            descent = Descent(p, config)
            descent.step()
    torch.testing.assert_close(first.detach(), 3 * second.detach())
