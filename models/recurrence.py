"""The gated recurrence of `models.gru`, with no work on padding and one product for its weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def last_state(inputs: Tensor, length: Tensor, from_state: nn.Linear) -> Tensor:
    """The state after each journey's newest touchpoint, from a state of zeros.

    A touchpoint with inputs (i_r, i_z, i_n) and (s_r, s_z, s_n) = from_state(state) makes it

        state + z * (n - state),  r = sigmoid(i_r + s_r), z = sigmoid(i_z + s_z),
                                  n = tanh(i_n + r * s_n).

    Args:
        inputs: (B, T, 3H); what stands on padding is not read.
        length: int64 (B,), 0 to T.
        from_state: H to 3H, with bias. In training it is called once, on all states (B, T, H), so
            that its gradient is that of one linear layer.

    Returns:
        (B, H).
    """
    walk = _Walk(inputs.detach(), length)
    state = walk.forward(from_state)
    if not torch.is_grad_enabled():
        return state
    products = from_state(walk.padded(walk.states))
    last: Tensor = _Recurrence.apply(inputs, products, state, walk)  # type: ignore[no-untyped-call]
    return last


class _Recurrence(Function):
    """Gives the state that the walk has come to; its backward pass walks back."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, products: Tensor, state: Tensor, walk: _Walk) -> Tensor:
        ctx.walk = walk
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *ctx.walk.backward(gradient), None, None


class _Walk:
    """All journeys, touchpoint by touchpoint; at each step those that are long enough.

    The N touchpoints stand in the order of the walk: the first of every journey, the second of
    those that have one, and so on, longest journeys first.
    """

    def __init__(self, inputs: Tensor, length: Tensor) -> None:
        self.size, self.steps, width = inputs.shape
        self.order = length.argsort(descending=True, stable=True)
        steps = torch.arange(self.steps).unsqueeze(1)
        present = steps < length[self.order]
        self.places = (self.order * self.steps + steps)[present]
        self.counts = [count for count in present.sum(dim=1).tolist() if count]
        self.inputs = inputs.reshape(-1, width).index_select(0, self.places)

    def forward(self, from_state: nn.Linear) -> Tensor:
        """(B, H) the last state of each journey."""
        self.weight, bias = from_state.weight.detach(), from_state.bias.detach()
        hidden = self.weight.shape[1]
        weights = torch.split(self.weight.t(), [2 * hidden, hidden], dim=1)
        gates, entering = torch.split(self.inputs, [2 * hidden, hidden], dim=1)
        self.gates = gates + bias[: 2 * hidden]
        self.states, self.products, self.new = self.inputs.new_empty(
            3, len(self.inputs), hidden
        ).unbind()
        last = self.inputs.new_zeros(self.size, hidden)
        by_step = (self.gates, *self.gates.chunk(2, dim=1), entering)
        by_step += (self.states, self.products, self.new)
        for gates, reset, update, entered, before, product, new in self._by_step(*by_step):
            state = last[: len(before)]
            before.copy_(state)
            gates.addmm_(before, weights[0]).sigmoid_()
            torch.addmm(bias[2 * hidden :], before, weights[1], out=product)
            torch.addcmul(entered, reset, product, out=new).tanh_()
            state.lerp_(new, update)
        del self.inputs
        return torch.empty_like(last).index_copy_(0, self.order, last)

    def backward(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, 3H) each: the gradients of the inputs and of the products of the states."""
        hidden = self.new.shape[1]
        reset, update = self.gates.chunk(2, dim=1)
        keep = 1 - update
        # What a gradient of the state after a touchpoint is multiplied by, for r, z and s_n.
        by_new = update * (1 - self.new.square())
        by_all = self.new.new_empty(len(self.new), 3, hidden)
        torch.mul(by_new, reset, out=by_all[:, 2])
        torch.mul(self.products * (1 - reset), by_all[:, 2], out=by_all[:, 0])
        torch.mul((self.new - self.states) * keep, update, out=by_all[:, 1])

        after = torch.empty_like(self.new)
        current = gradient[self.order]
        for by, kept, of_state in reversed(list(self._by_step(by_all, keep, after))):
            state = current[: len(kept)]
            of_state.copy_(state)
            by.mul_(state.unsqueeze(1))
            state.mul_(kept).addmm_(by.flatten(1), self.weight)
        products = by_all.flatten(1)
        inputs = torch.cat([products[:, : 2 * hidden], after * by_new], dim=1)
        return self.padded(inputs), self.padded(products)

    def padded(self, walked: Tensor) -> Tensor:
        """(B, T, W) of (N, W) in the order of the walk; 0 on padding."""
        width = walked.shape[1]
        total = walked.new_zeros(self.size * self.steps, width)
        total.index_copy_(0, self.places, walked)
        return total.view(self.size, self.steps, width)

    def _by_step(self, *walked: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(torch.split(x, self.counts) for x in walked), strict=True)
