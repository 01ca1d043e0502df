"""Erasure: what a visitor asks for when they want to be forgotten (GDPR, article 17)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl

from client.audit_log import Event
from client.folder import SiteFolder
from client.preparation import ERASED, PENDING
from client.pseudonyms import Keys
from journeys.store import Store
from privacy.ledger import LedgerError, visitor_epsilon

DELTA = 1e-5
"""Delta of the bound, where the site has no policy that says one."""


class ErasureError(ValueError):
    """The visitors to erase cannot be read. The message names the file, never an id."""


@dataclass(frozen=True)
class Receipt:
    """What was erased, and what left the site before. Holds no id and no pseudonym."""

    asked: int
    """Ids that were given."""
    pseudonyms: int
    """Pseudonyms with visits among those of the ids; an id has two at most (`Keys`)."""
    visits: int
    """Visits deleted."""
    releases: dict[str, int] | None
    """By run: how many requests were answered (or may have been) while the visits were stored, so
    that they may have been used. None where the ledger is damaged."""
    epsilon: float | None
    """What these releases reveal about one of the pseudonyms is bounded by (epsilon, delta). None
    where the ledger is damaged."""
    delta: float


def read_ids(path: Path) -> tuple[str, ...]:
    """Visitor ids from a text file, one a line, as the source writes them.

    Raises:
        ErasureError: It cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ErasureError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ErasureError(f"{path}: is not UTF-8 text") from None
    ids = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not ids:
        raise ErasureError(f"{path}: holds no visitor id; write one a line")
    return ids


def forget(folder: SiteFolder, ids: Sequence[str]) -> Receipt:
    """Delete all visits of the visitors, never store one again, and put a receipt in the audit log.

    An id is looked for as written and in lower case (Matomo's ids are hex digits). Either all of
    it happens or nothing: a killed erasure leaves `erasure begun` in the audit log, and is done
    again by the same command.

    What was released before stays released; a model is not trained anew. The receipt says which
    releases these are and the bound on what they reveal.

    Raises:
        SecretError, SettingError, StoreError, AuditLogError: Nothing was erased.
    """
    config = folder.config()
    keys = folder.keys(config)
    forms = sorted({form for visitor_id in ids for form in (visitor_id, visitor_id.lower())})
    with folder.store() as store:
        folder.audit_log.append("erasure begun", {"asked": len(ids)})
        pseudonyms = pl.Series([p for key in keys.current() for p in key.pseudonyms(forms)])
        gone = pl.col("visitor_id").is_in(pseudonyms.implode())
        found, since = _find(store, gone)
        visits = store.remove(gone, _tables(store, keys, forms, gone))
        releases, bound, delta = _released_since(folder, since)
        receipt = Receipt(len(ids), found, visits, releases, bound, delta)
        folder.audit_log.append("erasure", asdict(receipt))
    return receipt


def unfinished(events: Sequence[Event]) -> bool:
    """Whether the last erasure that the audit log knows was begun and never finished."""
    kinds = [event.kind for event in events if event.kind.startswith("erasure")]
    return kinds[-1:] == ["erasure begun"]


def _tables(
    store: Store, keys: Keys, forms: Sequence[str], gone: pl.Expr
) -> dict[str, pl.DataFrame]:
    erased = pl.DataFrame({"visitor": keys.erasure.numbers(forms)}, schema=ERASED)
    return {
        "erased": pl.concat([store.table("erased", ERASED), erased]).unique(maintain_order=True),
        "pending": store.table("pending", PENDING).filter(~gone),
    }


def _find(store: Store, gone: pl.Expr) -> tuple[int, int | None]:
    """How many pseudonyms have visits, and the change of the store that brought the first one."""
    found: set[str] = set()
    generations = []
    for part in store.manifest.parts:
        theirs = store.part(part).filter(gone).select("visitor_id").collect()["visitor_id"]
        if len(theirs):
            found |= set(theirs)
            generations.append(part.generation)
    return len(found), min(generations, default=None)


def _released_since(
    folder: SiteFolder, generation: int | None
) -> tuple[dict[str, int] | None, float | None, float]:
    """Requests by run after the ingest that brought `generation`, their epsilon, and delta."""
    # Here, because the policy's import takes seconds.
    from client.policy import PolicyError

    try:
        delta = folder.policy().delta
    except PolicyError:
        delta = DELTA
    if generation is None:
        return {}, 0.0, delta
    begun = [
        event.content
        for event in folder.audit_log.events()
        if event.kind == "ingest begun" and event.content["generation"] < generation
    ]
    try:
        entries = folder.released()[begun[-1]["requests"] if begun else 0 :]
    except LedgerError:
        return None, None, delta
    runs: dict[str, int] = {}
    for entry in entries:
        runs[entry.request.run] = runs.get(entry.request.run, 0) + 1
    releases = [release for entry in entries for release in entry.request.releases]
    return runs, visitor_epsilon(releases, delta), delta
