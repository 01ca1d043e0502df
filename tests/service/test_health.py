from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator, Mapping

import pytest
from prometheus_client import CollectorRegistry, Counter

from service import health
from service.health import HealthError, HealthServer


class Watched:
    """A process whose health a test sets."""

    def __init__(self) -> None:
        self.well = True
        self.fails = False
        self.registry = CollectorRegistry()
        self.rounds = Counter("rounds", "Rounds so far.", registry=self.registry)

    def health(self) -> tuple[bool, Mapping[str, object]]:
        if self.fails:
            raise ValueError("visitor 4711")
        return self.well, {"state": "waiting" if self.well else "stuck"}


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def server(watched: Watched) -> Iterator[HealthServer]:
    with HealthServer(0, watched.health, watched.registry) as server:
        yield server


def ask(
    server: HealthServer, path: str, method: str = "GET", body: bytes | None = None
) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read().decode()
    finally:
        connection.close()


def connect(server: HealthServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=5)


def closed(client: socket.socket) -> bool:
    """Whether the server ends the connection without an answer."""
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True


def test_health(server: HealthServer, watched: Watched) -> None:
    status, kind, body = ask(server, "/health")
    assert (status, kind, json.loads(body)) == (200, "application/json", {"state": "waiting"})
    watched.well = False
    status, kind, body = ask(server, "/health")
    assert (status, kind, json.loads(body)) == (503, "application/json", {"state": "stuck"})


def test_metrics(server: HealthServer, watched: Watched) -> None:
    watched.rounds.inc(3)
    status, kind, body = ask(server, "/metrics")
    assert status == 200
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    assert "\nrounds_total 3.0\n" in body


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/health/"),
        ("GET", "/health?x=1"),
        ("GET", "/../etc/passwd"),
        ("POST", "/health"),
        ("PUT", "/metrics"),
        ("DELETE", "/health"),
        ("get", "/health"),
    ],
)
def test_there_is_nothing_else(server: HealthServer, method: str, path: str) -> None:
    body = b"x" if method in ("POST", "PUT") else None
    assert ask(server, path, method, body)[0] == 404


@pytest.mark.parametrize("head", [b"\r\n\r\n", b"GET\r\n\r\n", b"\xff \xff \xff\r\n\r\n"])
def test_what_is_no_request_is_not_found(server: HealthServer, head: bytes) -> None:
    with connect(server) as client:
        client.sendall(head)
        assert client.recv(100).startswith(b"HTTP/1.1 404 ")


def test_a_failure_is_a_503_without_its_text(
    server: HealthServer, watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    health.log.disabled = False
    watched.fails = True
    status, _, body = ask(server, "/health")
    assert status == 503
    assert "4711" not in body
    assert "/health cannot be answered" in caplog.text
    watched.fails = False
    assert ask(server, "/health")[0] == 200


def test_large_requests_are_dropped(server: HealthServer) -> None:
    with connect(server) as client:
        client.sendall(b"GET /" + b"x" * 9000)
        assert closed(client)
    assert ask(server, "/health")[0] == 200


def test_slow_requests_are_dropped(server: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_TIMEOUT_S", 0.2)
    began = time.monotonic()
    with connect(server) as client:

        def trickle() -> None:
            # Each byte comes in time, all of them do not.
            while time.monotonic() - began < 5:
                client.sendall(b"x")
                time.sleep(0.02)

        with pytest.raises(OSError, match=r"reset|pipe"):
            trickle()
        assert time.monotonic() - began < 2


def test_idle_connections_leave_room_for_a_limited_number(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_TIMEOUT_S", 0.5)
    idle = [connect(server) for _ in range(16)]
    try:
        with connect(server) as client:
            assert closed(client)
        assert all(closed(one) for one in idle)
        assert ask(server, "/health")[0] == 200
    finally:
        for one in idle:
            one.close()


def test_nothing_is_written_to_the_terminal(
    server: HealthServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(server, "/health")
    ask(server, "/no")
    with connect(server) as client:
        client.sendall(b"GET /health HTTP/1.1\r\n")
    assert capfd.readouterr() == ("", "")


def test_other_addresses_are_not_served(server: HealthServer) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.port), timeout=5)


def test_a_port_that_is_taken_is_an_error(server: HealthServer, watched: Watched) -> None:
    taken = HealthServer(server.port, watched.health, watched.registry)
    with pytest.raises(HealthError, match=f"health port {server.port}: .*in use"), taken:
        pytest.fail("entered")
    with (
        pytest.raises(HealthError, match="health port 70000"),
        HealthServer(70000, watched.health, watched.registry),
    ):
        pytest.fail("entered")


def test_it_closes_at_once_and_can_be_opened_again(watched: Watched) -> None:
    with HealthServer(0, watched.health, watched.registry) as server:
        client = connect(server)
        began = time.monotonic()
    assert time.monotonic() - began < 1
    client.close()
    with pytest.raises(ConnectionRefusedError):
        connect(server)
    with HealthServer(server.port, watched.health, watched.registry) as again:
        assert ask(again, "/health")[0] == 200
