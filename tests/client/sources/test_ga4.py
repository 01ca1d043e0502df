from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.channels import channel
from client.sources.countries import COUNTRIES
from client.sources.ga4 import Ga4
from client.sources.source import VISITS, Batch, Cursor, SourceError
from conf.site import Ga4Source

SECRET = "s3cret"
HOUR = 3600
DAY = 24 * HOUR
START = 1_772_323_200
"""2026-03-01 UTC."""
LATER = START + 30 * DAY
"""By then nothing of March's first days may follow."""


def struct(**kinds: pl.DataType) -> pl.Struct:
    return pl.Struct(kinds)


T, N, F = pl.String(), pl.Int64(), pl.Float64()
CAMPAIGN = struct(source=T, medium=T, campaign_name=T, term=T, campaign_id=T)
TYPES: dict[str, pl.DataType] = {
    "event_date": T,
    "event_timestamp": N,
    "event_name": T,
    "event_params": pl.List(
        struct(
            key=T,
            value=struct(string_value=T, int_value=N, float_value=F, double_value=F),
        )
    ),
    "user_pseudo_id": T,
    "user_id": T,
    "privacy_info": struct(analytics_storage=T, ads_storage=T),
    "device": struct(category=T, operating_system=T),
    "geo": struct(country=T, city=T),
    "traffic_source": struct(name=T, medium=T, source=T),
    "collected_traffic_source": struct(
        manual_source=T,
        manual_medium=T,
        manual_campaign_name=T,
        manual_term=T,
        gclid=T,
        dclid=T,
        srsltid=T,
    ),
    "session_traffic_source_last_click": struct(
        manual_campaign=CAMPAIGN, google_ads_campaign=struct(campaign_name=T, customer_id=T)
    ),
    "ecommerce": struct(purchase_revenue=F, transaction_id=T),
    "event_value_in_usd": F,
}


def event(at: float, name: str = "page_view", **more: Any) -> dict[str, Any]:
    """An event at START + `at` seconds. `user`, `session`, `number` and any column may be given."""
    user, session = more.pop("user", "u.1"), more.pop("session", 100)
    texts = {"page_location": f"https://shop.example/?q={SECRET}", "page_referrer": SECRET}
    params: list[dict[str, Any]] = [
        {"key": key, "value": {"string_value": text}} for key, text in texts.items()
    ]
    numbers = {"ga_session_id": session, "ga_session_number": more.pop("number", 1)}
    params[1:1] = [
        {"key": key, "value": {"int_value": number}}
        for key, number in numbers.items()
        if number is not None
    ]
    return {
        "event_timestamp": round((START + at) * 1_000_000),
        "event_name": name,
        "event_params": params,
        "user_pseudo_id": user,
        "user_id": SECRET,
        "device": {"category": "mobile"},
        "geo": {"country": "Germany", "city": SECRET},
        "privacy_info": {"analytics_storage": "Yes"},
        **more,
    }


