from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.folder import SiteFolder, create
from client.preparation import MOST_VISITS, RARE, STEPS, Preparation, Prepared
from client.sources.source import VISITS as READ
from conf.site import (
    ConsentConfig,
    FilesSource,
    PreparationConfig,
    SiteConfig,
    VisitColumns,
)
from journeys.store import VISITS
from tests.visits import DAY, HOUR, NOW, visits


def config(
    consent: ConsentConfig | None = None, purposes: str = "", campaign_visitors: int = 3
) -> SiteConfig:
    return SiteConfig(
        name="acme",
        source=FilesSource(path="x", columns=VisitColumns(purposes=purposes)),
        consent=consent or ConsentConfig(accepted=["yes", "Granted"]),
        preparation=PreparationConfig(campaign_visitors=campaign_visitors),
    )


@pytest.fixture
def folder(tmp_path: Path) -> SiteFolder:
    return create(tmp_path / "site", NOW)


def preparation(folder: SiteFolder, settings: SiteConfig, now: int = NOW) -> Preparation:
    keys = folder.keys(settings)
    keys.turn(now)
    return Preparation(settings, keys, folder.store(read_only=True), now)


def prepare(folder: SiteFolder, *rows: dict[str, Any], **settings: Any) -> Prepared:
    return preparation(folder, config(**settings)).prepare(visits(*rows))


def removed(prepared: Prepared) -> dict[str, int]:
    return {step: count for step, count in prepared.removed.items() if count}


@pytest.mark.parametrize(
    ("said", "kept"),
    [("yes", 1), (" YES ", 1), ("granted", 1), ("no", 0), ("", 0), (None, 0), ("yes!", 0)],
)
def test_only_an_accepted_value_is_consent(folder: SiteFolder, said: str | None, kept: int) -> None:
    prepared = prepare(folder, {"consent": said})
    assert prepared.visits.height == kept
    assert removed(prepared) == ({} if kept else {"consent": 1})


def test_consent_upstream_lets_silence_pass_and_still_hears_a_no(folder: SiteFolder) -> None:
    silent, refused = {"consent": None}, {"consent": "no", "time": NOW}
    for consent, kept in [
        (ConsentConfig(upstream=True), 2),
        (ConsentConfig(upstream=True, accepted=["yes"]), 1),
    ]:
        assert prepare(folder, silent, refused, consent=consent).visits.height == kept


@pytest.mark.parametrize(
    ("field", "step"), [("do_not_track", "do not track"), ("opted_out", "opted out")]
)
def test_a_no_of_the_browser_counts_in_spite_of_consent(
    folder: SiteFolder, field: str, step: str
) -> None:
    prepared = prepare(folder, {field: True}, {field: False}, {field: None, "time": NOW})
    assert removed(prepared) == {step: 1}
    assert prepared.visits.height == 2


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("conversion-model", 1),
        ("ads; Conversion-Model", 1),
        ("ads,conversion-model|stats", 1),
        ("ads", 0),
        ("conversion-models", 0),
        (None, 0),
    ],
)
def test_the_purpose_must_be_among_those_consented_to(
    folder: SiteFolder, said: str | None, kept: int
) -> None:
    prepared = prepare(folder, {"purposes": said}, purposes="purposes")
    assert prepared.visits.height == kept
    assert removed(prepared) == ({} if kept else {"purpose": 1})


def test_steps_are_asked_in_their_order_and_each_visit_counts_once(folder: SiteFolder) -> None:
    prepared = prepare(
        folder,
        {"consent": "no", "do_not_track": True, "time": 0},
        {"do_not_track": True, "opted_out": True},
        {"opted_out": True, "time": 0},
        {"time": NOW - 396 * DAY},
        {"visit_id": "1"},
        {"visit_id": "1"},
    )
    assert tuple(prepared.removed) == STEPS
    assert removed(prepared) == {
        "consent": 1,
        "do not track": 1,
        "opted out": 1,
        "retention": 1,
        "stored already": 1,
    }
    assert prepared.visits.height == 1


