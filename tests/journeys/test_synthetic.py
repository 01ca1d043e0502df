from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from omegaconf import OmegaConf
from scipy.stats import chi2_contingency, kstest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from conf.schema import NumericColumn, SettingError, SyntheticData
from journeys import synthetic, truth
from journeys.features import FIRST, OTHER, feature_spec
from journeys.synthetic import SyntheticJourneys, generate

DAY = 86_400
CONFIG = Path(__file__).parents[2] / "conf" / "data" / "synthetic.yaml"


def small(**settings: Any) -> SyntheticData:
    """The configuration as shipped, with fewer sites and visitors."""
    shipped: Any = OmegaConf.load(CONFIG)
    del shipped["defaults"]
    merged = OmegaConf.merge(OmegaConf.structured(SyntheticData), shipped)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, SyntheticData)
    return replace(config, **({"sites": 3, "visitors": 400} | settings))


def past(journeys: SyntheticJourneys) -> pl.DataFrame:
    """Touchpoints up to the decision, with the decision's columns."""
    joined = journeys.touchpoints.join(journeys.decisions.drop("site"), on="visitor")
    return joined.filter(pl.col("time") <= pl.col("decision_time"))


def journeys_of(journeys: SyntheticJourneys, lookback_days: float) -> list[list[tuple[str, float]]]:
    """(channel, age in days) of each touchpoint in the look-back, a list a decision."""
    found: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for visitor, time, channel in journeys.touchpoints.select(
        "visitor", "time", "channel"
    ).iter_rows():
        found[visitor].append((time, truth.CHANNELS[channel - FIRST].name))
    journey = []
    for visitor, decided in journeys.decisions.select("visitor", "decision_time").iter_rows():
        ages = [(c, (decided - t) / DAY) for t, c in sorted(found[visitor]) if t <= decided]
        journey.append([(c, age) for c, age in ages if age < lookback_days])
    return journey


def slow_journey_logit(journey: list[tuple[str, float]]) -> float:
    """The sum of `journeys.truth`'s formula, touchpoint by touchpoint."""
    by_name = {c.name: c for c in truth.CHANNELS}
    total, before = 0.0, set[str]()
    for channel, age in journey:
        added = by_name[channel].effect * 0.5 ** (age / by_name[channel].half_life)
        for earlier, later, factor in truth.PAIRS:
            if later == channel and earlier in before:
                added *= factor
        total += added
        before.add(channel)
    return total


def slow_season_logit(time: int) -> float:
    decided = datetime.fromtimestamp(time, UTC)
    return truth.WEEKDAY[decided.weekday()] + truth.MONTH[decided.month - 1]


def logit(p: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    p64 = p.astype(np.float64)
    return np.asarray(np.log(p64 / (1 - p64)))


@pytest.fixture(scope="module")
def large() -> SyntheticJourneys:
    return generate(small(sites=10, visitors=3000), seed=1)


def test_same_seed_gives_the_same_journeys_and_another_seed_others() -> None:
    one, again, other = (generate(small(), seed) for seed in (5, 5, 6))
    assert one.touchpoints.equals(again.touchpoints)
    assert one.decisions.equals(again.decisions)
    assert np.array_equal(one.probability, again.probability)
    assert one.removal_effect == again.removal_effect
    assert not one.decisions["decision_time"].equals(other.decisions["decision_time"])


def test_a_site_past_does_not_depend_on_the_other_sites() -> None:
    alone, among = generate(small(sites=1), 2), generate(small(sites=3), 2)
    in_past = past(among).filter(pl.col("site") == "site 0")
    assert past(alone).drop("label").equals(in_past.drop("label"))


def test_touchpoints_are_an_encoded_touchpoint_frame() -> None:
    config = small()
    config.features = replace(config.features, campaign_buckets=7)
    touchpoints, spec = generate(config, 0).touchpoints, feature_spec(config.features)
    assert dict(touchpoints.schema) == {
        "visitor": pl.UInt64,
        "site": pl.String,
        "time": pl.Int64,
        "converted": pl.Boolean,
        **{name: pl.UInt16 for name, _ in spec.categorical},
        **dict.fromkeys(config.features.numeric, pl.Float32),
    }
    assert touchpoints.null_count().sum_horizontal().item() == 0
    for name, size in spec.categorical:
        assert set(touchpoints[name].unique()) == set(range(FIRST, size)), name
    for name in config.features.numeric:
        assert touchpoints[name].is_between(0, 1).all(), name
        assert touchpoints[name].n_unique() > 10, name
    for time, hour, weekday in touchpoints.select("time", "hour", "weekday").head(500).iter_rows():
        at = datetime.fromtimestamp(time, UTC)
        assert (hour, weekday) == (FIRST + at.hour, FIRST + at.weekday())


def test_numeric_columns_are_scaled_by_their_public_range() -> None:
    config = small()
    plain, logged = NumericColumn(0, 10), NumericColumn(0, 50, log=True)
    first, second = (
        generate(
            replace(config, features=replace(config.features, numeric={"page_views": column})), 0
        ).touchpoints["page_views"]
        for column in (plain, logged)
    )
    pages = np.expm1(second.to_numpy().astype(np.float64) * log(51))
    assert pages == pytest.approx(pages.round(), abs=1e-3)
    assert first.to_numpy() == pytest.approx(np.minimum(pages, 10) / 10, abs=1e-5)


def test_what_the_features_leave_out_counts_as_other_and_changes_nothing_else() -> None:
    config = small()
    fewer = replace(
        config.features,
        channels=["email", "direct"],
        clock=False,
        categorical={"device": ["tablet"]},
        numeric={},
    )
    full, cut = generate(config, 3), generate(replace(config, features=fewer), 3)
    assert cut.touchpoints.columns == ["visitor", "site", "time", "converted", "channel", "device"]
    assert set(cut.touchpoints["channel"]) == {OTHER, FIRST, FIRST + 1}
    assert set(cut.touchpoints["device"]) == {OTHER, FIRST}
    assert full.touchpoints["time"].equals(cut.touchpoints["time"])
    assert np.array_equal(full.probability, cut.probability)
    assert cut.removal_effect == {c: full.removal_effect[c] for c in ("email", "direct")}


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("channels", ["direct", "fax"]),
        ("categorical", {"browser": ["a"]}),
        ("numeric", {"revenue": NumericColumn()}),
    ],
)
def test_a_feature_that_the_world_does_not_have_is_refused(field: str, asked: Any) -> None:
    config = small()
    config.features = replace(config.features, **{field: asked})
    with pytest.raises(SettingError, match=rf"data\.features\.{field}.*choose from"):
        generate(config, 0)


