"""A site's folder: where each of its files lies, and how one begins."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from client.audit_log import AuditLog
from client.pseudonyms import Keys
from client.sources.registry import open_source
from client.sources.source import Source
from conf.compose import site_from_yaml
from conf.site import PreparationConfig, SiteConfig
from journeys.store import Store
from privacy.ledger import Entry, Ledger

if TYPE_CHECKING:
    from client.policy import SitePolicy

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class SiteFolder:
    """All that a site has: settings, policy, keys, visits, ledger and audit log."""

    path: Path

    @property
    def ledger(self) -> Path:
        """The ledger's file."""
        return self.path / "ledger.sqlite"

    @property
    def visits(self) -> Path:
        """The store's folder."""
        return self.path / "store"

    @property
    def audit_log(self) -> AuditLog:
        """What was done with the visits."""
        return AuditLog(self.path / "audit.jsonl")

    def config(self) -> SiteConfig:
        """The site's settings. Raises `SettingError`."""
        return site_from_yaml(self.path / "site.yaml")

    def policy(self) -> SitePolicy:
        """The site's policy. Raises `PolicyError`."""
        # Here, because the import takes seconds, which most commands need not wait for.
        from client.policy import SitePolicy

        return SitePolicy.load(self.path / "policy.yaml")

    def keys(self, config: SiteConfig) -> Keys:
        """The keys of pseudonyms. Raises `SecretError`."""
        preparation = config.preparation
        return Keys(self.path / "keys", preparation.rotation_days, preparation.retention_days)

    def source(self, config: SiteConfig) -> Source:
        """Where the visits come from. Raises `SourceError` or `SecretError`."""
        return open_source(config.source, self.path)

    def released(self) -> tuple[Entry, ...]:
        """What the ledger says was released, oldest first. Raises `LedgerError`."""
        return Ledger(self.ledger, read_only=True).entries()

    def store(self, *, read_only: bool = False) -> Store:
        """The visits. Raises `StoreError`."""
        return Store(self.visits, read_only=read_only)


def create(path: Path, now: int) -> SiteFolder:
    """Begin a site: commented settings and policy, keys with mode 0600, an empty ledger.

    Raises:
        FileExistsError: There is a site already.
    """
    folder = SiteFolder(path)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    Keys.create(path / "keys", now, PreparationConfig().rotation_days)
    for name in ("site.yaml", "policy.yaml"):
        if not (path / name).exists():
            shutil.copyfile(TEMPLATES / name, path / name)
    Ledger(folder.ledger).close()
    folder.store().close()
    return folder
