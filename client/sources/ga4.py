"""Visits from Google Analytics 4's BigQuery export: events, one a row, put together to sessions.

- A visit is a session: the events of one `user_pseudo_id` and `ga_session_id`. Events without
  either (of visitors who refused analytics, or sent by a server) belong to none: they are left
  out, and are no bad rows.
- Its source is the first of these that is told, of one kind the earliest: that of the session by
  last click, a Google Ads campaign before a manual one; what was collected with an event; the
  user's first source, if it is the user's first session or the export is too old to have the
  others. Words in brackets, such as `(not set)`, say nothing.
- It is converted if it has a key event; its revenue is that of its key events, `purchase_revenue`
  (in the property's currency) or else `event_value_in_usd`, and 0 if that is negative.
- Its consent is `privacy_info.analytics_storage`, of several words the first in the alphabet: No
  before Yes, 0 before 1.
- Of the events' parameters only the session's id and number are kept: never a page's address.

Files are read in order of the date in their names, those of one date together. Sessions span
midnight. One is given once events 8 hours later are there, because no property lets a session rest
for longer, or once nothing has followed for three days. Until then its files are read again by the
next ingest, so that no visitor's id has to be kept outside the store. A session that grows
afterwards stays as it was given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from client.sources.countries import COUNTRIES
from client.sources.export import File, FilePiece, columns_of, files, read_pieces
from client.sources.source import VISITS, Batch, Cursor, Skipped, SourceError
from client.sources.table import cut, device, keep_good, refuse_missing
from conf.site import Ga4Source
from journeys.lines import POLARS_ERRORS
from journeys.table import EARLIEST

SECOND = 1_000_000
DAY = 86400 * SECOND
REST = DAY // 3
"""No session rests for longer (a property may set up to 7 h 55 min)."""
ENDED = 3 * DAY
"""For so long Google may still add to a day's table."""
MOST_EVENTS = 50_000
"""Events taken apart at once; each has some thirty parameters."""

_CLICK_IDS = ("gclid", "dclid", "srsltid")
_PAGE_VIEWS = ("page_view", "screen_view")


def _struct(**fields: pl.DataType) -> pl.Struct:
    return pl.Struct(fields)


_T = pl.String()
_COLUMNS: dict[str, pl.DataType] = {
    "event_timestamp": _T,
    "event_name": _T,
    "user_pseudo_id": _T,
    "event_params": pl.List(_struct(key=_T, value=_struct(int_value=_T))),
    "session_traffic_source_last_click": _struct(
        google_ads_campaign=_struct(campaign_name=_T),
        manual_campaign=_struct(source=_T, medium=_T, campaign_name=_T, term=_T),
    ),
    "collected_traffic_source": _struct(
        manual_source=_T,
        manual_medium=_T,
        manual_campaign_name=_T,
        manual_term=_T,
        **dict.fromkeys(_CLICK_IDS, _T),
    ),
    "traffic_source": _struct(source=_T, medium=_T, name=_T),
    "device": _struct(category=_T),
    "geo": _struct(country=_T),
    "ecommerce": _struct(purchase_revenue=_T),
    "event_value_in_usd": _T,
    "privacy_info": _struct(analytics_storage=_T),
}
"""What is read of an event. The types are JSON's, in which whole numbers are text."""

_NEWER = ("session_traffic_source_last_click", "collected_traffic_source")
_NEEDED = ("event_timestamp", "event_name", "user_pseudo_id", "event_params")

_PARTIAL = pl.Schema(
    {
        "user": pl.String(),
        "session": pl.Int64(),
        "first": pl.Int64(),
        "last": pl.Int64(),
        "rank": pl.UInt8(),
        "told": pl.Int64(),
        "source": pl.String(),
        "medium": pl.String(),
        "campaign": pl.String(),
        "keyword": pl.String(),
        "click_id": pl.UInt8(),
        "device": pl.String(),
        "country": pl.String(),
        "page_views": pl.Int64(),
        "visit_number": pl.Int64(),
        "converted": pl.Boolean(),
        "revenue": pl.Float64(),
        "consent": pl.String(),
        "day": pl.Int64(),
        "fresh": pl.Boolean(),
    }
)
"""A session, as far as its events were read; an event is one, too. `first`, `last` and `told` (when
its source was) in microseconds; `rank` of the source, small before large; `day` is the first, in
number, that has events of it; `fresh`: has it any that no earlier ingest has read?"""