def test_what_is_kept_is_the_closed_list_and_nothing_of_the_visitor(folder: SiteFolder) -> None:
    prepared = prepare(
        folder,
        {
            "visitor_id": "secret-visitor",
            "visit_id": "secret-visit",
            "source": "secret-source",
            "medium": "secret-medium",
            "keyword": "secret-keyword",
            "country": "de",
            "visit_number": 4812,
            "page_views": 1,
        },
    )
    assert prepared.visits.schema == VISITS
    (row,) = prepared.visits.rows(named=True)
    assert "secret" not in str(row)
    assert row["region"] == "western europe"
    assert row["visit_number"] == MOST_VISITS
    assert row["bounced"] is True
    for table in prepared.tables.values():
        assert "secret" not in str(table.rows())


def test_a_bounce_is_a_visit_of_one_action_at_most(folder: SiteFolder) -> None:
    pages = [0, 1, 2, None]
    rows = [{"page_views": count, "time": NOW - place} for place, count in enumerate(pages)]
    found = prepare(folder, *rows).visits.sort("time", descending=True)
    assert dict(zip(found["page_views"], found["bounced"], strict=True)) == {
        0: True,
        1: True,
        2: False,
        None: None,
    }


def test_the_pseudonym_is_the_hmac_of_the_id_by_the_sites_key(folder: SiteFolder) -> None:
    (key,) = folder.keys(config()).current()
    (row,) = prepare(folder, {"visitor_id": "ada"}).visits.rows(named=True)
    expected = hmac.digest(bytes.fromhex(key.key), b"ada", "sha256").hex()[:32]
    assert row["visitor_id"] == expected


def test_times_are_hours_and_visits_within_one_stay_in_order(folder: SiteFolder) -> None:
    hour = (NOW - DAY) // HOUR * HOUR
    prepared = prepare(
        folder,
        {"time": hour + 3000, "visit_id": "c", "page_views": 3},
        {"time": hour + 10, "visit_id": "a", "page_views": 1},
        {"time": hour + 2000, "visit_id": "b", "page_views": 2},
        {"time": hour + 3599, "visit_id": "d", "page_views": 4, "visitor_id": "bob"},
        {"time": hour + 5000, "visit_id": "f", "page_views": 5},
        {"time": hour + 4000, "visit_id": "e", "page_views": 4},
        {"time": hour + 7200, "visit_id": "g", "page_views": 6},
    )
    found = prepared.visits.select(pl.col("time").dt.epoch("s") - hour, "page_views", "visitor_id")
    ada, bob = (
        found.filter(pl.col("visitor_id") == v)
        for v in found["visitor_id"].unique(maintain_order=True)
    )
    assert ada["time"].to_list() == [0, 1, 2, 3600, 3601, 7200]
    assert ada["page_views"].to_list() == [1, 2, 3, 4, 5, 6]
    assert bob["time"].to_list() == [0]


def followers(campaign: str, names: str) -> list[dict[str, Any]]:
    return [{"visitor_id": name, "campaign": campaign} for name in names]


def test_without_ids_visits_at_one_time_by_two_campaigns_are_two(folder: SiteFolder) -> None:
    rows = [*followers("spring", "a"), *followers("odd", "a"), *followers("odd", "a")]
    assert prepare(folder, *rows).visits.height == 2


def test_a_campaign_of_few_visitors_shares_a_bucket(folder: SiteFolder) -> None:
    rows = [*followers("spring", "abc"), *followers("odd", "ab"), *followers(" ", "c")]
    found = prepare(folder, *rows, {"visitor_id": "x"}).visits
    assert found["campaign"].value_counts().sort("campaign").rows() == [
        (None, 2),
        (RARE, 2),
        ("spring", 3),
    ]


def test_visitors_count_once_and_over_batches(folder: SiteFolder) -> None:
    preparing = preparation(folder, config())
    often = [row | {"time": NOW - number} for number, row in enumerate(followers("spring", "aaab"))]
    one = preparing.prepare(visits(*often))
    assert one.visits.height == 4
    assert set(one.visits["campaign"]) == {RARE}
    assert one.tables["pending"].height == 2
    two = preparing.prepare(visits(*followers("spring", "bc")))
    assert set(two.visits["campaign"]) == {"spring"}
    assert two.tables["named"]["campaign"].to_list() == ["spring"]
    assert two.tables["pending"].is_empty()


