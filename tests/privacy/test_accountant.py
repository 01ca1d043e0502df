from __future__ import annotations

import math
from functools import reduce

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import (
    PrivacyLossDistribution,
    from_gaussian_mechanism,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.special import log_ndtr, ndtr

from privacy import accountant
from privacy.accountant import PrivacyEvent, _power, epsilon


def test_reference_point() -> None:
    """Promise 1."""
    spent = epsilon([PrivacyEvent(1.5, 0.04, 2250)], 1e-5)
    assert 6.7695 - 1e-3 <= spent <= 6.7695 * 1.01


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    events=st.lists(
        st.builds(
            PrivacyEvent,
            st.floats(0.6, 30.0),
            st.one_of(st.just(1.0), st.floats(0.003, 0.9)),
            st.integers(1, 500),
        ),
        min_size=1,
        max_size=3,
    ),
    delta=st.sampled_from([1e-7, 1e-5, 1e-2]),
)
def test_is_what_dp_accounting_composes(events: list[PrivacyEvent], delta: float) -> None:
    kinds = accountant.merge(events)
    grid = accountant._grid(kinds)
    losses = (
        from_gaussian_mechanism(
            kind.noise_multiplier,
            sampling_prob=kind.sample_rate,
            value_discretization_interval=grid,
        ).self_compose(kind.count)
        for kind in kinds
    )
    theirs = reduce(PrivacyLossDistribution.compose, losses).get_epsilon_for_delta(delta)
    # Theirs rounds losses above 745, whose exp(-loss) is 0, up to the grid.
    assert epsilon(events, delta) == pytest.approx(
        theirs, rel=1e-6, abs=1e-6 + grid * (theirs > 500)
    )


@pytest.mark.parametrize("direction", ["ADD", "REMOVE"])
@pytest.mark.parametrize(
    "event", [PrivacyEvent(1.1, 0.04), PrivacyEvent(0.4, 0.7), PrivacyEvent(3)]
)
def test_one_loss_is_dp_accountings(event: PrivacyEvent, direction: accountant._Direction) -> None:
    noise, rate = event.noise_multiplier, event.sample_rate
    theirs = from_gaussian_mechanism(noise, sampling_prob=rate, value_discretization_interval=0.01)
    pmf = (theirs._pmf_add if direction == "ADD" else theirs._pmf_remove).to_dense_pmf()
    ours = accountant._loss(noise, rate, 0.01, direction)
    assert ours.first == pmf._lower_loss
    np.testing.assert_allclose(ours.probabilities, pmf._probs, rtol=0, atol=1e-12)
    assert ours.infinite == pytest.approx(pmf._infinity_mass, rel=1e-9)


def test_is_below_renyi_and_near_prv() -> None:
    rdp, prv = RDPAccountant(), PRVAccountant()
    for other in (rdp, prv):
        other.history = [(1.5, 0.04, 500)]
    spent = epsilon([PrivacyEvent(1.5, 0.04, 500)], 1e-5)
    assert spent < rdp.get_epsilon(1e-5)
    assert spent == pytest.approx(prv.get_epsilon(1e-5), rel=0.01)


@pytest.mark.parametrize(
    ("noise", "count", "delta"),
    [(5.0, 3, 1e-5), (20.0, 1, 1e-8), (1.0, 1000, 1e-5), (0.02, 2, 1e-5), (100.0, 200_000, 1e-9)],
)
def test_plain_gaussian_agrees_with_its_closed_form(noise: float, count: int, delta: float) -> None:
    # Balle and Wang, "Improving the Gaussian Mechanism", 2018, theorem 8; k releases of noise
    # sigma are one of noise sigma / sqrt(k).
    sigma = noise / math.sqrt(count)

    def exact(spent: float) -> float:
        tail = spent + log_ndtr(-0.5 / sigma - spent * sigma)
        return float(ndtr(0.5 / sigma - spent * sigma) - math.exp(tail))

    spent = epsilon([PrivacyEvent(noise, count=count)], delta)
    assert exact(spent) <= delta < exact(0.998 * spent)


def test_rounds_add_up() -> None:
    one = PrivacyEvent(1.0, 0.05, 20)
    first, all_rounds = epsilon([one], 1e-5), epsilon([one] * 20, 1e-5)
    assert all_rounds > 2 * first
    assert all_rounds == epsilon([PrivacyEvent(1.0, 0.05, 400)], 1e-5)


def test_order_does_not_matter() -> None:
    events = [PrivacyEvent(20.0), PrivacyEvent(1.0, 0.05, 20), PrivacyEvent(2.0, 0.1, 3)]
    assert epsilon(events, 1e-5) == pytest.approx(epsilon(events[::-1], 1e-5), rel=1e-9)


