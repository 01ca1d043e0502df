"""A hub's folder: where each of its files lies, and how one begins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from conf.compose import hub_from_yaml
from conf.hub import HubConfig
from journeys.durable import write_durably
from server.certificates import create_authority, issue_server, issue_signer
from service.lock import held

AUTHORITY = "hub-ca.crt"
"""What a site needs to know the hub: its certificate authority."""


class HubError(RuntimeError):
    """The hub's folder cannot be used as asked. The message says what to do."""


class SuperLinkError(HubError):
    """The SuperLink does not answer, or not as it should. The message says what to do."""


@dataclass(frozen=True)
class HubFolder:
    """All that a hub has: settings, certificates, admitted sites, the SuperLink's state, runs."""

    path: Path

    def __post_init__(self) -> None:
        # Processes of a hub are told its folder from wherever they are started.
        object.__setattr__(self, "path", self.path.resolve())

    @property
    def settings(self) -> Path:
        """The hub's own settings."""
        return self.path / "hub.yaml"

    @property
    def certificates(self) -> Path:
        """Keys and certificates."""
        return self.path / "certificates"

    @property
    def authority(self) -> Path:
        """The certificate that sites get."""
        return self.path / AUTHORITY

    @property
    def sites(self) -> Path:
        """A public key of each admitted site, by its name."""
        return self.path / "sites"

    @property
    def runs(self) -> Path:
        """A folder of each run."""
        return self.path / "runs"

    @property
    def state(self) -> Path:
        """What the SuperLink keeps."""
        return self.path / "superlink"

    @property
    def logs(self) -> Path:
        """What the SuperLink and the front wrote."""
        return self.path / "logs"

    def config(self) -> HubConfig:
        """The hub's settings. Raises `HubError` where there is no hub, `SettingError` otherwise."""
        if not self.settings.exists():
            raise HubError(
                f"{self.path}: is no hub; make one with: "
                f"python -m server init {self.path} --host NAME"
            )
        return hub_from_yaml(self.settings)

    def new_run(self) -> Path:
        """Where a run's folder is to be, named by the time; the sites know the run by that name."""
        name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        taken = {path.name for path in self.runs.glob(f"{name}*")}
        return self.runs / next(
            one for one in (name, *(f"{name}-{n}" for n in range(2, 1000))) if one not in taken
        )

    @contextmanager
    def held(self, what: str) -> Iterator[None]:
        """Be the only process that does `what`. Raises `HubError` where another one does."""
        lock = self.path / f".{what}.lock"
        with ExitStack() as stack:
            try:
                descriptor = stack.enter_context(held(lock))
            except BlockingIOError:
                holder = lock.read_text(errors="replace").strip()
                raise HubError(f"{self.path}: {_BUSY[what]}, in process {holder}") from None
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield

    def is_held(self, what: str) -> bool:
        """Does a process do `what`?"""
        try:
            with self.held(what):
                return False
        except HubError:
            return True


_BUSY = {"start": "this hub is started already", "run": "a run is going on already"}


def create_hub(path: Path, config: HubConfig, now: int) -> HubFolder:
    """Begin a hub: settings, an authority of its own, certificates for `config.host`.

    Raises:
        HubError: There is a hub already.
    """
    hub = HubFolder(path)
    if hub.settings.exists():
        raise HubError(f"{path}: is a hub already")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in (hub.certificates, hub.sites, hub.runs, hub.state, hub.logs):
        folder.mkdir(mode=0o700, exist_ok=True)
    create_authority(hub.certificates, config.federation, now)
    issue_server(hub.certificates, [config.host], now)
    issue_signer(hub.certificates, now)
    write_durably(hub.authority, (hub.certificates / "ca.crt").read_bytes())
    # Last: without it there is no hub.
    write_durably(hub.settings, _settings(config).encode())
    return hub


def _settings(config: HubConfig) -> str:
    return f"""\
# A hub's own settings; each is explained in docs/settings.md. Restart the hub after a change.
host: {config.host}
federation: {config.federation}
listen: {config.listen}
port: {config.port}
superlink_port: {config.superlink_port}   # on the loopback address, as the next one
health_port: {config.health_port}
"""
