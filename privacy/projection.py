"""What a plan will have spent before it runs, and how far a budget reaches."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace

from privacy.accountant import PrivacyEvent, epsilon


def epsilon_after(
    rounds: int, each_round: Sequence[PrivacyEvent], spent: Iterable[PrivacyEvent], delta: float
) -> float:
    """Epsilon of `spent` and of `rounds` (0 or more) times `each_round` together, at `delta`.

    All of it about the same population of visitors. The guarantee is that of
    `privacy.accountant.epsilon`.
    """
    if rounds < 0:
        raise ValueError(f"rounds={rounds}: must be 0 or more")
    planned = [replace(event, count=rounds * event.count) for event in each_round]
    return epsilon([*spent, *planned], delta)


def affordable_rounds(
    each_round: Sequence[PrivacyEvent],
    spent: Iterable[PrivacyEvent],
    budget: float,
    delta: float,
    at_most: int = 100_000,
) -> int:
    """Most rounds, up to `at_most`, after which epsilon is still at most `budget`, at `delta`.

    0 where `spent` alone exceeds the budget. Rounds that release nothing are free: `at_most`.
    """
    already = tuple(spent)

    def cost(rounds: int) -> float:
        return epsilon_after(rounds, each_round, already, delta)

    # Many rounds are dear to account for: never more than twice what turns out affordable.
    reach = 1
    while reach < at_most and cost(reach) <= budget:
        reach *= 2
    return bisect_right(range(1, min(reach, at_most) + 1), budget, key=cost)
