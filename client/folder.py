"""A site's folder: where each of its files lies, and how one begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from client.agent_socket import socket_path
from client.audit_log import AuditLog
from client.node import NodeFolder
from client.pseudonyms import Keys
from client.sources.registry import open_source
from client.sources.source import Source
from conf.compose import site_from_yaml
from conf.site import PreparationConfig, SiteConfig, is_site_name
from journeys.durable import write_durably
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

    @property
    def node(self) -> NodeFolder:
        """What the SuperNode owns. May be moved to where another user runs it."""
        return NodeFolder(self.path / "node")

    @property
    def authority(self) -> Path:
        """The certificate that vouches for the hub, once the site has joined."""
        return self.path / "hub-ca.crt"

    @property
    def logs(self) -> Path:
        """What agent and SuperNode wrote, where `join` runs them."""
        return self.path / "logs"

    def socket(self, config: SiteConfig) -> Path:
        """Where the agent listens."""
        return socket_path(self.path, config.agent)

    def create_node(self, name: str) -> Path:
        """Make the SuperNode's key; the public one is what the coordinator gets. Returns its file.

        `name` is the site's, under which the coordinator admits it.
        """
        node = NodeFolder.create(self.path / "node", name)
        public_key = self.path / f"{name}.pub"
        write_durably(public_key, node.public_key.read_bytes())
        return public_key

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

    It goes by its folder's name, unless that is none for a site; settings that lie there already
    are kept, and say the name.

    Raises:
        FileExistsError: There is a site already.
        SettingError: Settings lie there that cannot be read.
    """
    folder = SiteFolder(path)
    name = path.resolve().name
    if (path / "site.yaml").exists():
        name = folder.config().name
    elif not is_site_name(name):
        name = _UNNAMED
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    Keys.create(path / "keys", now, PreparationConfig().rotation_days)
    for file in ("site.yaml", "policy.yaml"):
        if not (path / file).exists():
            text = (TEMPLATES / file).read_text("utf-8")
            # In quotes: `on` and `1e3` are no texts in YAML.
            text = text.replace(f"name: {_UNNAMED}\n", f'name: "{name}"\n', 1)
            (path / file).write_text(text, "utf-8")
    Ledger(folder.ledger).close()
    folder.store().close()
    folder.create_node(name)
    return folder


_UNNAMED = "my-site"
