"""From a data config to the journeys of every site of a simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from conf.schema import CriteoData, DataConfig, SyntheticData, TableData
from journeys.criteo import as_table, read_criteo
from journeys.decisions import decide
from journeys.encode import encode
from journeys.errors import JourneyDataError
from journeys.partition import partition
from journeys.site import SiteJourneys, natural_order
from journeys.split import split
from journeys.table import read_touchpoints


def load_sites(config: DataConfig, seed: int) -> list[SiteJourneys]:
    """The journeys of each site, in the natural order of their names (site 2 before site 10).

    A site sees its own rows only: a visitor of two sites is judged at each, from what that site
    knows, as in a deployment. `seed` deals visitors to sites (a table without a site column) or
    draws the world (synthetic); it has no influence on who is held out.

    Raises:
        JourneyDataError: The table cannot be used, or a site has fewer than 2 visitors to train on
            or none held out.
        SettingError: A setting out of range.
    """
    if isinstance(config, SyntheticData):
        from journeys.synthetic import generate

        world = generate(config, seed)
        decisions = world.decisions.with_columns(probability=pl.Series(world.probability))
        decided = _by_site(decisions)
        return [
            site_journeys(name, touchpoints, decided[name], config)
            for name, touchpoints in _by_site(world.touchpoints).items()
        ]
    if isinstance(config, CriteoData):
        touchpoints, config = read_criteo(config), as_table(config)
    elif isinstance(config, TableData):
        touchpoints = read_touchpoints(config)
    else:
        raise TypeError(f"no source of journeys for {type(config).__name__}")
    if config.site_column is None:
        sites, alpha = config.dirichlet_sites, config.dirichlet_alpha
        touchpoints = partition(touchpoints, sites, alpha, seed)
    return [
        site_journeys(name, touchpoints, decide(touchpoints, config), config)
        for name, touchpoints in _by_site(touchpoints).items()
    ]


def site_journeys(
    name: str, touchpoints: pl.DataFrame, decisions: pl.DataFrame, config: DataConfig
) -> SiteJourneys:
    """The examples of one site, encoded and split.

    Args:
        name: The site's name.
        touchpoints: The site's encoded touchpoint frame.
        decisions: Its decisions (`decide`), with a Float32 column `probability` where it is known.
        config: How examples are cut and split.
    """
    train, holdout = split(decisions, config)
    probability: npt.NDArray[np.float32] | None = None
    if "probability" in decisions.columns:
        probability = decisions["probability"].to_numpy()[holdout]
    journeys = SiteJourneys(
        name,
        encode(touchpoints, decisions.filter(train), config),
        encode(touchpoints, decisions.filter(holdout), config),
        probability,
    )
    visitors, held_out = journeys.train.visitors, journeys.holdout.visitors
    if visitors < 2 or held_out < 1:
        file = Path(config.path).name if isinstance(config, TableData) else "synthetic journeys"
        raise JourneyDataError(
            file,
            f'site "{name}" has {visitors} visitors to train on and {held_out} held out; '
            "it needs 2 and 1",
        )
    return journeys


def _by_site(frame: pl.DataFrame) -> dict[str, pl.DataFrame]:
    parts = frame.partition_by("site", as_dict=True, maintain_order=True)
    names = sorted((str(key[0]) for key in parts), key=natural_order)
    return {name: parts[(name,)] for name in names}
