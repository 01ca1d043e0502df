from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.secret import SecretError
from client.sources.matomo_api import MatomoApi
from client.sources.source import VISITS, Batch, SourceError
from conf.site import MatomoApiSource
from tests.matomo_server import NOON, TOKEN, MatomoServer, api_visit

NOW = NOON + 40 * 86400


@pytest.fixture
def matomo() -> Iterator[MatomoServer]:
    with MatomoServer() as server:
        yield server


class Opened(MatomoApi):
    """A source that notes its pauses instead of sleeping."""

    def __init__(self, url: str, folder: Path, token: str = TOKEN, **settings: Any) -> None:
        file = folder / "token"
        file.write_text(f"{token}\n")
        file.chmod(0o600)
        self.pauses: list[float] = []
        config = MatomoApiSource(url=url, token_file="token", **settings)
        super().__init__(config, folder, sleep=self.pauses.append)


def visits_of(batches: list[Batch]) -> pl.DataFrame:
    return pl.concat(batch.visits for batch in batches)


def goal(number: int | None, revenue: Any = 0) -> dict[str, Any]:
    return {"type": "goal", "goalId": number, "revenue": revenue, "url": "https://example.org"}


def order(revenue: Any) -> dict[str, Any]:
    return {"type": "ecommerceOrder", "revenue": revenue, "itemDetails": [{"itemName": "x"}]}


# ---------------------------------------------------------------------------- what a visit becomes