@dataclass(frozen=True)
class _Day:
    """Files that are read together."""

    files: list[File]

    @property
    def stamps(self) -> dict[str, list[int]]:
        return {file.name: file.stamp for file in self.files}


class Ga4:
    """The source `ga4`.

    Its cursor: the stamps of files that are `done`, and of those that are `open`, because they
    have sessions that were not given; `until`: of the open ones, sessions whose last event was
    before this time (microseconds) were given.
    """

    def __init__(self, config: Ga4Source, folder: Path) -> None:
        self._config = config
        self._folder = folder

    def check(self) -> None:
        """Look at the newest file. Raises `SourceError`."""
        days = self._days()
        if not days:
            raise SourceError(f"no file fits source.path={self._config.path}")
        _columns(days[-1].files[-1])

    def batches(self, cursor: Cursor | None, now: int) -> Iterator[Batch]:
        """The sessions that have ended. Raises `SourceError`."""
        days = self._days()
        if not days and cursor is None:
            raise SourceError(f"no file fits source.path={self._config.path}")
        cursor = cursor or {}
        read, opened, until = cursor.get("done", {}), cursor.get("open", {}), cursor.get("until", 0)
        done = {name: at for day in days for name, at in day.stamps.items() if read.get(name) == at}
        days = [day for day in days if not day.stamps.items() <= done.items()]
        fresh = [any(opened.get(name) != at for name, at in day.stamps.items()) for day in days]
        if not any(fresh) and now * SECOND - until < ENDED:
            return

        sessions = _PARTIAL.to_frame()
        newest = 0
        for number, day in enumerate(days):
            read_day = self._read_day(day, number, now, fresh=fresh[number])
            sessions = _together([sessions, read_day.sessions])
            newest = max(newest, _largest(sessions["last"]))
            ended = number == len(days) - 1 and now * SECOND - newest >= ENDED
            closed = newest + 1 if ended else newest - REST
            given = sessions.filter(
                pl.col("last") < closed, pl.col("fresh") | (pl.col("last") >= until)
            ).sort("last", "user", "session")
            sessions = sessions.filter(pl.col("last") >= closed)

            unread = {name: at for one in days[: number + 1] for name, at in one.stamps.items()}
            for part, before in _parts(given, self._config.batch):
                place = {"done": done, "open": unread, "until": before}
                if before is None:
                    first_open = min(sessions["day"], default=number + 1)
                    for one in days[:first_open]:
                        done = {**done, **one.stamps}
                    unread = {name: at for name, at in unread.items() if name not in done}
                    place = {"done": done, "open": unread, "until": closed}
                yield Batch(_visits(part), read_day.events, read_day.skipped, place)
                read_day = _Read(read_day.sessions, 0, ())

    def _days(self) -> list[_Day]:
        days: dict[str, list[File]] = {}
        for file in files(self._folder, self._config.path):
            # Tables of today are replaced by the day's.
            if "events_intraday_" not in file.path.name:
                date = re.search(r"events_(\d{8})", file.path.name)
                days.setdefault(date[1] if date else file.name, []).append(file)
        return [_Day(days[key]) for key in sorted(days)]

    def _read_day(self, day: _Day, number: int, now: int, *, fresh: bool) -> _Read:
        sessions = _PARTIAL.to_frame()
        waiting: list[pl.DataFrame] = []
        skipped: list[Skipped] = []
        count = 0
        for file in day.files:
            newer = any(name in _columns(file) for name in _NEWER)
            for piece in read_pieces(file, _COLUMNS, min(self._config.batch, MOST_EVENTS)):
                try:
                    events, bad = _events(piece, self._config.key_events, now, newer=newer)
                except POLARS_ERRORS:
                    raise SourceError(
                        f"{file.name}: is not GA4's export; a column holds another type"
                    ) from None
                count += len(piece.table)
                skipped += bad
                events = events.with_columns(day=pl.lit(number, pl.Int64), fresh=pl.lit(fresh))
                waiting.append(_together([events]))
                if sum(map(len, waiting)) > len(sessions) + 10 * MOST_EVENTS:
                    sessions, waiting = _together([sessions, *waiting]), []
        return _Read(_together([sessions, *waiting]), count, tuple(skipped))


