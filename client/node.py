"""What a SuperNode owns: the key that the hub knows the site by, and its number at the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from client.secret import SecretError, read_secret, write_secret
from journeys.durable import write_durably
from service.lock import held


class NodeBusyError(RuntimeError):
    """Another process uses the folder."""


@dataclass(frozen=True)
class NodeState:
    """How the SuperNode stands, for who looks at the site."""

    connected: bool
    text: str
    """What it said last: which node it is, or why it ended."""
    contact: float
    """When the hub last answered, UTC seconds, to within some seconds; where it ended, when."""


@dataclass(frozen=True)
class NodeFolder:
    """All that the SuperNode's user needs to own; nothing here is about visitors."""

    path: Path

    @property
    def public_key(self) -> Path:
        """The public key, as OpenSSH writes it, with the site's name."""
        return self.path / "key.pub"

    @property
    def name(self) -> str:
        """The site's name, by which its key goes. Raises `SecretError`."""
        try:
            return self.public_key.read_text("utf-8").strip().split(" ", 2)[2]
        except (OSError, UnicodeDecodeError, IndexError):
            raise SecretError(f"{self.public_key}: no public key with a site's name") from None

    @classmethod
    def create(cls, path: Path, name: str) -> NodeFolder:
        """Make a key for the site of this name, or end what an earlier call began."""
        folder = cls(path)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not folder._key.exists():
            # The curve that Flower's own keys are on.
            made = ec.generate_private_key(ec.SECP384R1())
            text = made.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
            write_secret(folder._key, text)
        public = folder.private_key().public_key()
        text = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        write_durably(folder.public_key, b"%s %s\n" % (text, name.encode()))
        return folder

    def private_key(self) -> ec.EllipticCurvePrivateKey:
        """The key. Raises `SecretError`."""
        try:
            key = load_ssh_private_key(read_secret(self._key), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise SecretError(f"{self._key}: no private key of a SuperNode")
        return key

    @property
    def node_id(self) -> int | None:
        """The number that the hub last gave; None where there is none that can be read."""
        try:
            return int((self.path / "node-id").read_text())
        except (OSError, ValueError):
            return None

    def keep_node_id(self, node_id: int) -> None:
        """Put the number on disk. Raises `OSError`."""
        write_durably(self.path / "node-id", b"%d\n" % node_id)

    def say(self, connected: bool, text: str) -> None:
        """Leave word of how the SuperNode stands. Raises `OSError`."""
        write_durably(self._state, json.dumps({"connected": connected, "text": text}).encode())

    def say_alive(self) -> None:
        """Leave word that the hub answered just now. Raises `OSError`."""
        os.utime(self._state)

    @property
    def state(self) -> NodeState | None:
        """How the SuperNode stands, as it said; None where it has said nothing that can be read."""
        try:
            said = json.loads(self._state.read_bytes())
            contact = self._state.stat().st_mtime
            return NodeState(said["connected"] is True, str(said["text"]), contact)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the only SuperNode here. Raises `NodeBusyError`, or `OSError`."""
        with ExitStack() as stack:
            try:
                stack.enter_context(held(self.path / ".lock"))
            except BlockingIOError:
                raise NodeBusyError(f"{self.path}: another SuperNode runs on it") from None
            yield

    @property
    def _key(self) -> Path:
        return self.path / "key"

    @property
    def _state(self) -> Path:
        return self.path / "state.json"