def test_decisions_are_one_a_visitor_just_after_a_touchpoint(large: SyntheticJourneys) -> None:
    decisions = large.decisions
    assert dict(decisions.schema) == {
        "visitor": pl.UInt64,
        "site": pl.String,
        "decision_time": pl.Int64,
        "label": pl.Boolean,
    }
    assert decisions["visitor"].n_unique() == len(decisions) == 30_000 == len(large.probability)
    assert decisions["site"].unique(maintain_order=True).to_list() == [
        f"site {i}" for i in range(10)
    ]
    assert large.probability.dtype == np.float32
    sites = large.touchpoints.select("visitor", "site").unique()
    assert sites.sort("visitor").equals(decisions.select("visitor", "site").sort("visitor"))
    last = past(large).with_columns(age=pl.col("decision_time") - pl.col("time"))
    newest = last.group_by("visitor").agg(pl.col("age").min(), count=pl.len())
    assert len(newest) == 30_000
    assert newest["age"].is_between(1, 30 * DAY - 1).all()
    assert newest["count"].max() == synthetic.MAX_TOUCHPOINTS
    assert newest["count"].min() == 1
    lookback = last.filter(pl.col("age") < 30 * DAY)
    assert 4 < len(lookback) / 30_000 < 5


def test_decisions_spread_evenly_over_the_half_year_to_2026_06_30(large: SyntheticJourneys) -> None:
    time = large.decisions["decision_time"].to_numpy()
    end = datetime(2026, 7, 1, tzinfo=UTC).timestamp()
    assert end - 182 * DAY <= time.min()
    assert time.max() < end
    assert kstest((end - time) / (182 * DAY), "uniform").pvalue > 1e-3


def test_a_label_is_a_conversion_within_the_horizon(large: SyntheticJourneys) -> None:
    bought = large.touchpoints.filter("converted").join(large.decisions, on="visitor")
    wait = bought["time"] - bought["decision_time"]
    assert (wait > 0).all()
    assert bought["label"].equals((wait <= 7 * DAY).rename("label"))
    assert bought["visitor"].n_unique() == len(bought)
    assert bought["label"].sum() == large.decisions["label"].sum()
    assert (~bought["label"]).sum() > 500


def test_labels_follow_the_probability(large: SyntheticJourneys) -> None:
    label = large.decisions["label"].to_numpy()
    for rows in np.array_split(np.argsort(large.probability), 10):
        p = large.probability[rows].astype(np.float64)
        deviation = np.sqrt((p * (1 - p)).sum())
        assert abs(label[rows].sum() - p.sum()) < 3.5 * deviation


@pytest.mark.parametrize("base_rate", [0.005, 0.08, 0.6])
@pytest.mark.parametrize("heterogeneity", [0.0, 1.0])
def test_the_mean_probability_is_the_base_rate(base_rate: float, heterogeneity: float) -> None:
    journeys = generate(small(base_rate=base_rate, heterogeneity=heterogeneity), 0)
    assert journeys.probability.mean(dtype=np.float64) == pytest.approx(base_rate, rel=1e-5)