def test_what_counts_of_campaigns_outlives_the_process_and_retention(folder: SiteFolder) -> None:
    first = preparation(folder, config()).prepare(visits(*followers("spring", "ab")))
    with folder.store() as store:
        store.append(first.visits, None, first.tables)
    assert set(
        preparation(folder, config()).prepare(visits(*followers("spring", "c"))).visits["campaign"]
    ) == {"spring"}
    later = NOW + 400 * DAY
    row = followers("spring", "c")[0] | {"time": later}
    assert set(preparation(folder, config(), later).prepare(visits(row)).visits["campaign"]) == {
        RARE
    }


def test_a_campaign_of_visitors_without_consent_counts_nobody(folder: SiteFolder) -> None:
    rows = [*followers("odd", "ab"), followers("odd", "c")[0] | {"consent": "no"}]
    assert set(prepare(folder, *rows).visits["campaign"]) == {RARE}


def test_a_visit_that_is_stored_is_not_stored_again(folder: SiteFolder) -> None:
    rows = [{"visit_id": str(i), "time": NOW - i * 20 * DAY} for i in range(5)]
    first = prepare(folder, *rows)
    with folder.store() as store:
        store.append(first.visits, None, first.tables)
    again = prepare(folder, *rows, {"visit_id": "new"})
    assert removed(again) == {"stored already": 5}
    assert again.visits.height == 1


def test_without_a_visit_id_the_same_visitor_and_time_is_the_same_visit(
    folder: SiteFolder,
) -> None:
    rows = [{"visitor_id": "a"}, {"visitor_id": "a"}, {"visitor_id": "b"}]
    assert prepare(folder, *rows).visits.height == 2
    assert prepare(folder, *rows, {"visitor_id": "a", "visit_id": "7"}).visits.height == 3


def test_a_pseudonym_changes_with_the_key(folder: SiteFolder) -> None:
    now, settings = NOW + 400 * DAY, config()
    keys = folder.keys(settings)
    keys.turn(now)
    border = keys.current()[1].since
    found = (
        Preparation(settings, keys, folder.store(read_only=True), now)
        .prepare(visits({"time": border - 1}, {"time": border}))
        .visits
    )
    assert found["visitor_id"].n_unique() == found.height == 2


TEXT = st.one_of(st.none(), st.text(max_size=20))


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "visitor_id": st.text(min_size=1, max_size=5),
                "visit_id": TEXT,
                "time": st.integers(0, NOW + HOUR),
                "channel": TEXT,
                "source": TEXT,
                "medium": TEXT,
                "campaign": TEXT,
                "country": TEXT,
                "consent": st.sampled_from(["yes", "no", None]),
                "page_views": st.one_of(st.none(), st.integers(0, 2**62)),
                "visit_number": st.one_of(st.none(), st.integers(-5, 2**62)),
                "duration_s": st.one_of(st.none(), st.floats(0, 1e300)),
                "do_not_track": st.sampled_from([True, False, None]),
            }
        ),
        max_size=30,
    )
)
@settings(max_examples=150, deadline=None)
def test_any_batch_is_prepared_and_every_visit_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    folder = create(tmp_path_factory.mktemp("site") / "x", NOW)
    batch = visits(*rows) if rows else READ.to_frame()
    prepared = preparation(folder, config(campaign_visitors=2)).prepare(batch)
    assert prepared.visits.schema == VISITS
    assert prepared.visits.height + sum(prepared.removed.values()) == batch.height
    assert prepared.visits["visit"].n_unique() == prepared.visits.height
    few = prepared.visits.group_by("campaign").agg(pl.col("visitor_id").n_unique())
    named = few.filter(pl.col("campaign").is_not_null(), pl.col("campaign") != RARE)
    assert (named["visitor_id"] >= 2).all()
