"""Deals the visitors of one table out to simulated sites."""

from __future__ import annotations

import numpy as np
import polars as pl

from journeys.hashing import draw_fraction
from journeys.table import in_order, visitor_starts


def partition(touchpoints: pl.DataFrame, sites: int, alpha: float, seed: int) -> pl.DataFrame:
    """`touchpoints` with a column `site` ("site 0" and on), each visitor wholly at one site.

    For each channel, shares of the sites are drawn from a symmetric Dirichlet(alpha), and visitors
    fall to sites by the shares of their first touchpoint's channel (the label skew of Yurochkin et
    al., "Bayesian nonparametric federated learning of neural networks", ICML 2019, section 5, with
    the channel for the label). A large alpha deals evenly. A visitor's site depends on the seed
    and on that visitor alone.
    """
    touchpoints = in_order(touchpoints)
    visitor = touchpoints["visitor"].to_numpy()
    starts = visitor_starts(visitor)
    first_channel = touchpoints["channel"].to_numpy()[starts]

    rng = np.random.default_rng(seed)
    channels = int(first_channel.max(initial=0)) + 1
    upto = np.cumsum(rng.dirichlet(np.full(sites, alpha), size=channels), axis=1)
    draws = draw_fraction(visitor[starts], "site", seed)
    site = (draws[:, None] >= upto[first_channel, :-1]).sum(axis=1)
    names = pl.Series([f"site {i}" for i in range(sites)])
    of_row = np.repeat(site, np.diff(starts, append=len(visitor)))
    return touchpoints.with_columns(site=names.gather(of_row))
