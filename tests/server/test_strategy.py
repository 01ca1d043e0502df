from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from conf.schema import STRATEGIES, StrategyConfig
from protocol.replies import SiteUpdate, Weights
from server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from server.strategy import Aggregator

RATE = 0.05
SHAPES = {"embedding": (4, 3), "out": (1,)}


def updates(models: list[Weights]) -> list[SiteUpdate]:
    return [SiteUpdate(str(i), 1, w, None) for i, w in enumerate(models)]


def draw(rng: np.random.Generator) -> Weights:
    return {n: rng.normal(size=shape).astype(np.float32) for n, shape in SHAPES.items()}


def draw_rounds(rounds: int, sites: int = 4) -> tuple[Weights, list[list[Weights]]]:
    rng = np.random.default_rng(3)
    return draw(rng), [[draw(rng) for _ in range(sites)] for _ in range(rounds)]


COUNTS = {"0": 10.0, "1": 250.0, "2": 31.0, "3": 77.0}


def run(aggregator: Aggregator, weights: Weights, rounds: list[list[Weights]], at: int) -> Weights:
    for round_, models in enumerate(rounds, at):
        weights = aggregator.combine(round_, weights, updates(models), COUNTS)
    return weights


def equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            hnp.arrays(np.float32, (n, 5), elements=st.floats(-10, 10, width=32)),
            hnp.arrays(np.float64, (n,), elements=st.floats(1, 1e6)),
        )
    ),
    st.sampled_from(["fedavg", "fedprox"]),
)
def test_fedavg_and_fedprox_are_the_weighted_mean(
    drawn: tuple[np.ndarray, np.ndarray], name: str
) -> None:
    models, counts = drawn
    aggregator = Aggregator(StrategyConfig(name=name, proximal_mu=0.1))

    combined = aggregator.combine(
        1,
        {"w": np.zeros(5, np.float32)},
        updates([{"w": model} for model in models]),
        {str(i): float(count) for i, count in enumerate(counts)},
    )

    expected = np.average(models.astype(np.float64), axis=0, weights=counts)
    np.testing.assert_allclose(combined["w"], expected, atol=2e-5)
    assert combined["w"].dtype == np.float32


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 9), st.just(3)),
                  elements=st.floats(-10, 10, width=32)))  # fmt: skip
def test_fedmedian_is_the_median_whatever_the_counts(models: np.ndarray) -> None:
    told = {str(i): float(10**i) for i in range(len(models))}

    combined = Aggregator(StrategyConfig(name="fedmedian")).combine(
        1, {"w": np.zeros(3, np.float32)}, updates([{"w": m} for m in models]), told
    )

    np.testing.assert_array_equal(combined["w"], np.median(models, axis=0).astype(np.float32))


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 12), st.just(3)),
               elements=st.floats(-10, 10, width=32)),
    st.floats(0, 0.49),
)  # fmt: skip
def test_fedtrimmedavg_is_the_mean_without_both_ends(models: np.ndarray, trim: float) -> None:
    n = len(models)
    cut = int(trim * n)

    combined = Aggregator(StrategyConfig(name="fedtrimmedavg", trim=trim)).combine(
        1,
        {"w": np.zeros(3, np.float32)},
        updates([{"w": m} for m in models]),
        {str(i): 1.0 for i in range(n)},
    )

    expected = np.sort(models.astype(np.float64), axis=0)[cut : n - cut].mean(axis=0)
    np.testing.assert_allclose(combined["w"], expected, atol=1e-5)


Moments = tuple[np.ndarray, np.ndarray]


def _adam(x: np.ndarray, d: np.ndarray, m: Moments, t: int) -> tuple[np.ndarray, Moments]:
    # Flower counts one more: round t corrects as Adam's step t + 1.
    first, second = 0.9 * m[0] + 0.1 * d, 0.99 * m[1] + 0.01 * d**2
    rate = RATE * np.sqrt(1 - 0.99 ** (t + 1)) / (1 - 0.9 ** (t + 1))
    return x + rate * first / (np.sqrt(second) + 1e-3), (first, second)


