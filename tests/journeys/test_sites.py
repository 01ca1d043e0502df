from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest

from conf.compose import load
from conf.schema import FeatureConfig, NumericColumn, SyntheticData, TableData
from journeys.errors import JourneyDataError
from journeys.features import OTHER, feature_spec
from journeys.site import SiteJourneys
from journeys.sites import load_sites

ROOT = Path(__file__).parents[2]


def write_table(path: Path, sites: list[str], visitors: int = 60) -> TableData:
    """Journeys of two touchpoints; all visitors come to every site."""
    rows = [
        {
            "visitor_id": f"v{visitor}",
            "time": f"2026-03-{1 + visitor % 20 + later:02}T10:00:00Z",
            "channel": ["direct", "email"][(visitor + later) % 2],
            "converted": bool(later and visitor % 3 == 0),
            "shop": site,
        }
        for site in sites
        for visitor in range(visitors)
        for later in (0, 1)
    ]
    pl.DataFrame(rows).write_csv(path)
    features = FeatureConfig(channels=["direct", "email"])
    return TableData(path=str(path), features=features, site_column="shop")


def rows_of(site: SiteJourneys) -> int:
    return len(site.train) + len(site.holdout)


def test_sites_by_column_in_natural_order(tmp_path: Path) -> None:
    names = ["shop 10", "shop 2", "shop 1", "annex"]
    sites = load_sites(write_table(tmp_path / "t.csv", names), seed=0)
    assert [site.name for site in sites] == ["annex", "shop 1", "shop 2", "shop 10"]
    assert [rows_of(site) for site in sites] == [60] * 4
    for site in sites:
        # A site knows what happened there, whatever the same visitor did elsewhere; and the same
        # visitors are held out everywhere.
        for part in ("train", "holdout"):
            mine, first = getattr(site, part), getattr(sites[0], part)
            assert mine.length.max() <= 2
            np.testing.assert_array_equal(mine.categorical, first.categorical)
            np.testing.assert_array_equal(mine.label, first.label)


def test_sites_dealt_out(tmp_path: Path) -> None:
    config = replace(write_table(tmp_path / "t.csv", ["a"], 300), site_column=None)
    config = replace(config, dirichlet_sites=3, dirichlet_alpha=5.0)
    sites = load_sites(config, seed=0)
    assert [site.name for site in sites] == ["site 0", "site 1", "site 2"]
    assert sum(map(rows_of, sites)) == 300
    again, other = load_sites(config, seed=0), load_sites(config, seed=1)
    assert list(map(rows_of, again)) == list(map(rows_of, sites))
    assert list(map(rows_of, other)) != list(map(rows_of, sites))


