from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import StrategyConfig
from protocol.replies import SiteFailure, SiteUpdate, Weights
from server.screening import MOST_VISITORS, cap_weights, screen_updates
from server.strategy import Aggregator

GLOBAL: Weights = {
    "hidden.weight": np.zeros((3, 2), np.float32),
    "out.bias": np.zeros(1, np.float32),
}


def update(site: str, weights: Weights) -> SiteUpdate:
    return SiteUpdate(site, 1, weights, 1.0)


def sound(site: str, value: float = 0.1) -> SiteUpdate:
    return update(site, {name: np.full_like(w, value) for name, w in GLOBAL.items()})


def with_value(value: float) -> Weights:
    weights = {name: w.copy() for name, w in GLOBAL.items()}
    weights["hidden.weight"][1, 1] = value
    return weights


BAD: dict[str, tuple[Weights, str]] = {
    "NaN": (with_value(np.nan), "weights.hidden.weight: a value is not finite"),
    "infinity": (with_value(-np.inf), "weights.hidden.weight: a value is not finite"),
    "huge": (with_value(1e30), "update of norm 1e+30, strategy.max_update_norm=100"),
    "largest float": (with_value(float(np.finfo(np.float32).max)), "update of norm 3.4e+38"),
    "too far": (with_value(100.1), "update of norm 100, strategy.max_update_norm=100"),
    "broadcastable shape": (
        {**GLOBAL, "hidden.weight": np.zeros(2, np.float32)},
        "weights.hidden.weight: shape (2,) instead of (3, 2)",
    ),
    "transposed": (
        {**GLOBAL, "hidden.weight": np.zeros((2, 3), np.float32)},
        "weights.hidden.weight: shape (2, 3) instead of (3, 2)",
    ),
    "no values": (
        {**GLOBAL, "out.bias": np.zeros(0, np.float32)},
        "weights.out.bias: shape (0,) instead of (1,)",
    ),
    "missing array": (
        {"out.bias": GLOBAL["out.bias"]},
        "weights.hidden.weight: missing or unknown",
    ),
    "further array": (
        {**GLOBAL, "extra": np.zeros(1, np.float32)},
        "weights.extra: missing or unknown",
    ),
    "nothing": ({}, "weights.hidden.weight: missing or unknown"),
}


@pytest.mark.parametrize("kind", ["NaN", "infinity"])
def test_without_a_bound_what_is_not_finite_is_dropped_all_the_same(kind: str) -> None:
    weights, reason = BAD[kind]
    kept, failed = screen_updates([update("a", weights)], GLOBAL, max_update_norm=np.inf)
    assert not kept
    assert failed[0].reason.startswith(reason)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_update_costs_its_site_alone(kind: str) -> None:
    weights, reason = BAD[kind]
    answers: list[SiteUpdate | SiteFailure] = [sound("a"), update("b", weights), sound("c")]

    kept, failed = screen_updates(answers, GLOBAL, max_update_norm=100.0)

    assert [u.site for u in kept] == ["a", "c"]
    assert [(f.site, f.outcome) for f in failed] == [("b", "dropped")]
    assert failed[0].reason.startswith(reason)


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "fedmedian", "fedtrimmedavg"])
def test_the_combined_model_stays_finite_under_all_bad_updates_at_once(strategy: str) -> None:
    answers: list[SiteUpdate | SiteFailure] = [
        sound("a"),
        *(update(kind, weights) for kind, (weights, _) in BAD.items()),
    ]

    kept, failed = screen_updates(answers, GLOBAL, max_update_norm=100.0)
    combined = Aggregator(StrategyConfig(name=strategy)).combine(1, GLOBAL, kept, {"a": 5.0})

    assert {f.site for f in failed} == set(BAD)
    assert all(np.isfinite(w).all() for w in combined.values())
    assert {n: w.shape for n, w in combined.items()} == {n: w.shape for n, w in GLOBAL.items()}


def test_the_norm_is_that_of_the_distance_from_the_rounds_model_over_all_arrays() -> None:
    far: Weights = {name: np.full_like(w, 50.0) for name, w in GLOBAL.items()}
    moved: Weights = {name: w + np.float32(0.1) for name, w in far.items()}
    norm = 0.1 * np.sqrt(7)

    kept, _ = screen_updates([update("a", moved)], far, max_update_norm=norm * 1.001)
    _, failed = screen_updates([update("a", moved)], far, max_update_norm=norm * 0.999)

    assert [u.site for u in kept] == ["a"]
    assert [f.site for f in failed] == ["a"]


def test_failures_pass_through() -> None:
    failure = SiteFailure("b", "missing", "no reply in 5 s")

    kept, failed = screen_updates([sound("a"), failure], GLOBAL, 100.0)

    assert [u.site for u in kept] == ["a"]
    assert failed == [failure]


@pytest.mark.parametrize("count", [1e9, -19.0, np.nan, np.inf, -np.inf, 0.0])
def test_no_count_takes_the_model_over(count: float) -> None:
    visitors = {"a": 100.0, "b": 120.0, "c": 110.0, "liar": count}

    weights = cap_weights(visitors, cap=4.0)

    assert 1.0 <= weights["liar"] <= 4.0 * 115.0
    assert {site: weights[site] for site in "abc"} == {"a": 100.0, "b": 120.0, "c": 110.0}


@given(
    st.lists(st.floats(width=64), min_size=1, max_size=8),
    st.floats(1.0, 10.0),
)
def test_a_weight_is_positive_and_at_most_cap_medians(counts: list[float], cap: float) -> None:
    visitors = {str(i): count for i, count in enumerate(counts)}

    weights = cap_weights(visitors, cap)

    assert weights.keys() == visitors.keys()

    def told(count: float) -> float:
        return min(count, MOST_VISITORS) if np.isfinite(count) and count >= 1 else 1.0

    median = float(np.median([told(c) for c in counts]))
    for site, count in visitors.items():
        assert weights[site] == min(told(count), cap * median) > 0
    assert np.isfinite(sum(weights.values()))
