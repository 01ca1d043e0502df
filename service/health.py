"""What monitoring asks a process: whether it is well, and its figures."""

from __future__ import annotations

import json
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

_LONGEST_HEAD = 8192
_TIMEOUT_S = 5.0
_AT_ONCE = 16

log = logging.getLogger(__name__)


class HealthError(RuntimeError):
    """The port cannot be had. The message names it."""


class HealthServer:
    """Serves `/health` and `/metrics` to this machine only, while the context is open.

    `/health`: what `health` says, as JSON; 200 if all is well, 503 if it is not. `/metrics`: the
    registry as Prometheus reads it. Anything else is 404. No request is larger than 8 KiB or takes
    longer than 5 s, and at most 16 are served at once. Every user of this machine may ask.
    """

    def __init__(
        self,
        port: int,
        health: Callable[[], tuple[bool, Mapping[str, object]]],
        registry: CollectorRegistry,
    ) -> None:
        """`port` 0: a free one. `health` is called in other threads."""
        self.port = port
        self._health = health
        self._registry = registry

    def __enter__(self) -> Self:
        """Open the port; `port` says which it is.

        Raises:
            HealthError: It cannot be opened.
        """
        try:
            self._server = _Server(("127.0.0.1", self.port), self._answer)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not 0 to 65535"
            raise HealthError(f"health port {self.port}: cannot be opened: {reason}") from error
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, method: str, path: str) -> tuple[str, str, bytes]:
        """Status, content type and body."""
        match method, path:
            case "GET", "/health":
                well, said = self._health()
                body = json.dumps(dict(said)).encode() + b"\n"
                return "200 OK" if well else "503 Service Unavailable", "application/json", body
            case "GET", "/metrics":
                return "200 OK", CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self._registry)
            case _:
                return "404 Not Found", "text/plain", b"there are /health and /metrics\n"


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = _AT_ONCE

    def __init__(
        self, address: tuple[str, int], answer: Callable[[str, str], tuple[str, str, bytes]]
    ) -> None:
        self.answer = answer
        self._places = threading.BoundedSemaphore(_AT_ONCE)
        super().__init__(address, _Request)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            # No thread could be started.
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a health request failed")


class _Request(socketserver.BaseRequestHandler):
    server: _Server
    request: socket.socket

    def handle(self) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        try:
            head = b""
            while b"\r\n\r\n" not in head:
                self.request.settimeout(max(deadline - time.monotonic(), 0.001))
                more = self.request.recv(_LONGEST_HEAD - len(head))
                if not more:
                    # It ended, or is too long.
                    return
                head += more
            # Nothing but the first line matters: there is no body to read, and the answer is the
            # same for everybody.
            method, path, *_ = [*head.split(b"\r\n")[0].decode("latin-1").split(" "), ""]
            status, kind, body = self._answer(method, path)
            said = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            self.request.sendall(f"{said}Connection: close\r\n\r\n".encode() + body)
        except OSError:
            # Too late, or gone.
            return

    def _answer(self, method: str, path: str) -> tuple[str, str, bytes]:
        try:
            return self.server.answer(method, path)
        except Exception:
            log.exception("%s cannot be answered", path)
            return "503 Service Unavailable", "text/plain", b"cannot be answered, see the log\n"
