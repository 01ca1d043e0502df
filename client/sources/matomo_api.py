"""Visits out of Matomo's HTTP API, `Live.getLastVisitsDetails`.

Visits are asked for in the order of their last action, and only settled ones: those whose last
action is older than `settle_minutes`, which stay as they are. The cursor is the last action of
the last visit read and how many visits of that very second were read, so that no page depends on
how many came before it.

The token stands in the body of each request and nowhere else. Matomo tells a visit's revenue and
its orders only as actions of the visit: of these, nothing but type, goal and revenue is read.
"""

from __future__ import annotations

import http.client
import json
import math
import random
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlencode, urlsplit

import polars as pl

from client.secret import read_password
from client.sources.matomo import DEVICE, RECORDS, REFERRERS, to_visits
from client.sources.source import VISITS, Batch, Cursor, Skipped, SourceError, added_up
from conf.site import MatomoApiSource

_BATCH = 10_000
"""Most visits in a batch: at some hundred visits a second, no more is lost by a killed ingest."""

_FIELDS = (
    "idVisit",
    "visitorId",
    "firstActionTimestamp",
    "lastActionTimestamp",
    "visitDuration",
    "actions",
    "visitCount",
    "referrerType",
    "referrerName",
    "referrerKeyword",
    "campaignName",
    "campaignSource",
    "campaignMedium",
    "campaignKeyword",
    "deviceType",
    "countryCode",
    "actionDetails",
    "truncatedActionsCount",
)
_HIDDEN = (
    "url",
    "title",
    "subtitle",
    "pageTitle",
    "pageIdAction",
    "eventCategory",
    "eventAction",
    "eventName",
    "siteSearchKeyword",
    "orderId",
    "itemDetails",
    "customVariables",
)
"""Fields of actions that Matomo need not send."""

_NAMES = {
    "visitor_id": 'field "visitorId"',
    "time": 'field "firstActionTimestamp"',
    "duration_s": 'field "visitDuration"',
    "page_views": 'field "actions"',
    "visit_number": 'field "visitCount"',
}
_REFERRERS = frozenset(REFERRERS.values())
_FIRST_DAY = date(1991, 8, 7)
"""Matomo refuses earlier days."""
_LONGEST_PAUSE = 300.0