@pytest.mark.parametrize("lookback_days", [30.0, 2.5])
def test_the_probability_is_the_formula_of_the_past(
    lookback_days: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without site differences and intent, the formula leaves nothing but the intercept.
    monkeypatch.setattr(synthetic, "PROPENSITY", 0.0)
    journeys = generate(small(heterogeneity=0.0, lookback_days=lookback_days), 4)
    known = [
        slow_journey_logit(journey) + slow_season_logit(time)
        for journey, time in zip(
            journeys_of(journeys, lookback_days), journeys.decisions["decision_time"], strict=True
        )
    ]
    assert np.std(known) > 0.5
    assert np.ptp(logit(journeys.probability) - known) < 1e-4


@pytest.mark.parametrize("lookback_days", [30.0, 2.5])
def test_removal_effects_are_those_of_deleted_touchpoints(lookback_days: float) -> None:
    journeys = generate(small(lookback_days=lookback_days), 4)
    journey = journeys_of(journeys, lookback_days)
    rest = logit(journeys.probability) - [slow_journey_logit(j) for j in journey]
    kept = journeys.probability.mean(dtype=np.float64)
    for channel, effect in journeys.removal_effect.items():
        left = [
            1 / (1 + exp(-base - slow_journey_logit([t for t in j if t[0] != channel])))
            for base, j in zip(rest, journey, strict=True)
        ]
        assert effect == pytest.approx(1 - np.mean(left) / kept, abs=1e-5), channel
    assert list(journeys.removal_effect) == [c.name for c in truth.CHANNELS]


def test_what_follows_the_decision_does_not_change_the_probability(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = generate(small(), 0)
    monkeypatch.setattr(synthetic, "LATER_TOUCHPOINTS", 5.0)
    monkeypatch.setattr(synthetic, "LATE_CONVERSION", 0.5)
    after = generate(small(), 0)
    assert len(after.touchpoints) > len(before.touchpoints) + 3000
    assert past(before).equals(past(after))
    assert before.decisions.equals(after.decisions)
    assert np.array_equal(before.probability, after.probability)


def test_the_future_would_leak_the_label(large: SyntheticJourneys) -> None:
    ahead = large.touchpoints.join(large.decisions.drop("site"), on="visitor").filter(
        pl.col("time") > pl.col("decision_time")
    )
    count = large.decisions.join(ahead.group_by("visitor").len(), on="visitor", how="left")
    leak = roc_auc_score(count["label"].to_numpy(), count["len"].fill_null(0).to_numpy())
    assert leak > 0.7


def site_differences(heterogeneity: float) -> tuple[float, float, SyntheticJourneys]:
    """Largest total variation distance of a site's channel mix from the mean mix, and the ratio
    of the largest to the smallest mean probability.
    """
    journeys = generate(small(sites=8, visitors=2000, heterogeneity=heterogeneity), 0)
    counts = past(journeys).pivot("channel", index="site", values="time", aggregate_function="len")
    mix = counts.drop("site").fill_null(0).to_numpy()
    mix = mix / mix.sum(axis=1, keepdims=True)
    rate = journeys.probability.reshape(8, -1).mean(axis=1)
    distance = np.abs(mix - mix.mean(axis=0)).sum(axis=1).max() / 2
    return float(distance), float(rate.max() / rate.min()), journeys


def test_heterogeneity_sets_how_much_sites_differ() -> None:
    (none, even, alike), (half, some, _), (full, strong, apart) = map(
        site_differences, (0.0, 0.5, 1.0)
    )
    assert none < 0.02
    assert 0.1 < half < full
    assert even < 1.15
    assert 1.5 < some < strong
    by_site = [
        journeys.decisions.group_by("site").agg(
            pl.col("label").sum(), rest=(~pl.col("label")).sum()
        )
        for journeys in (alike, apart)
    ]
    alike_p, apart_p = (chi2_contingency(t.drop("site").to_numpy()).pvalue for t in by_site)
    assert alike_p > 1e-3
    assert apart_p < 1e-20


def test_a_bag_of_channels_beats_the_last_touch_and_the_truth_beats_both(
    large: SyntheticJourneys,
) -> None:
    seen = past(large).filter(pl.col("decision_time") - pl.col("time") < 30 * DAY)
    bag = (
        large.decisions.select("visitor")
        .join(
            seen.pivot("channel", index="visitor", values="time", aggregate_function="len"),
            on="visitor",
            maintain_order="left",
        )
        .drop("visitor")
        .fill_null(0)
        .to_numpy()
    )
    last = large.decisions.select("visitor").join(
        seen.group_by("visitor").agg(pl.col("channel").sort_by("time").last()),
        on="visitor",
        maintain_order="left",
    )["channel"]
    label = large.decisions["label"].to_numpy()
    train = np.arange(len(label)) % 2 == 0
    channel = last.to_numpy().astype(np.int64)
    rate = np.bincount(channel[train], label[train]) / np.maximum(np.bincount(channel[train]), 1)
    model = LogisticRegression(max_iter=1000).fit(bag[train], label[train])

    by_last = roc_auc_score(label[~train], rate[channel[~train]])
    by_bag = roc_auc_score(label[~train], model.predict_proba(bag[~train])[:, 1])
    by_truth = roc_auc_score(label[~train], large.probability[~train])
    assert 0.55 < by_last <= 0.64
    assert by_last + 0.1 < by_bag < by_truth - 0.05
    assert by_truth >= 0.78
