"""The sites of a simulation as the process that runs them sees them."""

from __future__ import annotations

import resource
from contextlib import AbstractContextManager, closing, nullcontext

from flwr.app import Context
from flwr.clientapp import ClientApp

from client.app import client_app, simulated_site
from client.site import Site
from simulation.fleet import PARTITION, Fleet

_FILES_OF_A_SITE = 16
"""Its ledger's, and its encoded journeys while they are opened."""
_FILES_OF_ALL_ELSE = 512


class KeptSites:
    """Sites that this process alone runs: each is opened once, and stays open until `close`."""

    def __init__(self, fleet: Fleet) -> None:
        _allow_files(_FILES_OF_A_SITE * len(fleet.names))
        self._fleet = fleet
        self._sites: dict[int, Site] = {}

    def app(self) -> ClientApp:
        """A ClientApp for all of them; which one a message is for, its context says."""
        return client_app(self._open)

    def close(self) -> None:
        """Give up their ledgers."""
        while self._sites:
            self._sites.popitem()[1].close()

    def _open(self, context: Context) -> AbstractContextManager[Site]:
        index = int(context.node_config[PARTITION])
        if index not in self._sites:
            self._sites[index] = _open_site(self._fleet, index)
        return nullcontext(self._sites[index])


def _allow_files(number: int) -> None:
    """Let this process have so many more files open, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _FILES_OF_ALL_ELSE + number
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def shared_sites(fleet: Fleet) -> ClientApp:
    """A ClientApp for sites that other processes run too: each is open for one message."""
    return client_app(
        lambda context: closing(_open_site(fleet, int(context.node_config[PARTITION])))
    )


def _open_site(fleet: Fleet, index: int) -> Site:
    return simulated_site(fleet.open_journeys(index), fleet.ledgers, fleet.seed, index)
