"""Promise 15: who is not admitted gets nothing, and is told so; who was removed gets no more."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import httpx
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.proto.node_pb2 import Node

import server.__main__
from client.fleet import NOT_ADMITTED, UNTRUSTED, Fleet, HubError
from client.folder import SiteFolder
from client.node import NodeFolder
from server.admission import admitted_keys
from server.runs import open_superlink
from tests.deployment.federation import (
    NAMES,
    SLOW,
    SMALL,
    Federation,
    environment,
    open_federation,
    rounds,
)
from tests.publications import hub as other_hub

pytestmark = pytest.mark.slow

SHORT = (*SMALL, "rounds=1", "evaluations=1")
"""Of one round, and no more than is to be seen."""
HIT = "books"
"""The site that is removed, and comes back."""
NOT_REGISTERED = "this site's key is not registered at the hub, or another SuperNode uses it"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """One for all tests: what each leaves behind, the next one has to live with."""
    with open_federation(tmp_path_factory.mktemp("federation")) as opened:
        yield opened


@pytest.fixture
def stranger(federation: Federation, tmp_path: Path) -> NodeFolder:
    """A SuperNode with a key that the hub does not know."""
    return NodeFolder.create(tmp_path / "stranger", "stranger")


def outcomes(records: list[dict[str, object]], site: str) -> list[str]:
    """What each round got of a site."""
    told = []
    for record in records:
        sites = record["sites"]
        assert isinstance(sites, dict)
        told.append(str(sites[site]["outcome"]) if site in sites else "")
    return told


def admit(federation: Federation, *words: str) -> str:
    """`server admit`, here, because another process takes as long as a round; what it says."""
    said, failed = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(failed), suppress(SystemExit):
        server.__main__.main(["admit", str(federation.hub.path), *words])
    return said.getvalue().strip() or failed.getvalue().strip()


def test_who_is_not_let_in_is_told_why(
    federation: Federation, stranger: NodeFolder, tmp_path: Path
) -> None:
    # The key of a site that is there.
    twin = NodeFolder(tmp_path / "twin")
    twin.path.mkdir()
    for file in ("key", "key.pub"):
        shutil.copy(federation.sites["bakery"] / "node" / file, twin.path / file)
    # Nobody trusts what another authority vouches for, nor the right one under another name.
    other = other_hub(tmp_path / "other", int(time.time())) / "ca.crt"
    port = federation.hub.config().port
    right = federation.superlink, federation.hub.authority
    cases = {
        "stranger": (stranger, *right, NOT_ADMITTED, f"{NOT_REGISTERED}: give stranger.pub to"),
        "twin": (twin, *right, NOT_ADMITTED, NOT_REGISTERED),
        "authority": (stranger, right[0], other, UNTRUSTED, "is not trusted: "),
        "name": (stranger, f"127.1:{port}", right[1], UNTRUSTED, "is not trusted: Hostname mis"),
    }
    socket = SiteFolder(federation.sites["bakery"]).path / "agent.sock"
    with ExitStack() as stack:
        started = {}
        for name, (node, superlink, authority, _, _) in cases.items():
            folder = tmp_path / f"{name}-node"
            shutil.copytree(node.path, folder)
            log = stack.enter_context((tmp_path / f"{name}.log").open("wb"))
            started[name] = stack.enter_context(
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", "client", "carry", str(folder)),
                        *("--superlink", superlink, "--root-certificates", str(authority)),
                        *("--socket", str(socket)),
                    ],
                    env=environment(),
                    stderr=log,
                )
            )
        codes = {name: process.wait(timeout=60) for name, process in started.items()}
    for name, (*_, code, reason) in cases.items():
        said = (tmp_path / f"{name}.log").read_text()
        assert reason in said, (name, said)
        assert codes[name] == code, (name, said)
        state = NodeFolder(tmp_path / f"{name}-node").state
        assert state is not None
        assert not state.connected
        assert reason in state.text
    assert {node.public_key for node in open_superlink(federation.hub).nodes()} == set(
        admitted_keys(federation.hub).values()
    )


def test_a_removed_site_gets_no_more_and_a_strange_key_nothing_of_a_run(
    federation: Federation, stranger: NodeFolder
) -> None:
    with federation.running_run(*SLOW, "rounds=4", "strategy.round_timeout_s=15") as run:
        federation.wait_work(HIT, "train")
        assert_gets_nothing(federation, stranger)
        run.wait_rounds(1)
        assert admit(federation, "--remove", HIT) == f"{HIT}: removed; its key stays out"
        over = len(run.rounds())
        run.end()
        records = run.rounds()
    assert len(records) == 4
    assert all(record["completed"] for record in records), records
    assert {site for record in records for site in record["sites"]} == set(NAMES)
    for name in set(NAMES) - {HIT}:
        assert outcomes(records, name) == ["trained"] * 4
    # The round that was going on may have reached it.
    hit = outcomes(records, HIT)
    assert hit[0] == "trained", hit
    assert len(records) > over + 1
    assert "trained" not in hit[over + 1 :], hit
    charged = [
        entry.request.round
        for entry in federation.entries(HIT)
        if entry.request.run == f"shops/{run.folder.name}"
    ]
    assert max(charged) <= over + 1
    federation.wait(HIT, f"SuperNode not connected: {NOT_REGISTERED}")


def assert_gets_nothing(federation: Federation, node: NodeFolder) -> None:
    """With this key, not even as another site, from the hub's public port."""
    of_other = SiteFolder(federation.sites["bakery"]).node.node_id
    assert of_other is not None
    other = Node(node_id=of_other)
    authority = federation.hub.authority.read_bytes()
    fleet = Fleet(federation.superlink, authority, node.private_key(), node.name, threading.Event())
    calls: dict[str, Callable[[], object]] = {
        "pull": lambda: fleet._client.PullMessages(PullMessagesRequest(node=other)),
        "object": lambda: fleet._client.PullObject(
            PullObjectRequest(node=other, run_id=1, object_id="0" * 64)
        ),
        "push": lambda: fleet._client.PushMessages(PushMessagesRequest(node=other)),
        "beat": lambda: fleet._client.SendNodeHeartbeat(
            SendNodeHeartbeatRequest(node=other, heartbeat_interval=30)
        ),
    }
    try:
        with pytest.raises(HubError, match=NOT_REGISTERED):
            fleet.activate(None)
        for name, call in calls.items():
            with pytest.raises(httpx.HTTPStatusError) as refused:
                call()
            assert refused.value.response.status_code == 401, name
    finally:
        fleet.close()


