"""When each visitor is judged, and what came of it.

Decision and label of a visitor depend on that visitor's own rows and on public settings, on no
other visitor: adding or removing one visitor adds or removes one example and changes no other.
DP-SGD's guarantee for the visitor rests on that.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from conf.schema import DataConfig, TableData, utc_seconds
from journeys.hashing import draw
from journeys.table import in_order, visitor_starts

DAY = 86400


def lookback_seconds(config: DataConfig) -> int:
    """Length of the look-back window."""
    return round(config.lookback_days * DAY)


def horizon_seconds(config: DataConfig) -> int:
    """Length of the horizon."""
    return round(config.horizon_days * DAY)


def decide(touchpoints: pl.DataFrame, config: TableData) -> pl.DataFrame:
    """One decision a visitor: `visitor` UInt64, `decision_time` Int64, `label` Boolean.

    By `config.decision`:

    - `touchpoint`: at the start of one of the visitor's touchpoints, drawn by a hash of the
      visitor. Label: a conversion at a time in [decision, decision + horizon], so one in the
      visit that starts then counts.
    - `snapshot`: at `snapshot_at`, for the visitors with a touchpoint in the look-back before it.
      Label as above.
    - `visit`: at each row. Label: its own `converted`.

    The table is taken to reach the end of each horizon: a conversion that lies after the export
    counts as none. In order of the visitor key.
    """
    touchpoints = in_order(touchpoints)
    if config.decision == "visit":
        return touchpoints.select("visitor", decision_time="time", label="converted")

    visitor, time = touchpoints["visitor"].to_numpy(), touchpoints["time"].to_numpy()
    starts = visitor_starts(visitor)
    counts = np.diff(starts, append=len(visitor))
    keys = visitor[starts]
    if config.decision == "snapshot":
        decided = np.full(len(keys), utc_seconds(str(config.snapshot_at), "data.snapshot_at"))
    else:
        chosen = draw(keys, "decision touchpoint") % counts.astype(np.uint64)
        decided = time[starts + chosen.astype(np.int64)]

    since = time - np.repeat(decided, counts)
    converts = touchpoints["converted"].to_numpy() & (since >= 0)
    converts &= since <= horizon_seconds(config)
    decisions = pl.DataFrame(
        {
            "visitor": keys,
            "decision_time": decided,
            "label": np.logical_or.reduceat(converts, starts),
        }
    )
    if config.decision == "snapshot":
        seen = (since < 0) & (since > -lookback_seconds(config))
        decisions = decisions.filter(np.logical_or.reduceat(seen, starts))
    return decisions
