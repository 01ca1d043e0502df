from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from client import journeys as stored_journeys
from client.journeys import StoredJourneys, check_cut
from client.policy import PlanRefused, SitePolicy
from client.site import Site
from conf.compose import load
from conf.schema import (
    FeatureConfig,
    JourneyConfig,
    LogisticConfig,
    NumericColumn,
    OptimizerConfig,
    TableData,
    VisitorDP,
)
from journeys.errors import JourneyDataError
from journeys.examples import Examples
from journeys.features import feature_spec
from journeys.sites import load_sites
from journeys.store import VISITS, Store, StoreError
from models.registry import initial_weights
from privacy.ledger import Ledger
from protocol.plan import RoundPlan
from protocol.replies import SiteEvaluation, SiteUpdate
from tests.visits import store_of, stored

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
FEATURES = load(["data=site", "data.path=store"]).data.features
CUT = JourneyConfig(FEATURES)
CHANNELS = ("email", "direct", "paid search")


def visits(count: int, seed: int = 1) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        stored(
            f"visitor {seed} {number}",
            NOON - timedelta(days=float(day)),
            channel=CHANNELS[number % 3],
            campaign=f"campaign {number % 5}",
            converted=bool(rng.random() < 0.2),
            page_views=number % 9,
        )
        for number in range(count)
        for day in rng.uniform(0, 60, 1 + number % 3)
    ]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return store_of(tmp_path / "store", visits(60), visits(40, seed=2))


def cuts(store: Path, holdout: float = 0.2) -> StoredJourneys:
    return StoredJourneys(store, "acme", holdout)


def same(one: Examples, other: Examples) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for field in fields(Examples)
        if getattr(one, field.name) is not getattr(other, field.name)
    )


# ---------------------------------------------------------------------------- what is cut


@pytest.mark.parametrize("contributions", [1, 3])
@pytest.mark.parametrize("holdout", [0.2, 0.5])
def test_a_site_cuts_what_a_simulation_of_its_store_does(
    store: Path, contributions: int, holdout: float
) -> None:
    features = replace(FEATURES, campaign_buckets=16)
    cut = JourneyConfig(features, 20.0, 3.0, contributions)
    words = f"contributions={contributions} holdout={holdout} features.campaign_buckets=16"
    table = load(
        ["data=site", f"data.path={store}", "data.lookback_days=20", "data.horizon_days=3"]
        + [f"data.{word}" for word in words.split()]
    ).data
    assert isinstance(table, TableData)
    [simulated] = load_sites(table, seed=0)

    found = cuts(store, holdout)(cut)

    assert found.name == "acme"
    assert same(found.train, simulated.train)
    assert same(found.holdout, simulated.holdout)
    assert found.train.visitors + found.holdout.visitors == 100