@dataclass(frozen=True)
class _Read:
    """What a day's files hold."""

    sessions: pl.DataFrame
    """Shaped as `_PARTIAL`."""
    events: int
    skipped: tuple[Skipped, ...]


def _columns(file: File) -> list[str]:
    if file.kind == "csv":
        raise SourceError(f"{file.name}: must be Parquet or newline-delimited JSON")
    there = columns_of(file, list(_COLUMNS))
    # JSON leaves out what is null.
    needed = _NEEDED[:2] if file.kind == "json" else _NEEDED
    refuse_missing(needed, there, file.name, "is this GA4's BigQuery export?")
    return there


# ---------------------------------------------------------------------------- events


def _events(
    piece: FilePiece, key_events: Sequence[str], now: int, *, newer: bool
) -> tuple[pl.DataFrame, tuple[Skipped, ...]]:
    """The events of sessions, each as a session of its own (`_PARTIAL`, without day and fresh)."""
    told = _Fields(piece.table.schema)
    user = told.text("user_pseudo_id")
    session, number = told.parameter("ga_session_id"), told.parameter("ga_session_number")
    at = told.at("event_timestamp").cast(pl.Int64, strict=False)
    name = told.text("event_name")
    key_event = name.is_in(list(key_events)).fill_null(False)

    value = told.at("ecommerce", "purchase_revenue").cast(pl.Float64, strict=False)
    value = pl.coalesce(value, told.at("event_value_in_usd").cast(pl.Float64, strict=False))
    revenue = pl.when(key_event).then(value).fill_null(0.0)

    clicked = ("session_traffic_source_last_click", "manual_campaign")
    advert = told.word(clicked[0], "google_ads_campaign", "campaign_name")
    last = [told.word(*clicked, part) for part in ("source", "medium", "campaign_name", "term")]
    last = [
        pl.when(advert.is_not_null()).then(by_advert).otherwise(manual)
        for manual, by_advert in zip(
            last, (pl.lit("google"), pl.lit("cpc"), advert, last[3]), strict=True
        )
    ]
    collected = [
        told.word("collected_traffic_source", f"manual_{part}")
        for part in ("source", "medium", "campaign_name", "term")
    ]
    first = [told.word("traffic_source", part) for part in ("source", "medium", "name")]
    first.append(pl.lit(None, pl.String))
    of_first = (number == 1) | number.is_null() if newer else pl.lit(True)
    rank = (
        pl.when(_any(last))
        .then(1)
        .when(_any(collected))
        .then(2)
        .when(_any(first) & of_first)
        .then(3)
        .otherwise(9)
    )

    def by_rank(place: int) -> pl.Expr:
        return (
            pl.when(pl.col("rank") == 1)
            .then(pl.col(f"last{place}"))
            .when(pl.col("rank") == 2)
            .then(pl.col(f"collected{place}"))
            .when(pl.col("rank") == 3)
            .then(pl.col(f"first{place}"))
        )

    click_id = pl.coalesce(
        pl.when(told.text("collected_traffic_source", one).is_not_null()).then(
            pl.lit(place, pl.UInt8)
        )
        for place, one in enumerate(_CLICK_IDS)
    )
    belongs = user.is_not_null() & session.is_not_null()
    events, skipped = keep_good(
        piece,
        [
            user.alias("user"),
            session.alias("session"),
            at.alias("first"),
            at.alias("last"),
            rank.cast(pl.UInt8).alias("rank"),
            at.alias("told"),
            *(one.alias(f"last{place}") for place, one in enumerate(last)),
            *(one.alias(f"collected{place}") for place, one in enumerate(collected)),
            *(one.alias(f"first{place}") for place, one in enumerate(first)),
            click_id.alias("click_id"),
            device(told.text("device", "category")).alias("device"),
            told.text("geo", "country")
            .replace_strict(COUNTRIES, default=None, return_dtype=pl.String)
            .alias("country"),
            name.is_in(_PAGE_VIEWS).fill_null(False).cast(pl.Int64).alias("page_views"),
            number.alias("visit_number"),
            key_event.alias("converted"),
            revenue.alias("revenue"),
            told.text("privacy_info", "analytics_storage").alias("consent"),
        ],
        [
            ('column "event_timestamp": is no number', belongs & at.is_null()),
            (
                'column "event_timestamp": is before 1990 or in the future',
                belongs & ~at.is_between(EARLIEST * SECOND, now * SECOND + DAY),
            ),
            ("the event's revenue is not finite", belongs & ~revenue.is_finite()),
        ],
    )
    events = events.filter(pl.col("user").is_not_null(), pl.col("session").is_not_null())
    places = enumerate(("source", "medium", "campaign", "keyword"))
    events = events.with_columns(by_rank(place).alias(name) for place, name in places)
    return events.select(list(_PARTIAL)[:-2]), skipped


