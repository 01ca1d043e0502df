from __future__ import annotations

import numpy as np
import polars as pl

from conf.schema import DataConfig, utc_seconds
from journeys.decisions import DAY
from journeys.split import split

BORDER = utc_seconds("2026-03-01", "")


def decisions(visitors: int, times: list[int] | None = None) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "visitor": np.arange(visitors, dtype=np.uint64),
            "decision_time": times or [BORDER] * visitors,
            "label": [False] * visitors,
        }
    )


def test_by_hash_every_visitor_is_in_one_part_and_stays_there() -> None:
    config = DataConfig(name="synthetic", holdout=0.3)
    train, holdout = split(decisions(50_000), config)
    assert (train ^ holdout).all()
    assert abs(holdout.mean() - 0.3) < 0.01
    fewer = split(decisions(1_000), config)[1]
    assert (fewer == holdout[:1_000]).all()


def test_by_time_no_training_label_looks_past_the_border() -> None:
    config = DataConfig(name="synthetic", horizon_days=7, holdout_from="2026-03-01T00:00:00Z")
    ages = [-30 * DAY, -7 * DAY - 1, -7 * DAY, -1, 0, 1]
    train, holdout = split(decisions(6, [BORDER + age for age in ages]), config)
    assert train.tolist() == [True, True, False, False, False, False]
    assert holdout.tolist() == [False, False, False, False, True, True]
