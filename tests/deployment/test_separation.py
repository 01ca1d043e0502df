"""A site whose SuperNode runs under a user of its own, and hostile code that has become that user.

What such code can have is what the coordinator can have: answers that the site's policy allows,
each charged to the site's ledger. Everything else is refused, and on record.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.serverapp import Grid
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

import server.superlink
from client.agent_socket import LONGEST_FRAME_S, MOST_CONNECTIONS, ask_agent, ask_status
from client.folder import SiteFolder
from client.frames import Limits, read_frame, to_frame
from client.node import NodeFolder
from client.refusals import MOST
from conf.compose import from_yaml
from conf.schema import Unprotected
from protocol.exchange import Parts, Request, read_replies, request_parts
from protocol.plan import RoundPlan
from protocol.publication import LARGEST_BYTES, PUBLISH
from protocol.records import from_records, to_records
from protocol.replies import Reply, SiteDescription, SiteRefusal, SiteUpdate, Weights
from server.rounds import first_plan, initial_weights
from server.runs import open_superlink
from tests.deployment.federation import SMALL, Federation, open_federation, until
from tests.deployment.users import COLLEAGUE, GROUP, GROUP_ID, NODE, SITE, STRANGER, User, Users
from tests.publications import hub as other_hub
from tests.publications import model_files, sent

pytestmark = pytest.mark.slow

AGENT_SETTINGS = f"agent:\n  users: [{NODE.name}]\n  group: {GROUP}\n  socket: ../run/agent.sock\n"
LIMITS = Limits(8_000_000, 8_000_000)
SLOW = f"no whole frame in {LONGEST_FRAME_S:g} s"
"""Why the frame that comes in drops (`slow`) is refused, whenever that is."""


@dataclass
class Separated:
    """A site with two users, its hub, and what was trained there."""

    federation: Federation
    users: Users
    folder: SiteFolder
    socket: Path
    node: NodeFolder
    slow: subprocess.Popen[bytes] = field(init=False)
    """Sends a frame in drops, from the agent's start on."""
    run: Path = field(init=False)
    """Of the hub; it is over."""
    good: Parts = field(init=False)
    """A request that the policy allows, of another run than the hub's."""
    answer: Parts = field(init=False)
    """What that is answered with, again and again."""

    def intrude(self, user: User, attack: str, **told: Any) -> Any:
        """What comes of hostile code that runs as `user`."""
        with self.begin(user, attack, **told) as intruder:
            return self.outcome(intruder)

    def begin(self, user: User, attack: str, **told: Any) -> subprocess.Popen[bytes]:
        """Hostile code that goes on meanwhile."""
        code = Path(__file__).with_name("intruder.py")
        pipe = subprocess.PIPE
        intruder = self.users.start(user, sys.executable, "-I", str(code), stdin=pipe, stdout=pipe)
        assert intruder.stdin is not None
        intruder.stdin.write(json.dumps({"attack": attack, **told}).encode())
        intruder.stdin.close()
        return intruder

    def outcome(self, intruder: subprocess.Popen[bytes]) -> Any:
        """What came of it."""
        assert intruder.stdout is not None
        said = intruder.stdout.read()
        assert intruder.wait(timeout=90) == 0
        return json.loads(said)

    def send(self, frame: bytes, user: User = NODE, **more: Any) -> dict[str, Any]:
        """Send bytes to the agent's socket."""
        told = {"path": str(self.socket), "data": base64.b64encode(frame).decode(), **more}
        done = self.intrude(user, "send", **told)
        assert isinstance(done, dict)
        return done

    def ask(self, request: Request) -> dict[str, Reply]:
        """A sound request, and its answer."""
        return read_replies(answered(self.send(to_frame("ask", request_parts(request)))))

    def refusals(self) -> list[dict[str, Any]]:
        """What the site's audit log says of refusals."""
        events = self.folder.audit_log.events()
        return [event.content for event in events if event.kind == "refusal"]

    @contextmanager
    def costs_nothing(self) -> Iterator[None]:
        """What happens within is not charged, and changes nothing that the site has but its log."""
        before = self.folder.released(), kept(self.folder)
        yield
        assert (self.folder.released(), kept(self.folder)) == before

    @contextmanager
    def on_record(self, *reasons: str) -> Iterator[None]:
        """What happens within are so many refusals, one with each of `reasons` in it."""
        before = len(self.refusals())

        def told() -> list[str]:
            new = [str(refusal.get("reason")) for refusal in self.refusals()[before:]]
            return [reason for reason in new if reason != SLOW]

        yield
        until(lambda: len(told()) >= len(reasons), "the audit log", lambda: str(told()), 5)
        for reason, said in zip(reasons, told(), strict=True):
            assert reason in said, (reason, said)

    @property
    def plan(self) -> RoundPlan:
        """The run's plan before its first round."""
        return first_plan(from_yaml(self.run / "config.yaml"), self.run.name)

    @property
    def weights(self) -> Weights:
        """The model of the run's first round."""
        return initial_weights(from_yaml(self.run / "config.yaml"))

    @property
    def spring(self) -> RoundPlan:
        """A plan for another run, which the policy allows."""
        return replace(self.plan, run="spring", round=1)


