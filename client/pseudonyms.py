"""Pseudonyms of visitors: keyed hashes, whose keys never leave the site and end in time."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from client.secret import SecretError, read_secret, write_secret

_DAY = 86400
_FOREVER = 2**62


@dataclass(frozen=True)
class Key:
    """A secret and the visits that it is for: those that began in [since, until)."""

    since: int
    """UTC seconds."""
    until: int
    """UTC seconds."""
    key: str
    """32 random bytes, as hex."""

    def pseudonyms(self, visitor_ids: Iterable[str]) -> list[str]:
        """32 hex digits of each id: HMAC-SHA-256, cut to 128 bits.

        Who does not hold the key can neither find the pseudonym of an id nor the id of a pseudonym
        (RFC 2104; Bellare, "New proofs for NMAC and HMAC", CRYPTO 2006). Who holds it can test any
        id: these are pseudonymous data, not anonymous ones.
        """
        key = bytes.fromhex(self.key)
        # The two halves of HMAC, begun once: under half the time of `hmac.digest`.
        padded = key.ljust(64, b"\0")
        inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded))
        outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in padded))
        found = []
        for visitor_id in visitor_ids:
            one, two = inner.copy(), outer.copy()
            one.update(visitor_id.encode())
            two.update(one.digest())
            found.append(two.hexdigest()[:32])
        return found

    def numbers(self, texts: Iterable[str]) -> npt.NDArray[np.uint64]:
        """A 64-bit number of each text: keyed BLAKE2b (RFC 7693)."""
        begun = hashlib.blake2b(digest_size=8, key=bytes.fromhex(self.key))
        digests = bytearray()
        for text in texts:
            hashed = begun.copy()
            hashed.update(text.encode())
            digests += hashed.digest()
        return np.frombuffer(bytes(digests), dtype=np.uint64)


class Keys:
    """The keys of a site, in `folder`, each file with mode 0600.

    A pseudonym's key changes every `rotation_days`: a visitor who comes back after that has a new
    pseudonym. Once all visits of a key are past `retention_days`, the key is destroyed, and with it
    every way from an id to what was stored under it. The key of erasures stays: it names who must
    not be stored again.
    """

    def __init__(self, folder: Path, rotation_days: int, retention_days: int) -> None:
        """Raises `SecretError` if the keys are not there, damaged, or open to others."""
        self._file = folder / "pseudonyms.json"
        self._rotation, self._retention = rotation_days * _DAY, retention_days * _DAY
        self._keys = _read(self._file)
        self.erasure = _read(folder / "erasure.json")[0]

    @staticmethod
    def create(folder: Path, now: int, rotation_days: int) -> None:
        """Make the first keys of a site. Raises `FileExistsError` if there are some."""
        first = Key(-_FOREVER, now + rotation_days * _DAY, secrets.token_hex(32))
        write_secret(folder / "pseudonyms.json", _content([first]))
        for_ever = Key(-_FOREVER, _FOREVER, secrets.token_hex(32))
        write_secret(folder / "erasure.json", _content([for_ever]))

    def current(self) -> Sequence[Key]:
        """The keys under which visits may be stored, oldest first."""
        return tuple(self._keys)

    def turn(self, now: int) -> None:
        """Add the key for today where it is due, and destroy those that are over."""
        keys = list(self._keys)
        last = keys[-1].until
        # An hour ahead: a visit may begin so late by another machine's clock.
        while last <= now + 3600:
            keys.append(Key(last, last + self._rotation, secrets.token_hex(32)))
            last = keys[-1].until
        keys = [key for key in keys if key.until > now - self._retention]
        if keys != self._keys:
            staged = self._file.with_suffix(".new")
            staged.unlink(missing_ok=True)
            write_secret(staged, _content(keys))
            os.replace(staged, self._file)
            self._keys = keys


def _content(keys: Sequence[Key]) -> bytes:
    return json.dumps([asdict(key) for key in keys], indent=1).encode()


def _read(file: Path) -> list[Key]:
    try:
        keys = [Key(**key) for key in json.loads(read_secret(file))]
        if any(len(bytes.fromhex(key.key)) != 32 for key in keys):
            raise ValueError
        borders = [(before.until, after.since) for before, after in pairwise(keys)]
        if not keys or any(before != after for before, after in borders):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise SecretError(
            f"{file}: damaged; put back a copy, for without the keys no visitor is known again"
        ) from None
    return keys
