"""What a site has released: written down before the data is read, counted for ever after."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from privacy.accountant import PrivacyEvent, epsilon


class LedgerError(RuntimeError):
    """The ledger cannot be read. Nothing may be released until it can."""


@dataclass(frozen=True)
class Release:
    """One thing that left the site, or was about to."""

    run: str
    round: int
    name: str
    """What was released: `count` or `weights`."""
    noise_multiplier: float
    """0 where nothing protects it."""
    sample_rate: float
    count: int
    """Number of noisy steps in it."""

    @property
    def event(self) -> PrivacyEvent:
        """What it spends."""
        return PrivacyEvent(self.noise_multiplier, self.sample_rate, self.count)


class Ledger:
    """A site's releases, one JSON line each, in a file that outlives the process.

    A release is reserved before the first journey is read and counts from then on, whatever
    happens to the process. The same (run, round, name) is reserved once: asking again for what is
    already charged is free, because seeded training gives the same answer again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._releases: list[Release] = []
        self._size = 0

    def reserve(self, release: Release) -> None:
        """Charge `release`, on disk, unless it is charged already."""
        key = (release.run, release.round, release.name)
        if any((known.run, known.round, known.name) == key for known in self.releases()):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(release)) + "\n")

    def epsilon(self, delta: float) -> float:
        """A visitor's privacy loss by everything released so far, at `delta`."""
        return epsilon([release.event for release in self.releases()], delta)

    def releases(self) -> list[Release]:
        """All releases, those of other processes of this site included.

        Raises:
            LedgerError: A line cannot be read.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._size:
            lines = self.path.read_bytes().splitlines()
            self._releases = [_read(self.path, i, line) for i, line in enumerate(lines, 1)]
            self._size = size
        return self._releases


def _read(path: Path, number: int, line: bytes) -> Release:
    try:
        release = Release(**json.loads(line))
        _ = release.event  # refuses what no release can have
        return release
    except (ValueError, TypeError) as error:
        raise LedgerError(f"{path}, line {number}: not a release; the ledger is damaged") from error