@pytest.mark.parametrize("border", [None, "2026-03-14T00:00:00Z"], ids=["by hash", "by time"])
def test_several_examples_a_visitor(tmp_path: Path, border: str | None) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {
            "visitor_id": f"v{visitor}",
            "time": f"2026-03-{1 + day:02}T10:00:00Z",
            "channel": "direct",
            "converted": False,
            # Tells every touchpoint from every other.
            "mark": (visitor * 30 + day) / 30_000,
        }
        for visitor in range(1_000)
        for day in sorted(rng.choice(30, rng.integers(1, 7), replace=False).tolist())
    ]
    pl.DataFrame(rows).write_csv(tmp_path / "t.csv")
    features = FeatureConfig(channels=["direct"], numeric={"mark": NumericColumn()})
    one = TableData(
        path=str(tmp_path / "t.csv"), features=features, dirichlet_sites=3, holdout_from=border
    )
    seen: list[set[int]] = []
    for single, several in zip(
        load_sites(one, seed=0), load_sites(replace(one, contributions=3), seed=0), strict=True
    ):
        assert single.train.visitor is None
        assert single.holdout.visitor is None
        for name in ("categorical", "numeric", "length", "label"):
            array = getattr(several.holdout, name)
            np.testing.assert_array_equal(getattr(single.holdout, name), array)
        assert several.holdout.visitors == len(several.holdout)
        assert several.train.visitors == single.train.visitors == len(single.train)

        train, held = (
            decided_marks(part.numeric, part.length) for part in (several.train, several.holdout)
        )
        assert len(set(train)) == len(train)
        assert set(decided_marks(single.train.numeric, single.train.length)) <= set(train)
        assert several.train.visitor is not None
        own = pl.DataFrame(
            {"number": several.train.visitor, "visitor": [mark // 30 for mark in train]}
        )
        # A number a visitor, a visitor a number.
        assert len(own.unique()) == own["number"].n_unique() == own["visitor"].n_unique()
        assert own["number"].value_counts()["count"].max() == 3
        trained = set(own["visitor"])
        kept_apart = {mark // 30 for mark in held}
        assert not trained & kept_apart
        seen.append(trained | kept_apart)
    assert len(set().union(*seen)) == sum(map(len, seen))


def decided_marks(numeric: npt.NDArray[np.float32], length: npt.NDArray[np.int32]) -> list[int]:
    """visitor * 30 + day of the touchpoint at which each example is decided."""
    newest = numeric[np.arange(len(length)), length - 1, 0]
    return [int(mark) for mark in np.rint(newest * 30_000)]


def test_a_site_with_too_few_visitors_is_named(tmp_path: Path) -> None:
    config = write_table(tmp_path / "t.csv", ["only"], visitors=2)
    with pytest.raises(JourneyDataError, match='site "only" has'):
        load_sites(config, seed=0)


def test_synthetic_sites_carry_the_true_probability() -> None:
    config = load(["data=synthetic", "data.sites=2", "data.visitors=400"]).data
    sites = load_sites(config, seed=0)
    assert [site.name for site in sites] == ["site 0", "site 1"]
    for site in sites:
        assert rows_of(site) == 400
        assert site.holdout_probability is not None
        assert site.holdout_probability.shape == (len(site.holdout),)
    labels = np.concatenate([site.holdout.label for site in sites])
    truth = np.concatenate([cast(Any, site.holdout_probability) for site in sites])
    assert truth[labels == 1].mean() > 1.5 * truth[labels == 0].mean()


def test_the_synthetic_default_loads() -> None:
    config = load(["data=synthetic"]).data
    assert isinstance(config, SyntheticData)


def test_events_is_a_default_for_anyones_table(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_table(path, ["a"], 400)
    config = load(["data=events", f"data.path={path}", "data.dirichlet_sites=2"]).data
    assert sum(map(rows_of, load_sites(config, seed=0))) == 400


# ---------------------------------------------------------------------------- real sessions


@pytest.fixture
def online_shoppers() -> TableData:
    folder = Path(os.environ.get("JOURNEYS_REAL_DATA", ROOT.parent / "shared" / "data"))
    path = folder / "online_shoppers" / "online_shoppers_intention.csv"
    if not path.is_file():
        pytest.skip(f"set JOURNEYS_REAL_DATA to the folder that holds {'/'.join(path.parts[-2:])}")
    config = load(["data=online_shoppers", f"data.path={path}"]).data
    assert isinstance(config, TableData)
    return config


def test_real_sessions_by_region(online_shoppers: TableData) -> None:
    sites = load_sites(online_shoppers, seed=0)
    assert [site.name for site in sites] == [str(region) for region in range(1, 10)]
    # The figures of the table itself.
    visitors = [4780, 1136, 2403, 1182, 318, 805, 761, 434, 511]
    assert [rows_of(site) for site in sites] == visitors
    assert sum(site.train.label.sum() + site.holdout.label.sum() for site in sites) == 1908
    held_out = sum(len(site.holdout) for site in sites) / 12_330
    assert abs(held_out - 0.2) < 0.015

    spec = feature_spec(online_shoppers.features)
    codes = np.concatenate([site.train.categorical[:, 0] for site in sites])
    other = {name: (codes[:, i] == OTHER).mean() for i, (name, _) in enumerate(spec.categorical)}
    assert other.pop("VisitorType") < 0.01  # the shop's own "Other"
    assert set(other.values()) == {0.0}
    numbers = np.concatenate([site.train.numeric[:, 0] for site in sites])
    assert numbers.min() >= 0
    assert numbers.max() <= 1
    assert (numbers.std(axis=0) > 0.02).all()
    assert "PageValues" not in spec.numeric
