"""The sites of a simulation: encoded once, on disk, opened by whichever process runs them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.clientapp import ClientApp

from client.app import client_app
from client.site import Site
from journeys.examples import Examples
from journeys.features import FeatureSpec
from journeys.site import SiteJourneys
from privacy.ledger import Ledger

PARTITION = "partition-id"
"""Flower's name for the index of a simulated site."""


@dataclass(frozen=True)
class Fleet:
    """Where the sites' journeys and ledgers lie. Small: it is what worker processes are handed."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """Visitors to train on at each site."""
    spec: FeatureSpec
    seed: int
    journeys: Path
    """Folder of encoded journeys, memory-mapped."""
    ledgers: Path
    """Folder of the sites' ledgers, one file each."""

    @classmethod
    def store(
        cls, sites: list[SiteJourneys], spec: FeatureSpec, seed: int, journeys: Path, ledgers: Path
    ) -> Fleet:
        """Write the sites' examples into the folder `journeys`."""
        for index, site in enumerate(sites):
            site.train.save(journeys / str(index) / "train")
            site.holdout.save(journeys / str(index) / "holdout")
            if site.holdout_probability is not None:
                file = journeys / str(index) / "probability.npy"
                np.save(file, site.holdout_probability, allow_pickle=False)
        names = tuple(site.name for site in sites)
        sizes = tuple(len(site.train) for site in sites)
        return cls(names, sizes, spec, seed, journeys, ledgers)

    def open_journeys(self, index: int) -> SiteJourneys:
        """The journeys of one site, memory-mapped."""
        folder = self.journeys / str(index)
        probability = folder / "probability.npy"
        return SiteJourneys(
            self.names[index],
            Examples.open(folder / "train"),
            Examples.open(folder / "holdout"),
            np.load(probability, mmap_mode="r", allow_pickle=False)
            if probability.exists()
            else None,
        )


def fleet_app(fleet: Fleet) -> ClientApp:
    """A ClientApp for all sites of `fleet`; which one a message is for, its context says."""

    def of(context: Context) -> Site:
        return open_site(fleet, int(context.node_config[PARTITION]))

    return client_app(of)


@cache
def open_site(fleet: Fleet, index: int) -> Site:
    """The site, the same object whenever this process asks for it."""
    ledger = Ledger(fleet.ledgers / f"{index}.jsonl")
    return Site(fleet.open_journeys(index), fleet.spec, ledger, fleet.seed, index)
