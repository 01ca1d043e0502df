"""A hub's health and figures, for whoever watches it (Prometheus); no site's journeys are in it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from server.certificates import expiry
from server.hub import HubFolder, SuperLinkError
from server.status import runs, sites


class HubFigures(Collector):
    """Read when asked for: sites, the newest run, certificates."""

    def __init__(self, hub: HubFolder) -> None:
        self._hub = hub

    def registry(self) -> CollectorRegistry:
        """A registry of these figures alone."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return registry

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Nothing: what there is depends on the hub's state."""
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The figures of this moment."""
        online = GaugeMetricFamily(
            "conversion_hub_site_online", "1 if the site is connected", labels=["site"]
        )
        contact = GaugeMetricFamily(
            "conversion_hub_site_last_contact_seconds",
            "When the site was last heard of, UTC seconds",
            labels=["site"],
        )
        try:
            states = sites(self._hub)
        except SuperLinkError:
            states = []
        for site in states:
            online.add_metric([site.name], float(site.online))
            if site.last_contact:
                contact.add_metric([site.name], site.last_contact)
        yield online
        yield contact
        rounds = GaugeMetricFamily(
            "conversion_hub_run_rounds", "Rounds of a run, by outcome", labels=["run", "outcome"]
        )
        answers = GaugeMetricFamily(
            "conversion_hub_run_answers_lost",
            "Answers of sites that a run did not get, by reason",
            labels=["run", "reason"],
        )
        epsilon = GaugeMetricFamily(
            "conversion_hub_run_epsilon",
            "Largest privacy loss of a visitor by a run so far",
            labels=["run"],
        )
        # The newest only: a series for every run there ever was would grow without end.
        for run in runs(self._hub)[-3:]:
            name = run.folder.name
            rounds.add_metric([name, "completed"], run.done - run.failed)
            rounds.add_metric([name, "failed"], run.failed)
            answers.add_metric([name, "refused"], run.refusals)
            answers.add_metric([name, "missing"], run.missing)
            if run.epsilon is not None:
                epsilon.add_metric([name], run.epsilon)
        yield rounds
        yield answers
        yield epsilon
        days = GaugeMetricFamily(
            "conversion_hub_certificate_days", "Days until a certificate ends", labels=["name"]
        )
        for name, left in expiry(self._hub.certificates, int(time.time())).items():
            days.add_metric([name], left)
        yield days


def health(hub: HubFolder, *, front: bool) -> tuple[bool, Mapping[str, object]]:
    """Is the hub fit to serve: does the SuperLink answer, and its front, if it has one, listen?"""
    try:
        connected: int | None = sum(site.online for site in sites(hub))
    except SuperLinkError:
        connected = None
    parts = {"superlink": connected is not None}
    if front:
        parts["front"] = _listens(hub)
    return all(parts.values()), {**parts, "sites_online": connected}


def _listens(hub: HubFolder) -> bool:
    config = hub.config()
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.listen, config.listen)
    try:
        with socket.create_connection((host, config.port), timeout=2):
            return True
    except OSError:
        return False
