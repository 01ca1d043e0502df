"""Cuts each visitor's journey at the decision and encodes it for a model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from conf.schema import DataConfig, TableData
from journeys.decisions import lookback_seconds
from journeys.examples import Examples
from journeys.features import feature_spec
from journeys.table import in_order, visitor_starts


def encode(touchpoints: pl.DataFrame, decisions: pl.DataFrame, config: DataConfig) -> Examples:
    """One example a decision, in the order of `decisions`.

    The journey: the visitor's touchpoints in (decision - look-back, decision], or up to but not at
    the decision for a snapshot; of more than `max_touchpoints` the newest; oldest first, padded on
    the right. A numeric column that is `known_at_end` is 0 on a touchpoint at the decision time.

    - `gap`: log1p(seconds since the visitor's previous touchpoint) / log1p(look-back seconds), 1
      where the look-back holds none before.
    - `age`: log1p(seconds from the touchpoint to the decision) / log1p(look-back seconds).

    Nothing after the decision, and nothing of another visitor, has an influence on an example.

    Args:
        touchpoints: The encoded touchpoint frame (`journeys.table`), in any order.
        decisions: `visitor`, `decision_time`, `label`; a visitor at most once.
        config: Look-back and features.

    Raises:
        ValueError: A decision whose visitor has no touchpoint in the look-back. `decide` makes
            none.
    """
    touchpoints = in_order(touchpoints)
    spec, lookback = feature_spec(config.features), lookback_seconds(config)
    time = touchpoints["time"].to_numpy()
    decided = decisions["decision_time"].to_numpy()
    strictly_before = isinstance(config, TableData) and config.decision == "snapshot"
    begin, end = _windows(touchpoints, decisions, lookback, strictly_before)

    length = np.minimum(end - begin, spec.max_touchpoints)
    if (length < 1).any():
        raise ValueError("a decision has no touchpoint in its look-back")
    row, place, source = _places(end - length, length)
    shape = (len(decisions), spec.max_touchpoints)
    cell = row * spec.max_touchpoints + place
    at_decision = time[source] == decided[row]

    categorical = np.zeros((shape[0] * shape[1], len(spec.categorical)), dtype=np.uint16)
    for i, (name, _) in enumerate(spec.categorical):
        categorical[cell, i] = touchpoints[name].to_numpy()[source]
    numeric = np.zeros((shape[0] * shape[1], len(spec.numeric)), dtype=np.float32)
    for i, name in enumerate(config.features.numeric):
        values = touchpoints[name].to_numpy()[source]
        if config.features.numeric[name].known_at_end:
            values = np.where(at_decision, np.float32(0), values)
        numeric[cell, i] = values
    if config.features.gaps:
        since = np.where(source > begin[row], time[source] - time[source - 1], lookback)
        numeric[cell, -2] = np.log1p(since) / np.log1p(lookback)
        numeric[cell, -1] = np.log1p(decided[row] - time[source]) / np.log1p(lookback)
    return Examples(
        categorical=categorical.reshape(*shape, len(spec.categorical)),
        numeric=numeric.reshape(*shape, len(spec.numeric)),
        length=length.astype(np.int32),
        label=decisions["label"].to_numpy().astype(np.float32),
    )


def _windows(
    touchpoints: pl.DataFrame, decisions: pl.DataFrame, lookback: int, strictly_before: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """[begin, end): the rows of `touchpoints` in each decision's look-back."""
    visitor, time = touchpoints["visitor"].to_numpy(), touchpoints["time"].to_numpy()
    judged = decisions["visitor"].to_numpy()
    starts = visitor_starts(visitor)
    counts = np.diff(starts, append=len(visitor))
    block = np.searchsorted(visitor[starts], judged)
    if not np.array_equal(visitor[starts].take(block, mode="clip"), judged):
        raise ValueError("a decision is about a visitor without touchpoints")
    if np.bincount(block).max(initial=0) > 1:
        raise ValueError("a visitor has two decisions")

    # Rows of visitors without a decision lie after it, so that they fall in no window.
    decided = np.full(len(starts), time.min(initial=0) - 1)
    decided[block] = decisions["decision_time"].to_numpy()
    age = np.repeat(decided, counts) - time
    too_old = np.add.reduceat(age >= lookback, starts, dtype=np.int64)
    upto = np.add.reduceat(age > 0 if strictly_before else age >= 0, starts, dtype=np.int64)
    return starts[block] + too_old[block], starts[block] + upto[block]


def _places(
    begin: npt.NDArray[np.int64], length: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each kept touchpoint: its example, its place in the journey, its row in the table."""
    row = np.repeat(np.arange(len(length)), length)
    place = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
    return row, place, begin[row] + place
