from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


@pytest.mark.parametrize("border", [None, "2026-03-01T00:00:00Z"], ids=["by hash", "by time"])
@given(
    drawn=st.lists(
        st.tuples(st.integers(0, 8), st.sampled_from([-9, -8, -7, -1, 0, 1])),
        unique=True,
        max_size=30,
    )
)
@settings(deadline=None)
def test_a_visitor_of_several_decisions_is_in_one_part(
    border: str | None, drawn: list[tuple[int, int]]
) -> None:
    config = DataConfig(name="synthetic", holdout=0.5, horizon_days=7, holdout_from=border)
    frame = pl.DataFrame(
        [(visitor, BORDER + days * DAY) for visitor, days in drawn],
        schema={"visitor": pl.UInt64, "decision_time": pl.Int64},
        orient="row",
    )
    train, holdout = split(frame, config)
    trained = {visitor for (visitor, _), there in zip(drawn, train, strict=True) if there}
    held = [visitor for (visitor, _), there in zip(drawn, holdout, strict=True) if there]
    assert len(held) == len(set(held))
    assert not trained & set(held)

    # The first decision of each visitor falls as it would without the others.
    first = frame["visitor"].is_first_distinct().to_numpy()
    alone = split(frame.filter(first), config)
    np.testing.assert_array_equal(train[first], alone[0])
    np.testing.assert_array_equal(holdout[first], alone[1])
    assert not holdout[~first].any()
    # The others train where their visitor does, unless their label looks past the border.
    for (visitor, days), there in zip(drawn, train, strict=True):
        assert there == (visitor in trained and (border is None or days < -7))
