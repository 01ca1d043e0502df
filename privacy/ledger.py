"""What a site has released: written down before the data is read, counted for ever after.

One SQLite file a site, and beside it a head file that says how long the ledger is. A request is
two records: its reservation, which charges all its releases, and its commit, which says that the
answer is complete and keeps it. Each record carries the hash of everything before it.

What is detected on opening: any record changed, removed, inserted or moved, the ledger cut short
or put back to an older state, the head file changed or missing. What cannot be: that ledger and
head were both put back to one older state, or that both are gone; nor a forger, since the hash has
no key and who may write at the site may write it anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from privacy.accountant import Kinds, PrivacyEvent, add_event, epsilon

Population = Literal["train", "holdout"]
"""The two halves of a site. No visitor is in both."""


class LedgerError(RuntimeError):
    """The ledger cannot be used. Nothing may be released until it can."""


class LedgerBusyError(LedgerError):
    """Another process, or another `Ledger` of this one, owns the ledger."""


class LedgerDamagedError(LedgerError):
    """The ledger is not what was written. The message names the first bad record."""


class LedgerConflictError(LedgerError):
    """The request was reserved before, and is not the same: to answer it is a second release."""


@dataclass(frozen=True, slots=True)
class Release:
    """One thing that leaves the site."""

    name: str
    """What: `count`, `weights`, `histogram`, ..."""
    population: Population
    """Whom it is about."""
    event: PrivacyEvent
    """What it spends. Noise 0, for simulations only, makes epsilon infinite."""

    def __post_init__(self) -> None:
        _check_name("name", self.name)
        if self.population not in get_args(Population):
            raise ValueError(f"population={self.population!r}: must be one of train, holdout")


@dataclass(frozen=True, slots=True)
class Request:
    """One thing that was asked of the site, with all that the answer releases."""

    run: str
    round: int
    kind: str
    """What is asked: `describe`, `train`, `evaluate`, ... Once a run and round."""
    digest: str
    """Hash of all that the answer depends on, as received: the same request has the same."""
    releases: tuple[Release, ...]

    def __post_init__(self) -> None:
        _check_name("run", self.run)
        _check_name("kind", self.kind)
        if self.round < 0:
            raise ValueError(f"round={self.round}: must be 0 or more")
        names = [release.name for release in self.releases]
        if len(set(names)) < len(names):
            raise ValueError(f"releases {', '.join(names)}: a name twice in one request")

    @property
    def key(self) -> tuple[str, int, str]:
        """What is answered once: (run, round, kind)."""
        return self.run, self.round, self.kind


@dataclass(frozen=True, slots=True)
class Reservation:
    """Charged, and not answered yet: read the journeys, make the answer, commit it."""

    request: Request


@dataclass(frozen=True, slots=True)
class Answer:
    """The request was committed before."""

    reply: bytes | None
    """What was answered; None where no reply was given or it is no longer kept. Then only seeded
    noise gives the same answer again: without it, answering is a second release."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A request in the ledger."""

    request: Request
    committed: bool


