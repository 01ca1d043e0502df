"""The hub as a SuperNode sees it: the few of Flower's fleet calls that a site makes.

There is no call for the coordinator's app bundle among them: no code of another's is fetched.
Flower's own connection (`http_request_response`) makes the same calls, but tries them for ever,
sends signals to its own process and takes answers of any size.
"""

from __future__ import annotations

import os

# Before Flower is imported: software for privacy tells no one that it runs.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import json
import logging
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Protocol, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, Error, Message
from flwr.app.message import remove_content_from_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_id,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import (
    RuntimeVersionMetadata,
    get_runtime_version_incompatibility_exit_message,
)
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from protocol.exchange import Parts
from protocol.records import from_records, to_records
from protocol.wire import WireError

BEAT_S = 20.0
"""Pause between heartbeats; the hub takes a node for lost that was silent for 60 s."""

PATIENCE_S = 60.0
"""So long a call that fails is tried again. A node that was silent for longer is lost anyway."""

FIRST_PATIENCE_S = 10.0
"""The same before the site is let in: who starts it waits to hear what is wrong."""

LARGEST_MESSAGE = 64 * 2**20
"""Bytes of a message, its model included."""

LARGEST_TEXT = 4 * 2**20
"""Bytes of it that are not the model: these are parsed, and take many times the space then."""

MOST_OBJECTS = 1_000
"""Objects (Flower's name for the pieces of a message)."""

_PUSHES = 5
"""So often an answer is pushed until the hub has all that it holds."""

_LARGEST_BODY = LARGEST_MESSAGE + 2**20
_LONGEST_CALL_S = 120.0
_TIMEOUT = httpx.Timeout(20.0, connect=10.0)
_LARGEST_SKEW_S = 4.0
"""The SuperLink takes clocks of sites that are at most 5 s ahead of its own."""

