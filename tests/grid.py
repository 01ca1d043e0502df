"""A Flower grid in the tests' hands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


@dataclass
class AnsweringGrid(Grid):
    """What its nodes answer, `answer` says; replies come with the next pull."""

    nodes: dict[int, Any]
    calls: int = 0
    _replies: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        TaskIdentity.task_id = TaskIdentity.run_id = 1
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    def answer(self, node: int, message: Message) -> list[Message]:
        """The replies of `node`, of which each message has one or more or none."""
        raise NotImplementedError

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return Run.create_empty(run_id=1)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = f"{node}-{self.calls}"
            self._replies += self.answer(node, message)
            ids.append(message.metadata.message_id)
        self.calls += 1
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        # Hands out whatever there is, asked for or not: the worst that a grid may do.
        replies, self._replies = self._replies, []
        return replies

    def send_and_receive(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
        raise NotImplementedError