def test_a_removed_site_comes_back_with_a_new_key_and_not_with_the_old(
    federation: Federation,
) -> None:
    assert federation.stop(HIT) == 0
    key = federation.sites[HIT] / f"{HIT}.pub"
    assert "this key was removed, and a removed key stays out" in admit(federation, str(key))
    folder = SiteFolder(federation.sites[HIT])
    folder.node.path.rename(folder.path / "node-removed")
    after = len(federation.log(HIT))
    federation.join(HIT)
    federation.wait(HIT, f"give {key} to the coordinator", after)
    federation.wait(HIT, NOT_REGISTERED, after)
    assert admit(federation, str(key)) == f"{HIT}: admitted"
    federation.wait(HIT, "SuperNode connected", after)
    assert outcomes(rounds(federation.run(*SHORT)), HIT) == ["trained"]


def test_a_site_that_says_another_name_than_it_was_admitted_by_does_not_join(
    federation: Federation,
) -> None:
    name = "shoes"
    settings = federation.sites[name] / "site.yaml"
    text = settings.read_text()
    assert federation.stop(name) == 0
    settings.write_text(re.sub(r"^name: .*", "name: bakery", text, flags=re.M))
    after = len(federation.log(name))
    federation.join(name)
    federation.wait(name, "SuperNode connected", after)
    [record] = rounds(federation.run(*SHORT))
    for other in set(NAMES) - {name}:
        assert outcomes([record], other) == ["trained"]
    assert record["sites"][name]["outcome"] == "dropped"
    assert record["sites"][name]["reason"] == "answered under another site's name"
