from __future__ import annotations

import numpy as np
import polars as pl

from journeys.partition import partition


def touchpoints(visitors: int) -> pl.DataFrame:
    """Each visitor with a first touchpoint of channel 1 to 4 and a second of channel 5."""
    visitor = np.arange(visitors, dtype=np.uint64)
    first = pl.DataFrame({"visitor": visitor, "time": 0, "channel": visitor % 4 + 1})
    second = first.with_columns(time=1, channel=pl.lit(5, pl.UInt64))
    return pl.concat([first, second])


def shares(alpha: float, seed: int = 0) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """(channels, sites) share of each first channel's visitors at each site."""
    dealt = partition(touchpoints(20_000), 5, alpha, seed).filter(pl.col("channel") < 5)
    site = dealt["site"].str.tail(1).cast(pl.Int64).to_numpy()
    counts = np.zeros((4, 5))
    np.add.at(counts, (dealt["channel"].to_numpy() - 1, site), 1)
    counts /= counts.sum(axis=1, keepdims=True)
    return counts


def test_alpha_sets_the_skew_of_channels() -> None:
    assert np.abs(shares(1e6) - 0.2).max() < 0.03
    assert shares(0.05).max(axis=1).mean() > 0.7
    assert not np.array_equal(shares(1.0, seed=0), shares(1.0, seed=1))


def test_a_visitor_is_wholly_at_one_site_whoever_else_there_is() -> None:
    dealt = partition(touchpoints(1_000), 5, 1.0, seed=3)
    of_visitor = dealt.group_by("visitor").agg(pl.col("site").unique())
    assert (of_visitor["site"].list.len() == 1).all()
    fewer = partition(touchpoints(500), 5, 1.0, seed=3)
    assert fewer.equals(dealt.filter(pl.col("visitor") < 500))
