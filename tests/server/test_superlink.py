"""Against Flower's own SuperLink, started as a hub starts it, without its front."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.superlink.grid.http_grid import HttpGrid

import server.superlink
from client.fleet import Fleet
from conf.hub import HubConfig
from protocol.exchange import Parts
from protocol.records import from_records, to_records
from server.admission import admit, remove, tell_superlink
from server.hub import HubError, HubFolder, SuperLinkError, create_hub
from server.monitoring import HubFigures, health
from server.runs import open_superlink
from server.start import start
from server.status import sites
from server.superlink import LOST, SuperLink
from service.processes import Stopped
from tests.deployment.federation import descendants, environment, free_ports, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubFolder]:
    folder = tmp_path_factory.mktemp("superlink")
    ports = free_ports(3)
    config = HubConfig(
        host="localhost", port=ports[0], superlink_port=ports[1], health_port=ports[2]
    )
    hub = create_hub(folder / "hub", config, int(time.time()))
    log = folder / "start.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-m", "server", "start", "hub", "--no-front"],
            cwd=folder,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            until(lambda: "is up" in log.read_text(), "the hub", log.read_text)
            yield hub
        finally:
            started = [pid for pid, _ in descendants(process.pid)]
            process.terminate()
            assert process.wait(timeout=30) == 0, log.read_text()
            assert started
            assert not [pid for pid in started if os.path.exists(f"/proc/{pid}")]


@pytest.fixture
def superlink(hub: HubFolder) -> SuperLink:
    return open_superlink(hub)


def admitted(hub: HubFolder, name: str, key: ec.EllipticCurvePrivateKey | None = None) -> bytes:
    public = (key or ec.generate_private_key(ec.SECP384R1())).public_key()
    path = hub.path / "key.pub"
    path.write_bytes(public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    admit(hub, path, name)
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_who_is_admitted_is_registered_and_who_is_removed_is_not(
    hub: HubFolder, superlink: SuperLink
) -> None:
    superlink.register(
        ec.generate_private_key(ec.SECP256R1())
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "somebody else",
    )
    key = admitted(hub, "acme")
    names = tell_superlink(hub, superlink)
    assert list(names.values()) == ["acme"]
    assert [(node.id, node.public_key) for node in superlink.nodes()] == [(*names, key)]
    assert [(site.name, site.online, site.last_contact) for site in sites(hub)] == [
        ("acme", False, 0.0)
    ]
    remove(hub, "acme")
    assert tell_superlink(hub, superlink) == {}
    assert superlink.nodes() == []


def test_a_grid_is_of_one_run_and_who_is_away_is_not_on_it(superlink: SuperLink) -> None:
    with superlink.open_grid() as grid:
        first = grid.run.run_id
        assert list(grid.get_node_ids()) == []
    with superlink.open_grid() as grid:
        assert grid.run.run_id != first


def test_a_run_that_was_killed_is_not_in_the_way_of_the_next(superlink: SuperLink) -> None:
    process = os.fork()
    if process == 0:
        try:
            with superlink.open_grid():
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, code = os.waitpid(process, 0)
    assert os.WTERMSIG(code) == signal.SIGKILL
    with superlink.open_grid() as grid:
        assert list(grid.get_node_ids()) == []


def test_a_run_that_ended_is_lost_to_its_grid(superlink: SuperLink) -> None:
    with superlink.open_grid() as grid:
        pass
    with pytest.raises(LOST):
        grid.push_messages([Message(RecordDict({"a": ConfigRecord({})}), 1, "query")])
    # The call connected anew.
    assert isinstance(grid, HttpGrid)
    grid.close()


def test_an_answer_that_is_lost_on_the_way_costs_no_message(
    hub: HubFolder, superlink: SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    admitted(hub, "corner", key)
    tell_superlink(hub, superlink)
    authority = (hub.certificates / "ca.crt").read_bytes()
    site = Fleet(superlink.address, authority, key, "corner", threading.Event())
    node = site.activate(None)
    asked = Parts({"train": "what is asked"}, bytes(1000))
    answer = Parts({"train": "the answer"}, bytes(range(100)))
    with superlink.open_grid() as grid, monkeypatch.context() as patched:
        lost = lose_first_answers(patched)
        message = Message(to_records(asked), node, "train", ttl=60)
        assert grid.push_messages([message]) == [message.metadata.message_id]
        received = site.receive()
        assert received is not None
        assert site.fetch(received) == asked
        site.answer(received, answer, 0.1)
        [reply] = grid.pull_messages([message.metadata.message_id])
        assert from_records(reply.content) == answer
        # Each call twice: by the coordinator and by the site.
        assert Counter(path.rpartition("/")[2] for path in lost) == {
            "push-messages": 2,
            "push-object": 2,
            "pull-object": 2,
            "confirm-message-received": 2,
        }
    site.deactivate()
    site.close()
    remove(hub, "corner")
    tell_superlink(hub, superlink)


def lose_first_answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first answer to each call that asks for the same again is lost after it was given.

    The others hand something out once: what is lost with them is not asked for again.
    """
    lost: list[str] = []
    send = httpx.Client.send

    def losing(self: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        response = send(self, request, **options)
        path = request.url.path
        if path not in lost and not path.endswith("/pull-messages"):
            lost.append(path)
            raise httpx.ReadError("the answer is lost")
        return response

    monkeypatch.setattr(httpx.Client, "send", losing)
    return lost


def test_a_superlink_that_dies_is_lost_after_a_bounded_time_and_started_again(
    hub: HubFolder, superlink: SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.superlink, "LONGEST_OUTAGE_S", 1.0)
    port = str(hub.config().superlink_port)
    with superlink.open_grid() as grid:
        (process,) = [
            int(pid.name)
            for pid in Path("/proc").iterdir()
            if pid.name.isdigit() and _argv(pid)[1:2] == ["-c"] and port in _argv(pid)
        ]
        os.kill(process, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(LOST):
            grid.get_node_ids()
        assert time.monotonic() - began < 10
        with pytest.raises(SuperLinkError, match="no SuperLink answers at localhost:"):
            superlink.nodes()
        assert not health(hub, front=False)[0]
    until(superlink.is_up, "the SuperLink", lambda: (hub.logs / "superlink.log").read_text())
    assert health(hub, front=False) == (True, {"superlink": True, "sites_online": 0})


def test_health_and_figures_are_served_on_the_loopback_address(hub: HubFolder) -> None:
    admitted(hub, "books")
    tell_superlink(hub, open_superlink(hub))
    address = f"http://127.0.0.1:{hub.config().health_port}"
    with urllib.request.urlopen(f"{address}/health", timeout=10) as answer:
        assert answer.status == 200
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
        told = answer.read().decode()
    assert 'conversion_hub_site_online{site="books"} 0.0' in told
    assert 'conversion_hub_certificate_days{name="server"} 396.9' in told
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{address}/runs", timeout=10)
    registry = HubFigures(hub).registry()
    assert registry.get_sample_value("conversion_hub_site_online", {"site": "books"}) == 0.0
    remove(hub, "books")


def test_a_hub_is_not_started_twice(hub: HubFolder) -> None:
    with pytest.raises(HubError, match="this hub is started already, in process"):
        start(hub, Stopped(), lambda line: None, front=False)


def _argv(entry: Path) -> list[str]:
    try:
        return (entry / "cmdline").read_bytes().decode().split("\0")
    except OSError:
        return [""]
