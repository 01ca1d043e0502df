from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp
from scipy import stats

from privacy import randomness as source
from privacy.randomness import (
    LARGEST_DEVIATION,
    NORMAL_GRID,
    Randomness,
    SeededRandomness,
    SystemRandomness,
)

MILLION = 1_000_000
CHANCE = 1e-4
"""That a right distribution fails a test, were its seed not fixed."""


def seeded(seed: int = 0) -> SeededRandomness:
    return SeededRandomness(seed)


@pytest.fixture(params=["seeded", "system"])
def randomness(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Randomness:
    """Either source; the system's keys are those of a fixed sequence."""
    if request.param == "seeded":
        return seeded()
    monkeypatch.setattr(source, "urandom", np.random.default_rng(0).bytes)
    return SystemRandomness()


def is_calibrated(normals: npt.NDArray[np.float64]) -> bool:
    """Promise 2: 0.35 % is five standard errors at 10^6 coordinates."""
    return abs(float(normals.std()) - 1) <= 0.0035


def test_deviation_of_normals(randomness: Randomness) -> None:
    """Promise 2."""
    normals = randomness.normal(MILLION).astype(np.float64)
    assert is_calibrated(normals)
    assert not is_calibrated(0.98 * normals)
    assert not is_calibrated(1.02 * normals)
    assert abs(normals.mean()) < 4 / np.sqrt(MILLION)


def test_normals_are_normal_far_into_the_tails(randomness: Randomness) -> None:
    normals = randomness.normal(MILLION).astype(np.float64)
    assert stats.kstest(normals, "norm").pvalue > CHANCE
    edges = np.array([-np.inf, *np.linspace(-4.5, 4.5, 37), np.inf])
    counts = np.histogram(normals, edges)[0]
    # 3.4 are expected in each outermost bin.
    assert stats.chisquare(counts, MILLION * np.diff(stats.norm.cdf(edges))).pvalue > CHANCE
    assert 4.5 < np.abs(normals).max() < 6.5


@pytest.mark.parametrize("deviation", [0.5, 3.0, 40.0, 1e6])
def test_rounded_normals_have_their_exact_probabilities(
    randomness: Randomness, deviation: float
) -> None:
    whole = randomness.rounded_normal(deviation, MILLION)
    last, step = int(4 * deviation - 0.5), max(1, round(deviation / 40))
    edges = np.array([-np.inf, *np.arange(-last - 1, last + 1, step) + 0.5, np.inf])
    expected = MILLION * np.diff(stats.norm.cdf(edges / deviation))
    assert expected.min() > 3
    assert stats.chisquare(np.histogram(whole, edges)[0], expected).pvalue > CHANCE


def test_uniform(randomness: Randomness) -> None:
    uniform = randomness.uniform(MILLION)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    steps = uniform * 2.0**53
    assert (steps == np.floor(steps)).all()
    assert stats.chisquare(np.histogram(uniform, 100, (0, 1))[0]).pvalue > CHANCE
    lowest = steps.astype(np.int64) % 64
    assert stats.chisquare(np.bincount(lowest, minlength=64)).pvalue > CHANCE


def test_draws_follow_from_no_others(randomness: Randomness) -> None:
    n = 200_000
    kinds: list[npt.NDArray[np.float64]] = []
    for _ in range(2):
        kinds += [
            randomness.normal(n).astype(np.float64),
            randomness.rounded_normal(40, n) / 40,
            (randomness.uniform(n) - 0.5) * np.sqrt(12),
        ]
    bound = 5 / np.sqrt(n)
    for one, other in itertools.combinations(kinds, 2):
        assert abs((one * other).mean()) < bound
    for draws in kinds:
        for lag in (1, 2, 3, 8):
            assert abs((draws[lag:] * draws[:-lag]).mean()) < bound
            assert abs(np.corrcoef(draws[lag:] ** 2, draws[:-lag] ** 2)[0, 1]) < bound


@pytest.mark.parametrize("deviation", [-1.0, np.nan, np.inf, 2 * LARGEST_DEVIATION])
def test_impossible_deviation_is_refused(randomness: Randomness, deviation: float) -> None:
    with pytest.raises(ValueError, match="deviation="):
        randomness.rounded_normal(deviation, 1)


def test_nothing_is_drawn_of_nothing(randomness: Randomness) -> None:
    assert len(randomness.normal(0)) == len(randomness.uniform(0)) == 0
    assert (randomness.rounded_normal(0.0, 100) == 0).all()


def test_a_seed_repeats_and_the_system_does_not() -> None:
    for draw in ("normal", "uniform"):
        first, again = (getattr(seeded(1), draw)(10) for _ in range(2))
        assert (first == again).all()
        one, other = (getattr(SystemRandomness(), draw)(10) for _ in range(2))
        assert (one != other).all()
    assert (seeded(1).rounded_normal(9e6, 10) == seeded(1).rounded_normal(9e6, 10)).all()
    assert (seeded(1).normal(10) != seeded(2).normal(10)).all()
    assert seeded().repeatable
    assert not SystemRandomness().repeatable


def test_every_number_of_a_seed_counts() -> None:
    seeds = [(3,), (3, 0), (3, 4), (4, 3), (3, 4, 0)]
    assert len({SeededRandomness(*seed).normal(5).tobytes() for seed in seeds}) == len(seeds)
    assert (SeededRandomness(3, 4).normal(5) == SeededRandomness(3, 4).normal(5)).all()


def test_every_call_has_a_new_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[bytes] = []

    def urandom(size: int) -> bytes:
        keys.append(os.urandom(size))
        return keys[-1]

    monkeypatch.setattr(source, "urandom", urandom)
    one, other = SystemRandomness(), SystemRandomness()
    for randomness in (one, other, one):
        randomness.uniform(3)
        randomness.rounded_normal(1.0, 1)
    assert len(set(keys)) == 6
    assert {len(key) for key in keys} == {32}


def test_no_key_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def urandom(size: int) -> bytes:
        raise OSError("no entropy")

    monkeypatch.setattr(source, "urandom", urandom)
    with pytest.raises(OSError, match="no entropy"):
        SystemRandomness().normal(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_draws_for_itself() -> None:
    randomness = SystemRandomness()
    randomness.uniform(1)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, randomness.uniform(8).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(reading, 64))
    os.close(reading)
    os.close(writing)
    assert len(theirs) == 8
    assert (theirs != randomness.uniform(8)).all()


def test_protected_normals_are_on_the_grid() -> None:
    steps = SystemRandomness().normal(100_000).astype(np.float64) / NORMAL_GRID
    assert (steps == np.rint(steps)).all()
    # All steps of it are used, the odd ones as often as the even ones.
    assert abs((steps % 2).mean() - 0.5) < 5 * 0.5 / np.sqrt(100_000)


def test_a_sum_on_the_grid_does_not_tell_its_terms_by_its_low_bits() -> None:
    """What an attack on low bits looks for: sums that only one of two neighbours can give."""
    noise = SystemRandomness().normal(20_000)
    for hidden in (0.0, 1.0, 0.37, -6.2):
        on_grid = np.float32(np.rint(hidden / NORMAL_GRID) * NORMAL_GRID)
        steps = (on_grid + noise).astype(np.float64) / NORMAL_GRID
        assert (steps == np.rint(steps)).all()
        assert abs((steps % 2).mean() - 0.5) < 5 * 0.5 / np.sqrt(20_000)


def bits_of(draws: Iterator[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        source, "_keystream", lambda n: np.fromiter(draws, dtype=np.uint64, count=n)
    )


@settings(max_examples=100, deadline=None)
@given(below=st.floats(0.7, 23.0), place=st.floats(0, 1))
def test_fast_normals_are_within_their_error_bound(below: float, place: float) -> None:
    """The bound that exactness rests on, at both ends of what the bits not drawn leave open."""
    tail = min(int(2.0 ** (64 - below) * (1 - 0.3 * place)), 2**63 - 1)
    fast = -float(source.ndtri((np.float64(tail) + 0.5) * 2.0**-64))
    if fast > source._FAST:
        return
    with mp.workprec(320):
        for end in (max(tail, 1), tail + 1):
            exact = mp.sqrt(2) * mp.erfinv(1 - 2 * mp.ldexp(end, -64))
            assert abs(exact - fast) < source._ERROR


@pytest.mark.parametrize("deviation", [0.5, 40.0, 1 / NORMAL_GRID])
def test_fast_and_refined_rounding_agree(deviation: float, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = [int(bits) for bits in np.random.default_rng(0).integers(0, 2**64, 30, dtype=np.uint64)]
    bits_of(iter(draws * 2), monkeypatch)
    randomness = SystemRandomness()
    fast = randomness.rounded_normal(deviation, 30)
    monkeypatch.setattr(source, "_FAST", -1.0)
    assert (fast == randomness.rounded_normal(deviation, 30)).all()


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("boundary", [0.5, 2.5, 7.5])
def test_further_bits_decide_what_64_leave_open(
    boundary: float, negative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    deviation = 3.0
    with mp.workprec(400):
        chance = mp.erfc(mp.mpf(boundary) / deviation / mp.sqrt(2)) / 2
        tail, more = divmod(int(mp.floor(mp.ldexp(chance, 256))), 2**192)
    # The boundary between two whole numbers lies after `tail` and just after `more`.
    for further, expected in [(more - 1, boundary + 0.5), (more + 1, boundary - 0.5)]:
        bits_of(iter([tail + negative * 2**63]), monkeypatch)
        monkeypatch.setattr(source, "urandom", lambda n, further=further: further.to_bytes(n))
        (whole,) = SystemRandomness().rounded_normal(deviation, 1)
        assert whole == (-expected if negative else expected)


def test_the_largest_normal_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    bits_of(iter([0, 2**63]), monkeypatch)
    monkeypatch.setattr(source, "urandom", bytes)
    high, low = SystemRandomness().rounded_normal(100.0, 2)
    assert high == -low
    assert high == round(100 * stats.norm.isf(2.0**-257))