class MatomoApi:
    """The visits of one site, from a Matomo that is reached by HTTP."""

    def __init__(
        self,
        config: MatomoApiSource,
        folder: Path,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`folder`: what `token_file` is relative to. Raises `SecretError`, `SourceError`."""
        self._config = config
        self._url = _endpoint(config.url)
        self._host = urlsplit(self._url).hostname or ""
        self._token = read_password(folder / config.token_file)
        given = (config.consent_dimension, config.purposes_dimension)
        self._dimensions = [number for number in given if number]
        self._start = _day(config.start) if config.start else _FIRST_DAY
        self._sleep = sleep
        self._open = urllib.request.build_opener(_NoRedirect).open

    def check(self) -> None:
        """See `Source.check`. Asks for one visit."""
        now = int(datetime.now(UTC).timestamp())
        position = _Position(_midnight(self._start))
        for visit in self._page(position, now, limit=1):
            if not isinstance(visit, dict) or not visit.get("visitorId"):
                raise self._error("visits have no visitor id; its visits log may be switched off")
            for number in self._dimensions:
                if f"dimension{number}" not in visit:
                    raise self._error(f"visits have no custom dimension {number}")

    def batches(self, cursor: Cursor | None, now: int) -> Iterator[Batch]:
        """See `Source.batches`."""
        position = _Position(**cursor) if cursor else _Position(_midnight(self._start))
        settled = now - 60 * self._config.settle_minutes
        most = min(self._config.batch, _BATCH)
        page: list[Any] = []
        pages, failed, more = _Pages(), None, True
        while more:
            try:
                before, page = page, self._page(position, now, limit=self._config.page)
                if page and page == before:
                    raise self._error("gives the same page again and again")
                more, position = self._take(pages, page, position, settled)
            except SourceError as error:
                # What was read before it is good.
                failed, more = error, False
            if pages.rows and (pages.rows >= most or not more):
                yield pages.batch(position)
                pages = _Pages()
        if failed is not None:
            raise failed

    def _take(
        self, pages: _Pages, page: list[Any], position: _Position, settled: int
    ) -> tuple[bool, _Position]:
        """Add a page's settled visits. Returns whether there may be more, and where they begin."""
        seconds = [_last_action(visit) for visit in page]
        known = [second for second in seconds if second is not None]
        if page and not known:
            raise self._error('no visit of a page has a field "lastActionTimestamp"')
        if known != sorted(known) or (known and known[0] < position.second):
            raise self._error("visits do not come in the order of their last action")
        taken = [
            visit
            for visit, second in zip(page, seconds, strict=True)
            if second is None or second < settled
        ]
        pages.add([self._record(visit) for visit in taken])
        known = [second for second in known if second < settled]
        if not known:
            return False, position
        again = position.taken if known[-1] == position.second else 0
        after = _Position(known[-1], again + known.count(known[-1]))
        return len(taken) == len(page), after

    def _record(self, visit: Any) -> dict[str, Any] | str:
        """A row of `RECORDS`, or what is wrong with the visit."""
        if not isinstance(visit, dict):
            return "is no visit"
        number = _whole(visit.get("idVisit"))
        if number is None:
            return 'field "idVisit": is no number'
        if _last_action(visit) is None:
            return 'field "lastActionTimestamp": is no number'
        if _whole(visit.get("truncatedActionsCount")) not in (None, 0):
            return (
                'field "actionDetails": Matomo cut it short (visitor_log_maximum_actions_per_visit)'
            )
        revenues = self._conversions(visit.get("actionDetails"))
        if isinstance(revenues, str):
            return f'field "actionDetails": {revenues}'
        kind = _text(visit.get("referrerType")).lower()
        kind = "ai assistant" if kind.startswith("ai") else kind
        return {
            "visit_id": str(number),
            "visitor_id": _text(visit.get("visitorId")).lower(),
            "time": _whole(visit.get("firstActionTimestamp")),
            "duration_s": _whole(visit.get("visitDuration")),
            "page_views": _whole(visit.get("actions")),
            "visit_number": _whole(visit.get("visitCount")),
            "referrer_type": kind if kind in _REFERRERS else None,
            "referrer_name": _text(visit.get("referrerName")),
            "referrer_keyword": _text(visit.get("referrerKeyword")),
            "campaign_name": _text(visit.get("campaignName")),
            "campaign_source": _text(visit.get("campaignSource")),
            "campaign_medium": _text(visit.get("campaignMedium")),
            "campaign_keyword": _text(visit.get("campaignKeyword")),
            "device": DEVICE.get(_text(visit.get("deviceType")).lower()),
            "country": _text(visit.get("countryCode")),
            "consent": self._dimension(visit, self._config.consent_dimension),
            "purposes": self._dimension(visit, self._config.purposes_dimension),
            "converted": bool(revenues),
            "revenue": math.fsum(revenues),
        }

    def _conversions(self, actions: Any) -> list[float] | str:
        """Revenue of each counted conversion, or what is wrong with the actions."""
        if not isinstance(actions, list):
            return "is missing"
        revenues = []
        for action in actions:
            kind = action.get("type") if isinstance(action, dict) else None
            # A goal that was deleted since has no number; it counts where all do.
            goal = _whole(action.get("goalId")) if kind == "goal" else 0
            counts = not self._config.goals or goal in self._config.goals
            if kind in ("goal", "ecommerceOrder") and counts:
                revenue = _amount(action.get("revenue"))
                if revenue is None:
                    return "holds a revenue that is no number"
                revenues.append(revenue)
        return revenues

    @staticmethod
    def _dimension(visit: dict[str, Any], number: int) -> str | None:
        return _text(visit.get(f"dimension{number}")) if number else None

    # ------------------------------------------------------------------------ requests

    def _page(self, position: _Position, now: int, *, limit: int) -> list[Any]:
        """The next visits after `position`. Raises `SourceError` once all retries have failed."""
        fields = [*_FIELDS, *(f"dimension{number}" for number in self._dimensions)]
        day = timedelta(days=1)
        begin = max(_FIRST_DAY, datetime.fromtimestamp(position.second, UTC).date() - day)
        end = datetime.fromtimestamp(now, UTC).date() + day
        answer = self._ask(
            {
                "module": "API",
                "method": "Live.getLastVisitsDetails",
                "format": "JSON",
                "language": "en",
                "idSite": str(self._config.site_id),
                "period": "range",
                "date": f"{begin},{max(begin, end)}",
                "minTimestamp": str(position.second - 1),
                "filter_sort_order": "asc",
                "filter_offset": str(position.taken),
                "filter_limit": str(limit),
                "showColumns": ",".join(fields),
                "hideColumns": ",".join(_HIDDEN),
                "token_auth": self._token,
            }
        )
        if isinstance(answer, dict) and answer.get("result") == "error":
            raise self._error(_refusal(answer.get("message")))
        if not isinstance(answer, list):
            raise self._error("the answer is no list of visits; is this Matomo?")
        return answer

    def _ask(self, parameters: dict[str, str]) -> Any:
        request = urllib.request.Request(
            self._url,
            data=urlencode(parameters).encode(),
            headers={"Content-Type": "application/x-www-form-urlencoded"},
        )
        for attempt in range(self._config.retries + 1):
            try:
                return self._answer(request)
            except _PassingError as error:
                problem, pause = str(error), error.pause
            if attempt < self._config.retries:
                pause = max(pause, 2.0**attempt * random.uniform(0.75, 1.25))
                self._sleep(min(pause, _LONGEST_PAUSE))
        raise self._error(f"{problem}, {self._config.retries + 1} times")

    def _answer(self, request: urllib.request.Request) -> Any:
        """What Matomo answers. Raises `_PassingError` where asking again may help."""
        try:
            with self._open(request, timeout=self._config.timeout_s) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            status, wait = error.code, error.headers.get("Retry-After", "")
            error.close()
            self._refuse_status(status, wait)
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise self._error("its certificate cannot be trusted") from None
            raise _PassingError("cannot be reached") from None
        except (http.client.InvalidURL, UnicodeError):
            raise self._error("source.url is no address") from None
        except (OSError, http.client.HTTPException):
            raise _PassingError("the answer was cut off or did not come in time") from None
        try:
            return json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            raise _PassingError("the answer is not JSON") from None

    def _refuse_status(self, status: int, wait: str) -> NoReturn:
        if status == 429 or status >= 500:
            pause = float(wait) if wait.isascii() and wait.isdigit() else 0.0
            raise _PassingError(f"answers with status {status}", pause)
        if status in (401, 403):
            raise self._error(_refusal("token"))
        if 300 <= status < 400:
            raise self._error(
                "sends us elsewhere, where the token is not taken; source.url must be Matomo's own "
                "address"
            )
        raise self._error(f"answers with status {status}; source.url may be wrong")

    def _error(self, problem: str) -> SourceError:
        return SourceError(f"Matomo at {self._host}, site {self._config.site_id}: {problem}")


@dataclass(frozen=True)
class _Position:
    """All visits whose last action is before `second` were read, and `taken` with it."""

    second: int
    taken: int = 0


class _Pages:
    """Pages on their way to a batch."""

    def __init__(self) -> None:
        self.rows = 0
        self._visits = [pl.DataFrame(schema=VISITS)]
        self._skipped: list[Skipped] = []

    def add(self, records: list[dict[str, Any] | str]) -> None:
        good = [record for record in records if not isinstance(record, str)]
        visits, skipped = to_visits(pl.DataFrame(good, schema=RECORDS), _NAMES)
        self._visits.append(visits)
        self._skipped += skipped
        for place, problem in enumerate(records, start=self.rows + 1):
            if isinstance(problem, str):
                self._skipped.append(Skipped(problem, 1, f"entry {place} of a batch"))
        self.rows += len(records)

    def batch(self, position: _Position) -> Batch:
        cursor = {"second": position.second, "taken": position.taken}
        return Batch(pl.concat(self._visits), self.rows, added_up(self._skipped), cursor)


class _PassingError(Exception):
    """A failure that may pass. `pause`: seconds that Matomo asks us to wait."""

    def __init__(self, problem: str, pause: float = 0.0) -> None:
        super().__init__(problem)
        self.pause = pause


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another address never gets the token."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _endpoint(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        raise SourceError("source.url: is no address") from None
    if "@" in parts.netloc:
        raise SourceError("source.url: must not hold a user or a password")
    if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
        raise SourceError("source.url: http would show the token to the network; write https")
    return url if url.endswith(".php") else url.rstrip("/") + "/index.php"


def _day(text: str) -> date:
    try:
        return max(_FIRST_DAY, date.fromisoformat(text))
    except ValueError:
        raise SourceError("source.start: must be a day, such as 2026-01-31") from None


def _midnight(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())


def _refusal(message: Any) -> str:
    # Not Matomo's own words: they may quote a query.
    words = message.lower() if isinstance(message, str) else ""
    if any(word in words for word in ("token", "access", "authenticat", "permission")):
        return "refuses the token, or its account may not view this site"
    if "disabled" in words or "deactivated" in words:
        return "its visits log is switched off, so that the API gives no visits"
    return "answers with an error, which Matomo's own log tells; a smaller source.page may help"


def _refuse_constant(_: str) -> NoReturn:
    raise ValueError("no JSON number")


def _last_action(visit: Any) -> int | None:
    return _whole(visit.get("lastActionTimestamp")) if isinstance(visit, dict) else None


def _whole(value: Any) -> int | None:
    """A whole number, also one in text, that a table can hold; None where there is none."""
    if isinstance(value, str) and re.fullmatch("-?[0-9]{1,19}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        return None
    return value


def _amount(value: Any) -> float | None:
    """A finite number, also one in text; none at all is 0."""
    if value in (None, "", False):
        return 0.0
    try:
        amount = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return amount if abs(amount) < 1e15 else None


def _text(value: Any) -> str:
    # Half of a surrogate pair is JSON, but no text.
    return value.encode(errors="replace").decode() if isinstance(value, str) else ""
