"""The sites as the coordinator sees them: asked by name, answering within a time, once each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from conf.schema import Unprotected
from evaluation.histogram import EXACT, NOISED
from journeys.site import natural_order
from protocol.plan import RoundPlan
from protocol.records import plan_records, read_reply
from protocol.replies import (
    Reply,
    SiteDescription,
    SiteEvaluation,
    SiteFailure,
    SiteRefusal,
    SiteUpdate,
    Weights,
)
from protocol.wire import WireError

_SHORTEST_POLL_S, _LONGEST_POLL_S = 0.0005, 0.1
_LARGEST_COUNT = 1e12


class JoinError(RuntimeError):
    """Too few sites came. The message says how many, how long was waited, and what to do."""


class Federation:
    """Sends one plan to every site and gathers what comes back; every wait has an end."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._names: dict[int, str] = {}
        self.descriptions: dict[str, SiteDescription] = {}
        """By site name, in the order in which everything is listed and summed."""
        self.absent: list[SiteFailure] = []
        """Who was asked to join and did not, and why; by node where no name of its own is known."""

    def join(self, plan: RoundPlan, expected: int, needed: int, timeout: float) -> None:
        """Wait for `expected` sites and ask each who it is; go on with `needed` of them.

        Raises:
            JoinError: Fewer than `needed` sites came within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while len(nodes := sorted(self._grid.get_node_ids())) < expected:
            if time.monotonic() > deadline:
                break
            time.sleep(_LONGEST_POLL_S)
        # A node that has not said its name yet goes by its number.
        self._names = {node: f"node {node}" for node in nodes}
        left = max(deadline - time.monotonic(), 1.0)
        answers = self._ask(MessageType.QUERY, plan, None, left, SiteDescription)
        described = {node: a for node, a in answers.items() if isinstance(a, SiteDescription)}
        names = [answer.site for answer in described.values()]
        if twice := {name for name in names if names.count(name) > 1}:
            raise JoinError(f"two sites call themselves {min(twice)!r}: site names must differ")
        if len(described) < needed:
            raise JoinError(
                f"{len(described)} of {expected} sites joined within {timeout:.0f} s, {needed} are "
                f"needed{_first_reason(answers.values())}; start the missing sites or lower "
                "strategy.quorum"
            )
        self.absent = [
            replace(a, site=f"node {node}") if a.site in names else a
            for node, a in answers.items()
            if isinstance(a, SiteFailure)
        ]
        order = sorted(described, key=lambda node: natural_order(described[node].site))
        self._names = {node: described[node].site for node in order}
        self.descriptions = {described[node].site: described[node] for node in order}

    def train(
        self, plan: RoundPlan, weights: Weights, timeout: float
    ) -> list[SiteUpdate | SiteFailure]:
        """Each site's update or why there is none, in the order of site names."""
        answers = self._ask(MessageType.TRAIN, plan, weights, timeout, SiteUpdate)
        return [
            answer for answer in answers.values() if isinstance(answer, SiteUpdate | SiteFailure)
        ]

    def evaluate(
        self, plan: RoundPlan, weights: Weights, timeout: float
    ) -> list[SiteEvaluation | SiteFailure]:
        """Each site's evaluation or why there is none, in the order of site names."""
        answers = self._ask(MessageType.EVALUATE, plan, weights, timeout, SiteEvaluation)
        return [a for a in answers.values() if isinstance(a, SiteEvaluation | SiteFailure)]

    def _ask(
        self,
        kind: str,
        plan: RoundPlan,
        weights: Weights | None,
        timeout: float,
        expected: type[Reply],
    ) -> dict[int, Reply | SiteFailure]:
        records = plan_records(plan, weights)
        messages = [
            Message(records, node, kind, group_id=str(plan.round), ttl=timeout)
            for node in self._names
        ]
        answers: dict[int, Reply | SiteFailure] = {}
        for message in _exchange(self._grid, messages, timeout):
            node = message.metadata.src_node_id
            # The first reply of a site counts; another one is dropped unread.
            if node in self._names and node not in answers:
                answers[node] = self._read(message, plan, expected)
        return {
            node: answers.get(node, SiteFailure(name, "missing", f"no reply in {timeout:.0f} s"))
            for node, name in self._names.items()
        }

    def _read(
        self, message: Message, plan: RoundPlan, expected: type[Reply]
    ) -> Reply | SiteFailure:
        name = self._names[message.metadata.src_node_id]
        if message.has_error():
            return SiteFailure(name, "missing", message.error.reason or "the site failed")
        try:
            reply = read_reply(message.content)
        except WireError as error:
            return SiteFailure(name, "dropped", str(error))
        if isinstance(reply, SiteRefusal):
            # Who refuses to join has no other name than the one that it says.
            return SiteFailure(reply.site if plan.round == 0 else name, "refused", reply.reason)
        if not isinstance(reply, expected):
            return SiteFailure(name, "dropped", f"answered with a {type(reply).__name__}")
        if isinstance(reply, SiteUpdate | SiteEvaluation):
            if reply.round != plan.round:
                reason = f"answered for round {reply.round} instead of {plan.round}"
                return SiteFailure(name, "dropped", reason)
            if reply.site != name:
                return SiteFailure(name, "dropped", "answered under another site's name")
        if isinstance(reply, SiteEvaluation) and (fault := _fault(reply, plan)):
            return SiteFailure(name, "dropped", fault)
        return reply


def _exchange(grid: Grid, messages: list[Message], timeout: float) -> Iterator[Message]:
    """Replies as they come, until each message has one or `timeout` seconds are over.

    Polls rarely when sites take long: waiting adds about one per cent.
    """
    started = time.monotonic()
    open_ids = set(grid.push_messages(messages))
    while open_ids:
        replies = list(grid.pull_messages(open_ids))
        open_ids -= {reply.metadata.reply_to_message_id for reply in replies}
        yield from replies
        waited = time.monotonic() - started
        if waited > timeout:
            return
        if open_ids and not replies:
            time.sleep(min(max(waited / 100, _SHORTEST_POLL_S), _LONGEST_POLL_S))


def _fault(evaluation: SiteEvaluation, plan: RoundPlan) -> str:
    histogram = evaluation.histogram
    bins = EXACT if isinstance(plan.privacy, Unprotected) else NOISED
    if histogram.bins != bins:
        return f"histogram: {histogram.bins.count} bins instead of {bins.count}"
    if max(np.abs(histogram.negative).max(), np.abs(histogram.positive).max()) > _LARGEST_COUNT:
        return f"histogram: a count beyond {_LARGEST_COUNT:g}"
    if evaluation.noise > _LARGEST_COUNT:
        return f"noise: beyond {_LARGEST_COUNT:g}"
    return ""


def _first_reason(answers: Iterable[Reply | SiteFailure]) -> str:
    reasons = [answer.reason for answer in answers if isinstance(answer, SiteFailure)]
    return f" ({reasons[0]})" if reasons else ""
