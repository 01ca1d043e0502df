from __future__ import annotations

import grp
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import generate_latest

from client import agent, agent_socket
from client.agent import Agent
from client.agent_socket import AgentError, AgentUnreachable, ask_agent, ask_status
from client.folder import SiteFolder, create
from client.frames import to_frame
from conf.compose import load
from conf.schema import JourneyConfig, LogisticConfig, NumericColumn, OptimizerConfig, VisitorDP
from journeys.features import feature_spec
from models.registry import initial_weights
from privacy.ledger import Entry, Ledger, LedgerBusyError
from privacy.training import TrainingStopped
from protocol.exchange import Parts, Request, read_replies, request_parts
from protocol.plan import RoundPlan
from protocol.replies import (
    Reply,
    SiteDescription,
    SiteEvaluation,
    SiteReceipt,
    SiteRefusal,
    SiteUpdate,
)
from tests.deployment.federation import free_ports
from tests.publications import hub, model_files, sent
from tests.visits import NOW, POLICY, SITE, store_of, stored

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
GROUP = grp.getgrgid(os.getegid()).gr_name
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
CUT = JourneyConfig(load(["data=site", "data.path=store"]).data.features)
WEIGHTS = initial_weights(LogisticConfig(), feature_spec(CUT.features), 0)
PLAN = RoundPlan(
    federation="shops",
    purpose="conversion-model",
    run="spring",
    round=1,
    rounds=3,
    evaluations=3,
    model=LogisticConfig(),
    optimizer=OptimizerConfig(batch_size=64),
    privacy=VisitorDP(epsilon=3.0, delta=1e-5, count_noise=20.0),
    journeys=CUT,
)
DESCRIBE = Request({"describe": replace(PLAN, round=0)})
TRAIN = Request({"train": PLAN}, WEIGHTS)
ROUND = Request({"train": PLAN, "evaluate": PLAN}, WEIGHTS)