def test_a_cut_is_kept_while_the_store_is_the_same(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journeys = cuts(store)
    first = journeys(CUT)
    with monkeypatch.context() as patched:
        patched.setattr(stored_journeys, "Store", None)
        assert journeys(JourneyConfig(replace(FEATURES))) is first
    other = journeys(JourneyConfig(FEATURES, lookback_days=2))
    assert not same(other.train, first.train)
    # One cut is kept, not each that was ever asked for.
    assert journeys(CUT) is not first


def test_who_is_forgotten_is_gone_from_the_next_round_on(store: Path) -> None:
    journeys = cuts(store)
    before = journeys(CUT)
    with Store(store) as opened:
        opened.remove(pl.col("visitor_id").str.starts_with("visitor 1 "), {})
    after = journeys(CUT)
    assert before.train.visitors + before.holdout.visitors == 100
    assert after.train.visitors + after.holdout.visitors == 40


def test_what_was_ingested_since_is_there(store: Path) -> None:
    journeys = cuts(store)
    journeys(CUT)
    with Store(store) as opened:
        opened.append(pl.DataFrame(visits(10, seed=3), schema=VISITS), None, {})
    found = journeys(CUT)
    assert found.train.visitors + found.holdout.visitors == 110


# ---------------------------------------------------------------------------- what it tells


def test_that_nobody_has_a_channel_is_not_told(store: Path) -> None:
    """The answer would say, without noise, whether one visitor is there."""
    cut = JourneyConfig(replace(FEATURES, channels=["ai assistant"]))
    with pytest.raises(JourneyDataError):
        load_sites(load(["data=site", f"data.path={store}", "data.features.channels=[x]"]).data, 0)
    assert cuts(store)(cut).train.visitors == cuts(store)(CUT).train.visitors


@pytest.mark.parametrize("rows", [0, 1])
def test_a_site_without_visitors_gives_noise_like_any_other(tmp_path: Path, rows: int) -> None:
    folder = store_of(tmp_path / "store", visits(rows))
    policy = replace(SitePolicy.of_simulation(), run_epsilon=3.0, epsilon=3.0)
    ledger = Ledger(tmp_path / "ledger.sqlite", durable=False)
    weights = initial_weights(LogisticConfig(), feature_spec(FEATURES), 0)
    with closing(Site("acme", cuts(folder), policy, ledger, check_cut=check_cut)) as site:
        # Whatever the noise makes of the count.
        assert site.describe(plan(0)).visitors >= 1
        update, evaluation = site.train(plan(1), weights), site.evaluate(plan(1), weights)
    assert isinstance(update, SiteUpdate)
    assert isinstance(evaluation, SiteEvaluation)
    assert all(np.isfinite(w).all() for w in update.weights.values())


def plan(round_: int, cut: JourneyConfig = CUT) -> RoundPlan:
    promise = VisitorDP(epsilon=3.0, delta=1e-5, count_noise=20.0)
    model, optimizer = LogisticConfig(), OptimizerConfig(batch_size=32)
    return RoundPlan("shops", "ads", "run", round_, 3, 3, model, optimizer, promise, cut)


# ---------------------------------------------------------------------------- what is refused


def with_features(**changes: Any) -> JourneyConfig:
    return JourneyConfig(replace(FEATURES, **changes))


def numeric(name: str, **said: Any) -> JourneyConfig:
    return with_features(numeric={name: NumericColumn(**said)})


REFUSED = {
    "lookback": (JourneyConfig(FEATURES, lookback_days=401), "data.lookback_days=401: .* to 400"),
    "no lookback": (JourneyConfig(FEATURES, lookback_days=1e-9), "data.lookback_days=1e-09"),
    "horizon": (JourneyConfig(FEATURES, horizon_days=1e9), "data.horizon_days=1e.09"),
    "contributions": (JourneyConfig(FEATURES, contributions=21), "data.contributions=21: .* 20"),
    "touchpoints": (with_features(max_touchpoints=201), "data.features.max_touchpoints=201"),
    "channels": (
        with_features(channels=[str(i) for i in range(1001)]),
        "data.features.channels=1001: this site allows at most 1000",
    ),
    "values": (
        with_features(categorical={"region": [str(i) for i in range(1001)]}),
        "data.features.categorical.region=1001",
    ),
    "length at the end": (
        numeric("duration_s", high=9),
        "data.features.numeric.duration_s.known_at_end=false: this site allows true",
    ),
    "bounced": (numeric("bounced"), "data.features.numeric.bounced.known_at_end=false"),
    "no range": (
        numeric("visit_number", low=1.0, high=1.0 + 1e-9),
        "data.features.numeric.visit_number=1 to 1: this site allows a range of numbers",
    ),
    "too wide": (numeric("visit_number", low=-1e308, high=1e308), "numeric.visit_number=-1e.308"),
}
FOREIGN = ("revenue", "visitor_id", "visit", "basket", "user_id")


@pytest.mark.parametrize("name", REFUSED)
def test_a_cut_that_a_site_does_not_make_is_refused_by_its_field(name: str) -> None:
    cut, message = REFUSED[name]
    with pytest.raises(PlanRefused, match=f"^{message}" if "data" in message else message):
        check_cut(cut)


@pytest.mark.parametrize("column", [*FOREIGN, "duration_s", "page_views", "bounced"])
def test_categories_are_of_a_closed_list(column: str) -> None:
    with pytest.raises(PlanRefused, match=rf"^data\.features\.categorical={column}: this site"):
        check_cut(with_features(categorical={column: ["1"]}, numeric={}))


@pytest.mark.parametrize("column", [*FOREIGN, "device", "region", "campaign"])
def test_numbers_are_of_a_closed_list(column: str) -> None:
    with pytest.raises(PlanRefused, match=rf"^data\.features\.numeric={column}: this site allows"):
        check_cut(with_features(categorical={}, numeric={column: NumericColumn()}))


@pytest.mark.parametrize("column", ["converted", "site", "visitor", "time"])
def test_the_label_and_what_tells_visitors_apart_are_no_features_at_all(column: str) -> None:
    with pytest.raises(ValueError, match="must be new"):
        FeatureConfig(numeric={column: NumericColumn()})


def test_what_the_products_own_settings_ask_for_is_allowed() -> None:
    check_cut(CUT)
    check_cut(
        JourneyConfig(
            FeatureConfig(
                channels=[],
                max_touchpoints=200,
                campaign_buckets=4096,
                categorical={"region": ["europe"], "device": ["mobile"]},
                numeric={"bounced": NumericColumn(known_at_end=True)},
            ),
            lookback_days=400,
            horizon_days=1 / 24,
            contributions=20,
        )
    )


@pytest.mark.parametrize("ask", ["describe", "train", "evaluate"])
def test_a_refused_cut_is_neither_charged_nor_read(tmp_path: Path, ask: str) -> None:
    cut, message = REFUSED["length at the end"]
    policy, ledger = SitePolicy.of_simulation(), Ledger(tmp_path / "l.sqlite", durable=False)
    site = Site("acme", cuts(tmp_path / "nowhere"), policy, ledger, check_cut=check_cut)
    asked: Callable[..., object] = getattr(site, ask)
    with closing(site), pytest.raises(PlanRefused, match=message):
        asked(*[plan(1, cut)] + [{}] * (ask != "describe"))
    assert ledger.entries() == ()


def test_a_cut_is_checked_by_who_makes_it_too(store: Path) -> None:
    with pytest.raises(PlanRefused, match="known_at_end"):
        cuts(store)(REFUSED["bounced"][0])


def test_a_store_that_cannot_be_read(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store of visits"):
        cuts(tmp_path / "nowhere")(CUT)
    part = next(store.glob("*/*.parquet"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(StoreError, match="damaged"):
        cuts(store)(CUT)


def test_a_damaged_store_that_was_read_before_is_seen_with_its_next_change(store: Path) -> None:
    journeys = cuts(store)
    journeys(CUT)
    (store / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json: damaged"):
        journeys(CUT)


def test_no_message_quotes_a_cell(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> pl.DataFrame:
        raise pl.exceptions.ComputeError("cannot parse 'secret' as i64")

    monkeypatch.setattr(stored_journeys, "encode_rows", fails)
    with pytest.raises(StoreError) as error:
        cuts(store)(CUT)
    assert str(error.value) == f"{store}: cannot be read"
    assert error.value.__cause__ is None
