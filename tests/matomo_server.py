"""A real HTTP server on loopback that speaks `Live.getLastVisitsDetails`, and fails on demand.

`with MatomoServer() as matomo` serves `matomo.visits` (of `api_visit`) at `matomo.url`, and the
next requests meet `matomo.faults`, such as `["503", "cut"]`. `matomo.requests` and `matomo.log`
tell what came.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qsl

_METHOD = {
    "module": "API",
    "method": "Live.getLastVisitsDetails",
    "format": "JSON",
    "period": "range",
}
TOKEN = "t0ken-that-nobody-may-see"


class MatomoServer:
    """Answers as Matomo 5 does, out of `visits`, with the faults of `faults` first."""

    def __init__(self) -> None:
        self.visits: list[Any] = []
        self.pages: list[Any] = []
        """Answers to the next requests, in place of what `visits` would give."""
        self.site = 1
        self.faults: list[str] = []
        """Of each next request: a status (`429`, with `429:7` asking to wait), `cut` (half a
        body), `half json`, `html`, `hang`, `reset`, `list` or `error:WORDS`."""
        self.requests: list[dict[str, str]] = []
        self.log: list[str] = []
        """What a server's access log would hold: addresses and headers, no body."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.matomo = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, asked: dict[str, str]) -> Any:
        if asked.get("token_auth") != TOKEN:
            return _error("You can't access this resource as it requires a valid token_auth.")
        if any(asked.get(name) != value for name, value in _METHOD.items()):
            return _error("The method is not available.")
        if int(asked["idSite"]) != self.site:
            return _error("You can't access this resource: no 'view' access for the website.")
        if self.pages:
            return self.pages.pop(0)
        begin, end = (_seconds(day) for day in asked["date"].split(","))
        oldest = max(begin, int(asked.get("minTimestamp", 0)) + 1)
        found = [v for v in self.visits if oldest <= _last(v) < end + 86400]
        # A site's visits by last action; a stable sort, as the table's index gives it.
        found.sort(key=_last, reverse=asked.get("filter_sort_order") != "asc")
        offset, limit = int(asked.get("filter_offset", 0)), int(asked.get("filter_limit", 100))
        shown = asked.get("showColumns", "")
        if asked.get("language") != "en":
            found = [visit | {"deviceType": "Gerät"} for visit in found]
        return [
            _without(_only(visit, shown.split(",")), set(asked.get("hideColumns", "").split(",")))
            for visit in found[offset : offset + limit]
        ]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        matomo: MatomoServer = self.server.matomo  # type: ignore[attr-defined]
        asked = dict(parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
        matomo.requests.append(asked)
        matomo.log.append(f"{self.requestline}\n{self.headers}")
        fault = matomo.faults.pop(0) if matomo.faults else ""
        body = json.dumps(matomo.answer(asked)).encode()
        name, _, more = fault.partition(":")
        if name.isdigit():
            extra = {"Retry-After": more} if more and name == "429" else {}
            extra |= {"Location": more} if name.startswith("3") else {}
            self._send(b"sorry", int(name), extra)
        elif name == "cut":
            self._send(body, cut=len(body) // 2)
        elif name == "half json":
            self._send(body[: len(body) // 2])
        elif name == "html":
            self._send(b"<b>Fatal error</b>")
        elif name == "hang":
            time.sleep(1.0)
        elif name == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif name == "list":
            self._send(b'{"value": 1}')
        elif name == "error":
            self._send(json.dumps(_error(more)).encode())
        else:
            self._send(body)

    def do_GET(self) -> None:
        matomo: MatomoServer = self.server.matomo  # type: ignore[attr-defined]
        matomo.log.append(f"{self.requestline}\n{self.headers}")
        self._send(b"", 405)

    def _send(
        self,
        body: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, *_: object) -> None:
        pass


def _error(message: str) -> dict[str, str]:
    return {"result": "error", "message": message}


def _seconds(day: str) -> int:
    return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp())


def _last(visit: Any) -> int:
    return int(visit["lastActionTimestamp"])


def _only(visit: Any, fields: list[str]) -> Any:
    if not isinstance(visit, dict) or fields == [""]:
        return visit
    return {name: value for name, value in visit.items() if name in fields}


def _without(value: Any, hidden: set[str]) -> Any:
    if isinstance(value, dict):
        return {n: _without(v, hidden) for n, v in value.items() if n not in hidden}
    if isinstance(value, list):
        return [_without(v, hidden) for v in value]
    return value


NOON = 1_780_315_200
"""1 June 2026, 12:00 UTC."""


def api_visit(number: int, **changed: Any) -> dict[str, Any]:
    """A visit as Matomo's API gives it: direct, on a desktop, five minutes, one a minute."""
    begin = NOON + 60 * number
    return {
        "idSite": 1,
        "idVisit": str(number),
        "visitIp": "10.0.0.1",
        "userId": "somebody@example.org",
        "visitorId": f"{number:016x}",
        "firstActionTimestamp": begin,
        "lastActionTimestamp": begin + 300,
        "visitDuration": "300",
        "actions": "4",
        "visitCount": "1",
        "referrerType": "direct",
        "referrerName": "",
        "referrerKeyword": "",
        "referrerUrl": "",
        "deviceType": "Desktop",
        "countryCode": "de",
        "goalConversions": 0,
        "totalEcommerceRevenue": "999.00",
        "dimension1": "yes",
        "actionDetails": [
            {"type": "action", "url": "https://example.org/private", "pageTitle": "Private"}
        ],
        **changed,
    }
