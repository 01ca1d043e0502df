from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.replies import weights_fault

float32 = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(st.lists(float32, min_size=4, max_size=4))
def test_what_is_not_finite_is_found_and_nothing_else(values: list[float]) -> None:
    weights = {
        "a": np.array(values[:3], np.float32).reshape(1, 3),
        "b": np.asarray(np.float32(values[3])),
    }
    shapes = {name: value.shape for name, value in weights.items()}
    broken = [name for name, value in weights.items() if not np.isfinite(value).all()]
    expected = f"weights.{broken[0]}: a value is not finite" if broken else ""
    assert weights_fault(weights, shapes) == expected


@pytest.mark.parametrize("largest", [1e30, np.finfo(np.float32).max])
def test_the_largest_numbers_are_finite(largest: float) -> None:
    value = np.full(1000, largest, np.float32)
    assert weights_fault({"w": value}, {"w": (1000,)}) == ""
    value[-1] = np.inf
    assert weights_fault({"w": value}, {"w": (1000,)}) == "weights.w: a value is not finite"


def test_a_missing_unknown_or_misshapen_parameter_is_named() -> None:
    weights = {"w": np.zeros((2, 3), np.float32)}
    assert weights_fault(weights, {}) == "weights.w: missing or unknown"
    assert weights_fault({}, {"v": (1,)}) == "weights.v: missing or unknown"
    assert weights_fault(weights, {"w": (3, 2)}) == "weights.w: shape (2, 3) instead of (3, 2)"
