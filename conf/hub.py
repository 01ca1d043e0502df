"""Every setting of a hub's own file, `hub.yaml`. `conf.compose.hub_from_yaml` reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from conf.schema import MISSING, check, check_positive


@dataclass
class HubConfig:
    """A hub: where sites reach it, and how much it takes of them."""

    host: str = MISSING
    """Name or address under which sites reach the hub; the certificate is made out to it."""
    federation: str = "shops"
    """Name of the federation. A site's policy names those that may ask it."""
    listen: str = "0.0.0.0"
    """Address of this machine on which sites are heard, by the front or by nginx."""
    port: int = 9092
    """Port for the sites. The only one that the world may reach."""
    superlink_port: int = 9093
    """The SuperLink's port, on the loopback address: nobody but the hub uses it."""
    health_port: int = 9094
    """Port of `/health` and `/metrics`, on the loopback address; the front's `/metrics` are on the
    port after it. 0: none."""
    largest_body_mb: int = 64
    """Largest request of a site, in MB."""
    body_timeout_s: float = 60.0
    """Longest time that a site may take to send one request."""
    requests_per_s: float = 20.0
    """Requests that one address may make a second, on average over some seconds."""
    connections: int = 512
    """Connections at once."""

    def __post_init__(self) -> None:
        check(
            self.host == MISSING or re.fullmatch(r"[A-Za-z0-9.:-]{1,253}", self.host) is not None,
            "host",
            self.host,
            "must be a host name or an IP address, without a port",
        )
        check(bool(self.federation), "federation", "", "must not be empty")
        for name in ("port", "superlink_port", "health_port"):
            port = getattr(self, name)
            lowest = 0 if name == "health_port" else 1
            check(lowest <= port < 65_536, name, port, f"must be {lowest} to 65535")
        health = [self.health_port, self.health_port + 1] if self.health_port else []
        used = [self.port, self.superlink_port, *health]
        check(len(set(used)) == len(used), "port", self.port, "two settings name one port")
        check_positive(
            "",
            largest_body_mb=self.largest_body_mb,
            body_timeout_s=self.body_timeout_s,
            requests_per_s=self.requests_per_s,
            connections=self.connections,
        )