def test_a_visit(matomo: MatomoServer, tmp_path: Path) -> None:
    matomo.visits = [
        api_visit(
            7,
            visitorId="C0FFEE0123456789",
            referrerType="campaign",
            referrerName="spring",
            referrerKeyword="shoes",
            campaignName="Spring sale",
            campaignSource="google",
            campaignMedium="cpc",
            deviceType="Smartphone",
            countryCode="FR",
            visitCount="3",
            actionDetails=[{"type": "action"}, goal(2, "10.50"), order(20)],
        )
    ]
    source = Opened(matomo.url, tmp_path, consent_dimension=1)
    [batch] = source.batches(None, NOW)
    assert batch.visits.schema == VISITS
    assert (batch.rows, batch.skipped) == (1, ())
    assert batch.visits.row(0, named=True) == dict.fromkeys(VISITS) | {
        "visitor_id": "c0ffee0123456789",
        "visit_id": "7",
        "time": NOON + 420,
        "referrer_type": "campaign",
        "source": "google",
        "medium": "cpc",
        "campaign": "Spring sale",
        "keyword": "shoes",
        "device": "mobile",
        "country": "fr",
        "duration_s": 300.0,
        "page_views": 4,
        "visit_number": 3,
        "converted": True,
        "revenue": 30.5,
        "consent": "yes",
    }


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        (
            {"referrerType": "search", "referrerName": "Google", "referrerKeyword": "my illness"},
            {"referrer_type": "search", "source": "Google", "keyword": None, "campaign": None},
        ),
        (
            {"referrerType": "campaign", "referrerName": "spring", "referrerKeyword": "shoes"},
            {"campaign": "spring", "source": None, "keyword": "shoes", "medium": None},
        ),
        ({"referrerType": "social", "referrerName": "Facebook"}, {"referrer_type": "social"}),
        ({"referrerType": "ai", "referrerName": "ChatGPT"}, {"referrer_type": "ai assistant"}),
        ({"referrerType": "aiAssistant"}, {"referrer_type": "ai assistant"}),
        ({"referrerType": "carrier pigeon"}, {"referrer_type": None}),
        ({"deviceType": "Unknown"}, {"device": None}),
        ({"deviceType": "Phablet"}, {"device": "mobile"}),
        ({"deviceType": "Tablet"}, {"device": "tablet"}),
        ({"deviceType": "TV"}, {"device": "other"}),
        ({"countryCode": "xx"}, {"country": None}),
        ({"countryCode": ""}, {"country": None}),
        ({"campaignName": "😀" * 30_000}, {"campaign": "😀" * 30_000}),
        ({"campaignName": "half \ud83d pair"}, {"campaign": "half ? pair"}),
        ({"visitDuration": None, "actions": False}, {"duration_s": None, "page_views": None}),
        # The visitor's whole life, and goals without orders: neither is the visit's.
        ({"totalEcommerceRevenue": "99", "goalConversions": 1}, {"converted": False, "revenue": 0}),
    ],
)
def test_fields(
    matomo: MatomoServer, tmp_path: Path, given_: dict[str, Any], expected: dict[str, Any]
) -> None:
    matomo.visits = [api_visit(1, **given_)]
    [batch] = Opened(matomo.url, tmp_path).batches(None, NOW)
    row = batch.visits.row(0, named=True)
    assert {name: row[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("goals", "actions", "converted", "revenue"),
    [
        ([], [goal(3, "5.5"), goal(4, 2)], True, 7.5),
        ([], [goal(None, "")], True, 0.0),  # a goal that was deleted since
        ([], [{"type": "ecommerceAbandonedCart", "revenue": 70}], False, 0.0),
        ([0], [goal(3, 5), order("19.99")], True, 19.99),
        ([0], [goal(3, 5)], False, 0.0),
        ([3, 5], [goal(4, 1), goal("3", 5), order(9)], True, 5.0),
        ([3], [goal(None, 5)], False, 0.0),
        ([], [{"type": ["goal"]}, 3, None, "goal"], False, 0.0),
    ],
)
def test_conversions(
    matomo: MatomoServer,
    tmp_path: Path,
    goals: list[int],
    actions: list[Any],
    converted: bool,
    revenue: float,
) -> None:
    matomo.visits = [api_visit(1, actionDetails=actions)]
    [batch] = Opened(matomo.url, tmp_path, goals=goals).batches(None, NOW)
    assert batch.visits.select("converted", "revenue").row(0) == (converted, revenue)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"visitorId": "secret"}, 'field "visitorId": is not 8 bytes'),
        ({"visitorId": False}, 'field "visitorId": is empty'),
        ({"firstActionTimestamp": None}, 'field "firstActionTimestamp": is empty or no time'),
        ({"firstActionTimestamp": 5}, 'field "firstActionTimestamp": is before 1990 or after 2100'),
        ({"firstActionTimestamp": 10**30}, 'field "firstActionTimestamp": is empty or no time'),
        ({"visitDuration": -1}, 'field "visitDuration": is below 0'),
        ({"idVisit": "secret"}, 'field "idVisit": is no number'),
        ({"lastActionTimestamp": "secret"}, 'field "lastActionTimestamp": is no number'),
        ({"actionDetails": "secret"}, 'field "actionDetails": is missing'),
        (
            {"actionDetails": [order("secret")]},
            'field "actionDetails": holds a revenue that is no number',
        ),
        (
            {"truncatedActionsCount": 20},
            'field "actionDetails": Matomo cut it short (visitor_log_maximum_actions_per_visit)',
        ),
    ],
)
def test_a_visit_that_cannot_be_read_is_left_out(
    matomo: MatomoServer, tmp_path: Path, bad: dict[str, Any], reason: str
) -> None:
    matomo.pages = [[api_visit(1), api_visit(2, **bad), api_visit(3)], []]
    [batch] = Opened(matomo.url, tmp_path).batches(None, NOW)
    assert batch.visits["visit_id"].to_list() == ["1", "3"]
    assert batch.rows == 3
    [skipped] = batch.skipped
    assert (skipped.reason, skipped.count) == (reason, 1)
    assert "secret" not in skipped.first


def test_a_field_that_is_missing_is_told(matomo: MatomoServer, tmp_path: Path) -> None:
    matomo.pages = [[{"lastActionTimestamp": NOON}, "a visit", api_visit(1)], []]
    [batch] = Opened(matomo.url, tmp_path).batches(None, NOW)
    assert batch.visits.height == 1
    assert {s.reason for s in batch.skipped} == {'field "idVisit": is no number', "is no visit"}


