from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.special import ndtr

from privacy import accountant
from privacy.accountant import PrivacyEvent, epsilon


def test_reference_point() -> None:
    """Promise 1."""
    spent = epsilon([PrivacyEvent(1.5, 0.04, 2250)], 1e-5)
    assert 6.7695 - 1e-3 <= spent <= 6.7695 * 1.01


def test_is_below_renyi_and_near_prv() -> None:
    rdp, prv = RDPAccountant(), PRVAccountant()
    for other in (rdp, prv):
        other.history = [(1.5, 0.04, 500)]
    spent = epsilon([PrivacyEvent(1.5, 0.04, 500)], 1e-5)
    assert spent < rdp.get_epsilon(1e-5)
    assert spent == pytest.approx(prv.get_epsilon(1e-5), rel=0.01)


def test_plain_gaussian_agrees_with_its_closed_form() -> None:
    # Balle and Wang, "Improving the Gaussian Mechanism", 2018, theorem 8; k releases of noise
    # sigma are one of noise sigma / sqrt(k).
    noise = 5.0 / math.sqrt(3)
    spent = epsilon([PrivacyEvent(5.0, count=3)], 1e-5)
    delta = ndtr(0.5 / noise - spent * noise) - math.exp(spent) * ndtr(-0.5 / noise - spent * noise)
    assert delta == pytest.approx(1e-5, rel=0.01)
    assert delta <= 1e-5


def test_rounds_add_up() -> None:
    one = PrivacyEvent(1.0, 0.05, 20)
    first, all_rounds = epsilon([one], 1e-5), epsilon([one] * 20, 1e-5)
    assert all_rounds > 2 * first
    assert all_rounds == epsilon([PrivacyEvent(1.0, 0.05, 400)], 1e-5)


def test_order_does_not_matter() -> None:
    events = [PrivacyEvent(20.0), PrivacyEvent(1.0, 0.05, 20), PrivacyEvent(2.0, 0.1, 3)]
    assert epsilon(events, 1e-5) == epsilon(events[::-1], 1e-5)


def test_nothing_released_costs_nothing() -> None:
    assert epsilon([], 1e-5) == 0
    assert epsilon([PrivacyEvent(0.0, count=0)], 1e-5) == 0


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