@pytest.fixture
def folder() -> Iterator[SiteFolder]:
    """A site of 900 visitors, in a folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="agent-") as path:
        made = create(Path(path) / "acme", NOW)
        (made.path / "site.yaml").write_text(SITE)
        visits = [
            stored(
                f"visitor {number}",
                NOON - timedelta(days=day),
                channel=("email", "direct")[number % 2],
                converted=number % 7 == day,
            )
            for number in range(900)
            for day in (1, 4)
        ]
        store_of(made.visits, visits)
        yield made


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "_TICK_S", 0.02)


@dataclass
class Running:
    """An agent that runs in a thread."""

    agent: Agent
    socket: Path

    def ask(self, request: Request, timeout_s: float = 30, **more: Any) -> dict[str, Reply]:
        return read_replies(ask_agent(self.socket, request_parts(request), timeout_s, **more))

    def status(self) -> dict[str, Any]:
        return ask_status(self.socket)


@contextmanager
def running(folder: SiteFolder) -> Iterator[Running]:
    ended = threading.Event()
    with Agent(folder) as made:
        thread = threading.Thread(target=made.serve, args=(ended.is_set,))
        thread.start()
        path = folder.path / "agent.sock"
        try:
            wait_until(path.exists)
            yield Running(made, path)
        finally:
            ended.set()
            thread.join()


@pytest.fixture
def site(folder: SiteFolder) -> Iterator[Running]:
    with running(folder) as found:
        yield found


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def entries(folder: SiteFolder) -> list[Entry]:
    return list(Ledger(folder.ledger, read_only=True).entries())


def asked(folder: SiteFolder) -> list[tuple[str, int, bool]]:
    return [(e.request.kind, e.request.round, e.committed) for e in entries(folder)]


def refusals(folder: SiteFolder) -> list[dict[str, Any]]:
    return [event.content for event in folder.audit_log.events() if event.kind == "refusal"]


# ---------------------------------------------------------------------------- answering


def test_a_run_through_the_socket(folder: SiteFolder, site: Running) -> None:
    description = site.ask(DESCRIBE)["describe"]
    first = site.ask(ROUND)
    plans = {"evaluate": replace(PLAN, round=2), "train": replace(PLAN, round=2)}
    second = site.ask(Request(plans, first["train"].weights))  # type: ignore[union-attr]

    assert isinstance(description, SiteDescription)
    assert description.site == "acme"
    assert 500 < description.visitors < 950
    for answers in (first, second):
        assert list(answers) == ["evaluate", "train"]
        evaluation, update = answers["evaluate"], answers["train"]
        assert isinstance(evaluation, SiteEvaluation)
        assert isinstance(update, SiteUpdate)
        assert evaluation.noise > 0
        assert update.epsilon is not None
        assert 0 < update.epsilon < 3
    assert asked(folder) == [
        ("describe", 0, True),
        ("evaluate", 1, True),
        ("train", 1, True),
        ("evaluate", 2, True),
        ("train", 2, True),
    ]
    assert refusals(folder) == []


def test_what_is_asked_again_is_answered_with_the_same_bytes_at_no_cost(
    folder: SiteFolder, site: Running
) -> None:
    parts = request_parts(TRAIN)
    one = ask_agent(site.socket, parts, 30)
    assert ask_agent(site.socket, parts, 30) == one
    assert len(entries(folder)) == 2
    assert site.status()["rounds"] == 1


def test_the_noise_is_the_operating_systems(site: Running) -> None:
    counts = set()
    for number in range(6):
        plan = replace(PLAN, round=0, run=f"run {number}", privacy=VisitorDP(epsilon=1.0))
        answer = site.ask(Request({"describe": plan}))["describe"]
        assert isinstance(answer, SiteDescription)
        counts.add(answer.visitors)
    assert len(counts) > 1


def test_the_ledger_is_synced(folder: SiteFolder, site: Running) -> None:
    assert site.agent._ledger is not None
    assert site.agent._ledger._durable


# ---------------------------------------------------------------------------- refusing


def test_a_plan_that_the_policy_forbids_is_refused_and_on_record(
    folder: SiteFolder, site: Running
) -> None:
    plan = replace(PLAN, privacy=VisitorDP(epsilon=99.0, delta=1e-5))
    answer = site.ask(Request({"train": plan}, WEIGHTS))["train"]
    assert isinstance(answer, SiteRefusal)
    assert answer.reason.startswith("privacy.epsilon=99: ")
    assert refusals(folder) == [{"asked": "train", "reason": answer.reason}]
    assert entries(folder) == []


def test_a_cut_that_the_site_does_not_make_is_refused_and_not_charged(
    folder: SiteFolder, site: Running
) -> None:
    features = replace(CUT.features, numeric={"revenue": NumericColumn()})
    plan = replace(PLAN, journeys=replace(CUT, features=features))
    answers = site.ask(Request({"train": plan, "evaluate": plan}, WEIGHTS))
    for answer in answers.values():
        assert isinstance(answer, SiteRefusal)
        assert answer.reason.startswith("data.features.numeric=revenue: this site allows")
    assert entries(folder) == []


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        (Parts({}, None), "a message without text"),
        (Parts({"steal": "{}"}, None), "asks for something else than"),
        (Parts({"status": "{}"}, None), "asks for something else than"),
        (Parts({"train": "{}"}, None), "RoundPlan."),
        (Parts({"train": "nonsense \x1b[31m"}, None), "RoundPlan: not JSON"),
        (Parts({"train": json.dumps({"x" * 9999: 1})}, None), "RoundPlan."),
        (Parts(request_parts(TRAIN).texts, b"no model"), "weights: arrays that cannot be read"),
    ],
)
def test_a_request_that_cannot_be_read_is_an_error_and_on_record(
    folder: SiteFolder, site: Running, parts: Parts, told: str
) -> None:
    with pytest.raises(AgentError) as error:
        ask_agent(site.socket, parts, 30)
    assert told in str(error.value)
    assert len(str(error.value)) <= 300
    assert refusals(folder) == [{"asked": "ask", "reason": "cannot be read"}]
    assert isinstance(site.ask(DESCRIBE)["describe"], SiteDescription)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n        ", "no frame, or one of another version of this program"),
        (to_frame("answer", Parts({}, None)), "a frame of kind 3, which is not for here"),
        (to_frame("ask", request_parts(DESCRIBE))[:-1], "a frame that ends"),
        (to_frame("ask", Parts({}, bytes(2_000_000))), "bytes of weights, at most 1400000"),
        (to_frame("status", Parts({}, bytes(10))), "10 bytes of weights, at most 0"),
    ],
)
def test_a_bad_frame_is_refused_and_on_record(
    folder: SiteFolder, site: Running, sent: bytes, reason: str
) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(str(site.socket))
        end.settimeout(20)
        try:
            end.sendall(sent)
            end.shutdown(socket.SHUT_WR)
        except BrokenPipeError:
            pass
        assert reason.encode() in end.recv(10_000)
    [content] = refusals(folder)
    assert content["asked"] == "frame"
    assert reason in content["reason"]
    assert isinstance(site.ask(DESCRIBE)["describe"], SiteDescription)


def test_a_model_may_be_as_large_as_the_policy_says(folder: SiteFolder, site: Running) -> None:
    policy = folder.path / "policy.yaml"
    policy.write_text(POLICY.replace("max_parameters: 100000", "max_parameters: 1"))
    with pytest.raises(AgentError, match="2000000 bytes of weights, at most 1000004 are read"):
        ask_agent(site.socket, Parts({"train": "{}"}, bytes(2_000_000)), 30)
    policy.write_text(POLICY.replace("max_parameters: 100000", "max_parameters: 1000000"))
    with pytest.raises(AgentError, match="RoundPlan"):
        ask_agent(site.socket, Parts({"train": "{}"}, bytes(2_000_000)), 30)


def test_a_foreign_user_is_turned_away_and_on_record(
    folder: SiteFolder, site: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_socket, "_peer", lambda _: 54321)
    with pytest.raises(AgentError, match="user 54321 may not ask"):
        site.ask(DESCRIBE)
    [content] = refusals(folder)
    assert content["asked"] == "connection"
    assert content["reason"].startswith("user 54321 may not ask")
    assert entries(folder) == []


def test_the_supernodes_user_may_ask_and_not_look_at_the_status(
    folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.path / "site.yaml").write_text(f"{SITE}agent: {{users: [nobody], group: {GROUP}}}\n")
    nobody = agent_socket._user("nobody")
    monkeypatch.setattr("os.chown", lambda *_: None)
    with running(folder) as site:
        monkeypatch.setattr(agent_socket, "_peer", lambda _: nobody)
        assert isinstance(site.ask(DESCRIBE)["describe"], SiteDescription)
        with pytest.raises(AgentError, match="for the site's own user and root"):
            site.status()
    assert [content["asked"] for content in refusals(folder)] == ["status"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_is_told_without_its_message_and_the_agent_goes_on(
    folder: SiteFolder,
    site: Running,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    def fails(*_: object) -> None:
        raise error("visitor ada bought for 12.34")

    with monkeypatch.context() as patched:
        patched.setattr("client.site.Site.answer", fails)
        with pytest.raises(AgentError, match=f"^the site failed: {error.__name__}$"):
            site.ask(DESCRIBE)
    assert isinstance(site.ask(DESCRIBE)["describe"], SiteDescription)
    assert refusals(folder) == [{"asked": "ask", "reason": f"the site failed: {error.__name__}"}]


def test_a_damaged_store_is_told_without_where_and_what(
    folder: SiteFolder, site: Running, caplog: pytest.LogCaptureFixture
) -> None:
    [part] = folder.visits.glob("*/*.parquet")
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    told = "the site's visits cannot be read; nothing is answered until they can"
    with pytest.raises(AgentError, match=f"^{told}$"):
        site.ask(DESCRIBE)
    assert "damaged, its SHA-256" in caplog.text
    part.write_bytes(whole)
    assert isinstance(site.ask(DESCRIBE)["describe"], SiteDescription)
    # It was charged once.
    assert asked(folder) == [("describe", 0, True)]


# ---------------------------------------------------------------------------- stopping


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Training goes on until it is stopped; set once it has begun."""
    begun = threading.Event()

    def train(*arguments: Any) -> None:
        stopped = arguments[-1]
        begun.set()
        wait_until(stopped)
        raise TrainingStopped

    monkeypatch.setattr("privacy.training.Trainer.train", train)
    return begun