def answered(done: dict[str, Any], kind: str = "answer") -> Parts:
    """The frame that came back."""
    assert done.get("answer"), done
    stream = io.BytesIO(base64.b64decode(done["answer"]))
    came, parts = read_frame(stream.read, dict.fromkeys(("answer", "error"), LIMITS))
    assert came == kind, parts
    return parts


def error(done: dict[str, Any]) -> str:
    """The error that came back."""
    return answered(done, "error").texts["error"]


def kept(folder: SiteFolder) -> dict[str, str]:
    """A digest of each file of the site that no request may change."""
    return {
        str(path.relative_to(folder.path)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.path.rglob("*"))
        if path.is_file() and not path.name.startswith(("audit.", "ledger."))
    }


def give(path: Path, user: User) -> None:
    for one in (path, *path.rglob("*")):
        os.chown(one, user.id, user.id)


@pytest.fixture(scope="module")
def site() -> Iterator[Separated]:
    """As docs/deployment.md sets it up; one run is over."""
    with tempfile.TemporaryDirectory(prefix="site-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        users = Users(folder)
        if why := users.why_not():
            pytest.skip(why)
        with open_federation(folder, ["acme"], started=False) as federation:
            acme, node, run = federation.sites["acme"], folder / "node", folder / "run"
            with (acme / "site.yaml").open("a") as settings:
                settings.write(AGENT_SETTINGS)
            (acme / "node").rename(node)
            for one in (acme, node):
                shutil.copy(federation.hub.authority, one / "hub-ca.crt")
            run.mkdir(mode=0o711)
            run.chmod(0o711)
            for path, user in ((acme, SITE), (run, SITE), (node, NODE)):
                give(path, user)

            def start(name: str, user: User, *words: str, confined: bool = False) -> None:
                argv = (sys.executable, "-m", "client", *words)
                with (folder / f"{name}.log").open("wb") as log:
                    federation.running[name] = users.start(
                        user, *argv, confined=confined, stdout=log, stderr=log
                    )

            made = Separated(
                federation, users, SiteFolder(acme), run / "agent.sock", NodeFolder(node)
            )
            start("agent", SITE, "agent", str(acme), confined=True)
            # As from a copy of a hub, which does without them.
            for one in (federation.hub.state, federation.hub.logs):
                one.rmdir()
            federation.start_hub()
            federation.wait("agent", "listens on")
            drops = base64.b64encode(b"SITE\x01" * 10).decode()
            made.slow = made.begin(NODE, "send", path=str(made.socket), data=drops, pause_s=3.0)
            hub = ("--superlink", federation.superlink)
            trust = ("--root-certificates", str(node / "hub-ca.crt"))
            start("node", NODE, "carry", str(node), *hub, *trust, "--socket", str(made.socket))
            with made.slow:
                federation.wait("node", "connected to")
                made.run = federation.run(*SMALL)
                made.good = request_parts(Request({"train": made.spring}, made.weights))
                made.answer = answered(made.send(to_frame("ask", made.good)))
                yield made
                made.slow.kill()


@pytest.fixture(autouse=True)
def _goes_on(site: Separated) -> Iterator[None]:
    """After whatever was tried, the agent answers a good request as it did before."""
    yield
    if "agent" not in site.federation.running:
        return
    with site.costs_nothing():
        assert ask_agent(site.socket, site.good, 10) == site.answer


# ---------------------------------------------------------------------------- the two users


def test_a_site_with_two_users_takes_part_in_a_run(site: Separated) -> None:
    rounds = [json.loads(line) for line in (site.run / "metrics.jsonl").read_text().splitlines()]
    outcomes = [one["sites"]["acme"]["outcome"] for one in rounds if one["kind"] == "round"]
    assert outcomes == ["trained"] * 3
    for name, user in (("agent", SITE), ("node", NODE)):
        status = Path(f"/proc/{site.federation.running[name].pid}/status").read_text()
        assert f"Uid:\t{user.id}\t{user.id}\t{user.id}\t{user.id}\n" in status
        assert "CapEff:\t0000000000000000\n" in status
    assert site.socket.stat().st_mode & 0o777 == 0o660
    assert (site.socket.stat().st_uid, site.socket.stat().st_gid) == (SITE.id, GROUP_ID)


def test_nothing_of_the_site_can_be_read_or_changed(site: Separated) -> None:
    hub, own = site.federation.hub.path, site.node.path
    theirs = [site.folder.path, *site.folder.path.rglob("*"), site.socket.parent]
    names = {path.name for path in theirs}
    assert names >= {"policy.yaml", "site.yaml", "ledger.sqlite", "audit.jsonl", "keys", "store"}
    assert len(theirs) > 15
    with site.costs_nothing():
        paths = [str(path) for path in (*theirs, hub, *hub.rglob("*"))]
        tried = site.intrude(NODE, "files", paths=paths)
    for path, outcomes in tried.items():
        for what, outcome in outcomes.items():
            # The site's own folder lies beside others, as in /var/lib.
            assert outcome in ("PermissionError", "IsADirectoryError"), (path, what, outcome)
            assert (what, outcome) != ("read", "IsADirectoryError"), path
    # It is no sandbox: its own files it has.
    assert site.intrude(NODE, "files", paths=[str(own / "key.pub")])
    assert (own / "key.pub.linked").exists()


def test_the_socket_cannot_be_taken_away(site: Separated) -> None:
    tried = site.intrude(NODE, "files", paths=[str(site.socket)])[str(site.socket)]
    assert tried.pop("read") == tried.pop("write") == "OSError"  # It is a socket.
    assert set(tried.values()) == {"PermissionError"}, tried


def test_the_supernodes_key_is_for_its_own_user(site: Separated) -> None:
    paths = [str(site.node.path / name) for name in ("key", "node-id", "state.json")]
    for user in (SITE, STRANGER):
        for path, outcomes in site.intrude(user, "files", paths=paths).items():
            assert set(outcomes.values()) == {"PermissionError"}, (user, path, outcomes)


def test_the_agents_process_cannot_be_looked_into_or_ended(site: Separated) -> None:
    tried = site.intrude(NODE, "process", pid=site.federation.running["agent"].pid)
    assert set(tried.values()) == {"PermissionError"}, tried
    assert site.federation.running["agent"].poll() is None


# ---------------------------------------------------------------------------- what is asked


def weaker(**changes: Any) -> Callable[[RoundPlan], RoundPlan]:
    """A plan of a new run, with other words on privacy."""
    return lambda plan: replace(plan, run="greedy", privacy=replace(plan.privacy, **changes))


PLANS: dict[str, tuple[Callable[[RoundPlan], RoundPlan], str]] = {
    "less noise": (weaker(epsilon=3.5), "privacy.epsilon=3.5: this site allows at most 3"),
    "a larger delta": (weaker(delta=1e-3), "privacy.delta=0.001: this site allows at most 1e-05"),
    "no clipping": (weaker(clipping_norm=100.0), "privacy.clipping_norm=100: this site allows"),
    "an exact count": (weaker(count_noise=0.01), "count_noise"),
    "no protection": (
        lambda plan: replace(plan, run="greedy", privacy=Unprotected()),
        "privacy.name=unprotected: this site trains with differential privacy only",
    ),
    "another federation": (
        lambda plan: replace(plan, federation="rivals"),
        "federation=rivals: this site allows shops",
    ),
    "another purpose": (
        lambda plan: replace(plan, purpose="credit-scoring"),
        "purpose=credit-scoring: this site allows conversion-model",
    ),
    "a further round": (
        lambda plan: replace(plan, round=plan.rounds + 1),
        "round=4: must be 1 to rounds=3",
    ),
    "another plan in the same run": (
        lambda plan: replace(plan, privacy=replace(plan.privacy, epsilon=0.9)),
        "describe was asked before in this run, with another plan or model",
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_that_the_policy_forbids_is_refused(site: Separated, name: str) -> None:
    change, reason = PLANS[name]
    plan = change(site.spring)
    with site.costs_nothing(), site.on_record(reason):
        replies = site.ask(Request({"train": plan}, site.weights))
    refusal = replies["train"]
    assert isinstance(refusal, SiteRefusal)
    assert reason in refusal.reason


def test_an_earlier_round_is_not_released_again(site: Separated) -> None:
    name, array = next(iter(site.weights.items()))
    other = {**site.weights, name: array + np.float32(1)}
    first = replace(site.plan, round=1)
    tried = (
        (first, site.weights, "train is answered already, and is over"),
        (first, other, "this site allows at most 1 (policy: the plan's own epsilon)"),
        (site.spring, other, "train was asked before in this run, with another plan or model"),
    )
    with site.costs_nothing(), site.on_record(*(reason for *_, reason in tried)):
        for plan, weights, reason in tried:
            refusal = site.ask(Request({"train": plan}, weights))["train"]
            assert isinstance(refusal, SiteRefusal)
            assert reason in refusal.reason


def test_the_same_request_has_the_same_answer_and_is_charged_once(site: Separated) -> None:
    summer = replace(site.spring, run="summer")
    frame = to_frame("ask", request_parts(Request({"train": summer}, site.weights)))
    before = site.folder.released()
    first = answered(site.send(frame))
    assert isinstance(read_replies(first)["train"], SiteUpdate)
    charged = site.folder.released()[len(before) :]
    assert [entry.request.kind for entry in charged] == ["describe", "train"]
    assert {entry.request.run for entry in charged} == {"shops/summer"}
    with site.costs_nothing():
        for _ in range(3):
            assert answered(site.send(frame)) == first


def test_the_status_is_not_for_the_supernode(site: Separated) -> None:
    reason = "the status is for the site's own user and root"
    with site.costs_nothing(), site.on_record(reason):
        assert error(site.send(to_frame("status", Parts({}, None)))) == reason
    status = site.send(to_frame("status", Parts({}, None)), SITE)
    assert json.loads(answered(status).texts["status"])["site"] == "acme"


def test_a_publication_is_taken_from_the_hub_alone(site: Separated, tmp_path: Path) -> None:
    done = site.federation.command("server", "publish", "hub", f"hub/runs/{site.run.name}")
    assert "acme: has it" in done.stdout
    certificates = other_hub(tmp_path / "hub", int(time.time()))
    forged = sent(certificates, model_files(tmp_path / "model"), time=int(time.time()))
    with site.costs_nothing(), site.on_record("was not issued by the hub's authority"):
        parts = answered(site.send(to_frame("publish", forged)))
    assert isinstance(read_replies(parts, (PUBLISH,))[PUBLISH], SiteRefusal)
    assert [path.name for path in (site.folder.path / "models").glob("[!.]*")] == [site.run.name]


# ---------------------------------------------------------------------------- frames


def header(kind: int, text: int, weights: int) -> bytes:
    return struct.pack(">5sBIq", b"SITE\x01", kind, text, weights)


def texts(data: bytes) -> bytes:
    return header(0, len(data), -1) + data


TOO_LONG = {
    "text": (header(0, 2**32 - 1, -1), "4294967295 bytes of text, at most 8000000 are read"),
    "a model": (header(0, 2, 2**62), f"{2**62} bytes of weights, at most "),
    "a publication": (header(1, 2, 2**40), f"at most {LARGEST_BYTES} are read"),
}


@pytest.mark.parametrize("what", TOO_LONG)
@pytest.mark.parametrize("really", [0, 200_000_000], ids=["said", "sent"])
def test_a_huge_frame_is_refused_before_it_is_read(site: Separated, what: str, really: int) -> None:
    frame, reason = TOO_LONG[what]
    most = memory(site.federation.running["agent"].pid)
    with site.costs_nothing(), site.on_record(reason):
        done = site.send(frame, more=really)
    # Who goes on sending may miss what is answered.
    assert done["answer"] or really
    if done["answer"]:
        assert reason in error(done)
    assert done["sent"] < 2_000_000
    assert done["seconds"] < 5
    assert memory(site.federation.running["agent"].pid) < most + 20_000_000


def memory(pid: int) -> int:
    """The most memory that a process ever had, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


MALFORMED = {
    "noise": (os.urandom(100), "no frame, or one of another version"),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "no frame, or one of another version"),
    "another version": (b"SITE\x02" + bytes(13), "no frame, or one of another version"),
    "an answer": (header(3, 2, -1) + b"{}", "a frame of kind 3, which is not for here"),
    "an unknown kind": (header(99, 2, -1) + b"{}", "a frame of kind 99, which is not for here"),
    "a negative length": (header(0, 2, -2) + b"{}", "weights of a negative length"),
    "half a header": (b"SITE\x01\0", "a frame that ends early"),
    "half a text": (header(0, 100, -1) + b"{", "a frame that ends early"),
    "no JSON": (texts(b"{'train': 1}"), "the text is not JSON of texts"),
    "a number": (texts(b'{"train": 1}'), "the text is not JSON of texts"),
    "a list": (texts(b"[]"), "the text is no JSON object of texts"),
    "brackets": (texts(b"[" * 1_000_000), "the text is not JSON of texts"),
    "bytes": (texts(b'{"train": "\xff"}'), "the text is not UTF-8"),
    "half a character": (texts(rb'{"train": "\ud800"}'), "the text holds half a character"),
    "a name twice": (texts(b'{"train": "", "train": ""}'), "two texts of one name"),
    "many texts": (
        texts(json.dumps({str(n): "" for n in range(99)}).encode()),
        "99 texts, 8 are allowed",
    ),
    "nothing asked": (texts(b"{}"), "cannot be read"),
    "something else asked": (texts(b'{"visits": "all"}'), "cannot be read"),
    "no plan": (texts(b'{"train": "{}"}'), "cannot be read"),
    "no model": (header(0, 15, 8) + b'{"train": "{}"}' + bytes(8), "cannot be read"),
}


def test_a_malformed_frame_is_refused(site: Separated) -> None:
    for name, (frame, reason) in MALFORMED.items():
        with site.costs_nothing(), site.on_record(reason):
            done = site.send(frame, shut=True)
        assert error(done), name
        assert done["seconds"] < 5, name


def test_many_connections_at_once_leave_room_for_the_site(site: Separated) -> None:
    many = 4
    reason = f"user {NODE.id} has {MOST_CONNECTIONS} connections open"
    with site.costs_nothing():
        said = site.intrude(NODE, "many", path=str(site.socket), number=MOST_CONNECTIONS + many)
        told = [answered({"answer": one}, "error").texts["error"] for one in said if one]
        # The one that comes in drops (`slow`) may hold a place, too.
        assert many <= len(told) <= many + 1, said
        assert all(reason in one for one in told)
        # The site's own user has places of its own.
        assert ask_status(site.socket)["site"] == "acme"
    assert sum(reason in refusal["reason"] for refusal in site.refusals()) == len(told)


def test_a_frame_that_comes_in_drops_is_cut_off(site: Separated) -> None:
    done = site.outcome(site.slow)
    # Of the header's 18 bytes some had come.
    assert 2 <= done["sent"] < 18
    assert error(done) == SLOW
    assert done["seconds"] < LONGEST_FRAME_S + 5
    assert SLOW in [refusal["reason"] for refusal in site.refusals()]


# ---------------------------------------------------------------------------- other users


def test_a_user_outside_the_group_does_not_reach_the_socket(site: Separated) -> None:
    frame = to_frame("ask", site.good)
    with site.costs_nothing(), site.on_record():
        assert site.send(frame, STRANGER) == {"connect": "PermissionError"}


def test_a_user_whom_the_settings_do_not_name_is_turned_away_unread(site: Separated) -> None:
    reason = f"user {COLLEAGUE.id} may not ask this site's agent; agent.users names who may"
    frame = to_frame("ask", site.good)
    with site.costs_nothing(), site.on_record(reason, reason, reason):
        # Before anything was sent.
        assert error(site.send(b"", COLLEAGUE)) == reason
        for sent_ in (frame, to_frame("status", Parts({}, None))):
            done = site.send(sent_, COLLEAGUE)
            # Who is hung up on while sending may miss why.
            assert not done["answer"] or error(done) == reason


# ---------------------------------------------------------------------------- foreign code


HOSTILE = """\
import os, pathlib, sys
pathlib.Path({marker!r}, f"{{__name__}}-{{os.getuid()}}").write_text("was here")
app = None
"""
PROJECT = b"""\
[project]
name = "hostile"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "mallory"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
"""


@pytest.fixture
def marker() -> Iterator[Path]:
    """A folder in which every user may write."""
    with tempfile.TemporaryDirectory(prefix="marker-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


def hostile_bundle(marker: Path) -> Fab:
    code = HOSTILE.format(marker=str(marker)).encode()
    files = {"pyproject.toml": PROJECT, "client_app.py": code, "server_app.py": code}
    content, _ = build_fab_from_files(files)
    # It does what it is meant to do, wherever it is loaded.
    unpacked = marker / "unpacked"
    zipfile.ZipFile(io.BytesIO(content)).extractall(unpacked)
    for module in ("client_app", "server_app"):
        subprocess.run([sys.executable, "-c", f"import {module}"], cwd=unpacked, check=True)
        (marker / f"{module}-0").unlink()
    shutil.rmtree(unpacked)
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


def answer_of(grid: Grid, message: Message, site: Separated) -> Message:
    [id_] = grid.push_messages([message])
    found: list[Message] = []

    def came() -> bool:
        found.extend(grid.pull_messages([id_]))
        return bool(found)

    until(came, "an answer", site.federation.dump)
    return found[0]


@contextmanager
def fleet(site: Separated, port: int) -> Iterator[FleetHttpClient]:
    """Flower's own client, with the key of the site."""
    key = site.node.private_key()
    with FleetHttpClient.from_server_address(
        f"localhost:{port}",
        insecure=False,
        root_certificates=site.federation.hub.authority.read_bytes(),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
        ],
    ) as client:
        yield client


def get_code(client: FleetHttpClient, node: int, run: int, bundle: Fab) -> tuple[int, int]:
    """What a SuperNode of Flower's own calls for to run the coordinator's code; the statuses."""
    about = {"node": Node(node_id=node), "run_id": run}
    statuses = []
    for call in (
        lambda: client.GetRun(GetRunRequest(**about)).run.fab_hash == bundle.hash_str,
        lambda: (
            client.GetFab(GetFabRequest(hash_str=bundle.hash_str, **about)).fab.content
            == bundle.content
        ),
    ):
        try:
            assert call()
            statuses.append(200)
        except httpx.HTTPStatusError as refused:
            statuses.append(refused.response.status_code)
    return statuses[0], statuses[1]


def test_code_of_the_coordinator_runs_nowhere(
    site: Separated, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = hostile_bundle(marker)
    monkeypatch.setattr(server.superlink, "_empty_bundle", lambda: bundle)
    hub = site.federation.hub
    describe = Request({"describe": replace(site.spring, round=0)})
    own = [
        ("train", RecordDict({"config": ConfigRecord({"run": "client_app:app"})})),
        ("query.client_app", RecordDict({"text": ConfigRecord({"visits": "all of them"})})),
    ]
    with site.costs_nothing(), open_superlink(hub).open_grid() as grid:
        [node] = grid.get_node_ids()
        messages = [Message(content, node, kind, ttl=60) for kind, content in own]
        messages.append(Message(to_records(request_parts(describe)), node, "query", ttl=60))
        # One after the other: of many at once a SuperNode gives up the oldest.
        answers = [answer_of(grid, message, site) for message in messages]
        run = grid.run.run_id
        with fleet(site, hub.config().superlink_port) as inside:
            assert get_code(inside, node, run, bundle) == (200, 200)
        with fleet(site, hub.config().port) as outside:
            assert get_code(outside, node, run, bundle) == (404, 404)
    assert all(answer.has_error() for answer in answers[:-1])
    [reply] = read_replies(from_records(answers[-1].content)).values()
    assert isinstance(reply, SiteDescription)
    assert reply.site == "acme"
    assert list(marker.iterdir()) == []


# ---------------------------------------------------------------------------- last


def test_the_log_does_not_grow_without_end(site: Separated) -> None:
    """The last one: from here on refusals are counted, and no longer listed."""
    number = 2 * MOST
    frame = base64.b64encode(b"no frame, and long enough").decode()
    before = ask_status(site.socket)["refusals"]
    with site.costs_nothing():
        site.intrude(NODE, "flood", path=str(site.socket), data=frame, number=number)
    until(
        lambda: ask_status(site.socket)["refusals"] >= before + number,
        "all to be refused",
        lambda: str(ask_status(site.socket)),
        10,
    )
    assert len(site.refusals()) == MOST
    assert site.federation.stop("agent") == 0
    assert site.refusals()[-1] == {"not listed": before + number - MOST}
