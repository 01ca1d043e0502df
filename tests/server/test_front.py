from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.fleet_http_connection import http_request_response
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from prometheus_client import CollectorRegistry

from conf.hub import HubConfig
from server.certificates import create_authority, issue_server
from server.front import (
    Front,
    FrontError,
    Limits,
    PublicPort,
    Rate,
    public_port,
    serve,
    serve_hub,
)
from server.hub import create_hub
from server.superlink import SuperLink

PATH = "/v1/fleet/pull-messages"
PASSED = (
    "activate-node",
    "confirm-message-received",
    "deactivate-node",
    "pull-messages",
    "pull-object",
    "push-messages",
    "push-object",
    "send-node-heartbeat",
)
LIMITS = Limits(
    largest_body=100_000,
    body_timeout_s=1.0,
    idle_timeout_s=1.0,
    superlink_timeout_s=1.0,
    requests_per_s=2.0,
    burst=40,
    activations_per_minute=6,
    connections=40,
    connections_per_address=10,
)


def request(path: str, *headers: str, method: str = "POST", body: bytes = b"x") -> bytes:
    lines = (f"{method} {path} HTTP/1.1", "Host: hub.example.org", *headers)
    if not any(line.lower().startswith(("content-length", "transfer-enc")) for line in headers):
        lines = (*lines, f"Content-Length: {len(body)}")
    return "\r\n".join((*lines, "", "")).encode("latin-1") + body


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))


UNKNOWN = [
    # Every other call that Flower's SuperLink has, and those of FastAPI.
    *(
        path
        for _, path in PROTOBUF_REQUEST_TYPES
        if path not in {f"/v1/fleet/{call}" for call in PASSED}
    ),
    *("/", "/docs", "/redoc", "/openapi.json", "/health", "/metrics", "/v1/fleet", "/v1/fleet/"),
    "//v1/fleet/pull-messages",
    "/v1//fleet/pull-messages",
    "/v1/fleet//pull-messages",
    "/v1/fleet/./pull-messages",
    "/v1/fleet/x/../pull-messages",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/pull-messages/../../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/..%2fcontrol%2flist-runs",
    "/v1/control/../fleet/pull-messages",
    "/v1/fleet/pull%2dmessages",
    "/v1/fleet%2fpull-messages",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages/x",
    "/v1/fleet/pull-messages?x=1",
    "/v1/fleet/pull-messages%3fx=1",
    "/v1/fleet/pull-messages;x=1",
    "/v1/fleet/pull-messages%20",
    "/v1/fleet/pull-messages%0d%0aX:%20y",
    "/v1/fleet/pull-messages.",
    "/v1/fleet/pull-messagesx",
    "/v1/fleet/pull-message",
    "/v1/fleet/Pull-Messages",
    "/V1/fleet/pull-messages",
    "/x/v1/fleet/pull-messages",
    "https://hub.example.org/v1/fleet/pull-messages",
    "http://127.0.0.1/v1/control/list-runs",
]
METHODS = ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND")

# What is not HTTP as it should be, or could be read in two ways.
MALFORMED = {
    "CONNECT": request("127.0.0.1:443", method="CONNECT"),
    "TRACE": request(PATH, method="TRACE"),
    "post": request(PATH, method="post"),
    "star": request("*", method="OPTIONS"),
    "no path": request("v1/fleet/pull-messages"),
    "null": request("/v1/fleet/pull-messages%00"),
    "null byte": request("/v1/fleet/pull-messages\0"),
    "above the root": request("/v1/fleet/../../../v1/control/list-runs"),
    "backslash": request("/v1/fleet\\..\\control\\list-runs"),
    "fragment": request("/v1/fleet/pull-messages#x"),
    "no host": request(PATH).replace(b"Host: hub.example.org\r\n", b""),
    "two hosts": request(PATH, "Host: localhost"),
    "host with a path": request("/v1/control/list-runs", "Host: x/v1/fleet/pull-messages"),
    "HTTP/1.0": request(PATH).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "HTTP/0.9": b"GET /v1/fleet/pull-messages\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "HTTP/9.9": request(PATH).replace(b"HTTP/1.1", b"HTTP/9.9"),
    "a second blank": request(PATH).replace(b" HTTP/1.1", b"  HTTP/1.1"),
    "websocket": request(
        PATH,
        *("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"),
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        method="GET",
        body=b"",
    ),
    "h2c to another call": request(
        "/v1/control/list-runs",
        *("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"),
    ),
    "rewritten path": request("/", f"X-Original-URL: {PATH}", f"X-Rewrite-URL: {PATH}"),
    "rewritten method": request(PATH, "X-HTTP-Method-Override: POST", method="GET"),
    "length and chunks": request(
        PATH,
        *("Content-Length: 6", "Transfer-Encoding: chunked"),
        body=chunked() + request("/v1/control/list-runs"),
    ),
    "chunks and length": request(
        PATH,
        *("Transfer-Encoding: chunked", "Content-Length: 6"),
        body=chunked() + request("/v1/control/list-runs"),
    ),
    **{
        f"Transfer-Encoding{value}": request(PATH, f"Transfer-Encoding{value}", body=chunked(b"x"))
        for value in (": xchunked", ": chunked, identity", ": gzip, chunked", " : chunked")
    },
    "two codings": request(
        PATH, "Transfer-Encoding: chunked", "Transfer-Encoding: identity", body=chunked(b"x")
    ),
    **{
        f"Content-Length: {value}": request(PATH, f"Content-Length: {value}")
        for value in ("+1", "-1", "0x1", "1e0", "1, 2", "1 1", "9" * 40, "9" * 5000)
    },
    "two lengths": request(PATH, "Content-Length: 1", "Content-Length: 2"),
    "header without a name": request(PATH, ": chunked"),
    "header without a colon": request(PATH, "Transfer-Encoding"),
    "null in a header": request(PATH, "X-A: b\0c"),
    "long path": request(PATH + "x" * 20_000),
    "long header": request(PATH, f"X-A: {'b' * 20_000}"),
    "many headers": request(PATH, *(f"X-{number}: {'b' * 100}" for number in range(300))),
    "not HTTP": b"\x16\x03\x01" + bytes(300),
    "nothing but lines": b"\r\n" * 9000,
}