_log = logging.getLogger(__name__)
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class HubError(RuntimeError):
    """The hub cannot be used; says why and what to do. `code` is what the process ends with."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


UNREACHABLE, UNTRUSTED, NOT_ADMITTED, CLOCK, VERSION, STRANGE = 3, 4, 5, 6, 7, 8
"""Codes of `HubError`."""


class Stop(Protocol):
    """Says when the process is to end: an `Event`, or what `service.processes` makes of signals."""

    def is_set(self) -> bool:
        """Is the process to end?"""

    def wait(self, timeout: float, /) -> bool:
        """Wait so long, or until the process is to end; is it?"""


class StoppedError(Exception):
    """What was done was given up, because the process is to end."""


class MessageError(Exception):
    """A message that cannot be read or answered. Fit for the coordinator."""


class RunOverError(Exception):
    """The run that a message belongs to goes on no more: nobody waits for an answer."""


@dataclass(frozen=True)
class Asked:
    """A message that came; what it holds is still at the hub."""

    message: Message
    objects: tuple[str, ...] | None
    """The pieces; None if there are more than `MOST_OBJECTS`."""

    @property
    def id(self) -> str:
        """Its name, in logs."""
        return self.message.metadata.message_id[:12]

    @property
    def seconds_left(self) -> float:
        """Until nobody waits for the answer any more."""
        metadata = self.message.metadata
        return metadata.created_at + metadata.ttl - time.time()


class Fleet:
    """A SuperNode's connection to the hub. Its methods may be called from several threads.

    What fails on the way, or at a hub that is just starting, is tried again for `PATIENCE_S`; then
    each method raises `HubError`. Once `stopped` is set, a call that fails raises `StoppedError`.
    """

    def __init__(
        self,
        address: str,
        authority: bytes,
        key: ec.EllipticCurvePrivateKey,
        name: str,
        stopped: Stop,
    ) -> None:
        """`address`: HOST:PORT. `authority`: certificates (PEM), one of which vouches for the hub.

        `name`: the site's, for messages about its key.
        """
        self.address, self._name, self._stopped = address, name, stopped
        # Of this authority alone, not of those that the system trusts.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(cadata=authority.decode("ascii"))
        except (ValueError, ssl.SSLError):
            raise HubError(UNTRUSTED, "--root-certificates: holds no certificate") from None
        self._public_key = public_key_to_bytes(key.public_key())
        self._client = _Client(f"https://{address}", key, context)
        self._node = Node()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def activate(self, before: int | None) -> int:
        """Be let in, and get this site's number.

        `before`: the number in an earlier life. A node that did not say good-bye is let in again
        only once it was silent for a minute, so that it does so now.
        """
        if before is not None:
            try:
                self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=before))
            except (HubError, _AnsweredError) as error:
                if isinstance(error, HubError) and error.code not in (NOT_ADMITTED, CLOCK):
                    raise
        request = ActivateNodeRequest(
            public_key=self._public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        try:
            self._node = Node(node_id=self._call(self._client.ActivateNode, request).node_id)
        except _AnsweredError as error:
            if error.status == httpx.codes.PRECONDITION_FAILED:
                raise self._not_admitted() from error
            raise self._strange(error) from error
        return int(self._node.node_id)

    def deactivate(self) -> None:
        """Say good-bye, if the hub is there to hear it."""
        try:
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        except (httpx.HTTPError, ValueError):
            _log.info("the hub did not hear the good-bye")

    def beat(self) -> None:
        """Say that this site is there."""
        request = SendNodeHeartbeatRequest(
            node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        if not self._ask(self._client.SendNodeHeartbeat, request).success:
            raise self._not_admitted()

    def receive(self) -> Asked | None:
        """The next message for this site, if there is one. It is handed out once."""
        response = self._ask(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not response.messages_list or not response.message_object_trees:
            return None
        try:
            message = message_from_proto(response.messages_list[0])
        except (ValueError, TypeError, KeyError) as error:
            raise HubError(STRANGE, "the hub sent a message that is none") from error
        return Asked(message, _object_ids(response.message_object_trees[0]))

    def fetch(self, asked: Asked) -> Parts:
        """What a message holds.

        Raises:
            MessageError: Too large, or not what a coordinator of ours sends.
            RunOverError: Its run is over.
        """
        if asked.objects is None:
            raise MessageError(f"a message of more than {MOST_OBJECTS:,} objects")
        run, root = asked.message.metadata.run_id, asked.message.metadata.message_id
        contents: dict[str, bytes] = {}
        size = 0
        for id_ in asked.objects:
            contents[id_] = self._pull(run, id_)
            size += len(contents[id_])
            if size > LARGEST_MESSAGE:
                raise MessageError(f"a message of more than {LARGEST_MESSAGE:,} bytes")
        confirm = ConfirmMessageReceivedRequest(node=self._node, run_id=run, message_object_id=root)
        self._ask_of_run(self._client.ConfirmMessageReceived, confirm)
        return _parts(root, contents)

    def answer(self, asked: Asked, answer: Parts | str, seconds: float) -> None:
        """Send the answer, or an error's text; `seconds` is what it took to make.

        Raises:
            MessageError: The hub does not take it.
            RunOverError: The run is over.
        """
        if isinstance(answer, Parts):
            reply = Message(to_records(answer), reply_to=asked.message)
        else:
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, answer)
            reply = Message(error, reply_to=asked.message)
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects = {id_: one.deflate() for id_, one in get_all_nested_objects(reply).items()}
            tree = get_object_tree(reply)
        run = reply.metadata.run_id
        # What it holds travels in the objects.
        told = message_to_proto(remove_content_from_message(reply))
        push = PushMessagesRequest(
            node=self._node,
            messages_list=[told],
            message_object_trees=[tree],
            clientapp_runtime_list=[seconds],
        )
        # Where an object was not stored, the hub says anew what it lacks. It says so, too, of one
        # that it has stored without its answer coming through.
        for _ in range(_PUSHES):
            pushed = self._ask_of_run(self._client.PushMessages, push)
            if not set(pushed.objects_to_push) <= objects.keys():
                raise HubError(STRANGE, "the hub asked for what is no part of the answer")
            if all(
                self._push(run, pushed.session_id, id_, objects[id_])
                for id_ in pushed.objects_to_push
            ):
                return
        raise MessageError("the hub took too long to take the answer")

    def _push(self, run: int, session: str, id_: str, content: bytes) -> bool:
        """Hand the hub one object; does it say that it has stored it?"""
        request = PushObjectRequest(
            node=self._node,
            run_id=run,
            object_id=id_,
            object_content=content,
            session_id=session,
        )
        return bool(self._ask_of_run(self._client.PushObject, request).stored)

    def _pull(self, run: int, id_: str) -> bytes:
        """One object, which the coordinator may still be sending."""
        until = time.monotonic() + PATIENCE_S
        for pause in _pauses(0.1):
            request = PullObjectRequest(node=self._node, run_id=run, object_id=id_)
            response = self._ask_of_run(self._client.PullObject, request)
            if response.object_found and response.object_available:
                if get_object_id(response.object_content) != id_:
                    raise MessageError("a message that is not what its name says")
                return response.object_content
            if not response.object_found or time.monotonic() > until:
                break
            if self._stopped.wait(pause):
                raise StoppedError
        raise MessageError("a message that never came whole")

    def _ask_of_run(self, call: Callable[[_Request], _Response], request: _Request) -> _Response:
        try:
            return self._call(call, request)
        except _AnsweredError as error:
            if error.status == httpx.codes.FORBIDDEN:
                raise RunOverError from error
            raise MessageError(f"the hub answered {error}") from error

    def _ask(self, call: Callable[[_Request], _Response], request: _Request) -> _Response:
        try:
            return self._call(call, request)
        except _AnsweredError as error:
            raise self._strange(error) from error

    def _call(self, call: Callable[[_Request], _Response], request: _Request) -> _Response:
        """A call, tried again while it makes sense.

        Raises `_AnsweredError` for what the hub refuses, which means something else in each call.
        """
        until = time.monotonic() + (PATIENCE_S if self._node.node_id else FIRST_PATIENCE_S)
        for number, pause in enumerate(_pauses(0.25)):
            try:
                return call(request)
            except _VersionError as error:
                raise HubError(VERSION, f"another version of Flower at the hub: {error}") from error
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                if status == httpx.codes.UNAUTHORIZED:
                    raise self._unauthorized() from error
                if status < 500 and status != httpx.codes.TOO_MANY_REQUESTS:
                    raise _AnsweredError(status) from error
                fault = f"it answers {status}"
            except httpx.TransportError as error:
                fault = self._fault(error)
            except ValueError as error:
                # Not the answer of a SuperLink.
                raise HubError(
                    STRANGE, f"what answers at {self.address} is no hub; check --superlink"
                ) from error
            if self._stopped.is_set():
                raise StoppedError
            if time.monotonic() > until:
                raise HubError(UNREACHABLE, f"the hub at {self.address} does not answer: {fault}")
            # A connection that the hub had closed in the meantime is none.
            if number == 1:
                _log.warning("the hub does not answer: %s; trying again", fault)
            if self._stopped.wait(pause):
                raise StoppedError
        raise AssertionError("the pauses have no end")

    def _fault(self, error: httpx.TransportError) -> str:
        """What is wrong with the connection. Raises `HubError` for what does not pass."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise HubError(
                    UNTRUSTED,
                    f"the certificate of {self.address} is not trusted: {cause.verify_message}; "
                    "check --superlink and --root-certificates",
                ) from error
            if isinstance(cause, ssl.SSLError) and cause.reason == "WRONG_VERSION_NUMBER":
                raise HubError(
                    STRANGE, f"what answers at {self.address} speaks no TLS; check --superlink"
                ) from error
            if isinstance(cause, OSError) and cause.strerror:
                return cause.strerror
            cause = cause.__cause__ or cause.__context__
        return "no answer in time" if isinstance(error, httpx.TimeoutException) else "no connection"

    def _unauthorized(self) -> HubError:
        skew = self._client.skew
        if abs(skew) > _LARGEST_SKEW_S:
            return HubError(CLOCK, f"the hub refuses this site, because {_of_clock(skew)}")
        return self._not_admitted()

    def _not_admitted(self) -> HubError:
        return HubError(
            NOT_ADMITTED,
            f"this site's key is not registered at the hub, or another SuperNode uses it: give "
            f"{self._name}.pub to the coordinator",
        )

    def _strange(self, error: _AnsweredError) -> HubError:
        return HubError(STRANGE, f"the hub at {self.address} answered {error}")


