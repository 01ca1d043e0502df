"""Is joining worth it? On real sessions of nine regions, split as the published baseline was."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.model_selection import train_test_split

from conf.compose import load
from conf.schema import Config, TableData
from journeys.decisions import decide
from journeys.encode import encode
from journeys.site import SiteJourneys
from journeys.sites import load_sites
from journeys.table import read_touchpoints
from simulation.worth_joining import Result, approaches, compare_approaches

POOLED_BASELINE = 0.759
"""ROC-AUC of a centralised logistic regression without PageValues, from the data's source note."""

DATA = Path(os.environ.get("JOURNEYS_REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
SESSIONS = DATA / "online_shoppers" / "online_shoppers_intention.csv"


def test_every_approach_is_trained_and_judged_on_the_same_visitors() -> None:
    config = load(
        [
            "experiment=worth_joining",
            "data.sites=2",
            "data.visitors=300",
            "rounds=2",
            "optimizer.local_epochs=1",
        ]
    )
    sites = load_sites(config.data, config.seed)
    told: list[tuple[int, int]] = []
    results = compare_approaches(config, sites, lambda done, of: told.append((done, of)))
    assert [result.approach for result in results] == [a.name for a in approaches()]
    assert told[-1][0] == told[-1][1] == len(told)
    for result in results:
        assert set(result.sites) == {site.name for site in sites}
        low, middle, high = result.pooled["log_loss"]
        assert low <= middle <= high
        assert 0 < middle < 1


@pytest.mark.slow
@pytest.mark.skipif(
    not SESSIONS.exists(),
    reason="needs the real sessions: set JOURNEYS_REAL_DATA to the folder that holds "
    "online_shoppers/online_shoppers_intention.csv",
)
def test_nine_regions_gain_by_joining_even_with_epsilon_1() -> None:
    config = load(
        ["experiment=worth_joining", "data=online_shoppers", f"data.path={SESSIONS}", "seed=0"]
    )
    sites = baseline_split(config)
    results = {r.approach: r for r in compare_approaches(config, sites, lambda done, of: None)}
    alone = results["each site alone"]
    federated = results["federated, unprotected"]
    private = results["federated, epsilon 1"]
    assert auc(federated, "pooled") >= POOLED_BASELINE - 0.01
    assert auc(private, "mean") > auc(alone, "mean")


def auc(result: Result, over: str) -> float:
    return float(getattr(result, over)["roc_auc"][1])


def baseline_split(config: Config) -> list[SiteJourneys]:
    """The sites with the baseline's split by row, 80/20, seed 0, instead of the product's."""
    assert isinstance(config.data, TableData)
    touchpoints = read_touchpoints(config.data)
    rows = np.arange(len(touchpoints))
    held = np.isin(rows, train_test_split(rows, test_size=0.2, random_state=0)[1])
    visitors = pl.DataFrame({"visitor": touchpoints["visitor"], "held": held})
    sites = []
    for (name,), part in sorted(touchpoints.partition_by("site", as_dict=True).items()):
        decisions = decide(part, config.data)
        examples = encode(part, decisions, config.data)
        out = decisions.join(visitors, on="visitor", how="left", maintain_order="left")["held"]
        mask = out.to_numpy()
        sites.append(SiteJourneys(str(name), examples.take(~mask), examples.take(mask)))
    return sites