class Ledger:
    """A site's releases, in a file that outlives the process.

    ::

        with Ledger(folder / "ledger.sqlite") as ledger:
            if request not in ledger and ledger.epsilon(delta, also=request.releases) > budget:
                ...  # refuse
            match ledger.reserve(request):
                case Answer(reply):
                    ...  # send the same reply again, refuse if it is None
                case Reservation() as reservation:
                    reply = ...  # read, train, add noise
                    ledger.commit(reservation, reply)
                    ...  # send the reply

    Guarantee: whatever happens to the process, every release of a reply that was sent is counted,
    if replies are sent after `commit` only. A request counts from `reserve` on, which returns once
    it is on disk. A request that was reserved and, after a crash, never committed counts still and
    is answered under the same reservation, at no further cost: its first answer never left.

    One owner at a time, from opening to `close` or the end of the process, held by a lock on the
    head file (on a file system with working `flock`, which excludes some network shares). Threads
    of the owner may share it; forked children may not.
    """

    def __init__(self, path: Path, *, durable: bool = True, read_only: bool = False) -> None:
        """Open the ledger at `path`, or begin one, and check it all.

        Args:
            path: of the SQLite file. SQLite's own and the head file lie beside it.
            durable: False is for simulations only: nothing waits for the disk, and a reservation is
                written with the next commit or `close`. A killed process may so take back what it
                reserved and did not commit, a power cut more.
            read_only: look at the ledger as it is now; needs no lock, whoever owns it.

        Raises:
            LedgerBusyError: Somebody else owns it.
            LedgerDamagedError: It is not what was written. Nothing is changed then.
            LedgerError: It cannot be opened, or, read-only, there is none.
        """
        self.path = path
        self._records = _Records()
        self._mutex = threading.RLock()
        self._process = os.getpid()
        self._durable = durable
        self._lock: int | None = None
        self._database: sqlite3.Connection | None = None
        try:
            if read_only:
                if not path.exists() and not _head_file(path).exists():
                    raise LedgerError(f"{path}: no ledger")
                self._records = _read(path)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _own(path)
            self._records = _read(path)
            self._database = _open(path, durable)
            self._write_head()
        except OSError as error:
            self._give_up()
            raise LedgerError(f"{path}: cannot be opened: {error.strerror}") from error
        except BaseException:
            self._give_up()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # While the interpreter ends, modules are gone one by one; the lock goes with the process.
        if os is not None:
            self.close()

    def close(self) -> None:
        """Give up the ledger. What is recorded stays readable from this object."""
        with self._mutex:
            if self._database is not None and self._database.in_transaction:
                with self._transaction(self._database):
                    pass  # but write it
            self._give_up()

    def _give_up(self) -> None:
        with self._mutex:
            if self._database is not None:
                self._database.close()
                self._database = None
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def reserve(self, request: Request) -> Reservation | Answer:
        """Charge all releases of `request`, at once and on disk, unless they are charged already.

        Raises:
            LedgerConflictError: Its (run, round, kind) is reserved with another digest or releases.
            LedgerError: It cannot be written; the ledger is closed.
        """
        with self._writing() as database:
            known = self._records.entries.get(request.key)
            if known is None:
                with self._transaction(database, written=self._durable):
                    self._records.reserve(request)
                    self._append(database, {"reserve": _to_json(request)})
                return Reservation(request)
            if known.request != request:
                raise LedgerConflictError(
                    f"{self.path}: {request.kind} of run {request.run}, round {request.round} was "
                    "asked before, and differed; answering it again would be a second release"
                )
            return (
                Answer(self._reply(database, request)) if known.committed else Reservation(request)
            )

    def commit(self, reservation: Reservation, reply: bytes | None = None) -> None:
        """Say that the answer is complete, and keep `reply` for when it is asked for again.

        A run's reply of one kind is kept until a later round's of that kind is committed.

        Raises:
            LedgerConflictError: It was committed before, or never reserved here.
            LedgerError: It cannot be written; the ledger is closed.
        """
        request = reservation.request
        with self._writing() as database:
            known = self._records.entries.get(request.key)
            if known != Entry(request, committed=False):
                raise LedgerConflictError(
                    f"{self.path}: {request.kind} of run {request.run}, round {request.round} is "
                    "not waiting for a commit"
                )
            digest = None if reply is None else hashlib.sha256(reply).hexdigest()
            with self._transaction(database):
                dropped_replies = self._records.commit(request.key, digest)
                number = self._append(database, {"commit": list(request.key), "reply": digest})
                for dropped in dropped_replies:
                    database.execute("DELETE FROM replies WHERE number = ?", (dropped,))
                if reply is not None:
                    database.execute("INSERT INTO replies VALUES (?, ?)", (number, reply))

    def __contains__(self, request: Request) -> bool:
        """Whether `request`, just as it is, is charged already: to reserve it again is free."""
        with self._mutex:
            known = self._records.entries.get(request.key)
            return known is not None and known.request == request

    def entries(self) -> tuple[Entry, ...]:
        """All requests, in the order in which they were reserved."""
        with self._mutex:
            return tuple(self._records.entries.values())

    def events(self, population: Population) -> tuple[PrivacyEvent, ...]:
        """What was spent on `population`, by all runs, equal kinds added up."""
        with self._mutex:
            return tuple(self._records.spent[None].kinds[population].values())

    def epsilon(
        self, delta: float, *, run: str | None = None, also: Iterable[Release] = ()
    ) -> float:
        """A visitor's privacy loss by everything reserved so far, and by `also`, at `delta`.

        Guarantee: `visitor_epsilon` of all of it. With `run`, of that run alone.
        """
        with self._mutex:
            return self._records.spent.get(run, _NONE).epsilon(delta, also)

    @property
    def head(self) -> tuple[int, str]:
        """Number of records and the hash over all of them."""
        return self._records.number, self._records.hash

    def _reply(self, database: sqlite3.Connection, request: Request) -> bytes | None:
        for number, (key, digest) in self._records.replies.items():
            if key == request.key:
                return _stored_reply(self.path, database, number, digest)
        return None

    def _append(self, database: sqlite3.Connection, content: dict[str, object]) -> int:
        records, text = self._records, _canonical(content)
        row = (records.number + 1, text, _chained(records.hash, text))
        database.execute("INSERT INTO records VALUES (?, ?, ?)", row)
        records.number, _, records.hash = row
        return records.number

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._mutex:
            if self._database is None:
                raise LedgerError(f"{self.path}: the ledger is closed or open for reading only")
            if os.getpid() != self._process:
                raise LedgerBusyError(
                    f"{self.path}: owned by the process that this one forked from"
                )
            yield self._database

    @contextmanager
    def _transaction(self, database: sqlite3.Connection, *, written: bool = True) -> Iterator[None]:
        """What is executed within is on disk in the end, or the ledger is closed.

        With `written` False it is on disk after the next transaction.
        """
        try:
            if not database.in_transaction:
                database.execute("BEGIN IMMEDIATE")
            yield
            if written:
                database.execute("COMMIT")
                self._write_head()
        except BaseException as error:
            # What of it is on disk shows when it is opened again.
            self._give_up()
            if isinstance(error, sqlite3.Error | OSError):
                raise LedgerError(f"{self.path}: cannot be written: {error}") from error
            raise

    def _write_head(self) -> None:
        # In place, after the records: a ledger is never shorter than its head says. The length is
        # fixed and within one sector, which disks write whole.
        assert self._lock is not None
        os.pwrite(self._lock, _head_line(*self.head), 0)
        if self._durable:
            _sync(self._lock)


