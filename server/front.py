"""The hub's public port: passes on what a site's SuperNode calls, and nothing else.

Flower's SuperLink has one port for everything, and asks nobody who starts a run or registers a
node who they are. So it listens on the loopback address, and the world reaches this front: a closed
list of calls, each to the byte, with a closed list of headers, within limits. Everything else is
answered here, and the SuperLink never hears of it. `server.nginx` tells nginx to do the same.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ipaddress
import logging
import math
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import uvicorn
from prometheus_client import CollectorRegistry, Counter
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.hub import HubError, HubFolder
from service.health import HealthError, HealthServer
from service.processes import Stopped

CALLS = (
    "activate-node",
    "confirm-message-received",
    "deactivate-node",
    "pull-messages",
    "pull-object",
    "push-messages",
    "push-object",
    "send-node-heartbeat",
)
"""What a SuperNode of ours calls: POST /v1/fleet/<call>.

Not among them: register-node and unregister-node (the coordinator admits sites), get-run and
get-fab (a site fetches no code).
"""

REQUEST_HEADERS = (
    "accept",
    "content-type",
    "flwr-component-name",
    "flwr-package-name",
    "flwr-package-version",
    "flwr-public-key",
    "flwr-signature",
    "flwr-timestamp",
)
"""What of a request's head is passed on, besides how long the body is."""

ANSWER_HEADERS = ("content-length", "content-type", "flwr-version-incompatibility-message")
"""What of an answer's head is passed on; `Date` is the front's own."""

KEEP_ALIVE_S = 15
"""So long a connection may rest between two calls. A SuperNode gives up its own after 5 s."""

CONNECT_S = 5
"""So long the SuperLink may take to accept a connection."""

_STOP_S = 3
_TICK_S = 0.1
_LONGEST_HEAD = 16_384
_MOST_ADDRESSES = 10_000
_PATHS = {f"/v1/fleet/{call}".encode(): call for call in CALLS}
_REQUEST_HEADERS = {name.encode() for name in (*REQUEST_HEADERS, "content-length")}
_ANSWER_HEADERS = {name.encode() for name in ANSWER_HEADERS}
# As they are counted. 503 and not 429, which ends a SuperNode; it takes 502 to 504
# for a hub that has trouble, and tries again.
_REASONS = {
    400: "malformed",
    404: "unknown call",
    408: "too slow",
    413: "too large",
    431: "too large",
    502: "SuperLink not reached",
    503: "too frequent",
    504: "SuperLink too slow",
}

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

log = logging.getLogger(__name__)


class FrontError(HubError):
    """The front cannot be opened. The message says what to do."""


@dataclass(frozen=True)
class Limits:
    """How much the public port takes. "An address" is an IPv4 address, or an IPv6 /64."""

    largest_body: int = 64 * 1024 * 1024
    """Bytes of one request's body."""
    body_timeout_s: float = 60.0
    """Longest time for the whole of one body, and for the whole of one answer."""
    idle_timeout_s: float = 10.0
    """Longest time for a TLS handshake, for a request's head, and without reading an answer."""
    superlink_timeout_s: float = 30.0
    """Longest time that the SuperLink may be silent; so long a SuperNode waits."""
    requests_per_s: float = 20.0
    """Calls of one address a second, in the long run."""
    burst: int = 200
    """Calls of one address at once, after a rest."""
    activations_per_minute: int = 30
    """Activations of one address a minute, and at once. A SuperNode makes one as it starts."""
    connections: int = 512
    """Connections at once."""
    connections_per_address: int = 64
    """Connections of one address at once."""


@dataclass(frozen=True)
class PublicPort:
    """Where sites are heard, under which certificate, and the SuperLink behind it."""

    listen: str
    """Address of this machine; `::` is every IPv6 address, and no IPv4 one."""
    port: int
    certificate: Path
    key: Path
    superlink_port: int
    """On this machine's loopback address, and nowhere else."""
    authority: Path
    """The certificate that vouches for the SuperLink, as `localhost` and 127.0.0.1."""
    limits: Limits = Limits()


def public_port(hub: HubFolder) -> PublicPort:
    """The public port of `hub`. Raises `SettingError` if its settings are not in order."""
    config = hub.config()
    return PublicPort(
        listen=config.listen,
        port=config.port,
        certificate=hub.certificates / "server.crt",
        key=hub.certificates / "server.key",
        superlink_port=config.superlink_port,
        authority=hub.authority,
        limits=Limits(
            largest_body=config.largest_body_mb * 1024 * 1024,
            body_timeout_s=config.body_timeout_s,
            requests_per_s=config.requests_per_s,
            burst=math.ceil(10 * config.requests_per_s),
            connections=config.connections,
        ),
    )