BROKEN_CHUNKS = {
    "no size": b"\r\n\r\n",
    "no number": b"g\r\nx\r\n0\r\n\r\n",
    "negative": b"-1\r\nx\r\n0\r\n\r\n",
    "too long": b"1\r\nxyz\r\n0\r\n\r\n",
    "huge": b"f" * 17 + b"\r\nx",
    "half": b"5\r\nx",
}


@dataclass
class Answer:
    status: int | None
    """None: the connection was closed instead."""
    headers: dict[str, str]
    body: bytes


@dataclass
class Received:
    call: str
    headers: dict[str, str]
    body: bytes


class Upstream:
    """Stands for the SuperLink: says what reached it, and answers as it is told."""

    def __init__(self, port: PublicPort) -> None:
        self.begun: list[str] = []
        """First lines, whatever came of them."""
        self.whole: list[Received] = []
        """Requests that came to their end."""
        self.pieces = 0
        """Bytes of bodies."""
        self.answer = b"answer"
        self.fault = ""
        """`silent`, `cut` (no answer) or `half` (of an answer)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(port.certificate, port.key)
        self._server = ThreadingHTTPServer(("127.0.0.1", port.superlink_port), _Handler)
        self._server.daemon_threads = True
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self._server.upstream = self  # type: ignore[attr-defined]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 5
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().handle()

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        upstream: Upstream = self.server.upstream  # type: ignore[attr-defined]
        upstream.begun.append(self.requestline)
        body = b"".join(self._pieces(upstream))
        upstream.whole.append(
            Received(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
        )
        if upstream.fault == "silent":
            time.sleep(2)
        if upstream.fault in ("silent", "cut"):
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/protobuf")
        self.send_header("Content-Length", str(len(upstream.answer)))
        self.send_header("Set-Cookie", "a=b")
        self.send_header("Location", "https://127.0.0.1/")
        self.send_header("flwr-version-incompatibility-message", "old")
        self.end_headers()
        if upstream.fault == "half":
            self.close_connection = True
            self.wfile.write(upstream.answer[: len(upstream.answer) // 2])
        else:
            self.wfile.write(upstream.answer)

    def _pieces(self, upstream: Upstream) -> Iterator[bytes]:
        left = int(self.headers.get("Content-Length", 0))
        in_chunks = "Transfer-Encoding" in self.headers
        while left or in_chunks:
            if in_chunks:
                left = int(self.rfile.readline(), 16)
            piece = self.rfile.read1(left)
            if in_chunks:
                piece += self.rfile.read(left - len(piece))
                self.rfile.readline()
                in_chunks = left > 0
                left = len(piece)
            elif not piece:
                raise ConnectionError
            upstream.pieces += len(piece)
            left -= len(piece)
            yield piece

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self.do_POST
        raise AttributeError(name)


_ADDRESSES = itertools.count()


def new_address() -> str:
    """An address of this machine that nobody has called from yet."""
    number = next(_ADDRESSES)
    return f"127.1.{number // 250}.{number % 250 + 1}"


@dataclass
class Door:
    """The public port as the world reaches it, and what is behind it."""

    port: PublicPort
    upstream: Upstream

    def socket(self, address: str = "") -> socket.socket:
        where = ("127.0.0.1", self.port.port)
        return socket.create_connection(where, 6, (address or new_address(), 0))

    def connect(self, address: str = "") -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=self.port.authority)
        plain = self.socket(address)
        try:
            return context.wrap_socket(plain, server_hostname="localhost")
        except OSError:
            plain.close()
            raise

    def ask(self, raw: bytes, address: str = "") -> Answer:
        try:
            with self.connect(address) as connection:
                with contextlib.suppress(OSError):
                    connection.sendall(raw)
                return read_answer(connection)
        except (ConnectionError, ssl.SSLEOFError):
            return Answer(None, {}, b"")


def read_answer(connection: socket.socket) -> Answer:
    """Fails with TimeoutError where nothing comes."""
    response = http.client.HTTPResponse(connection)
    try:
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, response.read())
    except (ConnectionError, http.client.BadStatusLine, ssl.SSLError):
        return Answer(None, {}, b"")
    finally:
        response.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


def a_port(folder: Path) -> PublicPort:
    """A public port with an authority and certificates of its own."""
    now = int(time.time())
    create_authority(folder, "test", now)
    issue_server(folder, ["hub.example.org"], now)
    return PublicPort(
        listen="127.0.0.1",
        port=free_port(),
        certificate=folder / "server.crt",
        key=folder / "server.key",
        superlink_port=free_port(),
        authority=folder / "ca.crt",
        limits=LIMITS,
    )


def wait_until(holds: Callable[[], bool], what: str, timeout: float = 5.0) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def closes(connection: socket.socket) -> bool:
    """Does the other side close, without a word, before the socket's timeout?"""
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@contextlib.contextmanager
def serving(port: PublicPort, **more: Any) -> Iterator[None]:
    stopped = threading.Event()
    thread = threading.Thread(target=serve, args=(port, stopped), kwargs=more)
    thread.start()
    try:
        wait_until(lambda: listens(port.port) or not thread.is_alive(), "the front does not listen")
        yield
    finally:
        stopped.set()
        thread.join(10)
        assert not thread.is_alive()


