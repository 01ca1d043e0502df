"""What runs a simulation's sites: worker processes, or this process."""

from __future__ import annotations

import logging
import multiprocessing
import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from simulation.faults import Faults, misbehave
from simulation.fleet import PARTITION, Fleet

log = logging.getLogger(__name__)

Deliver = Callable[[Message], None]
"""Takes a site's reply."""

_Task = tuple[int, Message]
"""A message for a site of this index."""

_AHEAD = 2
"""Messages that a process has: one that it answers, and one so that it need not wait for it."""


class InlineWorker:
    """Runs sites in this process: for a debugger."""

    def __init__(self, fleet: Fleet, faults: Faults, deliver: Deliver) -> None:
        # Only where sites run: it loads torch, Opacus and the accountant.
        from simulation.fleet_app import KeptSites

        self._sites = KeptSites(fleet)
        self._app = self._sites.app()
        self._faults = faults
        self._deliver = deliver

    def send(self, index: int, message: Message) -> None:
        """Answer `message` as site `index`, at once."""
        self._deliver(self.answer(index, message))

    def answer(self, index: int, message: Message) -> Message:
        """The site's reply; an error it raises becomes an error reply, without its data."""
        context = Context(
            run_id=message.metadata.run_id,
            node_id=message.metadata.dst_node_id,
            node_config={PARTITION: index},
            state=RecordDict(),
            run_config={},
        )
        training = message.metadata.message_type == "train"
        fault = self._faults.of(index, int(message.metadata.group_id)) if training else None
        try:
            return misbehave(fault, lambda: self._app(message, context))
        except Exception as error:
            log.exception("site %d failed", index)
            return _error(message, f"{type(error).__name__} at the site")

    def close(self) -> None:
        """Give up the sites' ledgers."""
        self._sites.close()


class ProcessWorker:
    """Runs sites in a process of its own, one message at a time, in the order they are sent.

    A process that dies, or takes longer than a message's time to live, is replaced; the site that
    was asked has an error for a reply and the others go on.
    """

    def __init__(self, fleet: Fleet, faults: Faults, deliver: Deliver) -> None:
        self._fleet = fleet
        self._faults = faults
        self._deliver = deliver
        self._waiting: deque[_Task] = deque()
        self._sent: deque[_Task] = deque()
        self._start()

    def send(self, index: int, message: Message) -> None:
        """Queue `message` for site `index`."""
        self._waiting.append((index, message))
        self._send_ahead()

    @property
    def busy(self) -> bool:
        """Whether a reply is to come."""
        return bool(self._sent)

    def fileno(self) -> int:
        """What can be read from once there is something to take in."""
        return self._connection.fileno()

    def take_in(self, *, has_come: bool) -> None:
        """Deliver a reply if one has come, or an error if its time is over."""
        if self.busy and (has_come or _time_left(self._sent[0][1]) <= 0):
            self._receive(has_come)
            self._send_ahead()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _start(self) -> None:
        # Not fork: a fork of a process with threads (polars, torch) may hang. The fork server loads
        # what sites need once, has no threads, and starts a worker at once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["simulation.preload"])
        self._connection, theirs = context.Pipe()
        process = context.Process(
            target=_run_worker, args=(theirs, self._fleet, self._faults), daemon=True
        )
        process.start()
        self._process = process
        self._content: RecordDict | None = None
        theirs.close()

    def _send_ahead(self) -> None:
        """Hand over the next messages."""
        while self._waiting and len(self._sent) < _AHEAD:
            index, message = self._waiting[0]
            if self._sent and message.content is not self._content:
                # It is large: the process, while it sends a reply, may have no room to take it.
                return
            self._waiting.popleft()
            if _time_left(message) <= 0:
                self._deliver(_error(message, "another site of its worker took all the time"))
                continue
            self._sent.append((index, message))
            try:
                self._hand_over(index, message)
            except OSError:
                # It died: there will be no reply.
                return

    def _hand_over(self, index: int, message: Message) -> None:
        """Messages to several sites share their content, which is sent once."""
        known = message.content is self._content
        self._connection.send((index, message.metadata, None if known else message.content))
        self._content = message.content

    def _receive(self, has_come: bool) -> None:
        """Deliver the reply to the first message that was sent, or why there is none."""
        _, message = self._sent.popleft()
        try:
            if not has_come:
                raise TimeoutError
            reply = self._connection.recv()
        except (EOFError, OSError) as error:
            timeout = isinstance(error, TimeoutError)
            reply = _error(
                message, "the site did not answer in time" if timeout else "the site's process died"
            )
            self.close()
            self._waiting.extendleft(reversed(self._sent))
            self._sent.clear()
            self._start()
        self._deliver(reply)


def take_in(workers: Sequence[ProcessWorker], seconds: float) -> None:
    """Let `workers` deliver what has come, a reply each; wait for a first one at most so long."""
    poll, busy = select.poll(), [worker for worker in workers if worker.busy]
    for worker in busy:
        poll.register(worker, select.POLLIN)
    came = {file for file, _ in poll.poll(1000 * seconds)}
    for worker in busy:
        worker.take_in(has_come=worker.fileno() in came)


def _run_worker(connection: Connection, fleet: Fleet, faults: Faults) -> None:
    """Serve `connection` until it closes: a site's index and a message in, a reply out."""
    replies: list[Message] = []
    worker = InlineWorker(fleet, faults, replies.append)
    content = RecordDict()
    while True:
        try:
            index, metadata, new = connection.recv()
        except EOFError:
            return
        content = content if new is None else new
        # By its metadata: what is no reply is else stamped as this process's own.
        message: Message = cast(Any, Message)(content=content, metadata=metadata)
        connection.send(worker.answer(index, message))


def _time_left(message: Message) -> float:
    return float(message.metadata.created_at + message.metadata.ttl - time.time())


def _error(message: Message, reason: str) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