class _AnsweredError(Exception):
    """The hub answered that it does not do what was asked."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} {httpx.codes.get_reason_phrase(status)}".strip())
        self.status = status


class _VersionError(Exception):
    """The hub's Flower and this one do not fit."""


class _Client(FleetHttpClient):
    """Flower's client, with bounds for what comes back and an ear for the hub's clock."""

    def __init__(self, url: str, key: ec.EllipticCurvePrivateKey, context: ssl.SSLContext) -> None:
        super().__init__(url, verify=context)
        self._client.timeout = _TIMEOUT
        self._client.follow_redirects = False
        self._auth = NodeAuthHttpInterceptor(key, key.public_key())
        self._versions = dict(
            RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata()
        )
        self.skew = 0.0
        """How far this machine's clock is ahead of the hub's, in seconds."""
        self._warned = -1e9

    def _send(self, context: ProtobufRequestContext, *, stream: bool = False) -> httpx.Response:
        context.request.headers.update(self._versions)
        # What is compressed may be small here and without bounds once it is read.
        context.request.headers["accept-encoding"] = "identity"
        return self._auth.intercept(context, self._bounded)

    def _bounded(self, context: ProtobufRequestContext) -> httpx.Response:
        began, until = time.time(), time.monotonic() + _LONGEST_CALL_S
        response = self._client.send(context.request, stream=True)
        try:
            self._hear_clock(response, (began + time.time()) / 2)
            body = bytearray()
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > _LARGEST_BODY:
                    raise ValueError("an answer without end")
                if time.monotonic() > until:
                    raise httpx.ReadTimeout("an answer that takes too long")
        finally:
            response.close()
        if response.is_error and (
            fault := get_runtime_version_incompatibility_exit_message(
                body[:65_536].decode(errors="replace")
            )
        ):
            raise _VersionError(" ".join(fault.split())[:300])
        return httpx.Response(response.status_code, content=bytes(body), request=context.request)

    def _hear_clock(self, response: httpx.Response, at: float) -> None:
        try:
            # To the second, rounded down.
            date = parsedate_to_datetime(response.headers["date"]).astimezone(UTC)
        except (KeyError, ValueError, TypeError):
            return
        self.skew = at - (date.timestamp() + 0.5)
        if abs(self.skew) > _LARGEST_SKEW_S and time.monotonic() > self._warned + 600:
            self._warned = time.monotonic()
            _log.warning("%s", _of_clock(self.skew))


