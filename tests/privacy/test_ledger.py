from __future__ import annotations

import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.accountant import PrivacyEvent, epsilon, merge
from privacy.ledger import (
    Answer,
    Ledger,
    LedgerBusyError,
    LedgerConflictError,
    LedgerDamagedError,
    LedgerError,
    Population,
    Release,
    Request,
    Reservation,
    visitor_epsilon,
)

COUNT = Release("count", "train", PrivacyEvent(20.0))
WEIGHTS = Release("weights", "train", PrivacyEvent(1.1, 0.04, 25))
HISTOGRAM = Release("histogram", "holdout", PrivacyEvent(30.0))
DELTA = 1e-5


def asked(
    round_: int = 1,
    releases: tuple[Release, ...] = (WEIGHTS, HISTOGRAM),
    run: str = "run",
    kind: str = "train",
    digest: str = "d",
) -> Request:
    return Request(run, round_, kind, digest, releases)


def answer(ledger: Ledger, request: Request, reply: bytes | None = None) -> None:
    reservation = ledger.reserve(request)
    assert isinstance(reservation, Reservation)
    ledger.commit(reservation, reply)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path, durable=False) as opened:
        yield opened


@pytest.mark.parametrize("durable", [True, False])
def test_what_is_reserved_counts_in_any_later_process(path: Path, durable: bool) -> None:
    with Ledger(path, durable=durable) as ledger:
        ledger.reserve(asked())
        spent, head = ledger.epsilon(DELTA), ledger.head
    with Ledger(path, durable=durable) as ledger:
        assert ledger.epsilon(DELTA) == spent == epsilon([WEIGHTS.event], DELTA)
        assert [(e.request, e.committed) for e in ledger.entries()] == [(asked(), False)]
        assert ledger.head == head


