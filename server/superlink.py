"""The SuperLink on this machine, as the coordinator uses it: who is registered, and a run's grid.

It listens on the loopback address alone, because it asks nobody on its control and runtime calls
who they are. A run gets a bundle without code: what coordinates it is the process that calls
`open_grid`, and what answers is each site's own agent.
"""

from __future__ import annotations

import os

# Before Flower is imported: software for privacy tells no one that it runs.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
from flwr.app import Message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SubStatus
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.retry import RetryInvoker, constant, exponential
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from server.hub import SuperLinkError

LONGEST_OUTAGE_S = 60.0
"""So long a call of a run is tried again before the SuperLink counts as lost."""

CONTROL_TIMEOUT_S = 10.0
"""Longest wait for the answer to a call that is not a run's."""

LOST = (httpx.HTTPError, RunNotRunningException, ObjectPushError)
"""What a grid raises once its SuperLink is lost, or has given up the run."""


@dataclass(frozen=True)
class Node:
    """A registered SuperNode."""

    id: int
    public_key: bytes
    """As Flower keeps it: PEM."""
    online: bool
    last_contact: float
    """UTC seconds, to within a heartbeat; 0 where it never came."""


class SuperLink:
    """The calls of the control API. Raises `SuperLinkError` where it does not answer."""

    def __init__(self, address: str, authority: bytes) -> None:
        """`address`: HOST:PORT. `authority`: the certificate (PEM) that vouches for it."""
        self.address = address
        self._authority = authority

    def is_up(self) -> bool:
        """Does it answer?"""
        try:
            self.nodes()
        except SuperLinkError:
            return False
        return True

    def nodes(self) -> list[Node]:
        """Every registered SuperNode."""
        answer = self._call("ListNodes", ListNodesRequest())
        return [
            Node(
                one.node_id,
                one.public_key,
                one.status == "online",
                max(0.0, one.online_until - _PATIENCE * one.heartbeat_interval),
            )
            for one in answer.nodes_info
            if one.status != "unregistered"
        ]

    def register(self, public_key: bytes, name: str) -> None:
        """Let the SuperNode with this key (PEM) in."""
        self._call("RegisterNode", RegisterNodeRequest(public_key=public_key, name=name))

    def unregister(self, node: int) -> None:
        """Let a SuperNode in no more."""
        self._call("UnregisterNode", UnregisterNodeRequest(node_id=node))

    def _call(self, name: str, request: Any) -> Any:
        client = ControlHttpClient.from_server_address(
            self.address,
            False,
            self._authority,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        client._client.timeout = httpx.Timeout(CONTROL_TIMEOUT_S)
        with closing(client):
            try:
                return getattr(client, name)(request)
            except httpx.HTTPStatusError as error:
                raise SuperLinkError(
                    f"the SuperLink refused {name}: {error.response.status_code} "
                    f"{error.response.text[:300]}"
                ) from error
            except httpx.HTTPError as error:
                raise SuperLinkError(
                    f"no SuperLink answers at {self.address}; start it with: "
                    "python -m server start HUB"
                ) from error

    @contextmanager
    def open_grid(self) -> Iterator[Grid]:
        """A grid for one run, which ends with the block.

        Raises:
            SuperLinkError: The run could not be started. Later, its calls raise one of `LOST`.
        """
        run_id = self._call("StartRun", StartRunRequest(fab=fab_to_proto(_empty_bundle()))).run_id
        grid = _Grid(self.address, self._authority, self._task_of(run_id))
        client = grid.client
        beats = HeartbeatSender(lambda: _beat(client))
        status, details = SubStatus.FAILED, "ended early"
        try:
            beats.start()
            task = client.PullTaskInput(PullTaskInputRequest())
            TaskIdentity.task_id = task.task_id
            TaskIdentity.run_id = task.run.run_id
            TaskIdentity.node_id = task.context.node_id
            grid.set_run(run_from_proto(task.run))
            yield grid
            status, details = SubStatus.COMPLETED, ""
        finally:
            beats.stop()
            grid.end(status, details)

    def _task_of(self, run_id: int) -> str:
        """The token of the run's only task. Tasks that a killed process left are ended."""
        interceptors = [RuntimeVersionHttpInterceptor(component_name="SuperExec")]
        client = RuntimeHttpClient.from_server_address(
            self.address, False, self._authority, interceptors
        )
        with closing(client):
            while True:
                try:
                    got = client.AcquireTask(
                        AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
                    )
                except httpx.HTTPError as error:
                    raise SuperLinkError("the SuperLink gave no task for the run") from error
                if not got.token:
                    raise SuperLinkError("the SuperLink gave no task for the run")
                if got.task.run_id == run_id:
                    return str(got.token)
                left = _Grid(self.address, self._authority, got.token)
                left.end(SubStatus.FAILED, "its process was killed")


class _Grid(HttpGrid):
    """Flower's grid, but a call that fails is tried again for a bounded time, without signals."""

    def __init__(self, address: str, authority: bytes, token: str) -> None:
        super().__init__(address, insecure=False, root_certificates=authority, token=token)
        self._retry_invoker = RetryInvoker(
            lambda: exponential(max_delay=2),
            httpx.HTTPError,
            max_tries=None,
            max_time=LONGEST_OUTAGE_S,
            should_giveup=_is_final,
        )

    @property
    def client(self) -> RuntimeHttpClient:
        """The runtime API, with this run's token."""
        return self._runtime_client

    def _try_push_messages(self, run_id: int, messages: Iterable[Message]) -> list[str]:
        """Push messages; again, with what the SuperLink lacks, where an object was not stored.

        It says so, too, of an object that it has stored without its answer coming through.
        """
        again = RetryInvoker(lambda: constant(0), ObjectPushError, max_tries=_PUSHES, max_time=None)
        ids: list[str] = again.invoke(super()._try_push_messages, run_id, messages)
        return ids

    def end(self, status: str, details: str) -> None:
        """Tell the SuperLink that the run is over, if it is there to hear it."""
        self._retry_invoker.max_tries = 1
        try:
            self.client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
        except LOST:
            pass
        finally:
            self.close()


_PUSHES = 5
"""So often messages are pushed until the SuperLink has all that they hold."""

_PATIENCE = 2
"""Heartbeats that a SuperNode may miss before Flower takes it for offline."""


def _is_final(error: Exception) -> bool:
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code not in (
        httpx.codes.BAD_GATEWAY,
        httpx.codes.SERVICE_UNAVAILABLE,
        httpx.codes.GATEWAY_TIMEOUT,
    )


def _beat(client: RuntimeHttpClient) -> bool:
    # A run that the SuperLink has given up shows at the run's next call.
    try:
        return bool(client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
    except LOST:
        return False


@cache
def _empty_bundle() -> Fab:
    """What Flower wants of an app, without any code."""
    project = b"""\
[project]
name = "conversion-federation"
version = "0.1.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "conversion-federation"
[tool.flwr.app.components]
serverapp = "nothing:nothing"
clientapp = "nothing:nothing"
[tool.flwr.app.config]
"""
    content, _ = build_fab_from_files({"pyproject.toml": project})
    return Fab(hashlib.sha256(content).hexdigest(), content, {})
