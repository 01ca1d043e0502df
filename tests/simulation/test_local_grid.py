from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from hypothesis import example, given
from hypothesis import strategies as st

import simulation.local_grid
from conf.compose import load
from conf.schema import Config
from journeys.examples import Examples
from journeys.features import FeatureSpec, feature_spec
from journeys.site import SiteJourneys
from privacy.ledger import Ledger, LedgerBusyError
from protocol.exchange import Request, read_replies, request_parts
from protocol.records import from_records, to_records
from protocol.replies import SiteDescription, SiteUpdate, Weights
from server.federation import Federation
from server.rounds import first_plan, initial_weights
from simulation.faults import Fault, Faults
from simulation.fleet import Fleet
from simulation.local_grid import LocalGrid, _pin
from simulation.workers import ProcessWorker, take_in

CONFIG: Config = load(["debug=tiny", "model=logistic", "privacy=unprotected"])
SPEC: FeatureSpec = feature_spec(CONFIG.data.features)
PLAN = first_plan(CONFIG, "run")
SIZES = (5, 9, 7)


def records_of(ask: str, weights: Weights | None = None, round_: int = 0) -> RecordDict:
    return to_records(request_parts(Request({ask: replace(PLAN, round=round_)}, weights or {})))


def examples(n: int) -> Examples:
    steps = SPEC.max_touchpoints
    return Examples(
        np.ones((n, steps, len(SPEC.categorical)), np.uint16),
        np.full((n, steps, len(SPEC.numeric)), 0.5, np.float32),
        np.full(n, steps, np.int32),
        (np.arange(n) % 2).astype(np.float32),
    )


def fleet_of(folder: Path, sizes: Iterable[int]) -> Fleet:
    sites = [SiteJourneys(f"site {i}", examples(n), examples(2)) for i, n in enumerate(sizes)]
    return Fleet.store(sites, 0, folder / "journeys", folder / "ledgers")


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return fleet_of(tmp_path, SIZES)


def longest(sizes: list[int], pinned: Iterable[int]) -> int:
    """What the worker with the most to do has to do."""
    load: Counter[int] = Counter()
    for size, worker in zip(sizes, pinned, strict=True):
        load[worker] += size
    return max(load.values())


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(1, 3))
@example([3, 3, 2, 2, 2], 2)
@example([1, 1, 1, 1, 4], 2)
def test_pinning_is_within_grahams_bound_of_the_best(sizes: list[int], workers: int) -> None:
    best = min(longest(sizes, way) for way in product(range(workers), repeat=len(sizes)))

    pinned = _pin(tuple(sizes), workers)

    # Graham, "Bounds on Multiprocessing Timing Anomalies", 1969, theorem 2: largest first.
    assert longest(sizes, pinned) <= best * (4 / 3 - 1 / (3 * workers)) + 1e-9


def test_equal_sites_are_dealt_out_evenly() -> None:
    pinned = _pin((500,) * 100, 4)

    assert [pinned.count(worker) for worker in range(4)] == [25] * 4


def test_a_fleet_gives_back_what_it_was_given(fleet: Fleet) -> None:
    assert fleet.sizes == SIZES
    for index, size in enumerate(SIZES):
        opened = fleet.open_journeys(index)
        assert opened.name == f"site {index}"
        np.testing.assert_array_equal(opened.train.categorical, examples(size).categorical)
        np.testing.assert_array_equal(opened.train.label, examples(size).label)
        assert len(opened.holdout) == 2
        assert opened.holdout_probability is None


def test_closing_a_grid_gives_up_the_ledgers(fleet: Fleet) -> None:
    for _ in range(2):
        with LocalGrid(fleet, workers=0) as grid:
            federation = Federation(grid)
            federation.join(PLAN, 3, 3, 10.0)
            with pytest.raises(LedgerBusyError):
                Ledger(fleet.ledgers / "0.sqlite")
    Ledger(fleet.ledgers / "0.sqlite").close()


def test_every_site_answers_for_itself(fleet: Fleet) -> None:
    with LocalGrid(fleet, workers=0) as grid:
        federation = Federation(grid)
        federation.join(PLAN, 3, 3, 10.0)

    assert {s: d.visitors for s, d in federation.descriptions.items()} == {
        "site 0": 5.0,
        "site 1": 9.0,
        "site 2": 7.0,
    }


