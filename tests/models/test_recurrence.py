from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.recurrence import last_state

torch.set_num_threads(1)


def step_by_step(inputs: Tensor, length: Tensor, from_state: nn.Linear) -> Tensor:
    """The same as its docstring says it, one journey and one touchpoint after the other."""
    states = []
    for journey, touchpoints in zip(inputs, length.tolist(), strict=True):
        state = inputs.new_zeros(from_state.in_features)
        for touchpoint in journey[:touchpoints]:
            reset_in, update_in, new_in = touchpoint.chunk(3)
            reset_st, update_st, new_st = from_state(state).chunk(3)
            reset = torch.sigmoid(reset_in + reset_st)
            update = torch.sigmoid(update_in + update_st)
            state = state + update * (torch.tanh(new_in + reset * new_st) - state)
        states.append(state)
    return torch.stack(states)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    padding=st.integers(0, 2),
    hidden=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_states_and_gradients_are_those_of_a_walk_touchpoint_by_touchpoint(
    lengths: list[int], padding: int, hidden: int, seed: int
) -> None:
    torch.manual_seed(seed)
    from_state = nn.Linear(hidden, 3 * hidden).double()
    steps = max(max(lengths) + padding, 1)
    inputs = torch.randn(len(lengths), steps, 3 * hidden).double().requires_grad_()
    length, outer = torch.tensor(lengths), torch.randn(len(lengths), hidden).double()
    leaves = [inputs, from_state.weight, from_state.bias]
    results = []
    for function in (last_state, step_by_step):
        state = function(inputs, length, from_state)
        value = (state * outer).sum() + 0 * sum(leaf.sum() for leaf in leaves)
        results.append([state, *torch.autograd.grad(value, leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(last_state(inputs, length, from_state), results[0][0])


def test_it_is_torch_s_gru_but_for_the_sign_of_the_update_gate() -> None:
    torch.manual_seed(0)
    gru = nn.GRU(3, 4, batch_first=True).double()
    touchpoints = torch.randn(2, 5, 3).double()
    _, expected = gru(touchpoints)
    from_input, from_state = nn.Linear(3, 12).double(), nn.Linear(4, 12).double()
    sign = torch.ones(12, 1).double()
    sign[4:8] = -1
    with torch.no_grad():
        for layer, weight, bias in (
            (from_input, gru.weight_ih_l0, gru.bias_ih_l0),
            (from_state, gru.weight_hh_l0, gru.bias_hh_l0),
        ):
            layer.weight.copy_(weight * sign)
            layer.bias.copy_(bias * sign[:, 0])
    state = last_state(from_input(touchpoints), torch.tensor([5, 5]), from_state)
    torch.testing.assert_close(state, expected[0], rtol=1e-11, atol=1e-12)