def _any(words: Sequence[pl.Expr]) -> pl.Expr:
    return pl.any_horizontal(word.is_not_null() for word in words)


class _Fields:
    """The fields of events; one that an export has not is null."""

    def __init__(self, types: pl.Schema) -> None:
        self._types = types

    def at(self, *path: str) -> pl.Expr:
        kind: object = self._types.get(path[0])
        value = pl.col(path[0])
        for name in path[1:]:
            kind = kind.to_schema().get(name) if isinstance(kind, pl.Struct) else None
            value = value.struct.field(name)
        return value if kind is not None else pl.lit(None, pl.String)

    def text(self, *path: str) -> pl.Expr:
        """Text without spaces around it, nothing as null."""
        value = self.at(*path).cast(pl.String).str.strip_chars()
        return pl.when(value != "").then(value)

    def word(self, *path: str) -> pl.Expr:
        """Text of up to 200 characters that says something."""
        text = cut(self.text(*path))
        return pl.when(~text.str.contains(r"^\(.*\)$")).then(text)

    def parameter(self, key: str) -> pl.Expr:
        """The whole number that a parameter of the event holds."""
        found = pl.element().filter(pl.element().struct.field("key") == key)
        number = found.struct.field("value").struct.field("int_value").cast(pl.Int64, strict=False)
        if "event_params" not in self._types:
            return pl.lit(None, pl.Int64)
        return pl.col("event_params").list.eval(number).list.first()


# ---------------------------------------------------------------------------- sessions


def _together(parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """One row a session, of rows that are each a part of one."""
    ranked = ("rank", "told", "source", "medium", "campaign", "keyword")
    sessions = (
        pl.concat(parts)
        .sort("rank", "told", *ranked[2:])
        .group_by("user", "session")
        .agg(
            pl.col("first").min(),
            pl.col("last").max(),
            pl.col(ranked).first(),
            pl.col("click_id", "device", "country").min(),
            pl.col("page_views").sum(),
            pl.col("visit_number").min(),
            pl.col("converted").any(),
            pl.col("revenue").sum(),
            pl.col("consent", "day").min(),
            pl.col("fresh").any(),
        )
    )
    return sessions.select(pl.col(name).cast(kind) for name, kind in _PARTIAL.items())


def _largest(times: pl.Series) -> int:
    largest = times.max()
    return largest if isinstance(largest, int) else 0


def _parts(given: pl.DataFrame, rows: int) -> Iterator[tuple[pl.DataFrame, int | None]]:
    """`given` in parts of `rows`, and `last` of the next part's first; None with the last part.

    The last part comes in any case, be it empty.
    """
    start = 0
    while start + rows < len(given):
        yield given[start : start + rows], given["last"][start + rows]
        start += rows
    yield given[start:], None


def _visits(sessions: pl.DataFrame) -> pl.DataFrame:
    names = dict(enumerate(_CLICK_IDS))
    known = sessions.select(
        visitor_id="user",
        visit_id=pl.format("{}.{}", "user", "session"),
        time=pl.col("first") // SECOND,
        source="source",
        medium="medium",
        campaign="campaign",
        keyword="keyword",
        click_id=pl.col("click_id").replace_strict(names, return_dtype=pl.String),
        device="device",
        country="country",
        duration_s=(pl.col("last") - pl.col("first")) / SECOND,
        page_views="page_views",
        visit_number="visit_number",
        converted="converted",
        revenue=pl.max_horizontal("revenue", pl.lit(0.0)),
        consent="consent",
    )
    missing = [pl.lit(None, kind).alias(name) for name, kind in VISITS.items() if name not in known]
    return known.with_columns(missing).select(list(VISITS))
