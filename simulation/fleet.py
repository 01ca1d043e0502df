"""The sites of a simulation: encoded once, on disk, opened by whichever process runs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from journeys.examples import Examples
from journeys.site import SiteJourneys

PARTITION = "partition-id"
"""Flower's name for the index of a simulated site."""


@dataclass(frozen=True)
class Fleet:
    """Where the sites' journeys and ledgers lie. Small: it is what worker processes are handed."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """Examples to train on at each site."""
    seed: int
    journeys: Path
    """Folder of encoded journeys, memory-mapped."""
    ledgers: Path
    """Folder of the sites' ledgers, one file each."""

    @classmethod
    def store(cls, sites: list[SiteJourneys], seed: int, journeys: Path, ledgers: Path) -> Fleet:
        """Write the sites' examples into the folder `journeys`."""
        for index, site in enumerate(sites):
            site.train.save(journeys / str(index) / "train")
            site.holdout.save(journeys / str(index) / "holdout")
            if site.holdout_probability is not None:
                file = journeys / str(index) / "probability.npy"
                np.save(file, site.holdout_probability, allow_pickle=False)
        names = tuple(site.name for site in sites)
        sizes = tuple(len(site.train) for site in sites)
        return cls(names, sizes, seed, journeys, ledgers)

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
