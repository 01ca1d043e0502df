"""Made-up visits for the demo, as a shop would export them."""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path

import polars as pl

from conf.compose import load
from conf.schema import FeatureConfig, SyntheticData
from journeys.features import FIRST
from journeys.synthetic import LAST_DECISION, generate

SITE = """\
name: {name}
source:
  name: files
  path: export/*.csv
  columns: {{visitor_id: visitor, time: began, channel: channel, device: device,
            duration_s: duration, page_views: pages, converted: bought, consent: consent}}
consent:
  accepted: ["yes"]
"""
"""The `site.yaml` that reads them."""


def write_visits(sites: dict[str, Path], visitors: int, now: datetime) -> None:
    """Write `export/visits.csv` into each site's folder, with visits of the half year before `now`.

    The journeys are synthetic (`journeys.synthetic`): what drives conversions is known, and alike
    at the sites.
    """
    overrides = ["data=synthetic", f"data.sites={len(sites)}", f"data.visitors={visitors}"]
    config = load(overrides).data
    assert isinstance(config, SyntheticData)
    touchpoints = generate(config, seed=0).touchpoints
    later = int(now.timestamp()) - LAST_DECISION - 8 * 86400
    parts = touchpoints.partition_by("site", maintain_order=True)
    for (name, folder), part in zip(sites.items(), parts, strict=True):
        rows = _as_exported(part, config.features, later, now).with_columns(
            visitor=pl.format("{}-{}", pl.lit(name), "visitor")
        )
        (folder / "export").mkdir()
        rows.write_csv(folder / "export" / "visits.csv")


def _as_exported(
    touchpoints: pl.DataFrame, features: FeatureConfig, later: int, now: datetime
) -> pl.DataFrame:
    """Codes and scaled numbers back to what they stand for, moved `later` seconds."""
    names = {"channel": features.channels, "device": features.categorical["device"]}
    named = [
        pl.col(column).replace_strict(
            dict(enumerate(values, start=FIRST)), default=None, return_dtype=pl.String
        )
        for column, values in names.items()
    ]
    # Both are scaled by log1p from 0 (`conf.schema.NumericColumn`).
    numbers = [
        ((pl.col(column).cast(pl.Float64) * math.log1p(features.numeric[column].high)).exp() - 1)
        .round()
        .cast(pl.Int64)
        for column in ("duration_s", "page_views")
    ]
    moved = touchpoints.with_columns(*named, *numbers, time=pl.col("time") + later)
    return moved.filter(pl.col("time") < int(now.timestamp())).select(
        "visitor",
        began=pl.from_epoch("time").dt.strftime("%Y-%m-%dT%H:%M:%SZ"),
        channel=pl.col("channel"),
        device=pl.col("device"),
        duration=pl.col("duration_s"),
        pages=pl.col("page_views"),
        bought=pl.when("converted").then(pl.lit("yes")).otherwise(pl.lit("no")),
        consent=pl.lit("yes"),
    )
