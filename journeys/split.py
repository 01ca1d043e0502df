"""Who trains and who is held out: no visitor does both."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from conf.schema import DataConfig, utc_seconds
from journeys.decisions import horizon_seconds
from journeys.hashing import draw_fraction


def split(
    decisions: pl.DataFrame, config: DataConfig
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(N,) which decisions train and (N,) which are held out.

    By a hash of the visitor, a share `config.holdout` is held out: the same visitors at every site
    and in every run. With `config.holdout_from`, by time instead: held out is a decision at or
    after it, training is one whose horizon ends before it, and what lies between is in neither,
    since its label looks past the border.

    Visitors stay disjoint: a visitor's first decision (`decide` draws their order) says where the
    visitor belongs. Of those held out only the first counts, so that a visitor changes one bin of
    an evaluation by 1; of those in training, all that may train.
    """
    visitor = decisions["visitor"].to_numpy()
    if config.holdout_from is not None:
        border = utc_seconds(config.holdout_from, "data.holdout_from")
        decided = decisions["decision_time"].to_numpy()
        early, late = decided + horizon_seconds(config) < border, decided >= border
    else:
        late = draw_fraction(visitor, "holdout") < config.holdout
        early = ~late
    _, first, whose = np.unique(visitor, return_index=True, return_inverse=True)
    held_out = np.zeros(len(visitor), dtype=np.bool_)
    held_out[first] = late[first]
    return early & early[first][whose], held_out
