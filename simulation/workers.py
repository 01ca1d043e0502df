"""What runs a simulation's sites: worker processes, or this process."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from protocol.records import from_records
from simulation.faults import Faults, misbehave
from simulation.fleet import PARTITION, Fleet

log = logging.getLogger(__name__)

Deliver = Callable[[Message], None]
"""Takes a site's reply."""

_Task = tuple[int, Message]
"""A message for a site of this index."""

_AHEAD = 24
"""Messages that a process has: one that it answers, and more that it need not wait for."""

_TOGETHER = 8
"""Replies that a process sends before it tells of them, as long as it has more to do."""

_ROOM = 2**20
"""Bytes of replies that may lie until they are read, as far as the system lets them."""


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
        self._came = select.poll()
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
        # To wake up for each reply costs as much as to read it.
        may_lie = _TOGETHER * self._reply_bytes <= self._room
        return (self._bell if may_lie else self._replies).fileno()

    def take_in(self) -> None:
        """Deliver the replies that have come, or an error if the time of the next one is over."""
        with suppress(BlockingIOError):
            os.read(self._bell.fileno(), select.PIPE_BUF)
        while self.busy and self._came.poll(0):
            self._receive(has_come=True)
        if self.busy and _time_left(self._sent[0][1]) <= 0:
            self._receive(has_come=False)
        self._send_ahead()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self._came.unregister(self._replies)
        for pipe in (self._requests, self._replies, self._bell):
            pipe.close()

    def _start(self) -> None:
        # Not fork: a fork of a process with threads (polars, torch) may hang. The fork server loads
        # what sites need once, has no threads, and starts a worker at once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["simulation.preload"])
        requests, self._requests = context.Pipe(duplex=False)
        self._replies, replies = context.Pipe(duplex=False)
        self._bell, bell = context.Pipe(duplex=False)
        os.set_blocking(self._bell.fileno(), False)
        self._room = _widen(replies)
        self._reply_bytes = 0
        self._came.register(self._replies, select.POLLIN)
        theirs = requests, replies, bell
        process = context.Process(
            target=_run_worker, args=(*theirs, self._fleet, self._faults), daemon=True
        )
        process.start()
        self._process = process
        self._content: RecordDict | None = None
        for pipe in theirs:
            pipe.close()

    def _send_ahead(self) -> None:
        """Hand over the next messages. They share their content, which is sent once."""
        tasks = []
        while self._waiting and len(self._sent) < _AHEAD:
            index, message = self._waiting[0]
            known = message.content is self._content
            if self._sent and not known:
                # It is large: the process, while it sends a reply, may have no room to take it.
                break
            self._waiting.popleft()
            if _time_left(message) <= 0:
                self._deliver(_error(message, "another site of its worker took all the time"))
                continue
            if not known:
                self._content = message.content
                self._reply_bytes = _size(message.content)
            self._sent.append((index, message))
            tasks.append((index, message.metadata, None if known else message.content))
        if tasks:
            # Where the process died there will be no reply.
            with suppress(OSError):
                self._requests.send(tasks)

    def _receive(self, *, has_come: bool) -> None:
        """Deliver the reply to the first message that was sent, or why there is none."""
        _, message = self._sent.popleft()
        try:
            if not has_come:
                raise TimeoutError
            reply = self._replies.recv()
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
    """Let `workers` deliver what has come; wait for a first reply at most so long."""
    poll, busy = select.poll(), [worker for worker in workers if worker.busy]
    for worker in busy:
        poll.register(worker, select.POLLIN)
    poll.poll(1000 * seconds)
    for worker in busy:
        worker.take_in()


def _widen(pipe: Connection) -> int:
    """Make room for `_ROOM` bytes, as far as the system lets it; returns what there is."""
    if sys.platform != "linux":
        return 0
    with suppress(OSError):
        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _ROOM)
    return fcntl.fcntl(pipe.fileno(), fcntl.F_GETPIPE_SZ)


def _size(content: RecordDict) -> int:
    """Bytes of a reply at most, to a request of such content: a model as large, and text."""
    return len(from_records(content).weights or b"") + 2**13


def _run_worker(
    requests: Connection, replies: Connection, bell: Connection, fleet: Fleet, faults: Faults
) -> None:
    """Serve `requests` until they end: lists of a site's index and a message, each with a reply.

    A byte on `bell` says that there are replies.
    """
    answers: list[Message] = []
    worker = InlineWorker(fleet, faults, answers.append)
    content = RecordDict()
    more = select.poll()
    more.register(requests, select.POLLIN)
    untold = 0
    while True:
        try:
            tasks = requests.recv()
        except EOFError:
            return
        while tasks:
            index, metadata, new = tasks.pop(0)
            content = content if new is None else new
            # By its metadata: what is no reply is else stamped as this process's own.
            message: Message = cast(Any, Message)(content=content, metadata=metadata)
            replies.send(worker.answer(index, message))
            untold += 1
            if untold == _TOGETHER or not (tasks or more.poll(0)):
                os.write(bell.fileno(), b".")
                untold = 0


def _time_left(message: Message) -> float:
    return float(message.metadata.created_at + message.metadata.ttl - time.time())


def _error(message: Message, reason: str) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
