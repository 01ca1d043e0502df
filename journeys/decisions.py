"""When each visitor is judged, and what came of it.

Decisions and labels of a visitor depend on that visitor's own rows and on public settings, on no
other visitor: adding or removing one visitor adds or removes that visitor's examples, at most
`data.contributions`, and changes no other. DP-SGD's guarantee for the visitor rests on that.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
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
    """Each visitor's decisions: `visitor` UInt64, `decision_time` Int64, `label` Boolean.

    By `config.decision`:

    - `touchpoint`: at the start of up to `config.contributions` of the visitor's touchpoints (of
      touchpoints at one time, one), drawn without replacement by a hash of visitor and touchpoint.
      Label: a conversion at a time in [decision, decision + horizon], so one in the visit that
      starts then counts.
    - `snapshot`: at `snapshot_at`, for the visitors with a touchpoint in the look-back before it.
      Label as above.
    - `visit`: at each row. Label: its own `converted`.

    The table is taken to reach the end of each horizon: a conversion that lies after the export
    counts as none. In order of the visitor key; a visitor's own in the order they were drawn in,
    so that more contributions leave the first of each visitor what it was.
    """
    touchpoints = in_order(touchpoints)
    if config.decision == "visit":
        return touchpoints.select("visitor", decision_time="time", label="converted")

    visitor, time = touchpoints["visitor"].to_numpy(), touchpoints["time"].to_numpy()
    if config.decision == "snapshot":
        keys = visitor[visitor_starts(visitor)]
        decided = np.full(len(keys), utc_seconds(str(config.snapshot_at), "data.snapshot_at"))
        begin, end = rows_between(
            touchpoints, keys, decided - lookback_seconds(config) + 1, decided
        )
        keys, decided = keys[begin < end], decided[begin < end]
    else:
        drawn = _draw_rows(visitor, time, config.contributions)
        keys, decided = visitor[drawn], time[drawn]

    conversions = touchpoints.select("visitor", "time").filter(touchpoints["converted"])
    begin, end = rows_between(conversions, keys, decided, decided + horizon_seconds(config) + 1)
    return pl.DataFrame({"visitor": keys, "decision_time": decided, "label": begin < end})


def rows_between(
    touchpoints: pl.DataFrame,
    visitor: npt.NDArray[np.uint64],
    since: npt.NDArray[np.int64],
    until: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """[begin, end): the rows of `touchpoints` with times in [since, until) of each visitor asked.

    Args:
        touchpoints: `visitor` and `time` (0 or more), in order (`in_order`).
        visitor: (N,) keys, in any order and as often as wanted; one without rows has begin = end.
        since: (N,) UTC seconds, at most `until`.
        until: (N,) UTC seconds.
    """
    keys, time = touchpoints["visitor"].to_numpy(), touchpoints["time"].to_numpy()
    starts = visitor_starts(keys)
    span = time.max(initial=0) + 1
    # Visitor and time in one number. Those with rows have odd places, so that others meet none.
    own = np.repeat(2 * np.arange(len(starts)) + 1, np.diff(starts, append=len(keys)))
    place = np.searchsorted(keys[starts], visitor) + np.searchsorted(keys[starts], visitor, "right")
    rows = own * (span + 1) + time
    begin, end = (
        np.searchsorted(rows, place * (span + 1) + np.clip(border, 0, span))
        for border in (since, until)
    )
    return begin, end


def _draw_rows(
    visitor: npt.NDArray[np.uint64], time: npt.NDArray[np.int64], most: int
) -> npt.NDArray[np.int64]:
    """Up to `most` rows of each visitor, no two at one time; by visitor, then as drawn."""
    starts = visitor_starts(visitor)
    counts = np.diff(starts, append=len(visitor))
    chosen = draw(visitor[starts], "decision touchpoint") % counts.astype(np.uint64)
    first = starts + chosen.astype(np.int64)
    if most == 1:
        return first
    # Two touchpoints at one time would make the same example twice.
    anew = (visitor[1:] != visitor[:-1]) | (time[1:] != time[:-1])
    rows = np.flatnonzero(np.concatenate([np.ones(min(1, len(time)), dtype=np.bool_), anew]))
    turn = draw(visitor[rows] ^ draw(time[rows].astype(np.uint64), "time"), "further decisions")
    turn[time[rows] == np.repeat(time[first], counts)[rows]] = 0
    rows = rows[np.lexsort([turn, visitor[rows]])]
    starts = visitor_starts(visitor[rows])
    place = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
    return rows[place < most]