def visitor_epsilon(releases: Iterable[Release], delta: float) -> float:
    """A visitor's privacy loss by all `releases`, at `delta`.

    Guarantee: all of it together is (epsilon, delta)-differentially private under add or remove one
    visitor. A visitor is in one population, so the loss is the largest over populations (parallel
    composition); within one, all releases compose.
    """
    return _NONE.epsilon(delta, releases)


# Not every system has the faster one, which leaves the file's times unsynced.
_sync = getattr(os, "fdatasync", os.fsync)

_VERSION = 1
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE records (number INTEGER PRIMARY KEY, content TEXT NOT NULL, hash TEXT NOT NULL);
CREATE TABLE replies (number INTEGER PRIMARY KEY, body BLOB NOT NULL);
PRAGMA user_version = {_VERSION};
COMMIT;
"""
_REMEDY = (
    "Nothing is released until it is whole again: put back a copy of the ledger and of the files "
    "beside it that was made after the last release; without one, what was spent is unknown"
)

# The hash before the first record.
_NOTHING = "0" * 64

_Key = tuple[str, int, str]


class _Spent:
    """Releases, added up as they come."""

    def __init__(self) -> None:
        self.kinds: dict[Population, Kinds] = {half: {} for half in get_args(Population)}

    def add(self, release: Release) -> None:
        """Count one more."""
        add_event(self.kinds[release.population], release.event)

    def epsilon(self, delta: float, also: Iterable[Release]) -> float:
        """`visitor_epsilon` of them, and of `also`."""
        more = [(release.population, release.event) for release in also]
        return max(
            epsilon([*kinds.values(), *(event for of, event in more if of == half)], delta)
            for half, kinds in self.kinds.items()
        )


_NONE = _Spent()


@dataclass
class _Records:
    """What the records say."""

    head: int = 0
    """The number of which the head file knows the hash."""
    at_head: str = _NOTHING
    """The hash over the records up to it, or as far as they go."""
    number: int = 0
    hash: str = _NOTHING
    """Of the last record, over all."""
    entries: dict[_Key, Entry] = field(default_factory=dict)
    spent: dict[str | None, _Spent] = field(default_factory=lambda: {None: _Spent()})
    """By each run, and by all."""
    replies: dict[int, tuple[_Key, str]] = field(default_factory=dict)
    """Key and hash of the replies that are kept, by the number of their commit."""

    def read(self, number: int, text: str, hash_: str) -> None:
        """Take in the next record.

        Raises:
            ValueError: It does not follow from those before it.
        """
        if number != self.number + 1 or hash_ != _chained(self.hash, text):
            raise ValueError("its hash does not follow from the records up to it")
        content = json.loads(text)
        if "reserve" in content:
            self.reserve(_from_json(content["reserve"]))
        else:
            self.commit(tuple(content["commit"]), content["reply"])
        self.number, self.hash = number, hash_
        if number == self.head:
            self.at_head = hash_

    def reserve(self, request: Request) -> None:
        """Charge `request`. The next record says so."""
        if request.key in self.entries:
            raise ValueError("reserved twice")
        self.entries[request.key] = Entry(request, committed=False)
        for release in request.releases:
            for run in (None, request.run):
                self.spent.setdefault(run, _Spent()).add(release)

    def commit(self, key: _Key, reply: str | None) -> list[int]:
        """Take the request of `key` as answered, with a reply of hash `reply`, if there is one.

        The next record says so. Returns the numbers of the replies that are kept no longer.
        """
        if self.entries[key].committed:
            raise ValueError("committed twice")
        self.entries[key] = Entry(self.entries[key].request, committed=True)
        run, round_, kind = key
        dropped = [
            number
            for number, ((of_run, of_round, of_kind), _) in self.replies.items()
            if (of_run, of_kind) == (run, kind) and of_round < round_
        ]
        for number in dropped:
            del self.replies[number]
        if reply is not None:
            self.replies[self.number + 1] = key, reply
        return dropped


def _read(path: Path) -> _Records:
    """All records, checked.

    Raises:
        LedgerDamagedError: They are not what was written.
        OSError: They may not be read.
    """
    # Before the records, which an owner may be adding to.
    head = _read_head(path)
    records = _Records() if head is None else _Records(head[0])
    # Not an empty file, for which SQLite would throw a WAL away.
    if path.exists() and path.stat().st_size:
        with path.open("rb"):
            pass  # SQLite does not tell a file that may not be read from a damaged one.
        try:
            uri = f"{path.absolute().as_uri()}?mode=ro"
            with closing(sqlite3.connect(uri, uri=True)) as database:
                _read_records(path, database, records)
        except (sqlite3.Error, ValueError, TypeError, KeyError, AttributeError) as error:
            raise _damaged(path, records.number + 1, str(error)) from error
    count = records.number
    if head is None:
        if count:
            raise _damaged(path, count, f"{_head_file(path).name} is missing or empty")
    elif count < head[0]:
        raise _damaged(path, count + 1, f"missing, with all up to {head[0]}")
    elif records.at_head != head[1]:
        raise _damaged(path, head[0], f"not the one that {_head_file(path).name} knows")
    return records


def _read_records(path: Path, database: sqlite3.Connection, records: _Records) -> None:
    database.text_factory = bytes
    database.execute("BEGIN")
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version == 0 and not database.execute("SELECT * FROM sqlite_master").fetchall():
        return
    if version != _VERSION:
        raise LedgerDamagedError(
            f"{path}: damaged, or written by another version of this program: schema version "
            f"{version}, not {_VERSION}. {_REMEDY}"
        )
    rows = database.execute("SELECT number, content, hash FROM records ORDER BY number")
    for number, text, hash_ in rows:
        records.read(number, text.decode(), hash_.decode())
    for number, (_, digest) in records.replies.items():
        _stored_reply(path, database, number, digest)
    (found,) = database.execute("PRAGMA integrity_check").fetchone()
    if found != b"ok":
        raise ValueError(found.decode())


def _check_name(field: str, value: str) -> None:
    # Names come from outside and are shown on terminals.
    if not (0 < len(value) <= 200 and value.isprintable()):
        raise ValueError(f"{field}: must be 1 to 200 printable characters")


def _open(path: Path, durable: bool) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        if not durable:
            # A process of a simulation has many open, and SQLite sets 20 pages aside for each.
            database.execute("PRAGMA page_size = 2048")
        (mode,) = database.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise sqlite3.OperationalError(f"journal mode {mode}")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version != _VERSION:
            database.executescript(_SCHEMA)
    except sqlite3.Error as error:
        database.close()
        raise LedgerError(f"{path}: cannot be opened: {error}") from error
    return database


def _own(path: Path) -> int:
    lock = os.open(_head_file(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise LedgerBusyError(
            f"{path}: in use by another process of this site; wait for it to end, or stop it"
        ) from error
    return lock


def _stored_reply(path: Path, database: sqlite3.Connection, number: int, digest: str) -> bytes:
    row = database.execute("SELECT body FROM replies WHERE number = ?", (number,)).fetchone()
    if row is None or hashlib.sha256(row[0]).hexdigest() != digest:
        raise _damaged(path, number, "its reply is not what was stored")
    return bytes(row[0])


def _damaged(path: Path, number: int, reason: str) -> LedgerDamagedError:
    return LedgerDamagedError(f"{path}: damaged at record {number}: {reason}. {_REMEDY}")


def _head_file(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def _head_line(number: int, hash_: str) -> bytes:
    return f"{number:020d} {hash_}\n".encode()


def _read_head(path: Path) -> tuple[int, str] | None:
    try:
        line = _head_file(path).read_bytes()
        # An owner may have been writing it.
        while line != (line := _head_file(path).read_bytes()):
            pass
    except FileNotFoundError:
        return None
    if not line:
        return None
    try:
        number, hash_ = line.decode("ascii").split()
        head = int(number), hash_
        if _head_line(*head) == line:
            return head
    except ValueError:
        pass
    raise LedgerDamagedError(f"{_head_file(path)}: damaged. {_REMEDY}")


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def _canonical(content: dict[str, object]) -> str:
    return _ENCODER.encode(content)


def _chained(before: str, text: str) -> str:
    return hashlib.sha256(before.encode() + text.encode()).hexdigest()


def _to_json(request: Request) -> dict[str, object]:
    releases = [
        {
            "name": release.name,
            "population": release.population,
            "noise_multiplier": float(release.event.noise_multiplier),
            "sample_rate": float(release.event.sample_rate),
            "count": int(release.event.count),
        }
        for release in request.releases
    ]
    return {
        "run": request.run,
        "round": int(request.round),
        "kind": request.kind,
        "digest": request.digest,
        "releases": releases,
    }


def _from_json(content: dict[str, Any]) -> Request:
    releases = tuple(
        Release(
            release["name"],
            release["population"],
            PrivacyEvent(release["noise_multiplier"], release["sample_rate"], release["count"]),
        )
        for release in content["releases"]
    )
    return Request(content["run"], content["round"], content["kind"], content["digest"], releases)