class FromOutside:
    """What holds of any public port, whoever serves it. `door` is the port."""

    @pytest.fixture(autouse=True)
    def _as_it_was(self, door: Door) -> Iterator[None]:
        yield
        door.upstream.fault, door.upstream.answer = "", b"answer"

    @pytest.mark.parametrize("call", PASSED)
    def test_a_call_on_the_list_is_passed_on(self, door: Door, call: str) -> None:
        door.upstream.whole.clear()
        answer = door.ask(request(f"/v1/fleet/{call}", body=b"\0\1\2"))
        assert (answer.status, answer.body) == (200, b"answer")
        [received] = door.upstream.whole
        assert (received.call, received.body) == (f"/v1/fleet/{call}", b"\0\1\2")

    @pytest.mark.parametrize("path", UNKNOWN)
    def test_another_path_reaches_nothing(self, door: Door, path: str) -> None:
        door.upstream.begun.clear()
        assert door.ask(request(path)).status == 404
        assert door.upstream.begun == []

    @pytest.mark.parametrize("method", METHODS)
    def test_another_method_reaches_nothing(self, door: Door, method: str) -> None:
        door.upstream.begun.clear()
        for path in (PATH, "/v1/control/list-runs"):
            assert door.ask(request(path, method=method)).status == 404
        assert door.upstream.begun == []

    @pytest.mark.parametrize("name", MALFORMED)
    def test_what_is_malformed_reaches_nothing(self, door: Door, name: str) -> None:
        door.upstream.begun.clear()
        answer = door.ask(MALFORMED[name])
        assert answer.status in (None, 400, 404, 405, 413, 414, 431, 501, 505)
        assert door.upstream.begun == []

    @pytest.mark.parametrize("name", BROKEN_CHUNKS)
    def test_a_broken_body_never_comes_to_an_end(self, door: Door, name: str) -> None:
        door.upstream.whole.clear()
        with door.connect() as connection:
            connection.sendall(request(PATH, "Transfer-Encoding: chunked", body=b""))
            connection.sendall(BROKEN_CHUNKS[name])
            answer = read_answer(connection)
        assert answer.status in (None, 400, 408, 413)
        assert door.upstream.whole == []

    @pytest.mark.parametrize("length", ["Content-Length: 0", "Transfer-Encoding: chunked"])
    def test_a_request_behind_a_request_is_judged_by_itself(self, door: Door, length: str) -> None:
        door.upstream.begun.clear()
        body = b"" if length == "Content-Length: 0" else chunked()
        behind = request("/v1/control/start-run") + request("/v1/fleet/register-node")
        with door.connect() as connection:
            connection.sendall(request(PATH, length, body=body) + behind)
            assert read_answer(connection).status == 200
            connection.settimeout(0.3)
            closes(connection)
        assert door.upstream.begun == [f"POST {PATH} HTTP/1.1"]

    def test_several_calls_come_by_one_connection(self, door: Door) -> None:
        door.upstream.whole.clear()
        with door.connect() as connection:
            for number in range(5):
                connection.sendall(request(PATH, body=b"%d" % number))
                assert read_answer(connection).status == 200
        assert [received.body for received in door.upstream.whole] == [b"0", b"1", b"2", b"3", b"4"]

    def test_a_call_is_not_held_up(self, door: Door) -> None:
        # With Nagle's algorithm each takes 40 ms.
        times = []
        with door.connect() as connection:
            for _ in range(10):
                began = time.monotonic()
                connection.sendall(request(PATH))
                assert read_answer(connection).status == 200
                times.append(time.monotonic() - began)
        assert min(times) < 0.03

    def test_of_a_head_what_flower_needs_is_passed_on(self, door: Door) -> None:
        needed = {
            "accept": "application/protobuf",
            "content-type": "application/protobuf",
            "flwr-component-name": "SuperNode",
            "flwr-package-name": "flwr",
            "flwr-package-version": "1.42.0",
            "flwr-public-key": "AAAA",
            "flwr-signature": "BBBB",
            "flwr-timestamp": "2026-11-29T12:00:00+00:00",
        }
        others = {
            "accept-encoding": "gzip",
            "authorization": "Bearer x",
            "connection": "keep-alive, flwr-signature",
            "cookie": "a=b",
            "expect": "100-continue",
            "flwr-task-token": "x",
            "flwr_public_key": "CCCC",
            "forwarded": "for=10.0.0.1",
            "te": "trailers",
            "upgrade": "h2c",
            "user-agent": "x",
            "x-forwarded-for": "10.0.0.1",
            "x-real-ip": "10.0.0.1",
        }
        door.upstream.whole.clear()
        said = [f"{name}: {value}" for name, value in {**others, **needed}.items()]
        with door.connect() as connection:
            connection.sendall(request(PATH, *said))
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert response.status == 200
            response.close()
        [received] = door.upstream.whole
        own = ("host", "content-length", "connection")
        assert {k: v for k, v in received.headers.items() if k not in own} == needed
        assert received.headers["host"].startswith("127.0.0.1")
        assert received.headers.get("connection", "close") == "close"

    def test_of_an_answers_head_what_flower_needs_is_passed_on(self, door: Door) -> None:
        headers = door.ask(request(PATH)).headers
        assert headers["content-type"] == "application/protobuf"
        assert headers["flwr-version-incompatibility-message"] == "old"
        assert headers["date"].endswith("GMT")
        assert not {"set-cookie", "location"} & headers.keys()
        assert headers.get("server", "nginx") == "nginx"

    def test_a_folded_line_is_no_header(self, door: Door) -> None:
        door.upstream.whole.clear()
        folded = request(PATH, "flwr-timestamp: a\r\n flwr-signature: b")
        assert door.ask(folded).status in (200, 400)
        assert not any("flwr-signature" in received.headers for received in door.upstream.whole)

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9093", "superlink", "[::1]"])
    def test_a_host_changes_nothing(self, door: Door, host: str) -> None:
        door.upstream.whole.clear()
        raw = request(PATH).replace(b"hub.example.org", host.encode())
        assert door.ask(raw).status == 200
        assert door.upstream.whole[0].headers["host"].startswith("127.0.0.1")

    def test_a_body_may_be_as_large_as_the_limit(self, door: Door) -> None:
        body = os.urandom(LIMITS.largest_body)
        door.upstream.whole.clear()
        assert door.ask(request(PATH, body=body)).status == 200
        in_chunks = chunked(body[:40_000], body[40_000:])
        raw = request(PATH, "Transfer-Encoding: chunked", body=in_chunks)
        assert door.ask(raw).status == 200
        assert [received.body for received in door.upstream.whole] == [body, body]

    def test_a_body_is_passed_on_as_it_comes(self, door: Door) -> None:
        door.upstream.pieces = 0
        with door.connect() as connection:
            connection.sendall(request(PATH, "Content-Length: 20", body=bytes(10)))
            wait_until(lambda: door.upstream.pieces == 10, "it is held back", 0.8)
            connection.sendall(bytes(10))
            assert read_answer(connection).status == 200

    def test_a_body_that_says_that_it_is_too_large_is_refused_before_it_is_read(
        self, door: Door
    ) -> None:
        door.upstream.begun.clear()
        assert door.ask(request(PATH, f"Content-Length: {LIMITS.largest_body + 1}")).status == 413
        # And who is still sending hears of it.
        assert door.ask(request(PATH, body=bytes(5_000_000))).status == 413
        assert door.upstream.begun == []

    def test_a_body_that_grows_too_large_is_cut_off(self, door: Door) -> None:
        door.upstream.whole.clear()
        door.upstream.pieces = 0
        pieces = [bytes(30_000)] * 5
        raw = request(PATH, "Transfer-Encoding: chunked", body=chunked(*pieces))
        assert door.ask(raw).status == 413
        assert door.upstream.whole == []
        assert door.upstream.pieces <= LIMITS.largest_body

    @pytest.mark.parametrize("how", ["Content-Length: 5", "Transfer-Encoding: chunked"])
    def test_a_body_that_stops_is_cut_off(self, door: Door, how: str) -> None:
        door.upstream.whole.clear()
        began = time.monotonic()
        assert door.ask(request(PATH, how, body=b"1\r\nx")).status in (None, 408)
        assert time.monotonic() - began < 3
        assert door.upstream.whole == []

    def test_a_large_answer_comes_whole(self, door: Door) -> None:
        door.upstream.answer = os.urandom(3_000_000)
        assert door.ask(request(PATH)).body == door.upstream.answer

    @pytest.mark.parametrize(("fault", "status"), [("silent", 504), ("cut", 502)])
    def test_trouble_behind_the_port_is_such_that_a_supernode_tries_again(
        self, door: Door, fault: str, status: int
    ) -> None:
        door.upstream.fault = fault
        assert door.ask(request(PATH)).status == status

    def test_half_an_answer_is_not_taken_for_a_whole_one(self, door: Door) -> None:
        door.upstream.fault, door.upstream.answer = "half", bytes(1000)
        with pytest.raises(http.client.IncompleteRead):
            door.ask(request(PATH))

    def test_who_calls_too_often_is_told_to_wait_and_others_are_served(self, door: Door) -> None:
        door.upstream.begun.clear()
        # The one that a server behind a proxy would believe.
        address = "127.0.0.1"
        answers = []
        with door.connect(address) as connection:
            for _ in range(LIMITS.burst):
                # A false address does not help.
                connection.sendall(request(PATH, f"X-Forwarded-For: {new_address()}"))
                answers.append(read_answer(connection).status)
        answers += [door.ask(request(PATH), address).status for _ in range(20)]
        assert answers[: LIMITS.burst] == [200] * LIMITS.burst
        assert set(answers[LIMITS.burst :]) <= {200, 503}
        refused = answers.count(503)
        assert refused >= 10
        assert len(door.upstream.begun) == len(answers) - refused
        assert "retry-after" in door.ask(request(PATH), address).headers
        assert door.ask(request(PATH)).status == 200

    def test_a_flood_of_activations_is_held_off(self, door: Door) -> None:
        door.upstream.begun.clear()
        address, call = new_address(), request("/v1/fleet/activate-node")
        answers = [door.ask(call, address) for _ in range(20)]
        assert [answer.status for answer in answers] == [200] * 6 + [503] * 14
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert len(door.upstream.begun) == 6
        assert door.ask(request(PATH), address).status == 200
        assert door.ask(call).status == 200

    def test_a_flood_of_registrations_reaches_nothing(self, door: Door) -> None:
        door.upstream.begun.clear()
        address, call = new_address(), request("/v1/fleet/register-node")
        assert {door.ask(call, address).status for _ in range(100)} == {404}
        assert door.upstream.begun == []
        assert door.ask(request(PATH), address).status == 200

    def test_one_address_cannot_take_all_connections(self, door: Door) -> None:
        address = new_address()
        # On a machine that has much to do, the first may be given up before the last is there.
        for _ in range(3):
            with contextlib.ExitStack() as open_ones:
                for _ in range(LIMITS.connections_per_address):
                    connection = open_ones.enter_context(door.connect(address))
                    connection.sendall(request(PATH, "Content-Length: 5"))
                if door.ask(request(PATH), address).status in (None, 503):
                    assert door.ask(request(PATH)).status == 200
                    break
        else:
            pytest.fail("one more was let in")
        wait_until(lambda: door.ask(request(PATH), address).status == 200, "still shut out", 3)

    def test_a_handshake_that_never_ends_is_ended(self, door: Door) -> None:
        with contextlib.ExitStack() as open_ones:
            connections = [open_ones.enter_context(door.socket()) for _ in range(2)]
            connections[1].sendall(b"\x16\x03\x01\x02\x00\x01")
            for connection in connections:
                connection.settimeout(4)
                assert closes(connection)

    def test_a_head_that_never_ends_is_ended(self, door: Door) -> None:
        with contextlib.ExitStack() as open_ones:
            connections = [open_ones.enter_context(door.connect()) for _ in range(3)]
            connections[1].sendall(b"POST /v1/fl")
            connections[2].sendall(request(PATH)[:-4])
            for connection in connections:
                connection.settimeout(4)
                assert read_answer(connection).status in (None, 408)

    def test_a_head_that_comes_in_drops_is_ended(self, door: Door) -> None:
        with door.connect() as connection:
            began = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() - began < 4:
                    connection.sendall(b"P")
                    time.sleep(0.1)
            assert time.monotonic() - began < 3

    def test_without_tls_nothing_is_passed_on(self, door: Door) -> None:
        door.upstream.begun.clear()
        with door.socket() as connection:
            connection.sendall(request(PATH))
            assert read_answer(connection).status in (None, 400)
        assert door.upstream.begun == []

    def test_old_tls_is_refused(self, door: Door) -> None:
        context = ssl.create_default_context(cafile=door.port.authority)
        context.set_ciphers("DEFAULT@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = ssl.TLSVersion.TLSv1_1
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        with door.socket() as plain, pytest.raises(ssl.SSLError, match=r"PROTOCOL_VERSION|EOF"):
            context.wrap_socket(plain, server_hostname="localhost")

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_tls_of_today_is_served(self, door: Door, version: ssl.TLSVersion) -> None:
        context = ssl.create_default_context(cafile=door.port.authority)
        context.minimum_version = context.maximum_version = version
        with context.wrap_socket(door.socket(), server_hostname="localhost") as connection:
            connection.sendall(request(PATH))
            assert read_answer(connection).status == 200


class TestFront(FromOutside):
    @pytest.fixture(scope="class")
    @staticmethod
    def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
        port = a_port(tmp_path_factory.mktemp("front"))
        with Upstream(port) as upstream, serving(port):
            yield Door(port, upstream)

    @pytest.mark.parametrize(
        ("raw", "status"),
        [
            (request("/v1/control/list-runs"), 404),
            (MALFORMED["length and chunks"], 400),
            (request(PATH, "Content-Length: 5"), 408),
            (request(PATH, body=bytes(300_000)), 413),
            (MALFORMED["many headers"], 431),
        ],
    )
    def test_a_refusal_says_why_in_its_status_and_nothing_more(
        self, door: Door, raw: bytes, status: int
    ) -> None:
        answer = door.ask(raw)
        assert (answer.status, answer.body) == (status, b"")
        assert answer.headers.keys() == {"date", "connection", "content-length"}

    def test_no_other_header_of_an_answer_is_passed_on(self, door: Door) -> None:
        assert door.ask(request(PATH)).headers.keys() == {
            *("content-length", "content-type", "date", "flwr-version-incompatibility-message")
        }

    def test_a_question_mark_alone_is_lost_on_the_way(self, door: Door) -> None:
        # uvicorn does not tell it from nothing. It is lost, and not passed on.
        door.upstream.begun.clear()
        assert door.ask(request(f"{PATH}?")).status == 200
        assert door.upstream.begun == [f"POST {PATH} HTTP/1.1"]

    def test_a_body_that_comes_in_drops_is_cut_off(self, door: Door) -> None:
        door.upstream.whole.clear()
        with door.connect() as connection:
            connection.sendall(request(PATH, "Content-Length: 1000"))
            connection.settimeout(0.1)
            for _ in range(30):
                connection.sendall(b"x")
                with contextlib.suppress(TimeoutError):
                    assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
                    break
            else:
                pytest.fail("it was read on and on")
        assert door.upstream.whole == []


def test_all_addresses_together_have_so_many_connections(tmp_path: Path) -> None:
    limits = replace(LIMITS, connections=5, idle_timeout_s=10.0)
    port = replace(a_port(tmp_path), limits=limits)
    with Upstream(port) as upstream, serving(port):
        door = Door(port, upstream)
        wait_until(lambda: door.ask(request(PATH)).status == 200, "it is not served")
        # What was there before may be forgotten a moment late.
        for _ in range(3):
            with contextlib.ExitStack() as open_ones:
                for _ in range(limits.connections):
                    open_ones.enter_context(door.socket())
                if door.ask(request(PATH)).status is None:
                    break
        else:
            pytest.fail("one more was let in")
        wait_until(lambda: door.ask(request(PATH)).status == 200, "still shut out")


def test_who_does_not_read_the_answer_is_given_up(tmp_path: Path) -> None:
    limits = replace(LIMITS, body_timeout_s=60.0, idle_timeout_s=2.0, connections_per_address=3)
    port, address = replace(a_port(tmp_path), limits=limits), new_address()
    with Upstream(port) as upstream, serving(port), contextlib.ExitStack() as open_ones:
        door = Door(port, upstream)
        upstream.answer = bytes(30_000_000)
        for _ in range(limits.connections_per_address):
            open_ones.enter_context(door.connect(address)).sendall(request(PATH))
        wait_until(lambda: len(upstream.whole) == 3, "the calls do not come")
        upstream.answer = b"answer"
        assert door.ask(request(PATH), address).status is None
        wait_until(lambda: door.ask(request(PATH), address).status == 200, "still shut out")


def test_a_superlink_that_the_authority_does_not_vouch_for_is_told_nothing(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    port, other = a_port(tmp_path), a_port(tmp_path / "other")
    impostor = replace(other, superlink_port=port.superlink_port)
    with Upstream(impostor) as upstream, serving(port):
        assert Door(port, upstream).ask(request(PATH)).status == 502
        assert upstream.begun == []


def test_a_renewed_certificate_is_served_and_a_bad_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = a_port(tmp_path)

    def served() -> bytes | None:
        context = ssl.create_default_context(cafile=port.authority)
        with (
            door.socket() as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            return connection.getpeercert(binary_form=True)

    def in_file() -> bytes:
        found = x509.load_pem_x509_certificate(port.certificate.read_bytes())
        return found.public_bytes(Encoding.DER)

    with Upstream(port) as upstream, serving(port):
        door = Door(port, upstream)
        first = served()
        assert first == in_file()
        with door.connect() as before:
            issue_server(tmp_path, ["other.example.org"], int(time.time()))
            assert in_file() != first
            wait_until(lambda: served() == in_file(), "the renewed certificate is not served")
            second = served()
            before.sendall(request(PATH))
            assert read_answer(before).status == 200
        for content in ("-----BEGIN CERTIFICATE-----\nx\n", ""):
            port.certificate.write_text(content)
            wait_until(lambda: "is served on" in caplog.text, "nobody is told")
            caplog.clear()
            assert served() == second
        port.certificate.unlink()
        wait_until(lambda: "is served on" in caplog.text, "nobody is told")
        assert served() == second


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    port, stopped = a_port(tmp_path), threading.Event()
    stopped.set()
    with (
        socket.create_server(("127.0.0.1", port.port)),
        pytest.raises(FrontError, match=f"cannot listen on 127.0.0.1:{port.port}: Address already"),
    ):
        serve(port, stopped)
    with pytest.raises(FrontError, match=r"absent.crt and server.key: cannot be used: No such"):
        serve(replace(port, certificate=tmp_path / "absent.crt"), stopped)
    with pytest.raises(FrontError, match=r"absent.crt: cannot be used: No such"):
        serve(replace(port, authority=tmp_path / "absent.crt"), stopped)
    key = load_pem_private_key(port.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    port.key.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )
    with pytest.raises(FrontError, match=r"server.key: cannot be used"):
        serve(port, stopped)
    serve(replace(port, key=tmp_path / "ca.key", certificate=tmp_path / "ca.crt"), stopped)


_SERVE = """
import sys
from pathlib import Path
from server.front import serve_hub
from server.hub import HubFolder
from service.processes import until_stopped
with until_stopped() as stopped:
    serve_hub(HubFolder(Path(sys.argv[1])), stopped)
print("ended")
"""


def test_a_signal_ends_it_in_time_whatever_is_going_on(tmp_path: Path) -> None:
    config = HubConfig(
        host="localhost", listen="127.0.0.1", port=free_port(), superlink_port=free_port()
    )
    hub = create_hub(tmp_path / "hub", config, int(time.time()))
    port = public_port(hub)
    with (
        Upstream(port) as upstream,
        subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(hub.path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        try:
            wait_until(lambda: listens(port.port), "the front does not listen", 20)
            door = Door(port, upstream)
            assert door.ask(request(PATH)).status == 200
            with door.connect() as resting, door.connect() as calling, door.socket():
                calling.sendall(request(PATH, "Content-Length: 5"))
                wait_until(lambda: len(upstream.begun) == 2, "the call does not come")
                process.send_signal(signal.SIGTERM)
                said, _ = process.communicate(timeout=9)
                assert closes(resting)
            assert (process.returncode, said) == (0, "ended\n")
        finally:
            process.kill()


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PublicPort]:
    """Flower's own SuperLink, as a hub starts it, behind the front."""
    folder = tmp_path_factory.mktemp("superlink")
    config = HubConfig(
        host="localhost", listen="127.0.0.1", port=free_port(), superlink_port=free_port()
    )
    hub = create_hub(folder / "hub", config, int(time.time()))
    port, stopped = public_port(hub), threading.Event()
    front = threading.Thread(target=serve_hub, args=(hub, stopped))
    with (folder / "log").open("w") as log_file:
        process = subprocess.Popen(
            [
                *(sys.executable, "-c"),
                "from flwr.superlink.cli import flower_superlink; flower_superlink()",
                *("--host", "127.0.0.1", "--port", str(port.superlink_port)),
                *("--ssl-certfile", str(port.certificate), "--ssl-keyfile", str(port.key)),
                *("--ssl-ca-certfile", str(port.authority), "--isolation", "process"),
                *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
            ],
            env={
                **os.environ,
                "FLWR_HOME": str(folder),
                "FLWR_TELEMETRY_ENABLED": "0",
                "FLWR_DISABLE_UPDATE_CHECK": "1",
            },
            stdout=log_file,
            stderr=subprocess.STDOUT,
        )
        try:
            front.start()
            wait_until(lambda: listens(port.superlink_port), "the SuperLink does not start", 60)
            yield port
        finally:
            stopped.set()
            process.kill()
            process.wait()
            front.join(10)


def refused(call: Callable[[Any], object], request_: object) -> int:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        call(request_)
    return caught.value.response.status_code


def test_a_key_that_is_not_registered_gets_nothing_from_flowers_superlink(
    superlink: PublicPort,
) -> None:
    private, public = generate_key_pairs()
    key = public_key_to_bytes(public)
    with FleetHttpClient.from_server_address(
        f"localhost:{superlink.port}",
        insecure=False,
        root_certificates=superlink.authority.read_bytes(),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(private, public),
        ],
    ) as client:
        assert refused(client.PullMessages, PullMessagesRequest(node=Node(node_id=1))) == 401
        assert refused(client.ActivateNode, ActivateNodeRequest(public_key=key)) >= 400
        assert refused(client.RegisterNode, RegisterNodeFleetRequest(public_key=key)) == 404
        assert refused(client.GetFab, GetFabRequest(node=Node(node_id=1))) == 404
        assert refused(client.ActivateNode, ActivateNodeRequest(public_key=key)) >= 400


def test_control_of_flowers_superlink_is_not_to_be_had_from_outside(
    superlink: PublicPort,
) -> None:
    def control(port: int) -> ControlHttpClient:
        return ControlHttpClient.from_server_address(
            f"localhost:{port}", False, superlink.authority.read_bytes(), interceptors=[]
        )

    with control(superlink.superlink_port) as inside:
        inside.ListNodes(ListNodesRequest())
    with control(superlink.port) as outside:
        assert refused(outside.ListNodes, ListNodesRequest()) == 404


def test_a_registered_supernode_has_all_that_it_needs(superlink: PublicPort) -> None:
    private, public = generate_key_pairs()
    authority = superlink.authority.read_bytes()
    inside = SuperLink(f"localhost:{superlink.superlink_port}", authority)
    inside.register(public_key_to_bytes(public), "acme")
    with http_request_response(
        f"localhost:{superlink.port}",
        insecure=False,
        root_certificates=authority,
        authentication_keys=(private, public),
    ) as (node, receive, *_):
        assert receive() is None
        [seen] = inside.nodes()
        assert (seen.id, seen.online) == (node, True)
    assert not inside.nodes()[0].online


SCOPE = {
    "type": "http",
    "method": "POST",
    "http_version": "1.1",
    "raw_path": PATH.encode(),
    "query_string": b"",
    "headers": [],
    "client": ("127.0.0.1", 1),
}


def run_app(front: Front, *requests: httpx.Request) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(front, client=("2001:db8::1", 1)), base_url="https://hub"
        ) as client:
            return [await client.send(request_) for request_ in requests]

    return asyncio.run(run())


def a_call(call: str = "pull-messages", **more: Any) -> httpx.Request:
    return httpx.Request("POST", f"https://hub/v1/fleet/{call}", **more)


def a_front(
    answer: Callable[[httpx.Request], httpx.Response] | None = None,
    registry: CollectorRegistry | None = None,
    limits: Limits = LIMITS,
) -> Front:
    transport = httpx.MockTransport(answer or (lambda _: httpx.Response(200, content=b"answer")))
    return Front("https://127.0.0.1:1", transport, limits, registry)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (httpx.ConnectError("no"), 502),
        (httpx.ReadError("no"), 502),
        (httpx.RemoteProtocolError("no"), 502),
        (httpx.ConnectTimeout("no"), 504),
        (httpx.ReadTimeout("no"), 504),
        (httpx.PoolTimeout("no"), 504),
    ],
)
def test_an_error_of_the_way_to_the_superlink_has_a_status(error: Exception, status: int) -> None:
    def fail(_: httpx.Request) -> httpx.Response:
        raise error

    [answer] = run_app(a_front(fail), a_call())
    assert (answer.status_code, answer.content) == (status, b"")


