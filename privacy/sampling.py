"""Poisson sampling: who takes part in each step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr

from privacy.randomness import Randomness

Ints64 = npt.NDArray[np.int64]
Floats64 = npt.NDArray[np.float64]

_FEW = 64
"""Up to 1 / rate of so many, a draw for each visitor and step is faster."""
_AT_ONCE = 2**16
"""Visitors whose numbers fit in a processor's cache."""
_MOST = 64
"""Steps that a visitor takes part in, of about 1 / rate: more has a probability below 2^-200."""


def draw_steps(visitors: int, rate: float, steps: int, randomness: Randomness) -> Iterator[Ints64]:
    """Who is drawn at each of `steps` steps, as ascending numbers below `visitors`.

    Guarantee: each visitor is drawn at each step with probability `rate`, independently of all
    other visitors and steps, to within 1e-12 in total variation for a visitor in 1 / `rate` steps.

    At a small rate the work is that of the visitors drawn, not visitors x steps: over 1 / `rate`
    steps each visitor draws in how many of them it takes part (binomial), and then in which; every
    choice of so many is equally likely. That is the same distribution as a draw for each step.

    Args:
        visitors: 0 or more.
        rate: in (0, 1].
        steps: 0 or more.
        randomness: where the draws come from.
    """
    block = math.ceil(1 / rate)
    if block <= _FEW:
        for _ in range(steps):
            yield np.flatnonzero(randomness.uniform(visitors) < rate)
        return
    for start in range(0, steps, block):
        yield from _draw_block(visitors, rate, min(block, steps - start), randomness)


def _draw_block(visitors: int, rate: float, steps: int, randomness: Randomness) -> Iterator[Ints64]:
    at_most = _at_most(steps, rate)
    some, chance = _above(float(at_most[0]), visitors, randomness)
    times = np.searchsorted(at_most, chance, side="right")
    visitor = np.repeat(some, times)
    step = _whole(randomness, len(visitor), steps)
    several = np.flatnonzero(np.repeat(times, times) > 1)
    while len(several := _drawn_twice(several, visitor, step, steps)):
        step[several] = _whole(randomness, len(several), steps)
    # Whole numbers of 16 bits are sorted fastest.
    order = np.argsort(step.astype(np.uint16) if steps <= 2**16 else step, kind="stable")
    ends = np.cumsum(np.bincount(step, minlength=steps))
    start = 0
    for end in ends.tolist():
        yield visitor[order[start:end]]
        start = end


def _above(least: float, visitors: int, randomness: Randomness) -> tuple[Ints64, Floats64]:
    """Who draws a uniform number of at least `least`, and the numbers: most may be below."""
    who, numbers = [], []
    for start in range(0, visitors, _AT_ONCE):
        drawn = randomness.uniform(min(_AT_ONCE, visitors - start))
        rows = np.flatnonzero(drawn >= least)
        who.append(rows + start)
        numbers.append(drawn[rows])
    nobody = np.empty(0, dtype=np.int64), np.empty(0)
    return (np.concatenate(who), np.concatenate(numbers)) if who else nobody


def _drawn_twice(several: Ints64, visitor: Ints64, step: Ints64, steps: int) -> Ints64:
    """Those of the draws `several` whose visitor has two at one step: all are to be made anew.

    To make one of the two anew would favour some choices of steps over others.
    """
    draws = np.sort(visitor[several] * steps + step[several])
    twice = draws[1:][np.diff(draws) == 0] // steps
    return several[np.isin(visitor[several], twice)]


def _whole(randomness: Randomness, n: int, below: int) -> Ints64:
    """(n,) uniform whole numbers from 0 to `below` - 1, to within 2^-53 x `below`."""
    return (randomness.uniform(n) * below).astype(np.int64)


@lru_cache(maxsize=64)
def _at_most(steps: int, rate: float) -> Floats64:
    """Probability to be drawn at most 0, 1, ... times in `steps` steps."""
    times = np.arange(min(steps, _MOST))
    return np.asarray(bdtr(times, steps, rate), dtype=np.float64)