def test_flowers_own_calls_work(fleet: Fleet) -> None:
    with LocalGrid(fleet, workers=0) as grid:
        message = grid.create_message(records_of("describe"), "query", 2, "0")
        replies = list(grid.send_and_receive([message], timeout=10.0))

        assert list(grid.get_node_ids()) == [1, 2, 3]
        assert grid.run.run_id == 1
        assert [read_replies(from_records(r.content)) for r in replies] == [
            {"describe": SiteDescription("site 1", 9.0)}
        ]
        assert replies[0].metadata.src_node_id == 2
        assert list(grid.pull_messages([message.metadata.message_id])) == []


def test_an_error_at_a_site_becomes_a_reply_without_its_text(fleet: Fleet) -> None:
    for file in (fleet.journeys / "1" / "train").iterdir():
        file.unlink()

    with LocalGrid(fleet, workers=0) as grid:
        message = grid.create_message(records_of("describe"), "query", 2, "0")
        [reply] = grid.send_and_receive([message], timeout=10.0)

    assert reply.has_error()
    assert reply.error.reason == "FileNotFoundError at the site"


@pytest.mark.slow
def test_closing_ends_a_hanging_worker_and_what_is_queued_behind_it(fleet: Fleet) -> None:
    faults = Faults(((0, 1, Fault.HANG),))
    children = set(multiprocessing.active_children())
    with LocalGrid(fleet, workers=1, faults=faults) as grid:
        records = records_of("train", initial_weights(CONFIG))
        for node in (1, 2, 3):
            grid.push_messages([Message(records, node, "train", group_id="1", ttl=600.0)])
        time.sleep(0.5)
        started = time.monotonic()

    assert time.monotonic() - started < 5.0
    assert set(multiprocessing.active_children()) == children


@pytest.mark.slow
def test_a_site_behind_a_hanging_one_is_not_blamed_for_it(fleet: Fleet) -> None:
    faults = Faults(((0, 1, Fault.HANG),))
    records = records_of("train", initial_weights(CONFIG))
    with LocalGrid(fleet, workers=1, faults=faults) as grid:
        messages = [Message(records, node, "train", group_id="1", ttl=2.0) for node in (1, 2, 3)]
        replies = grid.send_and_receive(messages, timeout=20.0)

    assert {r.metadata.src_node_id: r.error.reason for r in replies} == {
        1: "the site did not answer in time",
        2: "another site of its worker took all the time",
        3: "another site of its worker took all the time",
    }


@pytest.mark.slow
def test_messages_of_different_content_reach_a_worker_one_by_one(fleet: Fleet) -> None:
    weights = initial_weights(CONFIG)
    contents = [records_of("describe"), records_of("train", weights), records_of("describe")]
    with LocalGrid(fleet, workers=1) as grid:
        messages = [
            Message(content, node, kind, group_id="1", ttl=60.0)
            for content, kind in zip(contents, ("query", "train", "query"), strict=True)
            for node in (1, 2, 3)
        ]
        replies = grid.send_and_receive(messages, timeout=60.0)

    told = [next(iter(read_replies(from_records(r.content)).items())) for r in replies]
    assert Counter((ask, answer.site) for ask, answer in told) == {
        (ask, f"site {i}"): times
        for ask, times in (("describe", 2), ("train", 1))
        for i in range(3)
    }


@pytest.mark.slow
def test_what_a_dying_worker_had_not_begun_is_answered_by_the_next(fleet: Fleet) -> None:
    faults = Faults(((1, 1, Fault.CRASH),))
    records = records_of("train", initial_weights(CONFIG), 1)
    with LocalGrid(fleet, workers=1, faults=faults) as grid:
        messages = [Message(records, node, "train", group_id="1", ttl=60.0) for node in (1, 2, 3)]
        replies = {r.metadata.src_node_id: r for r in grid.send_and_receive(messages, timeout=60.0)}

    assert replies[2].error.reason == "the site's process died"
    for node in (1, 3):
        assert trained(replies[node]) == f"site {node - 1}"


MANY = 60