def serve_hub(hub: HubFolder, stopped: Event | Stopped) -> None:
    """Serve the public port of `hub`, and its figures on the loopback address, until `stopped`.

    Raises as `serve` and `public_port` do.
    """
    port, registry = public_port(hub), CollectorRegistry()
    with contextlib.ExitStack() as opened:
        if health_port := hub.config().health_port:
            figures = HealthServer(health_port + 1, lambda: (True, {}), registry)
            try:
                opened.enter_context(figures)
            except HealthError as error:
                # Sites are served without them, too.
                log.warning("%s", str(error))
        serve(port, stopped, registry)


def serve(
    port: PublicPort, stopped: Event | Stopped, registry: CollectorRegistry | None = None
) -> None:
    """Serve until `stopped`; at most some seconds longer, for calls that are under way.

    A certificate that was renewed is served within a second, to new connections.

    Raises:
        FrontError: The address is taken, or the certificate cannot be used.
    """
    listening = _listening(port)
    with listening:
        asyncio.run(_serve(port, listening, stopped, registry))


class Rate:
    """How often each address may come: `burst` times at once, and `per_s` times a second."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._pause = 1 / per_s
        self._burst_s = burst / per_s
        # When each address may come `burst` times again; in the order of their last times, so that
        # what is forgotten first is the longest quiet.
        self._rested: collections.OrderedDict[str, float] = collections.OrderedDict()

    def __len__(self) -> int:
        """Addresses that are remembered."""
        return len(self._rested)

    def wait(self, address: str, now: float) -> float:
        """Seconds until `address` may come; 0, and one time less, if it may now."""
        rested = max(self._rested.pop(address, now), now)
        # To 1 ns: a pause that is over is over, whatever its sum was rounded to.
        wait = max(0.0, round(rested + self._pause - self._burst_s - now, 9))
        self._rested[address] = rested if wait else rested + self._pause
        if len(self._rested) > _MOST_ADDRESSES:
            self._rested.popitem(last=False)
        return wait


class Front:
    """The ASGI application: refuses a call, or passes it on to the SuperLink piece by piece."""

    def __init__(
        self,
        superlink: str,
        transport: httpx.AsyncBaseTransport,
        limits: Limits,
        registry: CollectorRegistry | None = None,
    ) -> None:
        """`superlink`: its address, such as https://127.0.0.1:9093; `transport`: the way there."""
        self._superlink = superlink
        self._transport = transport
        self._limits = limits
        self._rate = Rate(limits.requests_per_s, limits.burst)
        self._activations = Rate(limits.activations_per_minute / 60, limits.activations_per_minute)
        registry = registry or CollectorRegistry()
        self._requests = Counter(
            "conversion_hub_requests",
            "Requests at the public port that were answered",
            ["call", "status"],
            registry=registry,
        )
        self.refusals = Counter(
            "conversion_hub_refusals",
            "What the public port refused by itself",
            ["reason"],
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            while (await _answered(receive, send))["type"] != "lifespan.shutdown":
                pass
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = _call(scope)
        try:
            status = await self._passed_on(call, scope, receive, send)
        except _GoneError:
            return
        except _Refusal as refusal:
            status = refusal.status
            self.refusals.labels(_REASONS[status]).inc()
            await _refuse(refusal, send)
        self._requests.labels(call or "other", str(status)).inc()

    async def _passed_on(self, call: str, scope: Scope, receive: Receive, send: Send) -> int:
        """Pass a call on, and its answer back; the answer's status."""
        headers = self._admitted(call, scope)
        limits = self._limits
        request = httpx.Request(
            "POST",
            f"{self._superlink}/v1/fleet/{call}",
            headers=headers,
            content=_body(receive, limits),
            extensions={
                "timeout": httpx.Timeout(limits.superlink_timeout_s, connect=CONNECT_S).as_dict()
            },
        )
        try:
            answer = await self._transport.handle_async_request(request)
        except httpx.TimeoutException:
            raise _Refusal(504) from None
        except httpx.TransportError:
            raise _Refusal(502) from None
        stream = answer.stream
        assert isinstance(stream, httpx.AsyncByteStream)
        head = [(name, value) for name, value in answer.headers.raw if _passes(name)]
        async with contextlib.aclosing(stream):
            await send(
                {"type": "http.response.start", "status": answer.status_code, "headers": head}
            )
            try:
                async with asyncio.timeout(limits.body_timeout_s):
                    async for piece in stream:
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
            except (TimeoutError, httpx.TransportError) as error:
                # The head has left: that the answer has no end is what says that it failed.
                log.warning("%s: an answer was cut off (%s)", call, type(error).__name__)
                raise _GoneError from None
        await send({"type": "http.response.body"})
        return answer.status_code

    def _admitted(self, call: str, scope: Scope) -> list[tuple[bytes, bytes]]:
        """What is passed on of the head of a call. Raises `_Refusal`."""
        if not call:
            raise _Refusal(404)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > _LONGEST_HEAD:
            raise _Refusal(431)
        # Each once: the SuperLink must not choose between two.
        headers = dict(scope["headers"])
        if b"content-length" in headers and b"transfer-encoding" in headers:
            raise _Refusal(400)
        if int(headers.get(b"content-length", 0)) > self._limits.largest_body:
            raise _Refusal(413)
        address, now = _address(scope["client"][0]), time.monotonic()
        wait = self._rate.wait(address, now)
        if not wait and call == "activate-node":
            wait = self._activations.wait(address, now)
        if wait:
            raise _Refusal(503, retry_after_s=math.ceil(wait))
        return [(name, value) for name, value in headers.items() if name in _REQUEST_HEADERS]


class _Refusal(Exception):  # noqa: N818  (a refusal is an answer, not a fault)
    """The front answers by itself."""

    def __init__(self, status: int, retry_after_s: int | None = None) -> None:
        super().__init__(status)
        self.status = status
        self.retry_after_s = retry_after_s


class _GoneError(Exception):
    """There is nobody left to answer."""


def _call(scope: Scope) -> str:
    """The call that is asked for; empty if none.

    The path to the byte, as it came: `raw_path` is neither decoded nor normalised.
    """
    if (scope["method"], scope["http_version"], scope["query_string"]) != ("POST", "1.1", b""):
        return ""
    return _PATHS.get(scope.get("raw_path", b""), "")


def _passes(name: bytes) -> bool:
    return name.lower() in _ANSWER_HEADERS


async def _answered(receive: Receive, send: Send) -> Message:
    """An event of the server's life; there is nothing to do at any."""
    event = await receive()
    await send({"type": f"{event['type']}.complete"})
    return event


async def _body(receive: Receive, limits: Limits) -> AsyncIterator[bytes]:
    """A request's body as it comes. Raises `_Refusal` once it is too much or too slow."""
    deadline = asyncio.get_running_loop().time() + limits.body_timeout_s
    size, more = 0, True
    while more:
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise _Refusal(408) from None
        if message["type"] == "http.disconnect":
            raise _GoneError
        piece = message.get("body", b"")
        size += len(piece)
        if size > limits.largest_body:
            raise _Refusal(413)
        yield piece
        more = message.get("more_body", False)


async def _refuse(refusal: _Refusal, send: Send) -> None:
    """Answer without a body and close the connection, whatever was still to come."""
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    if refusal.retry_after_s is not None:
        headers.append((b"retry-after", str(refusal.retry_after_s).encode()))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body"})


def _address(client: str) -> str:
    """What is counted as one address. Who has an IPv6 address has its whole /64."""
    if ":" not in client:
        return client
    return ipaddress.IPv6Address(client.partition("%")[0]).exploded[:19]


class _Connection(H11Protocol):
    """uvicorn's, where every wait for the other side has an end.

    By itself uvicorn waits for ever for a first request, for the rest of a head, and for somebody
    to read an answer.
    """

    def __init__(self, idle_timeout_s: float, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._idle_timeout_s = idle_timeout_s
        self._head: asyncio.TimerHandle | None = None
        self._reader: asyncio.TimerHandle | None = None
        self.lost = asyncio.Event()
        # One whose handshake fails is never made.
        self.lost.set()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.lost.clear()
        super().connection_made(transport)
        self._head = self._abort_later()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in filter(None, (self._head, self._reader)):
            timer.cancel()
        self.lost.set()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            if self._head is not None:
                self._head.cancel()
            self._head = None
        elif self._head is None:
            self._head = self._abort_later()

    def shutdown(self) -> None:
        """End it as the front ends; at once if it rests, as nobody is there to say goodbye to."""
        rests = self.cycle is None or self.cycle.response_complete
        if rests and not self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader = self._abort_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader is not None:
            self._reader.cancel()

    def _abort_later(self) -> asyncio.TimerHandle:
        return self.loop.call_later(self._idle_timeout_s, self.transport.abort)


class _Server(uvicorn.Server):
    """uvicorn's, ended by us: signals are for who started it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Door:
    """Takes connections in, at most so many at once, and gives them to uvicorn under TLS.

    By itself uvicorn takes in as many as there are, and lets each take a minute for its handshake.
    """

    def __init__(self, port: PublicPort, server: _Server, refusals: Counter) -> None:
        self._port = port
        self._server = server
        self._refusals = refusals
        self._state = _state(port)
        self._context = _context(port)
        self._open: collections.Counter[str] = collections.Counter()
        self._attending: set[asyncio.Task[None]] = set()

    async def accept(self, listening: socket.socket) -> None:
        """Take connections in until cancelled."""
        limits, loop = self._port.limits, asyncio.get_running_loop()
        while True:
            try:
                connection, (client, *_) = await loop.sock_accept(listening)
            except OSError as error:
                # Such as no file descriptor left: a moment later there may be one.
                log.warning("a connection cannot be taken in: %s", error.strerror)
                await asyncio.sleep(1)
                continue
            address = _address(client)
            if (
                self._open.total() >= limits.connections
                or self._open[address] >= limits.connections_per_address
            ):
                connection.close()
                self._refusals.labels("too many connections").inc()
                continue
            self._open[address] += 1
            task = loop.create_task(self._attend(connection, address))
            self._attending.add(task)
            task.add_done_callback(self._attending.discard)

    async def close(self) -> None:
        """Give up what is still open."""
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        for task in self._attending:
            task.cancel()
        if self._attending:
            await asyncio.wait(self._attending, timeout=1)

    def renew(self) -> None:
        """Serve the certificate as it is now in its file, if it is a good one."""
        state = _state(self._port)
        if state == self._state:
            return
        self._state = state
        try:
            self._context = _context(self._port)
        except FrontError as error:
            log.error("%s; the one from before is served on", error)
        else:
            log.info("%s: served from now on", self._port.certificate)

    async def _attend(self, connection: socket.socket, address: str) -> None:
        timeout = self._port.limits.idle_timeout_s
        try:
            _, protocol = await asyncio.get_running_loop().connect_accepted_socket(
                lambda: _Connection(
                    timeout,
                    config=self._server.config,
                    server_state=self._server.server_state,
                    app_state={},
                ),
                connection,
                ssl=self._context,
                ssl_handshake_timeout=timeout,
                ssl_shutdown_timeout=timeout,
            )
            await protocol.lost.wait()
        except OSError:
            # A handshake that failed (`ssl.SSLError` is an OSError) is nobody's business.
            pass
        finally:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]


async def _serve(
    port: PublicPort,
    listening: socket.socket,
    stopped: Event | Stopped,
    registry: CollectorRegistry | None,
) -> None:
    async with _transport(port) as transport:
        superlink = f"https://127.0.0.1:{port.superlink_port}"
        front = Front(superlink, transport, port.limits, registry)
        server = _Server(_uvicorn_config(front))
        door = _Door(port, server, front.refusals)
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(server.serve(sockets=[]))
            accepting = tasks.create_task(door.accept(listening))
            while not stopped.is_set():
                door.renew()
                await asyncio.sleep(_TICK_S)
            accepting.cancel()
            server.should_exit = True
            await serving
            await door.close()


def _uvicorn_config(front: Front) -> uvicorn.Config:
    config = uvicorn.Config(
        front,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        # What strangers send must not fill the log; refusals are counted.
        log_level="error",
        access_log=False,
        # Who calls is who connects, whatever X-Forwarded-For says.
        proxy_headers=False,
        server_header=False,
        date_header=True,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=_STOP_S,
        h11_max_incomplete_event_size=_LONGEST_HEAD,
    )
    config.load()
    return config


def _transport(port: PublicPort) -> httpx.AsyncHTTPTransport:
    try:
        context = ssl.create_default_context(cafile=port.authority)
    except OSError as error:
        raise FrontError(f"{port.authority}: cannot be used: {_why(error)}") from error
    # The SuperLink gives up a connection that rested for 5 s: by then it must not be used again.
    limits = httpx.Limits(max_connections=port.limits.connections, keepalive_expiry=2)
    return httpx.AsyncHTTPTransport(verify=context, trust_env=False, limits=limits)


def _context(port: PublicPort) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        # A key with a password is refused, instead of asked for at the terminal.
        context.load_cert_chain(port.certificate, port.key, password="")
    except OSError as error:
        raise FrontError(
            f"{port.certificate} and {port.key.name}: cannot be used: {_why(error)}"
        ) from error
    return context


def _why(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or type(error).__name__


def _state(port: PublicPort) -> list[tuple[int, int]]:
    """What changes when the certificate or its key is renewed."""
    with contextlib.suppress(OSError):
        found = [path.stat() for path in (port.certificate, port.key)]
        return [(file.st_mtime_ns, file.st_ino) for file in found]
    return []


def _listening(port: PublicPort) -> socket.socket:
    family = socket.AF_INET6 if ":" in port.listen else socket.AF_INET
    try:
        listening = socket.create_server((port.listen, port.port), family=family, backlog=128)
    except OSError as error:
        raise FrontError(
            f"cannot listen on {port.listen}:{port.port}: {error.strerror}; is the hub up already, "
            "or does another program have the port?"
        ) from error
    listening.setblocking(False)
    # Connections inherit it. asyncio does it for sockets of its own; without it each answer is
    # 40 ms late.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
