"""A Flower grid without a network: messages go to sites in worker processes of this machine."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence, Set

from flwr.app import Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from simulation.faults import Fault, Faults
from simulation.fleet import Fleet
from simulation.workers import InlineWorker, ProcessWorker, take_in

_RUN_ID = 1

_MOMENT_S = 0.2
"""What asking for replies waits at most."""


class LocalGrid(Grid):
    """Each site is pinned to a worker, which keeps its journeys; node i + 1 is site i.

    With 0 workers the sites run in this process, one after the other, as messages are pushed.
    """

    def __init__(self, fleet: Fleet, workers: int, faults: Faults | None = None) -> None:
        # Flower stamps messages with the identity of the process's task; here there is one.
        TaskIdentity.task_id = TaskIdentity.run_id = _RUN_ID
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        self._faults = faults or Faults()
        self._run = Run.create_empty(run_id=_RUN_ID)
        self._numbers = itertools.count(1)
        self._replies: dict[str, list[Message]] = {}
        self._processes = [
            ProcessWorker(fleet, self._faults, self._deliver) for _ in range(workers)
        ]
        self._workers: Sequence[InlineWorker | ProcessWorker] = self._processes or [
            InlineWorker(fleet, self._faults, self._deliver)
        ]
        self._worker_of = _pin(fleet.sizes, len(self._workers))

    def __enter__(self) -> LocalGrid:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()

    def set_run(self, run: Run) -> None:
        """Take another run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The one run of this grid."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """1 to the number of sites."""
        return range(1, len(self._worker_of) + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand each message to its site's worker."""
        ids = []
        for message in messages:
            identity = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = identity
            index = message.metadata.dst_node_id - 1
            self._workers[self._worker_of[index]].send(index, message)
            ids.append(identity)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that have come since the last call; if there is none, waits a moment for one.

        Workers get their next messages here, too: they stand still while nobody asks.
        """
        asked = message_ids if isinstance(message_ids, Set) else set(message_ids)
        until = time.monotonic() + _MOMENT_S
        while asked and asked.isdisjoint(self._replies):
            left = until - time.monotonic()
            if left <= 0:
                break
            take_in(self._processes, left)
        came = [one for one in self._replies if one in asked]
        return [reply for one in came for reply in self._replies.pop(one)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, then pull until every message has a reply or `timeout` seconds are over."""
        deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        while waiting and time.monotonic() < deadline:
            came = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in came}
            replies += came
        return replies

    def _deliver(self, reply: Message) -> None:
        index, group = reply.metadata.src_node_id - 1, reply.metadata.group_id
        twice = self._faults.of(index, int(group)) is Fault.DUPLICATE
        known = self._replies.setdefault(reply.metadata.reply_to_message_id, [])
        known.extend([reply] * (2 if twice else 1))


def _pin(sizes: tuple[int, ...], workers: int) -> list[int]:
    """A worker for each site, the largest sites first, each to the worker with the least to do."""
    load = [0] * workers
    pinned = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        pinned[index] = min(range(workers), key=lambda w: load[w])
        load[pinned[index]] += sizes[index]
    return pinned