def test_what_the_superlink_refuses_is_passed_on() -> None:
    [answer] = run_app(a_front(lambda _: httpx.Response(401, json={"detail": "no"})), a_call())
    assert (answer.status_code, answer.json()) == (401, {"detail": "no"})


def test_a_body_is_passed_on_piece_by_piece() -> None:
    """What was sent is at the SuperLink before there is more; the same on the way back."""
    log: list[str] = []

    class Way(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request_: httpx.Request) -> httpx.Response:
            assert isinstance(request_.stream, httpx.AsyncByteStream)
            async for piece in request_.stream:
                log.append(f"SuperLink got {piece.decode()}")
            return httpx.Response(200, stream=Back())

    class Back(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for piece in (b"d", b"e"):
                log.append(f"SuperLink says {piece.decode()}")
                yield piece

    pieces = [(b"a", True), (b"b", True), (b"c", False)]

    async def receive() -> dict[str, Any]:
        body, more = pieces.pop(0)
        log.append(f"site says {body.decode()}")
        return {"type": "http.request", "body": body, "more_body": more}

    async def send(message: Any) -> None:
        if message.get("body"):
            log.append(f"site got {message['body'].decode()}")

    front = Front("https://127.0.0.1:1", Way(), LIMITS)
    asyncio.run(front(SCOPE, receive, send))
    up = [f"{who} {piece}" for piece in "abc" for who in ("site says", "SuperLink got")]
    assert log == up + [
        f"{who} {piece}" for piece in "de" for who in ("SuperLink says", "site got")
    ]


@pytest.mark.parametrize("how", ["breaks off", "never ends"])
def test_an_answer_that_is_not_whole_is_not_ended(how: str) -> None:
    class Back(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"half"
            if how == "breaks off":
                raise httpx.ReadError("gone")
            while True:
                await asyncio.sleep(0.01)
                yield b"more"

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    limits = replace(LIMITS, body_timeout_s=0.1)
    front = a_front(lambda _: httpx.Response(200, stream=Back()), limits=limits)
    asyncio.run(asyncio.wait_for(front(SCOPE, receive, send), 2))
    assert sent[0]["status"] == 200
    assert sent[1]["body"] == b"half"
    assert all(message["more_body"] for message in sent[1:])


def test_requests_and_refusals_are_counted() -> None:
    registry = CollectorRegistry()
    front = a_front(registry=registry)
    activations = [a_call("activate-node") for _ in range(8)]
    too_large = a_call(content=bytes(LIMITS.largest_body + 1))
    run_app(front, a_call(), a_call("register-node"), too_large, *activations)

    def count(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"conversion_hub_{name}_total", labels)

    assert count("requests", call="pull-messages", status="200") == 1
    assert count("requests", call="pull-messages", status="413") == 1
    assert count("requests", call="activate-node", status="200") == 6
    assert count("requests", call="activate-node", status="503") == 2
    assert count("requests", call="other", status="404") == 1
    assert count("refusals", reason="unknown call") == 1
    assert count("refusals", reason="too large") == 1
    assert count("refusals", reason="too frequent") == 2


def test_other_protocols_of_asgi_are_answered() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run(kind: str, *events: str) -> None:
        left = list(events)

        async def receive() -> dict[str, Any]:
            return {"type": left.pop(0)}

        await a_front()({"type": kind, "path": PATH}, receive, send)

    asyncio.run(run("lifespan", "lifespan.startup", "lifespan.shutdown"))
    asyncio.run(run("websocket", "websocket.connect"))
    assert [message["type"] for message in sent] == [
        *("lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close")
    ]


def test_a_rate_is_a_burst_and_then_so_many_a_second() -> None:
    rate = Rate(per_s=2.0, burst=3)
    now = 123_456.789
    assert [rate.wait("a", now) for _ in range(5)] == [0, 0, 0, 0.5, 0.5]
    assert rate.wait("b", now) == 0
    assert rate.wait("a", now + 0.4) == pytest.approx(0.1)
    assert [rate.wait("a", now + 0.5) for _ in range(2)] == [0, 0.5]
    assert [rate.wait("a", now + 100) for _ in range(4)] == [0, 0, 0, 0.5]


def test_a_rate_forgets_who_was_quiet_the_longest() -> None:
    rate = Rate(per_s=1.0, burst=1)
    rate.wait("busy", 0.0)
    for number in range(20_000):
        rate.wait(f"address {number}", 0.0)
        assert rate.wait("busy", 0.0) == 1.0
    assert len(rate) == 10_000


def test_an_ipv6_address_is_served(tmp_path: Path) -> None:
    port = replace(a_port(tmp_path), listen="::1")
    stopped = threading.Event()
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    thread = threading.Thread(target=serve, args=(port, stopped))
    thread.start()
    try:
        context = ssl.create_default_context(cafile=port.authority)

        def is_served() -> bool:
            with contextlib.suppress(ConnectionRefusedError):
                plain = socket.create_connection(("::1", port.port), 5)
                with context.wrap_socket(plain, server_hostname="localhost") as connection:
                    connection.sendall(request("/"))
                    return read_answer(connection).status == 404
            return False

        wait_until(is_served, "it is not served")
    finally:
        stopped.set()
        thread.join(10)


def test_an_ipv6_network_is_one_address() -> None:
    front = a_front(limits=replace(LIMITS, burst=1))

    async def run(client: str) -> int:
        way = httpx.ASGITransport(front, client=(client, 1))
        async with httpx.AsyncClient(transport=way) as asking:
            return (await asking.post(f"https://hub{PATH}")).status_code

    clients = ("2001:db8::1", "2001:db8::ffff:1", "2001:db8:0:1::1", "127.0.0.1", "127.0.0.2")
    assert [asyncio.run(run(client)) for client in clients] == [200, 503, 200, 200, 200]
