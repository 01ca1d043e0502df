"""What runs a simulation's sites: worker processes, or this process."""

from __future__ import annotations

import logging
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from simulation.faults import Faults, misbehave
from simulation.fleet import PARTITION, Fleet

log = logging.getLogger(__name__)

Deliver = Callable[[Message], None]
"""Takes a site's reply."""


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
        self._tasks: queue.SimpleQueue[tuple[int, Message] | None] = queue.SimpleQueue()
        self._closed = False
        self._start()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def send(self, index: int, message: Message) -> None:
        """Queue `message` for site `index`."""
        self._tasks.put((index, message))

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._closed = True
        self._tasks.put(None)
        self._process.kill()
        self._thread.join()
        self._stop()

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
        theirs.close()

    def _stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            index, message = task
            left = message.metadata.created_at + message.metadata.ttl - time.time()
            if left <= 0:
                self._deliver(_error(message, "another site of its worker took all the time"))
                continue
            try:
                reply = self._exchange(index, message, left)
            except (EOFError, OSError, TimeoutError) as error:
                if isinstance(error, TimeoutError):
                    reason = "the site did not answer in time"
                else:
                    reason = "the site's process died"
                reply = _error(message, reason)
                self._stop()
                if self._closed:
                    return
                self._start()
            self._deliver(reply)

    def _exchange(self, index: int, message: Message, left: float) -> Message:
        self._connection.send_bytes(index.to_bytes(4, "little"))
        self._connection.send_bytes(_encode(message))
        if not self._connection.poll(left):
            raise TimeoutError
        return _decode(self._connection.recv_bytes())


def _run_worker(connection: Connection, fleet: Fleet, faults: Faults) -> None:
    """Serve `connection` until it closes: a site's index and a message in, a reply out."""
    replies: list[Message] = []
    worker = InlineWorker(fleet, faults, replies.append)
    while True:
        try:
            index = int.from_bytes(connection.recv_bytes(), "little")
            message = _decode(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(_encode(worker.answer(index, message)))


def _error(message: Message, reason: str) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _encode(message: Message) -> bytes:
    return bytes(message_to_proto(message).SerializeToString())


def _decode(data: bytes) -> Message:
    return message_from_proto(ProtoMessage.FromString(data))