def _of_clock(skew: float) -> str:
    way = "ahead of" if skew > 0 else "behind"
    return f"this machine's clock is {abs(skew):.0f} s {way} the hub's; set it right (NTP)"


def _pauses(first: float) -> Iterator[float]:
    while True:
        yield first
        first = min(2 * first, 4.0)


def _object_ids(tree: ObjectTree) -> tuple[str, ...] | None:
    """Each once; None if there are too many."""
    found: dict[str, None] = {}
    left = [tree]
    for _ in range(MOST_OBJECTS):
        if not left:
            return tuple(found)
        one = left.pop()
        found[one.object_id] = None
        left.extend(one.children)
    return tuple(found) if not left else None


def _parts(root: str, contents: dict[str, bytes]) -> Parts:
    """The content of a message. Raises `MessageError`."""
    try:
        _check_sizes(contents)
        message = inflate_object_from_contents(root, contents)
        if not isinstance(message, Message) or not message.has_content():
            raise MessageError("a message without content")
        return from_records(message.content)
    except WireError as error:
        raise MessageError(str(error)) from error
    except MessageError:
        raise
    except Exception as error:
        # Whatever hostile bytes raise in Flower: KeyError, ValueError, RecursionError and more.
        raise MessageError("a message that cannot be read") from error


def _check_sizes(contents: dict[str, bytes]) -> None:
    """What a message takes once it is read: an array may name one chunk a million times."""
    heads = {id_: get_object_head_values_from_object_content(one) for id_, one in contents.items()}
    text = sum(len(contents[id_]) for id_, head in heads.items() if head[0] != _CHUNK)
    if text > LARGEST_TEXT:
        raise MessageError(f"a message with more than {LARGEST_TEXT:,} bytes besides its model")
    size = 0
    for id_, (kind, children, _) in heads.items():
        if kind == _ARRAY:
            chunks = json.loads(get_object_body(contents[id_], Array))["arraychunk_ids"]
            size += sum(len(contents[children[index]]) for index in chunks)
    if size > LARGEST_MESSAGE:
        raise MessageError(f"a message of more than {LARGEST_MESSAGE:,} bytes")


_ARRAY, _CHUNK = Array.__qualname__, ArrayChunk.__qualname__
