"""Synthetic journeys whose conversion probabilities and channel effects are known.

`journeys.truth` holds the world's constants. Site i draws everything from (seed, i) alone, so its
journeys stay the same whatever the other sites are; only the intercept, which brings the mean rate
over all sites to `base_rate`, ties the sites' labels together.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import polars as pl

from conf.schema import FeatureConfig, NumericColumn, SettingError, SyntheticData
from journeys.features import FIRST, OTHER, feature_spec
from journeys.truth import CHANNELS, DAY, PROPENSITY, journey_logits, season_logit, weekday

LAST_DECISION = int(datetime(2026, 7, 1, tzinfo=UTC).timestamp()) - 1
"""Decisions end with 2026-06-30, UTC."""
DECISION_DAYS = 182
"""Decisions are spread evenly over so many days."""

MAX_TOUCHPOINTS = 20
"""Longest journey before the decision."""
MEAN_REVISITS = 4.0
"""Mean touchpoints before the decision beyond the first, for intent 0."""
GAP_DAYS = 1.5
"""Median time between the end of a visit and the next visit, for intent 0."""
DELAY_DAYS = 0.2
"""Median time between the end of the newest visit and the decision, for intent 0."""
DURATION_S = 70.0
"""Median length of a visit, for intent 0."""
PAGE_S = 45.0
"""Seconds spent on a page, on average."""
MAX_DURATION_S = 3600
"""Longest visit."""

CONCENTRATION = 5.0
"""Total concentration of the Dirichlet that draws a site's channel mix, at heterogeneity 1; it
falls with the square of the heterogeneity."""
SITE_SPREAD = 0.6
"""Standard deviation of the sites' log-odds at heterogeneity 1."""

DEVICES = {"desktop": (0.38, 0.30), "mobile": (0.55, -0.15), "tablet": (0.07, 0.00)}
"""Share of visitors for intent 0, and its tilt with intent, as for channels."""
DEVICE_SWITCH = 0.15
"""Share of touchpoints on a freshly drawn device instead of the visitor's usual one."""
CAMPAIGNS = 4
"""Campaigns of each channel. They add nothing to the log-odds."""

LATER_TOUCHPOINTS = 1.0
"""Mean touchpoints after the decision, beside the conversion."""
LATE_CONVERSION = 0.03
"""Share of the visitors without a conversion in the horizon who convert just after it."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SyntheticJourneys:
    """Touchpoints and decisions of all sites, with the truth that drew them."""

    touchpoints: pl.DataFrame
    """Encoded touchpoint frame: `visitor` (UInt64), `site` (String), `time` (Int64, UTC seconds),
    `converted` (Boolean), one UInt16 column a categorical feature, one Float32 column in [0, 1] a
    declared numeric column. Sorted by site, visitor and time. Goes beyond the decisions."""
    decisions: pl.DataFrame
    """`visitor`, `site`, `decision_time` (Int64, UTC seconds), `label` (Boolean).
    A row a visitor, in the order of the touchpoints."""
    probability: npt.NDArray[np.float32]
    """(N,) true P(conversion within the horizon | journey, visitor, site), row by row with
    `decisions`. It knows the visitor's latent intent, so that no model can quite reach it."""
    removal_effect: dict[str, float]
    """1 - E[p without the channel's touchpoints] / E[p] of each channel of the features, the
    expectations taken over the generated visitors of all sites. Below 0 where a channel harms."""


@dataclass(frozen=True)
class _Visits:
    """What touchpoints are like, one entry a touchpoint: raw values, without their times."""

    visitor: Ints
    channel: Ints
    campaign: Ints
    device: Ints
    duration_s: Ints
    page_views: Ints


@dataclass(frozen=True)
class _Site:
    """The visitors of a site, and what they did up to their decisions."""

    intent: Floats
    channel_odds: Floats
    usual_device: Ints
    decision_time: Ints
    history: pl.DataFrame
    logit: Floats
    """(visitors,) log-odds of a conversion, but for the intercept."""
    logit_without: Floats
    """(visitors, channels) the same without each channel's touchpoints."""
    future: np.random.Generator
    """Draws what follows the decisions."""