def in_thread(stack: ExitStack, work: Callable[[], object]) -> list[object]:
    """What came of `work`, once the stack is left."""
    outcome: list[object] = []

    def attempt() -> None:
        try:
            outcome.append(work())
        except AgentError as error:
            outcome.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    stack.callback(thread.join)
    return outcome


def test_training_is_stopped_when_who_asked_hangs_up(
    folder: SiteFolder, site: Running, endless: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AgentError, match="withdrawn"):
        site.ask(TRAIN, cancelled=endless.is_set)
    wait_until(lambda: site.status()["at_work"] is None)
    assert asked(folder) == [("describe", 0, True), ("train", 1, False)]
    monkeypatch.undo()
    assert isinstance(site.ask(TRAIN)["train"], SiteUpdate)
    assert asked(folder) == [("describe", 0, True), ("train", 1, True)]


def test_a_newer_request_stops_the_one_at_work(
    folder: SiteFolder, site: Running, endless: threading.Event
) -> None:
    with ExitStack() as stack:
        first = in_thread(stack, lambda: site.ask(TRAIN))
        assert endless.wait(20)
        work = site.status()["at_work"]
        assert site.ask(DESCRIBE)["describe"] == site.ask(DESCRIBE)["describe"]
    assert (work["asked"], work["run"], work["round"]) == ("train", "spring", 1)
    assert work["seconds"] >= 0
    [error] = first
    assert str(error) == "stopped before its end; it is answered when it is asked again"
    # It is no refusal.
    assert refusals(folder) == []


