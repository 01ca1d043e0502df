"""Whether a site is ready: its files, its source, and a trial of its visits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import polars as pl

from client.audit_log import AuditLogError
from client.erasure import unfinished
from client.folder import SiteFolder
from client.ingest import Account, BadRowsError, try_out
from client.secret import SecretError
from client.sources.source import SourceError
from conf.schema import SettingError
from journeys.store import StoreError
from privacy.ledger import LedgerError

SITE_ERRORS = (
    AuditLogError,
    BadRowsError,
    LedgerError,
    SecretError,
    SettingError,
    SourceError,
    StoreError,
)
"""What can be wrong with a site; each says what and what to do. (And `PolicyError`.)"""

T = TypeVar("T")


@dataclass
class Findings:
    """What was looked at, and what is wrong."""

    passed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    account: Account | None = None
    """Of the trial; None where the source cannot be read."""
    visits: pl.DataFrame | None = None
    """As they would be stored."""

    def look(self, made: Callable[[], T], said: Callable[[T], str]) -> T | None:
        """Do one check: what `made` finds is said as `said`, or what it raises is a problem."""
        # Here, because the policy's import takes seconds.
        from client.policy import PolicyError

        try:
            found = made()
        except (*SITE_ERRORS, PolicyError) as error:
            self.problems.append(str(error))
            return None
        self.passed.append(said(found))
        return found


def check(folder: SiteFolder, now: int, most: int) -> Findings:
    """Look at everything, and prepare up to about `most` visits without storing any."""
    findings = Findings()
    config = findings.look(folder.config, lambda _: "settings: whole")
    policy = findings.look(
        folder.policy,
        lambda p: f"policy: allows {', '.join(p.purposes)} to {', '.join(p.federations)}",
    )
    if config and policy and config.purpose not in policy.purposes:
        findings.problems.append(
            f"site.yaml: purpose={config.purpose}: the policy allows {', '.join(policy.purposes)}"
        )
    findings.look(folder.released, lambda entries: f"ledger: whole, {len(entries)} requests")
    events = findings.look(
        folder.audit_log.events, lambda events: f"audit log: whole, {len(events)} events"
    )
    if events and unfinished(events):
        findings.problems.append("an erasure was begun and not finished: say forget again")
    findings.look(lambda: _visits(folder), lambda rows: f"store: whole, {rows:,} visits")
    if config:
        findings.look(
            lambda: folder.keys(config), lambda keys: f"keys: {len(keys.current())} in use"
        )
        tried = findings.look(
            lambda: try_out(folder, now, most),
            lambda _: f"source: {config.source.name} can be read",
        )
        if tried:
            findings.account, findings.visits = tried
    return findings


def _visits(folder: SiteFolder) -> int:
    with folder.store(read_only=True) as store:
        return store.manifest.rows
