"""Which sites are let in: a public key of each in the hub's folder, and in the SuperLink."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)

from conf.site import is_site_name
from journeys.durable import sync_folder, write_durably
from server.hub import HubFolder
from server.superlink import SuperLink

_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


class AdmissionError(ValueError):
    """A key or a name that cannot be admitted. The message says what to do."""


def admit(hub: HubFolder, key_file: Path, name: str | None = None) -> str:
    """Let the site with this public key in, under `name` or the file's; returns the name.

    Takes effect when the SuperLink is next told (`tell_superlink`). A key that comes again under
    its own name changes nothing.

    Raises:
        AdmissionError: No such key, or name or key are taken by another site.
    """
    name = key_file.stem if name is None else name
    if not is_site_name(name):
        raise AdmissionError(
            f"{name!r}: a site's name is a letter or digit, then up to 62 letters, digits, spaces, "
            "dots or hyphens; give another with --name"
        )
    try:
        text = key_file.read_bytes()
    except OSError as error:
        raise AdmissionError(f"{key_file}: cannot be read: {error.strerror}") from None
    key = _pem(text, str(key_file))
    if key in _removed_keys(hub):
        # Flower keeps it out for ever, too.
        raise AdmissionError(
            f"{key_file}: this key was removed, and a removed key stays out; the site gets a new "
            "one when it moves its folder node/ away and joins again"
        )
    for other, known in admitted_keys(hub).items():
        if other == name and known != key:
            raise AdmissionError(
                f"{name}: a site of that name is admitted with another key; first remove it: "
                f"python -m server admit {hub.path} --remove {name}"
            )
        if known == key and other != name:
            raise AdmissionError(f"{key_file}: this key is admitted already, as {other}")
    write_durably(hub.sites / f"{name}.pub", text)
    return name


def remove(hub: HubFolder, name: str) -> None:
    """Let a site in no more, as soon as the SuperLink is told. Its key stays out for ever.

    Raises:
        AdmissionError: No such site.
    """
    keys = admitted_keys(hub)
    if name not in keys:
        known = ", ".join(keys) or "none"
        raise AdmissionError(f"{name}: no such site; admitted are: {known}")
    removed = hub.sites / "removed"
    removed.mkdir(mode=0o700, exist_ok=True)
    digest = hashlib.sha256(keys[name]).hexdigest()[:16]
    (hub.sites / f"{name}.pub").rename(removed / f"{digest}.pub")
    sync_folder(removed)
    sync_folder(hub.sites)


def admitted_keys(hub: HubFolder) -> dict[str, bytes]:
    """Each admitted site's public key (PEM), by name. Raises `AdmissionError`."""
    return _keys(hub.sites)


def _removed_keys(hub: HubFolder) -> set[bytes]:
    return set(_keys(hub.sites / "removed").values())


def _keys(folder: Path) -> dict[str, bytes]:
    return {path.stem: _pem(path.read_bytes(), str(path)) for path in sorted(folder.glob("*.pub"))}


def tell_superlink(hub: HubFolder, superlink: SuperLink) -> dict[int, str]:
    """Register who is admitted and nobody else; returns the sites' names by node.

    Raises:
        SuperLinkError: The SuperLink does not answer.
    """
    names = {key: name for name, key in admitted_keys(hub).items()}
    registered = superlink.nodes()
    for node in registered:
        if node.public_key not in names:
            superlink.unregister(node.id)
    missing = names.keys() - {node.public_key for node in registered}
    for key in missing:
        superlink.register(key, names[key])
    nodes = superlink.nodes() if missing else registered
    return {node.id: names[node.public_key] for node in nodes if node.public_key in names}


def _pem(text: bytes, file: str) -> bytes:
    try:
        key = load_ssh_public_key(text)
    except (ValueError, UnsupportedAlgorithm):
        raise AdmissionError(
            f"{file}: no public key in OpenSSH's format; a site finds its own in SITE/NAME.pub"
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
        raise AdmissionError(f"{file}: not a key on a NIST curve, which is what Flower takes")
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