def test_a_long_changing_run_adds_up_whatever_was_asked_before() -> None:
    events = [PrivacyEvent(20.0)]
    for round_ in range(20):
        events.append(PrivacyEvent(1.0 + round_ / 50, 1 / (20 + round_ % 3), 20))
        events.append(PrivacyEvent(30.0))
        step_by_step = epsilon(events, 1e-5)
    accountant._epsilon.cache_clear()
    accountant._block_spectrum.cache_clear()
    assert epsilon(events, 1e-5) == step_by_step
    assert step_by_step > epsilon(events[:-2], 1e-5)


def test_equal_kinds_are_merged_and_the_latest_comes_last() -> None:
    count, weights, other = PrivacyEvent(20.0), PrivacyEvent(1.0, 0.1, 9), PrivacyEvent(1.0, 0.2)
    nothing = PrivacyEvent(3.0, count=0)
    merged = accountant.merge([count, weights, other, nothing, count])
    assert merged == (weights, other, PrivacyEvent(20.0, count=2))


def test_nothing_released_costs_nothing() -> None:
    assert epsilon([], 1e-5) == 0
    assert epsilon([PrivacyEvent(0.0, count=0)], 1e-5) == 0


def test_delta_that_floating_point_cannot_tell_from_0_is_not_reached() -> None:
    assert epsilon([PrivacyEvent(20.0)], 1e-14) == math.inf
    assert epsilon([PrivacyEvent(1000.0, count=10**6)], 1e-12) == math.inf


@pytest.mark.parametrize("noise", [0.0, 1e-6, 0.0099])
def test_so_little_noise_is_no_protection(noise: float) -> None:
    assert epsilon([PrivacyEvent(noise)], 1e-5) == math.inf


def test_without_noise_nothing_is_protected() -> None:
    assert epsilon([PrivacyEvent(3.0), PrivacyEvent(0.0, 0.01)], 1e-5) == math.inf


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_impossible_delta_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        epsilon([PrivacyEvent(1.0)], delta)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_multiplier", -1.0),
        ("noise_multiplier", math.nan),
        ("noise_multiplier", math.inf),
        ("sample_rate", 0.0),
        ("sample_rate", 1.5),
        ("sample_rate", math.nan),
        ("count", -1),
    ],
)
def test_impossible_event_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        PrivacyEvent(**{"noise_multiplier": 1.0, field: value})  # type: ignore[arg-type]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    noise=st.floats(0.8, 30.0),
    rate=st.floats(0.01, 1.0),
    count=st.integers(1, 1000),
    count_noise=st.floats(5.0, 50.0),
)
def test_coarse_grid_is_pessimistic_and_close(
    noise: float, rate: float, count: int, count_noise: float
) -> None:
    events = (PrivacyEvent(noise, rate, count), PrivacyEvent(count_noise))
    grid = accountant._grid(events)
    with pytest.MonkeyPatch.context() as patch:
        accountant._epsilon.cache_clear()
        spent = epsilon(events, 1e-5)
        patch.setattr(accountant, "_grid", lambda _: grid / 4)
        accountant._epsilon.cache_clear()
        finer = epsilon(events, 1e-5)
    accountant._epsilon.cache_clear()
    assert finer - 1e-6 <= spent <= finer * 1.002 + 1e-4


@settings(max_examples=6, deadline=None, derandomize=True)
@given(noise=st.floats(0.7, 10.0), rate=st.floats(0.01, 0.5), count=st.integers(1, 300))
def test_more_noise_fewer_steps_and_rarer_draws_spend_less(
    noise: float, rate: float, count: int
) -> None:
    spent = epsilon([PrivacyEvent(noise, rate, count)], 1e-5)
    # The grid's error is up to 0.2 %, so the changes are larger.
    assert epsilon([PrivacyEvent(noise * 1.1, rate, count)], 1e-5) < spent
    assert epsilon([PrivacyEvent(noise, rate * 0.9, count)], 1e-5) < spent
    assert epsilon([PrivacyEvent(noise, rate, 2 * count)], 1e-5) > spent


@given(st.integers(1, 5000), st.integers(0, 2**16))
def test_a_power_is_the_power_in_more_digits(exponent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.dirichlet(np.ones(8)), 16)
    exact = spectrum.astype(np.clongdouble) ** exponent
    error = np.abs(_power(spectrum, exponent) - exact)
    assert error.max() <= exponent * 2.0**-52
