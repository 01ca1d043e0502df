"""Cuts each visitor's journey at each decision and encodes it for a model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from conf.schema import DataConfig, TableData
from journeys.decisions import lookback_seconds, rows_between
from journeys.examples import Examples
from journeys.features import feature_spec
from journeys.table import in_order


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
        decisions: `visitor`, `decision_time`, `label`; of a visitor `contributions` at most.
        config: Look-back, features and contributions. With more than one, `Examples.visitor` says
            whose each example is.

    Raises:
        ValueError: A decision whose visitor has no touchpoint in the look-back, or more decisions
            of a visitor. `decide` makes none.
    """
    touchpoints = in_order(touchpoints)
    spec, lookback = feature_spec(config.features), lookback_seconds(config)
    time = touchpoints["time"].to_numpy()
    decided = decisions["decision_time"].to_numpy()
    judged = decisions["visitor"].to_numpy()
    _, visitor, examples = np.unique(judged, return_inverse=True, return_counts=True)
    if examples.max(initial=0) > config.contributions:
        raise ValueError(
            f"a visitor has more decisions than data.contributions={config.contributions}"
        )
    strictly_before = isinstance(config, TableData) and config.decision == "snapshot"
    until = decided if strictly_before else decided + 1
    begin, end = rows_between(touchpoints, judged, decided - lookback + 1, until)

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
        visitor=visitor if config.contributions > 1 else None,
    )


def _places(
    begin: npt.NDArray[np.int64], length: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each kept touchpoint: its example, its place in the journey, its row in the table."""
    row = np.repeat(np.arange(len(length)), length)
    place = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
    return row, place, begin[row] + place