def generate(config: SyntheticData, seed: int) -> SyntheticJourneys:
    """Draw the journeys of `config.sites` sites with `config.visitors` visitors each.

    The same config and seed give the same journeys. Raises SettingError where the features ask for
    a channel or a column that the synthetic world does not have; what the features leave out of the
    world's channels and devices counts as `other`.
    """
    _check_features(config.features)
    sites = [_draw_site(config, seed, index) for index in range(config.sites)]
    intercept = _calibrate(np.concatenate([site.logit for site in sites]), config.base_rate)

    touchpoints, decisions, probabilities = [], [], []
    for index, site in enumerate(sites):
        probability = _sigmoid(site.logit + intercept).astype(np.float32)
        label = site.future.random(config.visitors, dtype=np.float32) < probability
        decided = pl.DataFrame(
            {
                "visitor": np.arange(config.visitors, dtype=np.uint64),
                "decision_time": site.decision_time,
                "label": label,
            }
        )
        seen = pl.concat([site.history, _draw_future(config, site, label)]).sort("visitor", "time")
        decisions.append(_at_site(decided, index))
        touchpoints.append(_at_site(seen, index))
        probabilities.append(probability)
    return SyntheticJourneys(
        pl.concat(touchpoints),
        pl.concat(decisions),
        np.concatenate(probabilities),
        _removal_effect(sites, intercept, config.features.channels),
    )


def _draw_site(config: SyntheticData, seed: int, index: int) -> _Site:
    streams = np.random.SeedSequence(seed, spawn_key=(index,)).spawn(3)
    character, past, future = (np.random.default_rng(stream) for stream in streams)
    n, lookback_s = config.visitors, config.lookback_days * DAY

    share = np.array([c.share for c in CHANNELS])
    if config.heterogeneity > 0:
        # Below 1e-6 the mix is the typical one to six digits, and the square would underflow.
        share = character.dirichlet(share * CONCENTRATION / max(config.heterogeneity, 1e-6) ** 2)
    site_logit = SITE_SPREAD * config.heterogeneity * character.standard_normal()

    intent = past.standard_normal(n)
    channel_odds = _tilted(share, np.array([c.tilt for c in CHANNELS]), intent)
    usual_device = _draw(past, _device_odds(intent), np.arange(n))
    decision_time = past.integers(LAST_DECISION + 1 - DECISION_DAYS * DAY, LAST_DECISION + 1, n)
    revisits = past.exponential(MEAN_REVISITS * np.exp(0.3 * intent)).astype(np.int64)
    count = 1 + np.minimum(revisits, MAX_TOUCHPOINTS - 1)
    visitor, newest = np.repeat(np.arange(n), count), np.cumsum(count) - 1
    visits = _draw_visits(past, visitor, intent, channel_odds, usual_device)

    wait = GAP_DAYS * DAY * past.lognormal(-0.5 * intent[visitor], 1.2)
    wait[newest] = DELAY_DAYS * DAY * past.lognormal(-0.3 * intent, 1.5)
    step = visits.duration_s + 1 + wait.astype(np.int64)
    step[newest] = np.minimum(step[newest], max(int(lookback_s) - 1, 1))
    # From a visit to the decision pass its own step and those of the visitor's later visits.
    elapsed = np.cumsum(step)
    age = np.repeat(elapsed[newest], count) - elapsed + step

    seen = age < lookback_s
    added, left = journey_logits(visitor[seen], visits.channel[seen], age[seen] / DAY, n)
    rest = site_logit + PROPENSITY * intent + season_logit(decision_time)
    history = _encode(visits, decision_time[visitor] - age, np.zeros(len(age), bool), config)
    return _Site(
        intent=intent,
        channel_odds=channel_odds,
        usual_device=usual_device,
        decision_time=decision_time,
        history=history,
        logit=rest + added,
        logit_without=rest[:, None] + left,
        future=future,
    )


def _draw_future(config: SyntheticData, site: _Site, label: npt.NDArray[np.bool_]) -> pl.DataFrame:
    """Touchpoints after the decision: the conversions, in the horizon or late, and others."""
    rng, n, horizon = site.future, config.visitors, int(config.horizon_days * DAY)
    late = ~label & (rng.random(n) < LATE_CONVERSION)
    buyer = np.flatnonzero(label | late)
    other = np.repeat(np.arange(n), rng.poisson(LATER_TOUCHPOINTS, n))
    visitor = np.concatenate([buyer, other])
    bought = rng.integers(1, horizon + 1, len(buyer)) + horizon * late[buyer]
    after = np.concatenate([bought, rng.integers(1, 2 * horizon + 1, len(other))])
    visits = _draw_visits(rng, visitor, site.intent, site.channel_odds, site.usual_device)
    converted = np.arange(len(visitor)) < len(buyer)
    return _encode(visits, site.decision_time[visitor] + after, converted, config)


