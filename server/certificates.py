"""A hub's certificates: one authority, and what it issues to the front and to the publisher.

::

    ca.key, ca.crt             the authority; sites get ca.crt and trust nothing else
    server.key, server.crt     TLS of the hub's public port
    signing.key, signing.crt   signs what is published (`protocol.signature`)

A key and its certificate are two files: killed between them, `renew` leaves a pair that does not
fit, which TLS and `protocol.signature` refuse; renewing once more mends it.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from journeys.durable import sync_folder

NAMES = ("ca", "server", "signing")
"""Each a `.key`, for its owner alone, and a `.crt`."""

_AUTHORITY_DAYS = 3650
_SERVER_DAYS = 397  # Longer ones are refused by Apple's systems.
_SIGNER_DAYS = 730
_CLOCK_SKEW = timedelta(hours=1)
_ALWAYS = ("localhost", "127.0.0.1")
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


class CertificateError(ValueError):
    """A certificate that is missing or cannot be issued. The message says what to do."""


def create_authority(folder: Path, name: str, now: int) -> None:
    """Begin an authority called `name`.

    Raises:
        CertificateError: There is one already, or the name is too long.
    """
    if (folder / "ca.key").exists():
        raise CertificateError(
            f"{folder}: has an authority already, which sites may trust; to begin a new one, move "
            "this folder away"
        )
    if not 1 <= len(name) <= 64:
        raise CertificateError("an authority's name has 1 to 64 characters")
    key = ec.generate_private_key(ec.SECP384R1())
    builder = _begun(key.public_key(), name, now, _AUTHORITY_DAYS)
    builder = (
        builder.issuer_name(_name(name))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    _write_pair(folder, "ca", key, builder.sign(key, SHA384()))


def issue_server(folder: Path, hosts: Sequence[str], now: int) -> None:
    """A new key and certificate for TLS under `hosts`, names and addresses, and on this machine.

    Raises:
        CertificateError: No authority, or it is over; or a host is neither name nor address.
    """
    names = [_host(one) for one in dict.fromkeys((*hosts, *_ALWAYS))]
    _issue(
        folder,
        "server",
        ec.generate_private_key(ec.SECP256R1()),
        now,
        _SERVER_DAYS,
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.SubjectAlternativeName(names),
    )


def issue_signer(folder: Path, now: int) -> None:
    """A new key and certificate for signing what is published. Raises `CertificateError`."""
    _issue(
        folder,
        "signing",
        ed25519.Ed25519PrivateKey.generate(),
        now,
        _SIGNER_DAYS,
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]),
    )


def renew(folder: Path, now: int, also: Sequence[str] = ()) -> None:
    """New keys and certificates of server and signer, by the same authority.

    For the same hosts as before, and `also`. Sites need nothing new; what was signed before stays
    good.

    Raises:
        CertificateError: A certificate is missing, or the authority is over.
    """
    extensions = _read(folder, "server").extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    issue_server(folder, [*also, *(str(name.value) for name in names)], now)
    issue_signer(folder, now)


def expiry(folder: Path, now: int) -> dict[str, float]:
    """Days left of each certificate, by `NAMES`; below 0 if it is over.

    Raises:
        CertificateError: One is missing.
    """
    return {
        name: (_read(folder, name).not_valid_after_utc.timestamp() - now) / 86_400 for name in NAMES
    }


def _issue(
    folder: Path, name: str, key: PrivateKey, now: int, days: int, *extensions: x509.ExtensionType
) -> None:
    """Write `key` and a certificate of it, which ends with its authority's at the latest."""
    authority = _read(folder, "ca")
    end = authority.not_valid_after_utc
    if now >= end.timestamp():
        raise CertificateError(
            f"{folder}: the authority is over since {end:%Y-%m-%d}; begin a new hub, whose "
            "certificate every site then needs"
        )
    try:
        authority_key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except (OSError, ValueError, TypeError):
        raise CertificateError(f"{folder / 'ca.key'}: not a key that can be read") from None
    if (
        not isinstance(authority_key, ec.EllipticCurvePrivateKey)
        or authority_key.public_key() != authority.public_key()
    ):
        raise CertificateError(f"{folder / 'ca.key'}: not the key of ca.crt beside it")
    authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    builder = _begun(key.public_key(), name, now, days, end).issuer_name(authority.subject)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    builder = builder.add_extension(_key_usage(signs_certificates=False), True)
    for extension in (authority_id, *extensions):
        builder = builder.add_extension(extension, False)
    _write_pair(folder, name, key, builder.sign(authority_key, SHA384()))


def _begun(
    key: PublicKey, name: str, now: int, days: int, end: datetime | None = None
) -> x509.CertificateBuilder:
    # Sites whose clocks are late take it too.
    begin = datetime.fromtimestamp(now, UTC) - _CLOCK_SKEW
    last = begin + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(last if end is None else min(last, end))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    # A name that ends in digits is an address that is wrong.
    last = host.rpartition(".")[2]
    if len(host) > 253 or last.isdecimal() or not re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", host):
        raise CertificateError(f"host {host!r}: neither a name nor an address (and no port)")
    return x509.DNSName(host)


def _read(folder: Path, name: str) -> x509.Certificate:
    path = folder / f"{name}.crt"
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise CertificateError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise CertificateError(f"{path}: not a certificate") from None


def _write_pair(folder: Path, name: str, key: PrivateKey, certificate: x509.Certificate) -> None:
    key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    staged = [
        _staged(folder / f"{name}.key", key_pem, 0o600),
        _staged(folder / f"{name}.crt", certificate.public_bytes(Encoding.PEM), 0o644),
    ]
    for path in staged:
        path.replace(path.with_suffix(""))
    sync_folder(folder)


def _staged(path: Path, content: bytes, mode: int) -> Path:
    staged = path.with_name(f"{path.name}.tmp")
    staged.unlink(missing_ok=True)
    with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return staged
