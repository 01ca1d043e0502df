from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from server.admission import AdmissionError, admit, admitted_keys, remove, tell_superlink
from server.hub import HubFolder
from server.superlink import Node, SuperLink


@pytest.fixture
def hub(tmp_path: Path) -> HubFolder:
    (tmp_path / "hub" / "sites").mkdir(parents=True)
    return HubFolder(tmp_path / "hub")


def key_file(path: Path, curve: ec.EllipticCurve | None = None) -> Path:
    key = ec.generate_private_key(curve or ec.SECP384R1()).public_key()
    path.write_bytes(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b" comment")
    return path


@dataclass
class FakeSuperLink:
    """Registers as Flower does: a key that was removed never comes back."""

    registered: dict[int, bytes] = field(default_factory=dict)
    removed: set[bytes] = field(default_factory=set)

    def nodes(self) -> list[Node]:
        return [Node(node, key, False, 0.0) for node, key in self.registered.items()]

    def register(self, key: bytes, name: str) -> None:
        assert key not in self.removed | set(self.registered.values())
        self.registered[len(self.registered) + len(self.removed) + 1] = key

    def unregister(self, node: int) -> None:
        self.removed.add(self.registered.pop(node))


def told(hub: HubFolder, superlink: FakeSuperLink) -> dict[int, str]:
    return tell_superlink(hub, cast(SuperLink, superlink))


def test_who_is_admitted_is_registered_and_nobody_else(hub: HubFolder, tmp_path: Path) -> None:
    superlink = FakeSuperLink({1: b"somebody who registered by the control API"})
    assert admit(hub, key_file(tmp_path / "acme.pub")) == "acme"
    assert admit(hub, key_file(tmp_path / "x.pub"), "Books - more") == "Books - more"
    assert sorted(told(hub, superlink).values()) == ["Books - more", "acme"]
    assert set(superlink.registered.values()) == set(admitted_keys(hub).values())
    before = dict(superlink.registered)
    told(hub, superlink)
    assert superlink.registered == before


def test_a_removed_site_is_out_and_its_key_stays_out(hub: HubFolder, tmp_path: Path) -> None:
    superlink = FakeSuperLink()
    key = key_file(tmp_path / "acme.pub")
    admit(hub, key)
    admit(hub, key_file(tmp_path / "books.pub"))
    told(hub, superlink)
    remove(hub, "acme")
    assert list(told(hub, superlink).values()) == ["books"]
    for name in ("acme", "acme2"):
        with pytest.raises(AdmissionError, match="this key was removed"):
            admit(hub, key, name)
    admit(hub, key_file(tmp_path / "new.pub"), "acme")
    assert sorted(told(hub, superlink).values()) == ["acme", "books"]


def test_names_and_keys_are_of_one_site_each(hub: HubFolder, tmp_path: Path) -> None:
    acme = key_file(tmp_path / "acme.pub")
    admit(hub, acme)
    admit(hub, acme)
    with pytest.raises(AdmissionError, match="acme: a site of that name is admitted with another"):
        admit(hub, key_file(tmp_path / "other.pub"), "acme")
    with pytest.raises(AdmissionError, match="this key is admitted already, as acme"):
        admit(hub, acme, "books")
    assert list(admitted_keys(hub)) == ["acme"]


@pytest.mark.parametrize("name", ["", "../acme", "a/b", ".hidden", "x" * 64, "a\nb"])
def test_a_name_that_is_no_name_is_refused(hub: HubFolder, tmp_path: Path, name: str) -> None:
    with pytest.raises(AdmissionError, match="a site's name is a letter or digit"):
        admit(hub, key_file(tmp_path / "acme.pub"), name)
    assert admitted_keys(hub) == {}


def test_what_is_no_key_for_flower_is_refused(hub: HubFolder, tmp_path: Path) -> None:
    path = tmp_path / "acme.pub"
    with pytest.raises(AdmissionError, match="cannot be read"):
        admit(hub, path)
    path.write_text("-----BEGIN PUBLIC KEY-----")
    with pytest.raises(AdmissionError, match="no public key in OpenSSH's format"):
        admit(hub, path)
    other = ed25519.Ed25519PrivateKey.generate().public_key()
    path.write_bytes(other.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    with pytest.raises(AdmissionError, match="not a key on a NIST curve"):
        admit(hub, path)


def test_who_is_not_admitted_cannot_be_removed(hub: HubFolder, tmp_path: Path) -> None:
    admit(hub, key_file(tmp_path / "acme.pub"))
    with pytest.raises(AdmissionError, match="books: no such site; admitted are: acme"):
        remove(hub, "books")