def test_the_same_request_is_charged_and_answered_once(path: Path) -> None:
    """Promise 8."""
    with Ledger(path, durable=False) as ledger:
        assert asked() not in ledger
        assert ledger.reserve(asked()) == Reservation(asked())
        assert asked() in ledger
        assert asked(digest="e") not in ledger
        spent = ledger.epsilon(DELTA)
        ledger.commit(Reservation(asked()), b"reply")
        assert ledger.reserve(asked()) == Answer(b"reply")
    with Ledger(path, durable=False) as ledger:
        assert ledger.reserve(asked()) == Answer(b"reply")
        assert ledger.epsilon(DELTA) == spent
        assert len(ledger.entries()) == 1


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]),
            st.sampled_from(["train", "holdout"]),
            st.sampled_from([0.5, 1.0, 2.0]),
            st.integers(0, 3),
        ),
        max_size=8,
    )
)
def test_what_is_spent_is_the_sum_of_all_entries(
    requests: list[tuple[str, Population, float, int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        with Ledger(path, durable=False) as ledger:
            for round_, (run, half, noise, count) in enumerate(requests):
                release = Release("weights", half, PrivacyEvent(noise, 1.0, count))
                ledger.reserve(asked(round_, (release,), run))
        for known in (ledger, Ledger(path, read_only=True)):
            releases = [r for entry in known.entries() for r in entry.request.releases]
            for half in get_args(Population):
                events = [r.event for r in releases if r.population == half]
                assert known.events(half) == merge(events)
            for run in ("a", "b", "c"):
                of_run = [
                    r for e in known.entries() if e.request.run == run for r in e.request.releases
                ]
                also = [WEIGHTS, HISTOGRAM]
                expected = visitor_epsilon([*of_run, *also], DELTA)
                assert known.epsilon(DELTA, run=run, also=also) == expected


def test_a_reservation_goes_on_after_a_crash(path: Path) -> None:
    with Ledger(path, durable=False) as ledger:
        ledger.reserve(asked())
    with Ledger(path, durable=False) as ledger:
        spent = ledger.epsilon(DELTA)
        answer(ledger, asked(), b"reply")
        assert ledger.epsilon(DELTA) == spent


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize(
    "other",
    [
        asked(digest="e"),
        asked(releases=(WEIGHTS,)),
        asked(releases=(replace(WEIGHTS, event=PrivacyEvent(1.2, 0.04, 25)), HISTOGRAM)),
        asked(releases=(replace(WEIGHTS, population="holdout"), HISTOGRAM)),
    ],
)
def test_another_request_under_the_same_name_is_refused(
    ledger: Ledger, other: Request, committed: bool
) -> None:
    reservation = ledger.reserve(asked())
    assert isinstance(reservation, Reservation)
    if committed:
        ledger.commit(reservation, b"reply")
    before = ledger.head
    with pytest.raises(LedgerConflictError, match=r"train of run run, round 1 .* second release"):
        ledger.reserve(other)
    assert ledger.head == before


def test_other_rounds_runs_and_kinds_are_charged_of_their_own(ledger: Ledger) -> None:
    requests = [
        asked(),
        asked(2),
        asked(run="other"),
        asked(kind="evaluate", releases=(HISTOGRAM,)),
    ]
    for request in requests:
        assert ledger.reserve(request) == Reservation(request)
    assert [entry.request for entry in ledger.entries()] == requests


def test_replies_of_earlier_rounds_are_dropped(path: Path) -> None:
    described = asked(0, (COUNT,), kind="describe")
    with Ledger(path, durable=False) as ledger:
        answer(ledger, described, b"count")
        answer(ledger, asked(1), b"first")
        answer(ledger, asked(2), None)
        answer(ledger, asked(1, run="other"), b"other")
        assert ledger.reserve(asked(1)) == Answer(None)
        assert ledger.reserve(asked(2)) == Answer(None)
        answer(ledger, asked(3), b"third")
    with Ledger(path, durable=False) as ledger:
        assert ledger.reserve(described) == Answer(b"count")
        assert ledger.reserve(asked(3)) == Answer(b"third")
        assert ledger.reserve(asked(1, run="other")) == Answer(b"other")
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM replies").fetchone() == (3,)
    database.close()


def test_a_late_commit_of_an_earlier_round_drops_no_reply(path: Path) -> None:
    with Ledger(path, durable=False) as ledger:
        late = ledger.reserve(asked(1))
        assert isinstance(late, Reservation)
        answer(ledger, asked(2), b"second")
        ledger.commit(late, b"first")
    with Ledger(path, durable=False) as ledger:
        assert ledger.reserve(asked(1)) == Answer(b"first")
        assert ledger.reserve(asked(2)) == Answer(b"second")


def test_only_what_waits_can_be_committed(ledger: Ledger) -> None:
    with pytest.raises(LedgerConflictError, match="not waiting"):
        ledger.commit(Reservation(asked()), b"reply")
    answer(ledger, asked(), b"reply")
    with pytest.raises(LedgerConflictError, match="not waiting"):
        ledger.commit(Reservation(asked()), b"another")
    assert ledger.reserve(asked()) == Answer(b"reply")


def test_populations_compose_in_parallel_and_releases_in_sequence(ledger: Ledger) -> None:
    answer(ledger, asked(0, (COUNT,), kind="describe"))
    for round_ in (1, 2):
        answer(ledger, asked(round_))
    answer(ledger, asked(1, run="other"))
    train = epsilon([COUNT.event, *[WEIGHTS.event] * 3], DELTA)
    assert ledger.epsilon(DELTA) == pytest.approx(train, rel=1e-9)
    assert ledger.events("holdout") == (PrivacyEvent(30.0, count=3),)
    assert ledger.epsilon(DELTA, run="other") == epsilon([WEIGHTS.event], DELTA)
    assert ledger.epsilon(DELTA, run="never") == 0

    more = Release("histogram", "holdout", PrivacyEvent(0.5))
    holdout = epsilon([*ledger.events("holdout"), more.event], DELTA)
    assert holdout > train
    assert ledger.epsilon(DELTA, also=[more]) == holdout


def test_a_release_without_noise_makes_epsilon_infinite(ledger: Ledger) -> None:
    answer(ledger, asked(releases=(replace(WEIGHTS, event=PrivacyEvent(0.0, 0.1, 10)),)))
    assert ledger.epsilon(DELTA) == math.inf


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("run", {"run": ""}),
        ("run", {"run": "a\x1b[2J"}),
        ("kind", {"kind": "k" * 201}),
        ("round", {"round": -1}),
        ("twice", {"releases": (WEIGHTS, replace(WEIGHTS, population="holdout"))}),
    ],
)
def test_impossible_requests_are_refused(field: str, values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=field):
        replace(asked(), **values)  # type: ignore[arg-type]


def test_impossible_releases_are_refused() -> None:
    with pytest.raises(ValueError, match="name"):
        replace(COUNT, name="")
    with pytest.raises(ValueError, match="population"):
        replace(COUNT, population="all")  # type: ignore[arg-type]


def test_one_owner_at_a_time(path: Path) -> None:
    """Promise 9, within a process."""
    with Ledger(path, durable=False):
        with pytest.raises(LedgerBusyError, match=r"ledger\.sqlite: in use by another process"):
            Ledger(path, durable=False)
        assert Ledger(path, read_only=True).entries() == ()
    Ledger(path, durable=False).close()


HOLD = """
import sys
from pathlib import Path
from privacy.accountant import PrivacyEvent
from privacy.ledger import Ledger, Release, Request

ledger = Ledger(Path(sys.argv[1]))
weights = Release("weights", "train", PrivacyEvent(1.1, 0.04, 25))
histogram = Release("histogram", "holdout", PrivacyEvent(30.0))
ledger.reserve(Request("run", 1, "train", "d", (weights, histogram)))
print("reserved", flush=True)
sys.stdin.read()
"""


def test_a_killed_owner_leaves_its_reservation_and_no_lock(path: Path) -> None:
    """Promises 6 and 9, with processes."""
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    with owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"reserved\n"
        with pytest.raises(LedgerBusyError):
            Ledger(path, durable=False)
        assert len(Ledger(path, read_only=True).entries()) == 1
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    with Ledger(path, durable=False) as ledger:
        assert ledger.epsilon(DELTA) == epsilon([WEIGHTS.event], DELTA)
        answer(ledger, asked(), b"reply")


def test_in_a_simulation_a_reservation_is_written_with_the_next_commit(path: Path) -> None:
    def written() -> list[bool]:
        return [entry.committed for entry in Ledger(path, read_only=True).entries()]

    with Ledger(path, durable=False) as ledger:
        first = ledger.reserve(asked(1))
        assert isinstance(first, Reservation)
        assert asked(1) in ledger
        assert written() == []
        ledger.commit(first)
        assert written() == [True]
        ledger.reserve(asked(2))
        assert written() == [True]
    assert written() == [True, False]


def test_what_a_simulation_cannot_write_closes_its_ledger(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with Ledger(path, durable=False) as ledger, monkeypatch.context() as patch:
        reserved = ledger.reserve(asked())
        assert isinstance(reserved, Reservation)
        patch.setattr("privacy.ledger.hashlib.sha256", full)
        with pytest.raises(LedgerError, match=r"cannot be written: .*No space"):
            ledger.commit(reserved)
        with pytest.raises(LedgerError, match="closed"):
            ledger.reserve(asked())
    assert Ledger(path, read_only=True).entries() == ()


def test_a_forked_child_does_not_write(ledger: Ledger) -> None:
    ledger._process = os.getpid() + 1
    with pytest.raises(LedgerBusyError, match="forked"):
        ledger.reserve(asked())


def test_threads_of_the_owner_may_share_it(path: Path) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with Ledger(path, durable=False) as ledger, ThreadPoolExecutor(8) as pool:
            requests = [asked(round_, kind=kind) for round_ in range(20) for kind in "abc"]
            list(pool.map(lambda request: answer(ledger, request, b"reply"), requests))
    finally:
        sys.setswitchinterval(interval)
    assert len(Ledger(path, read_only=True).entries()) == len(requests)


def test_a_closed_or_read_only_ledger_takes_nothing(path: Path) -> None:
    ledger = Ledger(path, durable=False)
    ledger.close()
    for unusable in (ledger, Ledger(path, read_only=True)):
        with pytest.raises(LedgerError, match="closed or open for reading only"):
            unusable.reserve(asked())


def test_there_is_no_ledger_to_read(path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger"):
        Ledger(path, read_only=True)
    assert not path.parent.exists()


def test_what_cannot_be_written_closes_the_ledger(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with Ledger(path) as ledger, monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(LedgerError, match=r"cannot be written: .*No space"):
            ledger.reserve(asked())
        with pytest.raises(LedgerError, match="closed"):
            ledger.reserve(asked())
    # The records were written, what says how many was not: the reservation counts.
    with Ledger(path, durable=False) as ledger:
        assert len(ledger.entries()) == 1


def store(folder: Path) -> Ledger:
    ledger = Ledger(folder / "ledger.sqlite")
    answer(ledger, asked(0, (COUNT,), kind="describe"), b"count")
    for round_ in range(1, 4):
        answer(ledger, asked(round_), bytes([round_]) * 5000)
    ledger.reserve(asked(4))
    return ledger


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger that was closed, and one whose process was killed: its WAL is still there."""
    folder = tmp_path_factory.mktemp("stored")
    ledger = store(folder / "open")
    shutil.copytree(folder / "open", folder / "killed", ignore=shutil.ignore_patterns("*-shm"))
    ledger.close()
    (folder / "open").rename(folder / "closed")
    return folder


@pytest.mark.parametrize(
    ("state", "suffix"),
    [("closed", ""), ("closed", ".head"), ("killed", ""), ("killed", "-wal"), ("killed", ".head")],
)
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_no_file_can_be_lost(
    stored: Path, tmp_path: Path, state: str, suffix: str, damage: str
) -> None:
    shutil.copytree(stored / state, tmp_path / "site")
    file = tmp_path / "site" / f"ledger.sqlite{suffix}"
    file.unlink() if damage == "missing" else file.write_bytes(b"")
    with pytest.raises(LedgerDamagedError, match=r"damaged at record \d+: .*Nothing is released"):
        Ledger(tmp_path / "site" / "ledger.sqlite", durable=False)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), state=st.sampled_from(["closed", "killed"]))
def test_damage_is_noticed_or_harmless(stored: Path, data: st.DataObject, state: str) -> None:
    """Promise 10."""
    truth = Ledger(stored / "closed" / "ledger.sqlite", read_only=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "site"
        shutil.copytree(stored / state, folder)
        files = sorted(file.name for file in folder.iterdir() if file.stat().st_size)
        file = folder / data.draw(st.sampled_from(files))
        content = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 120))
        at = min(at, len(content) - 1)
        if data.draw(st.integers(0, 5)):
            content[at] ^= data.draw(st.integers(1, 255))
        else:
            del content[at:]
        file.write_bytes(content)
        try:
            ledger = Ledger(folder / "ledger.sqlite", durable=False)
        except LedgerDamagedError as error:
            assert str(folder) in str(error)  # noqa: PT017
            return
        with ledger:
            assert (ledger.head, ledger.entries()) == (truth.head, truth.entries())
            assert ledger.reserve(asked(3)) == Answer(bytes([3]) * 5000)


def test_damage_outside_all_records_is_noticed(stored: Path, tmp_path: Path) -> None:
    path = shutil.copytree(stored / "closed", tmp_path / "site") / "ledger.sqlite"
    content = bytearray(path.read_bytes())
    content[107] ^= 8  # What page 1 says of its unused bytes, which later writes rely on.
    path.write_bytes(content)
    with pytest.raises(LedgerDamagedError, match="ragment"):
        Ledger(path, durable=False)


def test_an_older_copy_of_the_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path, durable=False) as ledger:
        answer(ledger, asked(1))
    older = path.read_bytes()
    with Ledger(path, durable=False) as ledger:
        answer(ledger, asked(2))
    path.write_bytes(older)
    with pytest.raises(LedgerDamagedError, match="damaged at record 3: missing, with all up to 4"):
        Ledger(path, durable=False)


CHANGES = {
    "changed": "UPDATE records SET content = replace(content, '1.1', '9.9') WHERE number = 3",
    "removed": "DELETE FROM records WHERE number = 3",
    "moved": "UPDATE records SET number = 30 WHERE number = 3",
    "cut": "DELETE FROM records WHERE number >= 3",
    "reply": "UPDATE replies SET body = x'00'",
    "of another version": "PRAGMA user_version = 7",
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed_and_nothing_is_written(
    stored: Path, tmp_path: Path, change: str
) -> None:
    path = shutil.copytree(stored / "closed", tmp_path / "site") / "ledger.sqlite"
    with sqlite3.connect(path) as database:
        database.execute(CHANGES[change])
    database.close()
    before = path.read_bytes()
    bad = {"reply": "record 2", "of another version": "schema version 7"}.get(change, "record 3")
    for read_only in (False, True):
        with pytest.raises(LedgerDamagedError, match=bad):
            Ledger(path, durable=False, read_only=read_only)
    assert path.read_bytes() == before


def test_a_ledger_that_may_not_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "site").write_text("a file where a folder should be")
    with pytest.raises(LedgerError, match="cannot be opened") as caught:
        Ledger(tmp_path / "site" / "ledger.sqlite")
    assert not isinstance(caught.value, LedgerDamagedError)