# ---------------------------------------------------------------------------- paging


@pytest.mark.parametrize("page", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("same_second", [False, True])
def test_every_visit_comes_once(
    matomo: MatomoServer, tmp_path: Path, page: int, same_second: bool
) -> None:
    # In groups of five that end in the same second, or each on its own.
    matomo.visits = [
        api_visit(n, lastActionTimestamp=NOON + (n // 5 if same_second else n)) for n in range(23)
    ]
    visits = visits_of(list(Opened(matomo.url, tmp_path, page=page).batches(None, NOW)))
    assert sorted(map(int, visits["visit_id"])) == list(range(23))


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_a_stopped_ingest_goes_on_where_it_was(
    matomo: MatomoServer, tmp_path: Path, kept: int
) -> None:
    matomo.visits = [api_visit(n, lastActionTimestamp=NOON + n // 3) for n in range(20)]
    first = Opened(matomo.url, tmp_path, page=2, batch=5).batches(None, NOW)
    stored = [next(first) for _ in range(kept)]
    cursor = json.loads(json.dumps(stored[-1].cursor)) if stored else None
    stored += Opened(matomo.url, tmp_path, page=3, batch=7).batches(cursor, NOW)
    assert sorted(map(int, visits_of(stored)["visit_id"])) == list(range(20))


def test_batches_are_about_as_large_as_wanted(matomo: MatomoServer, tmp_path: Path) -> None:
    matomo.visits = [api_visit(n) for n in range(10)]
    source = Opened(matomo.url, tmp_path, page=2, batch=4)
    assert [b.visits.height for b in source.batches(None, NOW)] == [4, 4, 2]


def test_visits_that_may_go_on_are_left_for_later(matomo: MatomoServer, tmp_path: Path) -> None:
    source = Opened(matomo.url, tmp_path, settle_minutes=60)
    now = NOON + 7200
    ends = [now - 3601, now - 3600, now - 10]
    matomo.visits = [api_visit(n, lastActionTimestamp=end) for n, end in enumerate(ends)]
    [batch] = source.batches(None, now)
    assert batch.visits["visit_id"].to_list() == ["0"]
    assert list(source.batches(batch.cursor, now)) == []
    # Visit 1 went on, and visit 3 began, before the next ingest.
    matomo.visits[1]["lastActionTimestamp"] = now
    matomo.visits.append(api_visit(3, lastActionTimestamp=now + 60))
    [batch] = source.batches(batch.cursor, now + 7200)
    assert sorted(batch.visits["visit_id"]) == ["1", "2", "3"]


def test_nothing_before_the_start_and_no_other_site(matomo: MatomoServer, tmp_path: Path) -> None:
    matomo.visits = [api_visit(1), api_visit(2000)]
    source = Opened(matomo.url, tmp_path, start="2026-06-02")
    assert visits_of(list(source.batches(None, NOW)))["visit_id"].to_list() == ["2000"]
    with pytest.raises(SourceError, match="may not view this site"):
        Opened(matomo.url, tmp_path, site_id=2).check()


def test_no_visits_no_batch(matomo: MatomoServer, tmp_path: Path) -> None:
    source = Opened(matomo.url, tmp_path)
    source.check()
    assert list(source.batches(None, NOW)) == []


@pytest.mark.parametrize("server", ["ignores the order", "repeats itself", "forgets the time"])
def test_a_server_that_does_as_it_likes_ends_it(
    matomo: MatomoServer, tmp_path: Path, server: str
) -> None:
    page = {
        "ignores the order": [api_visit(2), api_visit(1)],
        "repeats itself": [api_visit(1)],
        "forgets the time": [{"idVisit": 1}],
    }[server]
    matomo.pages = [page] * 9
    with pytest.raises(SourceError):
        list(Opened(matomo.url, tmp_path).batches(None, NOW))
    assert len(matomo.requests) <= 2


# ---------------------------------------------------------------------------- failures


@pytest.mark.parametrize("fault", ["429", "500", "503", "cut", "half json", "html", "reset"])
def test_a_failure_that_passes(matomo: MatomoServer, tmp_path: Path, fault: str) -> None:
    matomo.visits = [api_visit(n) for n in range(6)]
    matomo.faults = ["", fault, fault]
    source = Opened(matomo.url, tmp_path, page=2)
    assert visits_of(list(source.batches(None, NOW))).height == 6
    assert [0.75 <= p <= 1.25 for p in source.pauses[:1]] == [True]
    assert [1.5 <= p <= 2.5 for p in source.pauses[1:]] == [True]


def test_an_answer_that_does_not_come_in_time(matomo: MatomoServer, tmp_path: Path) -> None:
    matomo.visits = [api_visit(1)]
    matomo.faults = ["hang"]
    source = Opened(matomo.url, tmp_path, timeout_s=0.2)
    assert visits_of(list(source.batches(None, NOW))).height == 1
    assert len(source.pauses) == 1


@pytest.mark.parametrize(("asked", "least"), [("7", 7), ("99999", 300), ("soon", 0)])
def test_a_server_that_asks_to_wait(
    matomo: MatomoServer, tmp_path: Path, asked: str, least: float
) -> None:
    matomo.faults = [f"429:{asked}"]
    source = Opened(matomo.url, tmp_path)
    list(source.batches(None, NOW))
    [pause] = source.pauses
    assert pause == least or (least == 0 and pause <= 1.25)


def test_a_page_that_keeps_failing(matomo: MatomoServer, tmp_path: Path) -> None:
    matomo.visits = [api_visit(n) for n in range(9)]
    matomo.faults = ["", "", *["503"] * 4]
    source = Opened(matomo.url, tmp_path, page=2, retries=3)
    batches = source.batches(None, NOW)
    good = next(batches)
    assert good.visits["visit_id"].to_list() == ["0", "1", "2", "3"]
    with pytest.raises(SourceError, match="status 503, 4 times"):
        next(batches)
    assert len(source.pauses) == 3
    rest = visits_of(list(source.batches(good.cursor, NOW)))
    assert sorted(map(int, rest["visit_id"])) == [4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("401", "refuses the token"),
        ("403", "refuses the token"),
        ("404", "source.url may be wrong"),
        ("302:http://127.0.0.1:9/", "Matomo's own address"),
        ("307:http://127.0.0.1:9/", "Matomo's own address"),
        ("list", "no list of visits"),
        ("error:Visits log is disabled by the administrator", "switched off"),
        (f"error:SELECT secret {TOKEN}", "Matomo's own log"),
    ],
)
def test_a_failure_that_stays(matomo: MatomoServer, tmp_path: Path, fault: str, told: str) -> None:
    matomo.faults = [fault]
    source = Opened(matomo.url, tmp_path)
    with pytest.raises(SourceError, match=told) as caught:
        list(source.batches(None, NOW))
    assert source.pauses == []
    assert "secret" not in str(caught.value)
    assert len(matomo.log) == 1


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    source = Opened("http://127.0.0.1:9/", tmp_path, retries=1)
    with pytest.raises(SourceError, match="cannot be reached, 2 times"):
        source.check()


def test_a_wrong_token(matomo: MatomoServer, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="refuses the token") as caught:
        Opened(matomo.url, tmp_path, token="wr0ng").check()
    assert "wr0ng" not in str(caught.value)


def test_check_wants_what_the_settings_name(matomo: MatomoServer, tmp_path: Path) -> None:
    matomo.visits = [api_visit(1)]
    Opened(matomo.url, tmp_path, consent_dimension=1).check()
    with pytest.raises(SourceError, match="no custom dimension 4"):
        Opened(matomo.url, tmp_path, consent_dimension=1, purposes_dimension=4).check()
    matomo.visits[0]["visitorId"] = False
    with pytest.raises(SourceError, match="no visitor id"):
        Opened(matomo.url, tmp_path).check()


@pytest.mark.parametrize(
    ("settings_", "told"),
    [
        ({"url": "https://user:pa55@matomo.example.org/"}, "must not hold a user"),
        ({"url": "http://matomo.example.org/"}, "write https"),
        ({"url": "https://[matomo/"}, "no address"),
        ({"url": "https://matomo.example.org/", "start": "yesterday"}, "source.start"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, settings_: dict[str, str], told: str) -> None:
    url = settings_.pop("url")
    with pytest.raises(SourceError, match=told) as caught:
        Opened(url, tmp_path, **settings_)
    assert "pa55" not in str(caught.value)


def test_an_address_that_is_none(tmp_path: Path) -> None:
    for url in ("https://a b/", "https://" + "a" * 70 + ".example.org/"):
        with pytest.raises(SourceError, match="is no address"):
            Opened(url, tmp_path).check()


def test_a_token_that_others_can_read(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o644)
    with pytest.raises(SecretError):
        MatomoApi(MatomoApiSource(url="https://m.example.org", token_file="token"), tmp_path)


# ---------------------------------------------------------------------------- what is sent


def test_the_token_stands_in_the_body_alone(matomo: MatomoServer, tmp_path: Path) -> None:
    matomo.visits = [api_visit(1)]
    source = Opened(matomo.url, tmp_path, retries=1)
    source.check()
    list(source.batches(None, NOW))
    for fault in ("503", "html", "cut", "403", "302:http://127.0.0.1:9/", f"error:bad {TOKEN}"):
        matomo.faults = [fault] * 2
        with pytest.raises(SourceError) as caught:
            source.check()
        matomo.faults = []
        assert TOKEN not in "".join(traceback.format_exception(caught.value))
        linked: BaseException | None = caught.value
        while linked is not None:
            assert TOKEN not in f"{linked!r} {vars(linked)}"
            linked = linked.__context__
    assert {asked["token_auth"] for asked in matomo.requests} == {TOKEN}
    assert TOKEN not in "\n".join(matomo.log)
    assert {line.split()[:2][0] for line in matomo.log} == {"POST"}


def test_matomo_is_asked_for_no_more_than_is_used(matomo: MatomoServer, tmp_path: Path) -> None:
    list(Opened(matomo.url, tmp_path, consent_dimension=3).batches(None, NOW))
    [asked] = matomo.requests
    shown = set(asked["showColumns"].split(","))
    assert "dimension3" in shown
    assert not shown & {"visitIp", "userId", "referrerUrl", "city", "customVariables"}
    assert {"url", "pageTitle"} <= set(asked["hideColumns"].split(","))


# ---------------------------------------------------------------------------- anything at all

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from(["17", "-3", "1e400", "c0ffee0123456789", str(NOON), "goal"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "goalId", "revenue", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = sorted(api_visit(1))


def test_whatever_comes_is_a_visit_a_skip_or_an_error(matomo: MatomoServer, tmp_path: Path) -> None:
    source = Opened(matomo.url, tmp_path, retries=0)

    @given(
        changes=st.lists(
            st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=4) | ANYTHING, max_size=4
        )
    )
    @settings(max_examples=500, deadline=None)
    def whatever_comes(changes: list[Any]) -> None:
        page = [
            {**api_visit(n), **change} if isinstance(change, dict) else change
            for n, change in enumerate(changes)
        ]
        matomo.pages = [page, []]
        rows = 0
        try:
            for batch in source.batches(None, NOW):
                assert batch.visits.schema == VISITS
                assert batch.visits.height + sum(s.count for s in batch.skipped) == batch.rows
                assert batch.visits["revenue"].is_finite().all()
                needed = batch.visits.select("visitor_id", "time", "converted", "revenue")
                assert needed.null_count().sum_horizontal().item() == 0
                rows += batch.rows
        except SourceError:
            return
        assert rows == len(page)

    whatever_comes()