def _draw_visits(
    rng: np.random.Generator, visitor: Ints, intent: Floats, channel_odds: Floats, usual: Ints
) -> _Visits:
    """A visit for each entry of `visitor`; the other arrays have one entry a visitor."""
    n = len(visitor)
    channel = _draw(rng, channel_odds, visitor)
    switched = rng.random(n) < DEVICE_SWITCH
    drawn = _draw(rng, _device_odds(intent), visitor)
    seconds = DURATION_S * rng.lognormal(0.4 * intent[visitor], 1.0)
    duration = np.clip(seconds, 1, MAX_DURATION_S).astype(np.int64)
    return _Visits(
        visitor=visitor,
        channel=channel,
        campaign=channel * CAMPAIGNS + rng.integers(0, CAMPAIGNS, n),
        device=np.where(switched, drawn, usual[visitor]),
        duration_s=duration,
        page_views=1 + rng.poisson(duration / PAGE_S),
    )


def _encode(
    visits: _Visits, time: Ints, converted: npt.NDArray[np.bool_], config: SyntheticData
) -> pl.DataFrame:
    """The encoded touchpoint frame, but for the site."""
    features = config.features
    categorical = {
        "channel": _index([c.name for c in CHANNELS], features.channels)[visits.channel],
        "campaign": FIRST + visits.campaign % max(features.campaign_buckets, 1),
        "hour": FIRST + time // 3600 % 24,
        "weekday": FIRST + weekday(time),
        "device": _index(list(DEVICES), features.categorical.get("device", []))[visits.device],
    }
    numeric = {"duration_s": visits.duration_s, "page_views": visits.page_views}
    return pl.DataFrame(
        {"visitor": visits.visitor.astype(np.uint64), "time": time, "converted": converted}
        | {
            name: categorical[name].astype(np.uint16)
            for name, _ in feature_spec(features).categorical
        }
        | {name: _scaled(numeric[name], column) for name, column in features.numeric.items()}
    )


def _at_site(frame: pl.DataFrame, index: int) -> pl.DataFrame:
    """`frame` with the site's name, and with visitors numbered uniquely over all sites."""
    visitor = pl.col("visitor") + pl.lit(index << 32, pl.UInt64)
    return frame.select(visitor, pl.lit(f"site {index}").alias("site"), pl.exclude("visitor"))


def _index(values: list[str], public: list[str]) -> Ints:
    """Index of each of the world's values in the public list."""
    return np.array([FIRST + public.index(v) if v in public else OTHER for v in values])


def _scaled(values: Ints, column: NumericColumn) -> npt.NDArray[np.float32]:
    """Scaled to [0, 1] as NumericColumn says."""
    cut = np.clip(values.astype(np.float64), column.low, column.high)
    low, high = column.low, column.high
    if column.log:
        cut, low, high = np.log1p(cut), np.log1p(low), np.log1p(high)
    return ((cut - low) / (high - low)).astype(np.float32)


def _tilted(share: Floats, tilt: Floats, intent: Floats) -> Floats:
    """(options, visitors) cumulative probabilities, proportional to share * exp(tilt * intent)."""
    cumulative = np.cumsum(share[:, None] * np.exp(tilt[:, None] * intent), axis=0)
    return np.asarray(cumulative / cumulative[-1])


def _device_odds(intent: Floats) -> Floats:
    share, tilt = np.array(list(DEVICES.values())).T
    return _tilted(share, tilt, intent)


def _draw(rng: np.random.Generator, cumulative: Floats, visitor: Ints) -> Ints:
    """One option for each entry of `visitor`, by that visitor's cumulative probabilities."""
    u = rng.random(len(visitor))
    option = np.zeros(len(visitor), np.int64)
    for row in cumulative[:-1]:
        option += u >= row[visitor]
    return option


def _calibrate(logit: Floats, base_rate: float) -> float:
    """The intercept with which the mean probability is `base_rate`, by bisection."""
    low, high = -50.0, 50.0
    for _ in range(50):
        middle = (low + high) / 2
        if _sigmoid(logit + middle).mean() < base_rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _removal_effect(sites: list[_Site], intercept: float, channels: list[str]) -> dict[str, float]:
    names = [c.name for c in CHANNELS]
    kept = sum(_sigmoid(site.logit + intercept).sum() for site in sites)
    without = sum(_sigmoid(site.logit_without + intercept).sum(axis=0) for site in sites)
    return {name: float(1 - without[names.index(name)] / kept) for name in channels}


def _sigmoid(logit: Floats) -> Floats:
    # tanh neither overflows nor warns at any logit.
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logit)))


def _check_features(features: FeatureConfig) -> None:
    for key, asked, known in (
        ("channels", features.channels, [c.name for c in CHANNELS]),
        ("categorical", features.categorical, ["device"]),
        ("numeric", features.numeric, ["duration_s", "page_views"]),
    ):
        for name in asked:
            if name not in known:
                raise SettingError(
                    f"data.features.{key}: synthetic journeys have no {name!r}; "
                    f"choose from {', '.join(known)}"
                )
