from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from models.flat import FlatParameters
from models.weights import get_weights


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))


def test_a_model_and_its_vector_are_the_same_numbers() -> None:
    net, before = model(), get_weights(model())
    flat = FlatParameters(net)
    assert {n: v.tobytes() for n, v in flat.get().items()} == {
        n: v.tobytes() for n, v in before.items()
    }
    with torch.no_grad():
        flat.vector += 1
    assert np.array_equal(get_weights(net)["0.weight"], before["0.weight"] + 1)
    flat.set(before)
    assert np.array_equal(flat.vector[:6].detach().numpy(), before["0.weight"].ravel())


def test_what_is_got_does_not_change_with_the_model() -> None:
    flat = FlatParameters(model())
    got = flat.get()
    with torch.no_grad():
        flat.vector.zero_()
    assert np.abs(got["0.weight"]).max() > 0


def test_a_backward_pass_adds_to_the_vectors_gradient() -> None:
    net = model()
    flat = FlatParameters(net)
    x = torch.ones(4, 3)
    expected = torch.autograd.grad(net(x)[:, 0].sum(), list(net.parameters()))
    for _ in range(2):
        net(x)[:, 0].sum().backward()
    assert flat.vector.grad is not None
    torch.testing.assert_close(
        flat.vector.grad, 2 * torch.cat([gradient.flatten() for gradient in expected])
    )


def test_an_optimizer_of_the_vector_does_what_one_of_the_parameters_does() -> None:
    one, other = model(), model()
    flat = FlatParameters(one)
    steps = (
        torch.optim.SGD([flat.vector], 0.1, 0.9, weight_decay=0.01),
        torch.optim.SGD(other.parameters(), 0.1, 0.9, weight_decay=0.01),
    )
    for _ in range(3):
        for net, optimizer in zip((one, other), steps, strict=True):
            optimizer.zero_grad(set_to_none=False)
            net(torch.ones(4, 3))[:, 0].square().sum().backward()
            optimizer.step()
    for name, value in get_weights(other).items():
        np.testing.assert_allclose(flat.get()[name], value, rtol=1e-6)


def test_other_shapes_are_refused_and_change_nothing() -> None:
    flat = FlatParameters(model())
    before = flat.get()
    with pytest.raises(RuntimeError, match=r"0\.bias: shape \(3,\) where the model has \(2,\)"):
        flat.set({**before, "0.bias": np.zeros(3, np.float32)})
    assert np.array_equal(flat.get()["0.weight"], before["0.weight"])


def test_parts_of_a_vector() -> None:
    net = model()
    parts = FlatParameters(net).split(torch.arange(12.0))
    assert [parts[p].tolist() for p in net.parameters()] == [
        [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]],
        [6.0, 7.0],
        [8.0, 9.0],
        [10.0, 11.0],
    ]
