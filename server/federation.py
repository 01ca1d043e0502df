"""The sites as the coordinator sees them: asked by name, answering within a time, once each."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
from flwr.app import Message, MessageType
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid

from conf.schema import Unprotected
from evaluation.histogram import EXACT, NOISED
from journeys.site import natural_order
from protocol.exchange import Parts, Request, read_replies, request_parts
from protocol.plan import RoundPlan
from protocol.publication import PUBLISH, read_publication
from protocol.records import from_records, to_records
from protocol.replies import (
    Reply,
    SiteDescription,
    SiteEvaluation,
    SiteFailure,
    SiteReceipt,
    SiteRefusal,
    SiteUpdate,
)
from protocol.wire import WireError

_SHORTEST_POLL_S, _LONGEST_POLL_S = 0.0005, 0.1
_LARGEST_COUNT = 1e12
_REPEAT_AFTER = 0.1
"""The part of the time to answer after which a message is sent again."""


class JoinError(RuntimeError):
    """Too few sites came. The message says how many, how long was waited, and what to do."""


class Federation:
    """Asks every site the same and gathers what comes back; every wait has an end.

    A site that appears while the run goes on joins with the next round. One that has refused to
    join is not asked again.
    """

    def __init__(self, grid: Grid, admitted: Mapping[int, str] | None = None) -> None:
        """`admitted`: the sites that may take part and their names, by node.

        None: every node may, under the name that it says (a simulation).
        """
        self._grid = grid
        self._admitted = admitted
        self._nodes: dict[int, SiteDescription] = {}
        self._joining = self._calls()
        """Who has been asked who they are and has not answered."""
        self._failures: dict[int, SiteFailure] = {}

    @property
    def descriptions(self) -> dict[str, SiteDescription]:
        """By site name, in the order in which everything is listed and summed."""
        return {description.site: description for description in self._nodes.values()}

    @property
    def absent(self) -> list[SiteFailure]:
        """Who has not joined, and why; by node where no name of its own is known."""
        names = self.descriptions
        return [
            replace(failure, site=f"node {node}") if failure.site in names else failure
            for node, failure in self._failures.items()
        ]

    def join(self, plan: RoundPlan, expected: int, needed: int, timeout: float) -> None:
        """Ask each site who it is as it comes, until `expected` have come; go on with `needed`.

        Raises:
            JoinError: Fewer than `needed` sites came within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        heard = time.monotonic()
        while self._joining.open or len(self._nodes) + len(self._failures) < expected:
            # Who has failed in this join is asked again with the first round.
            if self._ask_who(plan, timeout, but=self._failures.keys()) or self._hear_who(plan):
                heard = time.monotonic()
                continue
            # Who was asked at the last moment has a second to answer.
            if time.monotonic() > (max(deadline, heard + 1.0) if self._joining.open else deadline):
                break
            time.sleep(_pause(time.monotonic() - heard))
        for node in self._joining.nodes:
            name = self._name(node)
            self._failures[node] = SiteFailure(name, "missing", f"no reply in {timeout:.0f} s")
        for node, name in (self._admitted or {}).items():
            if node not in self._nodes and node not in self._failures:
                self._failures[node] = SiteFailure(name, "missing", "not connected")
        if len(self._nodes) < needed:
            raise JoinError(
                f"{len(self._nodes)} of {expected} sites joined within {timeout:.0f} s, {needed} "
                f"are needed{_first_reason(self.absent)}; start the missing sites or lower "
                "strategy.quorum"
            )

    def ask(self, request: Request, timeout: float) -> dict[str, list[Reply | SiteFailure]]:
        """Each site's answer to each thing asked, or why there is none, in the order of names."""
        plan = next(iter(request.plans.values()))
        self._hear_who(plan)
        refused = {node for node, one in self._failures.items() if one.outcome == "refused"}
        self._ask_who(plan, timeout, but=refused)
        nodes = self._nodes
        kind = MessageType.TRAIN if "train" in request.plans else MessageType.EVALUATE
        answers: dict[int, dict[str, Reply | SiteFailure]] = {}
        messages = self._messages(request, kind, nodes, timeout)
        for node, message in self._exchange(messages, timeout):
            answers[node] = self._read(node, message, request)
        for node, description in nodes.items():
            missing = SiteFailure(description.site, "missing", f"no reply in {timeout:.0f} s")
            answers.setdefault(node, dict.fromkeys(request.plans, missing))
        return {ask: [answers[node][ask] for node in nodes] for ask in request.plans}

    def publish(self, parts: Parts, timeout: float) -> list[SiteReceipt | SiteFailure]:
        """Hand a publication to every site that is connected: who has it now, who not, and why.

        Raises:
            WireError: `parts` are no publication.
        """
        run = read_publication(parts)[0].statement.run
        present = sorted(self._present())
        records, kind = to_records(parts), MessageType.QUERY
        messages = [Message(records, node, kind, group_id=run, ttl=timeout) for node in present]
        answers: dict[int, SiteReceipt | SiteFailure] = {}
        for node, message in self._exchange(messages, timeout):
            answers[node] = self._receipt(node, message, run)
        for node in self._admitted or present:
            reason = f"no reply in {timeout:.0f} s" if node in present else "not connected"
            answers.setdefault(node, SiteFailure(self._name(node), "missing", reason))
        return sorted(answers.values(), key=lambda answer: natural_order(answer.site))

    def _receipt(self, node: int, message: Message, run: str) -> SiteReceipt | SiteFailure:
        name = self._name(node)
        if message.has_error():
            return SiteFailure(name, "missing", _fault_of(message))
        try:
            reply = read_replies(from_records(message.content), (PUBLISH,))[PUBLISH]
        except WireError as error:
            return SiteFailure(name, "dropped", str(error))
        if isinstance(reply, SiteRefusal):
            return SiteFailure(name, "refused", reply.reason)
        if not isinstance(reply, SiteReceipt) or reply.run != run:
            return SiteFailure(name, "dropped", "answered with something else than a receipt")
        if reply.site != name and self._admitted is not None:
            return SiteFailure(name, "dropped", "answered under another site's name")
        return reply

    def _exchange(self, messages: list[Message], timeout: float) -> Iterator[tuple[int, Message]]:
        """Nodes' replies as they come, until each has answered or `timeout` seconds are over.

        Polls rarely when sites take long: waiting adds about one per cent.
        """
        started = time.monotonic()
        calls = self._calls()
        calls.send(messages)
        while calls.open:
            replies = calls.receive()
            yield from ((node, reply) for node, reply in replies if not _is_expired(reply))
            waited = time.monotonic() - started
            if waited > timeout:
                return
            if calls.open and not replies:
                time.sleep(_pause(waited))

    def _calls(self) -> _Calls:
        # Nothing is lost within a simulation, whose sites may wait long for their turn.
        return _Calls(self._grid, repeats=self._admitted is not None)

    def _present(self) -> set[int]:
        nodes = set(self._grid.get_node_ids())
        return nodes if self._admitted is None else nodes & self._admitted.keys()

    def _name(self, node: int) -> str:
        # A node that has not said its name yet goes by its number.
        return f"node {node}" if self._admitted is None else self._admitted[node]

    def _ask_who(self, plan: RoundPlan, timeout: float, but: Collection[int]) -> bool:
        """Ask those who have not joined who they are, without waiting; whether there was anyone."""
        known = {*self._nodes, *self._joining.nodes, *but}
        strangers = sorted(self._present() - known)
        if strangers:
            self._joining.send(self._messages(_who(plan), MessageType.QUERY, strangers, timeout))
        return bool(strangers)

    def _hear_who(self, plan: RoundPlan) -> bool:
        """Take in who has joined since; whether anybody answered."""
        came: dict[int, SiteDescription] = {}
        replies = self._joining.receive()
        for node, message in replies:
            if _is_offline(message):
                # Asked anew once it is back.
                continue
            answer = self._read(node, message, _who(plan))["describe"]
            self._failures.pop(node, None)
            if isinstance(answer, SiteDescription):
                came[node] = answer
            elif isinstance(answer, SiteFailure):
                self._failures[node] = answer
        if came:
            self._welcome(came)
        return bool(replies)

    def _welcome(self, came: Mapping[int, SiteDescription]) -> None:
        joined = {**self._nodes, **came}
        name, times = Counter(one.site for one in joined.values()).most_common(1)[0]
        if times > 1:
            raise JoinError(f"two sites call themselves {name!r}: site names must differ")
        order = sorted(joined, key=lambda one: natural_order(joined[one].site))
        self._nodes = {one: joined[one] for one in order}

    def _messages(
        self, request: Request, kind: str, nodes: Iterable[int], timeout: float
    ) -> list[Message]:
        records = to_records(request_parts(request))
        round_ = max(plan.round for plan in request.plans.values())
        return [Message(records, node, kind, group_id=str(round_), ttl=timeout) for node in nodes]

    def _read(
        self, node: int, message: Message, request: Request
    ) -> dict[str, Reply | SiteFailure]:
        name = self._nodes[node].site if node in self._nodes else self._name(node)

        def failed(outcome: str, reason: str) -> dict[str, Reply | SiteFailure]:
            return dict.fromkeys(request.plans, SiteFailure(name, outcome, reason))

        if message.has_error():
            return failed("missing", _fault_of(message))
        try:
            replies = read_replies(from_records(message.content))
        except WireError as error:
            return failed("dropped", str(error))
        return {
            ask: self._checked(replies[ask], name, ask, plan)
            if ask in replies
            else SiteFailure(name, "dropped", f"no answer to {ask}")
            for ask, plan in request.plans.items()
        }

    def _checked(self, reply: Reply, name: str, ask: str, plan: RoundPlan) -> Reply | SiteFailure:
        if isinstance(reply, SiteRefusal):
            # Who refuses to join has no other name than the one that it says.
            unnamed = ask == "describe" and self._admitted is None
            return SiteFailure(reply.site if unnamed else name, "refused", reply.reason)
        if not isinstance(reply, _ANSWERS[ask]):
            return SiteFailure(name, "dropped", f"answered with a {type(reply).__name__}")
        if isinstance(reply, SiteUpdate | SiteEvaluation) and reply.round != plan.round:
            reason = f"answered for round {reply.round} instead of {plan.round}"
            return SiteFailure(name, "dropped", reason)
        if reply.site != name and (ask != "describe" or self._admitted is not None):
            return SiteFailure(name, "dropped", "answered under another site's name")
        if isinstance(reply, SiteEvaluation) and (fault := _fault(reply, plan)):
            return SiteFailure(name, "dropped", fault)
        return reply


