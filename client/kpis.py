"""A site's own figures, by month and channel. Exact, so for the site alone: they never leave it.

Of the visits of one month (by their time in UTC) and one channel:

- `visits`: how many.
- `visitors`: how many pseudonyms have one. A visitor whose pseudonym changed in between counts once
  for each. Visitors come by several channels and in several months: totals are no sums.
- `conversions`: how many visits ended in a conversion.
- `conversion_rate`: conversions / visits.
- `duration_s`: mean length in seconds, of the visits that have one; null where none has.
- `bounce_rate`: share of bounces among the visits of which it is known; null where it is of none.
- `revenue`: sum, in the site's own currency.
- `conversion_lag_days`: median, over the conversions, of the days from the visitor's first visit in
  the look-back to the visit that converted; null without conversions. The look-back holds the times
  in (conversion - lookback, conversion]; a conversion at the first visit in it has lag 0. By
  whatever channel the first visit came: month and channel are those of the visit that converted.
"""

from __future__ import annotations

import polars as pl

from journeys.decisions import DAY, rows_between
from journeys.hashing import hash_text
from journeys.store import Store
from journeys.table import in_order

ALL = "all"
"""Month or channel of a row that is over all of them."""

KPIS = pl.Schema(
    {
        "month": pl.String(),
        "channel": pl.String(),
        "visits": pl.Int64(),
        "visitors": pl.Int64(),
        "conversions": pl.Int64(),
        "conversion_rate": pl.Float64(),
        "duration_s": pl.Float64(),
        "bounce_rate": pl.Float64(),
        "revenue": pl.Float64(),
        "conversion_lag_days": pl.Float64(),
    }
)
"""The figures, one row a month (such as `2026-11`) and channel, `ALL` included."""

_FIGURES = (
    pl.len().alias("visits"),
    pl.col("visitor").n_unique().alias("visitors"),
    pl.col("converted").sum().alias("conversions"),
    pl.col("converted").mean().alias("conversion_rate"),
    pl.col("duration_s").cast(pl.Float64).mean(),
    pl.col("bounced").mean().alias("bounce_rate"),
    pl.col("revenue").sum(),
)


def kpis(store: Store, lookback_days: float = 30) -> pl.DataFrame:
    """The figures of a store, shaped as `KPIS`: by month, totals last; empty for an empty store."""
    # A number takes a fifth of the memory; among 10 million, two share one at odds of 3e-6.
    visits = store.visits().with_columns(visitor=hash_text(pl.col("visitor_id")))
    figures = _by_month_and_channel(visits, *_FIGURES)
    lags = _by_month_and_channel(
        _lags(visits, round(lookback_days * DAY)).lazy(),
        (pl.col("lag").median() / DAY).alias("conversion_lag_days"),
    )
    return (
        figures.join(lags, on=["month", "channel"], how="left")
        # `ALL` comes after every month as it is.
        .sort("month", pl.col("channel") == ALL, "channel")
        .select(pl.col(name).cast(kind) for name, kind in KPIS.items())
    )


def _by_month_and_channel(visits: pl.LazyFrame, *figures: pl.Expr) -> pl.DataFrame:
    """`figures` of each month and channel, each month, each channel, and all.

    One after the other, because each keeps the visitors of its groups in memory.
    """
    return pl.concat(
        visits.with_columns(month=pl.col("time").dt.strftime("%Y-%m"))
        .with_columns(pl.lit(ALL).alias(column) for column in over)
        .group_by("month", "channel")
        .agg(*figures)
        .collect(engine="streaming")
        for over in ([], ["channel"], ["month"], ["month", "channel"])
    )


def _lags(visits: pl.LazyFrame, lookback: int) -> pl.DataFrame:
    """Of each conversion: `time`, `channel`, and `lag`: seconds since the first visit."""
    converters = visits.filter("converted").select("visitor").unique()
    theirs = in_order(
        visits.join(converters, on="visitor", how="semi")
        .select("visitor", pl.col("time").dt.epoch("s"), "converted", "channel")
        .collect(engine="streaming")
    )
    conversions = theirs.filter("converted")
    time = conversions["time"].to_numpy()
    visitor = conversions["visitor"].to_numpy()
    first, _ = rows_between(theirs, visitor, time - lookback + 1, time + 1)
    begun = theirs["time"].to_numpy()[first]
    return conversions.select(pl.from_epoch("time"), "channel", lag=pl.Series(time - begun))
