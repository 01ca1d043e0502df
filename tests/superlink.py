"""A real SuperLink with TLS and node authentication, without the hub's front."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from client.node import NodeFolder
from server.certificates import create_authority, issue_server
from server.superlink import SuperLink
from tests.deployment.federation import free_ports


@dataclass
class Hub:
    """A SuperLink, and what a site needs to reach it."""

    superlink: SuperLink
    authority: Path

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return self.superlink.address

    def admit(self, node: NodeFolder) -> int:
        """Register a site's key; returns its number."""
        key = node.private_key().public_key()
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self.superlink.register(pem, node.name)
        [id_] = [one.id for one in self.superlink.nodes() if one.public_key == pem]
        return id_

    def is_online(self, id_: int) -> bool:
        """Does the SuperLink take the node for online?"""
        return any(one.id == id_ and one.online for one in self.superlink.nodes())


@contextmanager
def open_superlink(folder: Path) -> Iterator[Hub]:
    """Start one, which is killed at the block's end."""
    create_authority(folder, "test", int(time.time()))
    issue_server(folder, ["localhost"], int(time.time()))
    [port] = free_ports(1)
    log, authority = folder / "superlink.log", folder / "ca.crt"
    code = "from flwr.superlink.cli import flower_superlink; flower_superlink()"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", code, "--host", "127.0.0.1", "--port", str(port)),
                *("--ssl-certfile", str(folder / "server.crt")),
                *("--ssl-keyfile", str(folder / "server.key")),
                *("--ssl-ca-certfile", str(authority)),
                *("--enable-supernode-auth", "--isolation", "process"),
                "--disable-runtime-dependency-installation",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0"},
        )
    try:
        hub = Hub(SuperLink(f"localhost:{port}", authority.read_bytes()), authority)
        deadline = time.monotonic() + 60
        while not hub.superlink.is_up():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield hub
    finally:
        process.kill()
        process.wait()