def _who(plan: RoundPlan) -> Request:
    return Request({"describe": replace(plan, round=0)})


_ANSWERS: dict[str, type[Reply]] = {
    "describe": SiteDescription,
    "evaluate": SiteEvaluation,
    "train": SiteUpdate,
}


class _Calls:
    """Messages that wait for a reply. One that has none for long is sent a second time.

    A message is lost, and nobody hears of it, where who it was just handed to dies: the site, the
    SuperLink, or the connection between them. Who is asked twice trains once and is charged once.
    """

    def __init__(self, grid: Grid, repeats: bool) -> None:
        self._grid = grid
        self._repeats = repeats
        self._open: dict[str, int] = {}
        """The node that was asked, by message."""
        self._other: dict[str, str] = {}
        """Of two messages that ask a node the same, each by the other."""
        self._due: list[tuple[float, list[Message]]] = []
        """When to send them again where no reply has come."""

    @property
    def open(self) -> bool:
        """Is there a reply to wait for?"""
        return bool(self._open)

    @property
    def nodes(self) -> set[int]:
        """Those that have not answered."""
        return set(self._open.values())

    def send(self, messages: list[Message]) -> None:
        """Ask each message's node. All have the same time to live."""
        self._push(messages)
        if self._repeats and messages:
            due = time.monotonic() + _REPEAT_AFTER * messages[0].metadata.ttl
            self._due.append((due, messages))

    def receive(self) -> list[tuple[int, Message]]:
        """What has come: of each node that answered the first reply, or the SuperLink's for it.

        A second one of the same node is dropped unread.
        """
        for due in [one for one in self._due if one[0] < time.monotonic()]:
            self._due.remove(due)
            self._repeat(due[1])
        replies = []
        for reply in list(self._grid.pull_messages(self._open.keys())) if self._open else ():
            id_ = reply.metadata.reply_to_message_id
            node = self._open.get(id_)
            if node is None or reply.metadata.src_node_id not in (node, SUPERLINK_NODE_ID):
                continue
            del self._open[id_]
            other = self._other.get(id_, id_)
            if other in self._open and _is_expired(reply):
                continue
            self._open.pop(other, None)
            replies.append((node, reply))
        return replies

    def _push(self, messages: list[Message]) -> None:
        for id_, message in zip(self._grid.push_messages(messages), messages, strict=True):
            self._open[id_] = message.metadata.dst_node_id

    def _repeat(self, messages: list[Message]) -> None:
        first = messages[0].metadata
        left = first.created_at + first.ttl - time.time()
        silent = [one for one in messages if one.metadata.message_id in self._open]
        if left <= 0 or not silent:
            return
        repeats = [
            Message(
                message.content,
                message.metadata.dst_node_id,
                message.metadata.message_type,
                group_id=message.metadata.group_id,
                ttl=left,
            )
            for message in silent
        ]
        self._push(repeats)
        for one, other in zip(silent, repeats, strict=True):
            ids = one.metadata.message_id, other.metadata.message_id
            self._other |= zip(ids, reversed(ids), strict=True)


def _is_expired(reply: Message) -> bool:
    """Does the SuperLink say that the time to answer is over?"""
    return reply.has_error() and reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE


def _is_offline(reply: Message) -> bool:
    """Does the SuperLink say that the node is gone?"""
    return reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE


def _fault_of(reply: Message) -> str:
    if _is_expired(reply):
        return "no reply in time"
    if _is_offline(reply):
        return "went offline"
    return reply.error.reason or "the site failed"


def _pause(waited: float) -> float:
    return min(max(waited / 100, _SHORTEST_POLL_S), _LONGEST_POLL_S)


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


def _first_reason(failures: list[SiteFailure]) -> str:
    return f" ({failures[0].site}: {failures[0].reason})" if failures else ""