def plain(value: Any) -> Any:
    """As BigQuery writes it to JSON: no nulls, whole numbers as text."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def write(
    folder: Path, name: str, events: list[dict[str, Any]], without: tuple[str, ...] = ()
) -> None:
    if name.endswith(".parquet"):
        table = pl.DataFrame(events, schema=TYPES)
        table.drop(without).write_parquet(folder / name)
    else:
        (folder / name).write_text("\n".join(json.dumps(plain(one)) for one in events))


def read(
    folder: Path, cursor: Cursor | None = None, now: int = LATER, path: str = "*.*", **more: Any
) -> list[Batch]:
    batches = list(Ga4(Ga4Source(path=path, **more), folder).batches(cursor, now))
    for batch in batches:
        assert batch.visits.schema == VISITS
        json.dumps(batch.cursor)
        assert SECRET not in batch.visits.write_csv()
    return batches


def visits(batches: list[Batch]) -> pl.DataFrame:
    return pl.concat([VISITS.to_frame(), *(batch.visits for batch in batches)])


def names(batches: list[Batch]) -> list[str]:
    return sorted(visits(batches)["visit_id"])


# ---------------------------------------------------------------------------- one session


@pytest.mark.parametrize("name", ["events_20260301.parquet", "events_20260301.json"])
def test_a_session_is_a_visit(tmp_path: Path, name: str) -> None:
    collected = {"manual_source": "news", "manual_medium": "email", "manual_term": "t"}
    events = [
        event(90.25, "purchase", ecommerce={"purchase_revenue": 20.0}, event_value_in_usd=25.0),
        event(0, "session_start"),
        event(0.5, number=3),
        event(60, "screen_view", collected_traffic_source=collected | {"gclid": SECRET}),
        event(70, "scroll", event_value_in_usd=99.0, ecommerce={"purchase_revenue": None}),
        event(80, "purchase", event_value_in_usd=5.0),
    ]
    write(tmp_path, name, events)
    (batch,) = read(tmp_path)
    assert batch.visits.to_dicts() == [
        {
            "visitor_id": "u.1",
            "visit_id": "u.1.100",
            "time": START,
            "channel": None,
            "referrer_type": None,
            "source": "news",
            "medium": "email",
            "campaign": None,
            "keyword": "t",
            "click_id": "gclid",
            "device": "mobile",
            "country": "de",
            "duration_s": 90.25,
            "page_views": 2,
            "visit_number": 1,
            "converted": True,
            "revenue": 25.0,
            "consent": "Yes",
            "purposes": None,
            "do_not_track": None,
            "opted_out": None,
        }
    ]
    assert (batch.rows, batch.skipped) == (6, ())


def test_sessions_are_told_apart_by_user_and_id(tmp_path: Path) -> None:
    events = [
        event(at, user=user, session=session)
        for at, user, session in [(0, "a", 1), (5, "b", 1), (9, "a", 2), (12, "a", 1)]
    ]
    write(tmp_path, "events_20260301.parquet", events)
    told = visits(read(tmp_path)).sort("visit_id").select("visit_id", "duration_s").rows()
    assert told == [("a.1", 12.0), ("a.2", 0.0), ("b.1", 0.0)]


def test_key_events_are_those_of_the_settings(tmp_path: Path) -> None:
    lead = event(0, "generate_lead", event_value_in_usd=7.0)
    refund = event(9, "generate_lead", user="b", event_value_in_usd=-3.0)
    write(tmp_path, "events_20260301.parquet", [lead, refund])
    told = ["visitor_id", "converted", "revenue"]
    assert visits(read(tmp_path)).select(told).sort(told[0]).rows() == [
        ("b", False, 0.0),
        ("u.1", False, 0.0),
    ]
    assert visits(read(tmp_path, key_events=["generate_lead"])).select(told).sort(told).rows() == [
        ("b", True, 0.0),
        ("u.1", True, 7.0),
    ]


FIRST = {"source": "first", "medium": "organic", "name": "(organic)"}
COLLECTED = {"manual_source": "coll", "manual_medium": "email"}
MANUAL = {"manual_campaign": {"source": "man", "medium": "social", "campaign_name": "m"}}
ADS = {"google_ads_campaign": {"campaign_name": "ads"}, **MANUAL}
DIRECT = {"manual_campaign": {"source": "(direct)", "medium": "(none)"}}
NEWER = ("collected_traffic_source", "session_traffic_source_last_click")


@pytest.mark.parametrize(
    ("columns", "number", "without", "told"),
    [
        ({"session_traffic_source_last_click": ADS}, 1, (), ("google", "cpc", "ads")),
        ({"session_traffic_source_last_click": MANUAL}, 1, (), ("man", "social", "m")),
        (
            {"session_traffic_source_last_click": DIRECT, "collected_traffic_source": COLLECTED},
            1,
            (),
            ("coll", "email", None),
        ),
        ({"collected_traffic_source": COLLECTED}, 2, (), ("coll", "email", None)),
        ({}, 1, (), ("first", "organic", None)),
        ({}, 2, (), (None, None, None)),
        ({}, 2, NEWER, ("first", "organic", None)),
        ({}, 2, NEWER[:1], (None, None, None)),
    ],
)
def test_where_a_session_came_from(
    tmp_path: Path,
    columns: dict[str, Any],
    number: int,
    without: tuple[str, ...],
    told: tuple[str | None, ...],
) -> None:
    later = {"collected_traffic_source": {"manual_source": "later"}}
    events = [
        event(9, number=number, **(later if "collected_traffic_source" in columns else {})),
        event(5, number=number, traffic_source=FIRST, **columns),
        event(0, number=number, traffic_source=FIRST),
    ]
    write(tmp_path, "events_20260301.parquet", events, without)
    assert visits(read(tmp_path)).select("source", "medium", "campaign").row(0) == told


def test_channels_of_sessions(tmp_path: Path) -> None:
    sources = {
        "a": {"session_traffic_source_last_click": ADS},
        "b": {"collected_traffic_source": COLLECTED},
        "c": {"traffic_source": FIRST},
        "d": {"session_traffic_source_last_click": DIRECT},
        "e": {"collected_traffic_source": {"gclid": "x"}},
    }
    events = [event(0, user=user, **columns) for user, columns in sources.items()]
    write(tmp_path, "events_20260301.parquet", events)
    told = visits(read(tmp_path)).sort("visitor_id").select(channel())["channel"]
    assert told.to_list() == ["paid search", "email", "organic search", "direct", "paid search"]


def test_consent_withheld_once_is_withheld(tmp_path: Path) -> None:
    for yes, no in (("Yes", "No"), ("1", "0"), ("granted", "denied")):
        words = [yes, no, None, yes]
        events = [
            event(at, privacy_info={"analytics_storage": word}) for at, word in enumerate(words)
        ]
        write(tmp_path, "events_20260301.parquet", events)
        assert visits(read(tmp_path))["consent"].to_list() == [no]


def test_an_old_export_lacks_most_columns(tmp_path: Path) -> None:
    needed = ("event_timestamp", "event_name", "user_pseudo_id", "event_params")
    without = tuple(name for name in TYPES if name not in needed)
    write(tmp_path, "events_20260301.parquet", [event(0)], without)
    (visit,) = visits(read(tmp_path)).to_dicts()
    assert (visit["visit_id"], visit["device"], visit["consent"]) == ("u.1.100", None, None)


def test_countries_have_codes() -> None:
    assert len(set(COUNTRIES.values())) == 250
    assert all(len(code) == 2 and code == code.lower() for code in COUNTRIES.values())
    assert COUNTRIES["Türkiye"] == COUNTRIES["Turkey"] == "tr"
    assert COUNTRIES["United Kingdom"] == "gb"


# ---------------------------------------------------------------------------- bad events


def test_events_of_nobody_are_left_out_and_not_bad(tmp_path: Path) -> None:
    events = [event(0), event(1, user=None), event(2, session=None), event(3, user="")]
    write(tmp_path, "events_20260301.parquet", events)
    (batch,) = read(tmp_path)
    assert (names([batch]), batch.rows, batch.skipped) == (["u.1.100"], 4, ())


def test_bad_events_are_left_out_and_counted(tmp_path: Path) -> None:
    events = [
        event(0),
        event(-START),
        event(1) | {"event_timestamp": SECRET},
        event(1) | {"event_timestamp": None},
        event(2, "purchase", event_value_in_usd=float("inf")),
        event(60 * DAY),
        event(3),
    ]
    write(tmp_path, "events_20260301.json", events)
    text = (tmp_path / "events_20260301.json").read_text()
    (tmp_path / "events_20260301.json").write_text(
        text.replace("Infinity", '"Infinity"') + "\n{oops"
    )
    (batch,) = read(tmp_path)
    assert batch.visits["duration_s"].to_list() == [3.0]
    place = "events_20260301.json, row "
    assert sorted((one.reason, one.count, one.first) for one in batch.skipped) == [
        ("cannot be taken apart into its columns", 1, f"{place}8"),
        ('column "event_timestamp": is before 1990 or in the future', 2, f"{place}2"),
        ('column "event_timestamp": is no number', 2, f"{place}3"),
        ("the event's revenue is not finite", 1, f"{place}5"),
    ]


def test_what_is_no_export(tmp_path: Path) -> None:
    wrong_type = pl.DataFrame([event(0)], schema=TYPES).with_columns(event_params=pl.lit("x"))
    tables = {
        "a.csv": ("must be Parquet or newline-delimited JSON", pl.DataFrame({"a": [1]})),
        "b.parquet": ('no column "event_timestamp"; is this GA4', pl.DataFrame({"a": [1]})),
        "c.json": (
            'no column "event_timestamp"; nearest: event_time',
            pl.DataFrame({"event_time": [1]}),
        ),
        "d.parquet": ("is not GA4's export; a column holds another type", wrong_type),
    }
    for name, (problem, table) in tables.items():
        if name.endswith(".parquet"):
            table.write_parquet(tmp_path / name)
        elif name.endswith(".json"):
            table.write_ndjson(tmp_path / name)
        else:
            table.write_csv(tmp_path / name)
        with pytest.raises(SourceError, match=problem):
            read(tmp_path, path=name)
    with pytest.raises(SourceError, match="no file fits"):
        read(tmp_path, path="e*")
    with pytest.raises(SourceError, match="no file fits"):
        Ga4(Ga4Source(path="e*"), tmp_path).check()
    with pytest.raises(SourceError, match="must be Parquet"):
        Ga4(Ga4Source(path="a.csv"), tmp_path).check()


# ---------------------------------------------------------------------------- day by day


def random_events(random: Random, days: int, users: int) -> list[list[dict[str, Any]]]:
    """Events of each day; sessions last up to 3 hours, whatever the date."""
    made: list[list[dict[str, Any]]] = [[] for _ in range(days)]
    for user in range(users):
        start = random.uniform(0, days * DAY - 4 * HOUR)
        for at in (start, *(start + random.uniform(0, 3 * HOUR) for _ in range(4))):
            name = random.choice(["page_view", "purchase"])
            made[int(at // DAY)].append(event(at, name, user=f"u{user}", event_value_in_usd=1.5))
    for one in made:
        random.shuffle(one)
    return made


TOLD = ["visit_id", "time", "duration_s", "page_views", "converted", "revenue"]


def stored(batches: list[Batch]) -> pl.DataFrame:
    """What a store holds that takes the first of each visit."""
    return visits(batches).select(TOLD).unique("visit_id", keep="first").sort("visit_id")


@pytest.mark.parametrize("shards", [1, 3])
def test_any_cursor_goes_on_where_it_was_taken(tmp_path: Path, shards: int) -> None:
    random = Random(shards)
    for day, events in enumerate(random_events(random, days=4, users=60)):
        for shard in range(shards):
            name = f"events_2026030{day + 1}-{shard:03}.json"
            write(tmp_path, name, events[shard::shards])
    whole = visits(read(tmp_path)).select(TOLD).sort("visit_id")
    assert len(whole) == 60
    assert whole["page_views"].sum() + whole["revenue"].sum() / 1.5 == 300
    batches = read(tmp_path, batch=7)
    assert sum(batch.rows for batch in batches) == 300
    assert visits(batches).select(TOLD).sort("visit_id").equals(whole)
    for done, batch in enumerate(batches, start=1):
        rest = read(tmp_path, batch.cursor, batch=100)
        assert stored([*batches[:done], *rest]).equals(whole)
        # Nothing is given twice.
        assert len(visits([*batches[:done], *rest])) == 60
    assert read(tmp_path, batches[-1].cursor) == []


def test_each_day_brings_its_sessions(tmp_path: Path) -> None:
    days = random_events(Random(7), days=5, users=80)
    batches: list[Batch] = []
    cursor: Cursor | None = None
    for day, events in enumerate(days):
        write(tmp_path, f"events_2026030{day + 1}.parquet", events)
        now = START + (day + 1) * DAY + HOUR
        new = read(tmp_path, cursor, now)
        assert read(tmp_path, new[-1].cursor, now) == []
        # Only yesterday's file is read once more.
        rows = len(events) + (len(days[day - 1]) if day else 0)
        assert sum(batch.rows for batch in new) == rows
        batches += new
        cursor = new[-1].cursor
    assert visits(batches)["visit_id"].is_unique().all()
    open_still = 80 - len(visits(batches))
    assert open_still > 0
    batches += read(tmp_path, cursor, LATER)
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole", "all.parquet", [one for events in days for one in events])
    whole = visits(read(tmp_path / "whole")).select(TOLD).sort("visit_id")
    assert visits(batches).select(TOLD).sort("visit_id").equals(whole)
    assert read(tmp_path, batches[-1].cursor, LATER) == []


def test_the_cursor_holds_no_visitor(tmp_path: Path) -> None:
    write(tmp_path, "events_20260301.parquet", [event(23 * HOUR, user="personal")])
    (batch,) = read(tmp_path, now=START + DAY)
    assert len(batch.visits) == 0
    assert "personal" not in json.dumps(batch.cursor)


def test_a_day_that_google_adds_to_is_read_anew(tmp_path: Path) -> None:
    for day in range(3):
        events = [event(day * DAY + at * HOUR, user=f"u{day}.{at}") for at in range(24)]
        write(tmp_path, f"events_2026030{day + 1}.parquet", events)
    *_, last = read(tmp_path, now=START + 3 * DAY)
    path = tmp_path / "events_20260302.parquet"
    late = event(DAY + 5, user="late")
    table = pl.concat([pl.read_parquet(path), pl.DataFrame([late], schema=TYPES)])
    table.write_parquet(path)
    os.utime(path, ns=(0, 1))
    again = read(tmp_path, last.cursor, now=START + 3 * DAY)
    assert names(again) == sorted(["late.100", *(f"u1.{at}.100" for at in range(24))])


def test_tables_of_today_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "events_20260301.parquet", [event(0)])
    write(tmp_path, "events_intraday_20260302.parquet", [event(DAY, user="b")])
    assert names(read(tmp_path)) == ["u.1.100"]


def test_files_without_a_date_are_read_by_name(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", [event(23.9 * HOUR)])
    write(tmp_path, "b.parquet", [event(24.1 * HOUR, "purchase")])
    (visit,) = visits(read(tmp_path)).to_dicts()
    assert (visit["duration_s"], visit["converted"]) == (720.0, True)


# ---------------------------------------------------------------------------- anything at all

WORDS = st.one_of(
    st.none(),
    st.sampled_from(["x", "0", "-1", "NaN", "1e400", "1772323200000000", "99999999999999999999"]),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.booleans(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["key", "value", "category"]), st.integers(), max_size=2),
)


# 20 events each: 1,600 events of anything.
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.lists(WORDS, min_size=12, max_size=12), st.randoms(use_true_random=False))
def test_any_values(tmp_path: Path, words: list[Any], random: Random) -> None:
    def spoilt(value: Any) -> Any:
        if random.random() < 0.04:
            return random.choice(words)
        if isinstance(value, dict):
            return {key: spoilt(one) for key, one in value.items()}
        return [spoilt(one) for one in value] if isinstance(value, list) else value

    events = [spoilt(plain(event(at, number=1, user=f"u{at % 4}"))) for at in range(20)]
    text = "\n".join(json.dumps(one) for one in [event(0), *events])
    (tmp_path / "events_20260301.json").write_text(text)
    (batch,) = read(tmp_path, path="*.json")
    assert batch.rows == 21
    needed = batch.visits.select("visitor_id", "time", "converted", "revenue")
    assert needed.null_count().sum_horizontal().item() == 0


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.binary(max_size=40), st.integers(0, 10_000), st.integers(0, 9))
def test_any_bytes(tmp_path: Path, patch: bytes, at: int, width: int) -> None:
    content = "\n".join(json.dumps(plain(event(at, "purchase"))) for at in range(3)).encode()
    at %= len(content)
    (tmp_path / "events_20260301.json").write_bytes(content[:at] + patch + content[at + width :])
    try:
        read(tmp_path)
    except SourceError:
        return