def _yogi(x: np.ndarray, d: np.ndarray, m: Moments, t: int) -> tuple[np.ndarray, Moments]:
    first = 0.9 * m[0] + 0.1 * d
    second = m[1] - 0.01 * d**2 * np.sign(m[1] - d**2)
    return x + RATE * first / (np.sqrt(second) + 1e-3), (first, second)


def _adagrad(x: np.ndarray, d: np.ndarray, m: Moments, t: int) -> tuple[np.ndarray, Moments]:
    second = m[1] + d**2
    return x + RATE * d / (np.sqrt(second) + 1e-3), (d, second)


ADAPTIVE: dict[str, Callable[..., tuple[np.ndarray, Moments]]] = {
    "fedadam": _adam,
    "fedyogi": _yogi,
    "fedadagrad": _adagrad,
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_strategies_follow_reddi_et_al(name: str) -> None:
    weights, rounds = draw_rounds(3)
    got = run(Aggregator(StrategyConfig(name=name, server_learning_rate=RATE)), weights, rounds, 1)

    for key in SHAPES:
        x = weights[key].astype(np.float64)
        moments: Moments = (np.zeros_like(x), np.zeros_like(x))
        for t, models in enumerate(rounds, 1):
            mean = np.average([m[key] for m in models], axis=0, weights=list(COUNTS.values()))
            x, moments = ADAPTIVE[name](x, mean - x, moments, t)
        np.testing.assert_allclose(got[key], x, rtol=1e-4, atol=1e-5)
        assert np.abs(got[key] - weights[key]).max() > 1e-3


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_restored_strategy_goes_on_bit_for_bit(name: str) -> None:
    weights, rounds = draw_rounds(4)
    config = StrategyConfig(name=name, server_learning_rate=RATE)
    through = run(Aggregator(config), weights, rounds, 1)

    before = Aggregator(config)
    middle = run(before, weights, rounds[:2], 1)
    after = Aggregator(config)
    after.restore(before.state())

    assert equal(run(after, middle, rounds[2:], 3), through)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_state_survives_a_checkpoint_and_matters(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    weights, rounds = draw_rounds(4)
    config = StrategyConfig(name=name, server_learning_rate=RATE)
    through = run(Aggregator(config), weights, rounds, 1)
    before = Aggregator(config)
    middle = run(before, weights, rounds[:2], 1)

    save_checkpoint(folder, Checkpoint(2, 4, middle, before.state()))
    read = load_checkpoint(folder)

    assert read is not None
    after, forgetful = Aggregator(config), Aggregator(config)
    after.restore(read.strategy)
    assert equal(run(after, read.weights, rounds[2:], 3), through)
    assert not equal(run(forgetful, read.weights, rounds[2:], 3), through)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_order_of_updates_matters_by_rounding_at_most(name: str) -> None:
    weights, [models] = draw_rounds(1)
    told = updates(models)

    one = Aggregator(StrategyConfig(name=name)).combine(1, weights, told, COUNTS)
    other = Aggregator(StrategyConfig(name=name)).combine(1, weights, told[::-1], COUNTS)

    for key in SHAPES:
        np.testing.assert_allclose(one[key], other[key], atol=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_inputs_are_left_as_they_are(name: str) -> None:
    weights, [models] = draw_rounds(1)
    copies = [{n: w.copy() for n, w in model.items()} for model in [weights, *models]]

    Aggregator(StrategyConfig(name=name)).combine(1, weights, updates(models), COUNTS)

    assert all(equal(a, b) for a, b in zip([weights, *models], copies, strict=True))


@pytest.mark.parametrize("name", STRATEGIES)
def test_arrays_are_told_apart_by_name_not_by_order(name: str) -> None:
    weights, [models] = draw_rounds(1)
    turned = [dict(reversed(model.items())) for model in models]

    one = Aggregator(StrategyConfig(name=name)).combine(1, weights, updates(models), COUNTS)
    other = Aggregator(StrategyConfig(name=name)).combine(
        1, dict(reversed(weights.items())), updates(turned), COUNTS
    )

    assert equal(one, other)
    assert list(other) == list(reversed(weights))
    assert {n: w.shape for n, w in one.items()} == SHAPES
