"""From a site's source to its store: read, prepare, append, batch after batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import polars as pl

from client.folder import SiteFolder
from client.preparation import HOUR, PENDING, Preparation, Prepared, oldest_kept
from client.sources.source import Batch, Cursor, Skipped, added_up
from conf.schema import SettingError
from conf.site import SiteConfig, SourceConfig
from journeys.store import VISITS, Store


class BadRowsError(RuntimeError):
    """Too many rows cannot be read. Nothing of the batch that showed it was stored."""


@dataclass
class Account:
    """How many visits were read, and what became of them."""

    rows: int = 0
    """Rows read."""
    stored: int = 0
    """Visits that were, or in a trial would be, stored."""
    removed: Counter[str] = field(default_factory=Counter)
    """By step of the preparation."""
    skipped: tuple[Skipped, ...] = ()
    """Rows that cannot be read, one for each reason."""
    expired: int = 0
    """Visits deleted from the store, because they are past the retention window."""

    def add(self, batch: Batch, prepared: Prepared) -> None:
        """Count a batch."""
        self.rows += batch.rows
        self.stored += prepared.visits.height
        self.removed.update(prepared.removed)

    def skip(self, skipped: tuple[Skipped, ...]) -> None:
        """Count rows that cannot be read."""
        self.skipped = added_up((*self.skipped, *skipped))

    def check(self, rows: int, most: float) -> None:
        """Refuse a larger share than `most` of bad rows among all and `rows` more.

        One alone never stops an ingest: a few new visits would make it a large share.
        """
        bad, rows = sum(one.count for one in self.skipped), self.rows + rows
        if bad > max(1, most * rows):
            worst = max(self.skipped, key=lambda one: one.count)
            raise BadRowsError(
                f"{bad} of {rows} rows cannot be read, more than source.bad_rows={most:g} allows; "
                f"most often {worst.reason}, first in {worst.first}. Nothing of this batch was "
                "stored; correct the source or raise the limit, and ingest again"
            )


def ingest(
    folder: SiteFolder, now: int, progress: Callable[[Account], None] = lambda _: None
) -> Account:
    """Store the visits that the source has and the store has not, and delete those past retention.

    Each batch is stored whole, with the place where the source goes on: a killed ingest loses the
    batch in work, and the next one reads it again.

    Raises:
        SourceError, SecretError, StoreError, SettingError, BadRowsError: Says what to do. What was
            stored before stays stored.
    """
    config = folder.config()
    keys, source = folder.keys(config), folder.source(config)
    keys.turn(now)
    account = Account()
    with folder.store() as store:
        folder.audit_log.append(
            "ingest begun",
            {"generation": store.manifest.generation, "requests": len(folder.released())},
        )
        account.expired = _expire(store, config, now)
        preparation = Preparation(config, keys, store, now)
        meaning = _meaning(config.source)
        cursor = _cursor(store, meaning)
        try:
            for batch in source.batches(cursor, now):
                prepared = _prepared(batch, preparation, config, account, now)
                place = {"source": meaning, "at": batch.cursor}
                store.append(prepared.visits, place, prepared.tables)
                progress(account)
            store.compact()
        finally:
            _log(folder, store, account)
    return account


def try_out(folder: SiteFolder, now: int, most: int) -> tuple[Account, pl.DataFrame]:
    """Prepare up to about `most` visits from the beginning of the source, and store nothing.

    Returns the account and the visits as they would be stored.

    Raises:
        SourceError, SecretError, StoreError, SettingError, BadRowsError: As `ingest`.
    """
    config = folder.config()
    keys, source = folder.keys(config), folder.source(config)
    source.check()
    account, visits = Account(), []
    with folder.store(read_only=True) as store:
        preparation = Preparation(config, keys, store, now)
        for batch in source.batches(None, now):
            visits.append(_prepared(batch, preparation, config, account, now).visits)
            if account.rows >= most:
                break
    return account, pl.concat([VISITS.to_frame(), *visits])


def _prepared(
    batch: Batch, preparation: Preparation, config: SiteConfig, account: Account, now: int
) -> Prepared:
    visits = batch.visits.filter(pl.col("time") <= now + HOUR)
    account.skip(batch.skipped)
    ahead = batch.visits.height - visits.height
    if ahead:
        reason = "the visit begins in the future (is the source's clock or time zone right?)"
        account.skip((Skipped(reason, ahead, "a visit"),))
    account.check(batch.rows, config.source.bad_rows)
    prepared = preparation.prepare(visits)
    account.add(batch, prepared)
    return prepared


def _meaning(source: SourceConfig) -> dict[str, Any]:
    """The settings that say what a visit and a conversion are."""
    said = asdict(source)
    return {key: said[key] for key in ("name", "site_id", "goals", "key_events") if key in said}


def _cursor(store: Store, meaning: dict[str, Any]) -> Cursor | None:
    """Where the source goes on. Raises `SettingError` if it now means something else by a visit."""
    place = store.manifest.cursor
    if place is None:
        return None
    for key, value in meaning.items():
        before = place["source"].get(key)
        if before != value:
            raise SettingError(
                f"source.{key}={value}: was {before} when the visits in {store.folder} were "
                "stored; put it back, or move that folder away and ingest all anew"
            )
    at: Cursor = place["at"]
    return at


def _expire(store: Store, config: SiteConfig, now: int) -> int:
    oldest = oldest_kept(config, now)
    day = datetime.fromtimestamp(oldest, UTC)
    pending = store.table("pending", PENDING)
    kept = pending.filter(pl.col("time") >= oldest)
    tables = {"pending": kept} if kept.height < pending.height else {}
    return store.remove(pl.col("time") < day, tables, last_month=f"{day:%Y-%m}")


def _log(folder: SiteFolder, store: Store, account: Account) -> None:
    folder.audit_log.append(
        "ingest",
        {
            "generation": store.manifest.generation,
            "rows": account.rows,
            "stored": account.stored,
            "removed": dict(account.removed),
            "skipped": {one.reason: one.count for one in account.skipped},
            "expired": account.expired,
        },
    )