def test_of_several_requests_that_wait_the_newest_is_answered(
    site: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, hold = threading.Event(), threading.Event()

    def describe(*_: object) -> SiteDescription:
        begun.set()
        hold.wait(20)
        return SiteDescription("acme", 1.0)

    monkeypatch.setattr("client.site.Site.describe", describe)
    with ExitStack() as stack:
        first = in_thread(stack, lambda: site.ask(DESCRIBE))
        assert begun.wait(20)
        second = in_thread(stack, lambda: site.ask(DESCRIBE))
        wait_until(lambda: site.agent._turns._newest == 2)
        third = in_thread(stack, lambda: site.ask(DESCRIBE))
        wait_until(lambda: bool(second))
        hold.set()
    assert isinstance(second[0], AgentError)
    assert third == [{"describe": SiteDescription("acme", 1.0)}]
    # What ended all the same is answered.
    assert first == third


def test_training_is_stopped_when_the_agent_is(
    folder: SiteFolder, endless: threading.Event
) -> None:
    with ExitStack() as stack:
        with running(folder) as site:
            answer = in_thread(stack, lambda: site.ask(TRAIN))
            assert endless.wait(20)
            began = time.monotonic()
        assert time.monotonic() - began < 5
    assert str(answer[0]).startswith("stopped before its end")
    assert not site.socket.exists()
    with pytest.raises(AgentUnreachable):
        site.status()
    Ledger(folder.ledger).close()


def test_who_is_connected_and_silent_does_not_keep_the_agent(folder: SiteFolder) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        with running(folder) as site:
            end.connect(str(site.socket))
            end.sendall(to_frame("ask", request_parts(DESCRIBE))[:30])
            site.ask(DESCRIBE)
            began = time.monotonic()
        assert time.monotonic() - began < 5


def test_a_publication_is_taken_in_beside_training(
    folder: SiteFolder, site: Running, endless: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[object] = []

    def accept(of: SiteFolder, parts: Parts, now: int) -> Parts:
        taken.extend([of, parts])
        assert abs(now - time.time()) < 60
        return Parts({"publish": "SiteReceipt {}"}, None)

    monkeypatch.setattr(agent, "accept", accept)
    published = Parts({"publish": "{}"}, b"model")
    with ExitStack() as stack:
        gone = threading.Event()
        training = in_thread(stack, lambda: site.ask(TRAIN, cancelled=gone.is_set))
        assert endless.wait(20)
        answer = ask_agent(site.socket, published, 30)
        assert training == []
        gone.set()
    assert answer == Parts({"publish": "SiteReceipt {}"}, None)
    assert taken == [folder, published]


def test_a_published_model_is_taken_in_or_refused_and_on_record(
    folder: SiteFolder, site: Running
) -> None:
    now = int(time.time())
    certificates = hub(folder.path.parent / "hub", now)
    published = sent(certificates, model_files(folder.path.parent / "model"), time=now)
    (refused,) = read_replies(ask_agent(site.socket, published, 30), ("publish",)).values()
    assert isinstance(refused, SiteRefusal)
    assert refused.site == "acme"
    assert "trusts no hub; join again" in refused.reason
    assert refusals(folder) == [{"asked": "publish", "reason": refused.reason}]

    shutil.copy(certificates / "ca.crt", folder.authority)
    answer = ask_agent(site.socket, published, 30)
    assert read_replies(answer, ("publish",)) == {"publish": SiteReceipt("acme", "spring")}
    assert site.status()["model"] == "spring"
    assert len(refusals(folder)) == 1


# ---------------------------------------------------------------------------- the policy


def test_a_changed_policy_is_taken_up_before_the_next_request(
    folder: SiteFolder, site: Running
) -> None:
    policy = folder.path / "policy.yaml"
    site.ask(DESCRIBE)
    policy.write_text(POLICY.replace("run_epsilon: 3.0", "run_epsilon: 2.5"))
    # What was described before is asked again too.
    answer = site.ask(DESCRIBE)["describe"]
    assert isinstance(answer, SiteRefusal)
    assert answer.reason.startswith("privacy.epsilon=3: this site allows at most 2.5")
    policy.write_text(POLICY)
    assert isinstance(site.ask(DESCRIBE)["describe"], SiteDescription)


@pytest.mark.parametrize("text", [None, "", "epsilon: [", POLICY + "more: 1\n"])
def test_with_a_broken_policy_everything_is_refused_until_it_is_right_again(
    folder: SiteFolder, site: Running, text: str | None
) -> None:
    policy = folder.path / "policy.yaml"
    policy.unlink()
    if text is not None:
        policy.write_text(text)
    for request in (DESCRIBE, ROUND):
        with pytest.raises(AgentError, match=r"^policy\.yaml cannot be used; nothing is answered"):
            site.ask(request)
    assert entries(folder) == []
    assert [content["asked"] for content in refusals(folder)] == ["ask", "ask"]
    well, said = site.agent.health()
    assert not well
    assert "policy.yaml: " in str(said["policy"])
    assert said["ledger"] == "in order"
    status = site.status()
    assert not status["healthy"]
    assert status["epsilon"] is None

    policy.write_text(POLICY)
    assert isinstance(site.ask(DESCRIBE)["describe"], SiteDescription)
    assert site.agent.health() == (True, {"policy": "in order", "ledger": "in order"})


# ---------------------------------------------------------------------------- the ledger


def test_a_ledger_that_cannot_be_written_is_taken_up_again_with_the_next_request(
    folder: SiteFolder, site: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.ask(DESCRIBE)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("privacy.ledger._sync", full)
        with pytest.raises(
            AgentError, match=r"^ledger\.sqlite: cannot be .*No space left"
        ) as error:
            site.ask(TRAIN)
        assert str(folder.path) not in str(error.value)
        well, said = site.agent.health()
        assert not well
        assert "No space left" in str(said["ledger"])
        with pytest.raises(AgentError, match=r"^ledger\.sqlite: cannot be opened: No space left"):
            site.ask(TRAIN)
    # What reached the disk counts, though it was never answered.
    assert asked(folder) == [("describe", 0, True), ("train", 1, False)]

    assert isinstance(site.ask(TRAIN)["train"], SiteUpdate)
    assert site.agent.health()[0]
    assert asked(folder) == [("describe", 0, True), ("train", 1, True)]
    assert [content["asked"] for content in refusals(folder)] == ["ask", "ask"]


def test_with_a_damaged_ledger_the_agent_runs_refuses_and_says_so(
    folder: SiteFolder, site: Running, caplog: pytest.LogCaptureFixture
) -> None:
    site.ask(DESCRIBE)
    head = folder.path / "ledger.sqlite.head"
    whole = head.read_bytes()
    site.agent.close()
    head.write_bytes(whole.replace(b"2 ", b"9 ", 1))
    for _ in range(2):
        with pytest.raises(AgentError, match=r"^ledger\.sqlite"):
            site.ask(TRAIN)
    status = site.status()
    assert not status["healthy"]
    assert "damaged" in status["ledger"]
    assert status["epsilon"] is None
    head.write_bytes(whole)
    assert isinstance(site.ask(TRAIN)["train"], SiteUpdate)


def test_an_agent_begins_on_a_damaged_ledger_and_refuses(
    folder: SiteFolder, caplog: pytest.LogCaptureFixture
) -> None:
    head = folder.path / "ledger.sqlite.head"
    whole = head.read_bytes()
    head.write_bytes(b"nonsense")
    with caplog.at_level(logging.ERROR), running(folder) as site:
        assert "nothing is answered until this is repaired" in caplog.text
        with pytest.raises(AgentError, match=r"^ledger\.sqlite\.head: damaged"):
            site.ask(DESCRIBE)
        head.write_bytes(whole)
        assert isinstance(site.ask(DESCRIBE)["describe"], SiteDescription)


def test_a_ledger_that_is_gone_is_not_begun_anew(folder: SiteFolder) -> None:
    for path in folder.path.glob("ledger.*"):
        path.unlink()
    with running(folder) as site:
        with pytest.raises(AgentError, match=r"^ledger\.sqlite: is gone; put back"):
            site.ask(DESCRIBE)
        assert not site.status()["healthy"]
    assert not folder.ledger.exists()


def test_a_site_has_one_agent(folder: SiteFolder, site: Running) -> None:
    with pytest.raises(LedgerBusyError, match="in use by another process"):
        Agent(folder)
    assert site.status()["healthy"]


# ---------------------------------------------------------------------------- telling


def test_status_of_an_agent_that_has_worked(folder: SiteFolder, site: Running) -> None:
    before = site.status()
    assert before.pop("since") <= datetime.now(UTC).isoformat()
    assert before.pop("epsilon") == {"spent": 0.0, "left": 8.0, "delta": 1e-5}
    assert before == {
        "site": "acme",
        "healthy": True,
        "policy": "in order",
        "ledger": "in order",
        "rounds": 0,
        "refusals": 0,
        "last_request": None,
        "at_work": None,
        "model": None,
    }
    site.ask(ROUND)
    site.ask(Request({"train": replace(PLAN, federation="others")}, WEIGHTS))
    for run in ("spring", "summer"):
        (folder.path / "models" / run).mkdir(parents=True)
        model = folder.path / "models" / run / "model.safetensors"
        model.write_bytes(b"")
    os.utime(model, (2e9, 2e9))
    after = site.status()
    assert (after["rounds"], after["refusals"], after["model"]) == (1, 1, "summer")
    spent = Ledger(folder.ledger, read_only=True).epsilon(1e-5)
    assert after["epsilon"] == {"spent": spent, "left": 8.0 - spent, "delta": 1e-5}
    assert after["last_request"] >= after["since"]


def test_epsilon_is_composed_once_for_each_state_of_the_ledger(
    site: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.ask(DESCRIBE)
    first = site.status()["epsilon"]
    with monkeypatch.context() as patched:
        patched.setattr("privacy.ledger.Ledger.epsilon", None)
        assert site.status()["epsilon"] == first
    site.ask(TRAIN)
    assert site.status()["epsilon"]["spent"] > first["spent"]


def test_metrics(site: Running) -> None:
    site.ask(ROUND)
    lines = generate_latest(site.agent.registry).decode().splitlines()
    figures = dict(line.split(" ") for line in lines if not line.startswith("#"))
    assert set(figures) == {
        "conversion_site_rounds_total",
        "conversion_site_refusals_total",
        "conversion_site_epsilon_left",
        "conversion_site_last_request_timestamp_seconds",
        "conversion_site_busy",
    }
    assert figures["conversion_site_rounds_total"] == "1.0"
    assert figures["conversion_site_refusals_total"] == "0.0"
    assert float(figures["conversion_site_epsilon_left"]) == site.status()["epsilon"]["left"]
    assert abs(float(figures["conversion_site_last_request_timestamp_seconds"]) - time.time()) < 60
    assert figures["conversion_site_busy"] == "0.0"


# ---------------------------------------------------------------------------- the command


def command(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "client", "agent", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_runs_until_it_is_told_to_end(folder: SiteFolder) -> None:
    [port] = free_ports(1)
    (folder.path / "site.yaml").write_text(f"{SITE}agent: {{port: {port}}}\n")
    with command(str(folder.path), "--json-logs") as process:
        try:
            wait_until((folder.path / "agent.sock").exists)
            health = urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10)
            assert json.load(health) == {"policy": "in order", "ledger": "in order"}
            site = Running(None, folder.path / "agent.sock")  # type: ignore[arg-type]
            site.ask(ROUND)
            metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)
            assert b"conversion_site_rounds_total 1.0" in metrics.read()
            process.send_signal(signal.SIGTERM)
            _, logged = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, logged
    lines = [json.loads(line) for line in logged.splitlines()]
    assert [line["level"] for line in lines] == ["INFO"] * 3
    assert lines[0]["message"] == f"site acme listens on {folder.path}/agent.sock"
    assert lines[1]["message"].startswith("answered train, evaluate of run spring, round 1")
    assert not (folder.path / "agent.sock").exists()


def test_what_keeps_an_agent_from_beginning_is_one_line(folder: SiteFolder) -> None:
    (folder.path / "site.yaml").write_text(f"{SITE}agent: {{holdout: 2}}\n")
    with command(str(folder.path)) as process:
        _, logged = process.communicate(timeout=60)
    assert process.returncode == 2
    assert logged.startswith(f"error: {folder.path}/site.yaml: agent.holdout=2.0: must be")
    assert logged.count("\n") == 1