def train(fleet: Fleet, model: str = "logistic", fault: Fault | None = None) -> list[Message]:
    """The replies of all sites, in two processes, in the order of sites; 31 has the fault."""
    config = load(["debug=tiny", f"model={model}", "privacy=unprotected"])
    plan = replace(first_plan(config, "run"), round=1)
    records = to_records(request_parts(Request({"train": plan}, initial_weights(config))))
    faults = Faults(((30, 1, fault),) if fault else ())
    with LocalGrid(fleet, workers=2, faults=faults) as grid:
        nodes = grid.get_node_ids()
        messages = [Message(records, node, "train", group_id="1", ttl=60.0) for node in nodes]
        replies = list(grid.send_and_receive(messages, timeout=120.0))
    return sorted(replies, key=lambda reply: reply.metadata.src_node_id)


def trained(reply: Message) -> str:
    update = read_replies(from_records(reply.content))["train"]
    assert isinstance(update, SiteUpdate)
    return update.site


@pytest.mark.slow
def test_replies_of_many_sites_are_taken_in_several_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def counted(workers: Sequence[ProcessWorker], seconds: float) -> None:
        nonlocal looks
        looks += 1
        take_in(workers, seconds)

    monkeypatch.setattr("simulation.local_grid.take_in", counted)
    # Nobody is woken by that nothing comes.
    monkeypatch.setattr("simulation.local_grid._MOMENT_S", 30.0)

    replies = train(fleet_of(tmp_path, [3] * MANY))

    assert [trained(reply) for reply in replies] == [f"site {i}" for i in range(MANY)]
    assert looks <= MANY / 3


@pytest.mark.slow
def test_a_reply_for_which_a_pipe_has_no_room_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulation.workers._ROOM", 2**12)
    monkeypatch.setattr("simulation.local_grid._MOMENT_S", 30.0)
    fleet = fleet_of(tmp_path, [3] * MANY)
    started = time.monotonic()

    replies = train(fleet, "mlp")

    assert [trained(reply) for reply in replies] == [f"site {i}" for i in range(MANY)]
    assert len(from_records(replies[0].content).weights or b"") > 2**12
    assert time.monotonic() - started < 30.0


@pytest.mark.slow
def test_a_crash_among_many_sites_costs_one(tmp_path: Path) -> None:
    replies = train(fleet_of(tmp_path, [3] * MANY), fault=Fault.CRASH)

    assert replies[30].error.reason == "the site's process died"
    del replies[30]
    assert [trained(reply) for reply in replies] == [f"site {i}" for i in range(MANY) if i != 30]


@pytest.mark.slow
def test_a_worker_that_died_while_it_had_nothing_to_do_is_replaced(fleet: Fleet) -> None:
    with LocalGrid(fleet, workers=1) as grid:

        def ask(*nodes: int) -> dict[int, Message]:
            records = records_of("describe")
            messages = [Message(records, node, "query", group_id="0", ttl=60.0) for node in nodes]
            replies = grid.send_and_receive(messages, timeout=60.0)
            return {reply.metadata.src_node_id: reply for reply in replies}

        assert not ask(1)[1].has_error()
        [worker] = grid._processes
        worker._process.kill()
        worker._process.join()
        spent = time.process_time()
        assert list(grid.pull_messages(["never"])) == []
        assert time.process_time() - spent < simulation.local_grid._MOMENT_S / 2
        replies = ask(1, 2)
        assert replies[1].error.reason == "the site's process died"
        assert not replies[2].has_error()


@pytest.mark.slow
def test_who_asks_for_replies_is_woken_when_one_comes(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulation.local_grid._MOMENT_S", 60.0)
    with LocalGrid(fleet, workers=1) as grid:
        message = Message(records_of("describe"), 1, "query", group_id="0", ttl=60.0)
        ids = [*grid.push_messages([message]), "never"]
        started = time.monotonic()
        [reply] = grid.pull_messages(ids)
        assert time.monotonic() - started < 30.0
        assert reply.metadata.reply_to_message_id == ids[0]


def test_asking_for_replies_does_not_wait_for_ever(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulation.local_grid._MOMENT_S", 0.0)
    with LocalGrid(fleet, workers=0) as grid:
        assert list(grid.pull_messages(["never"])) == []
