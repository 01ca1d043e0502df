"""Signatures of documents: Ed25519, by a key whose certificate the hub's authority issued."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

ALGORITHM = "ed25519"

_DOMAIN = b"conversion-federation publication 1\0"
"""Begins all that is signed, so that no signature counts for anything else."""
_LONGEST_CERTIFICATE = 8_000


class SignatureError(ValueError):
    """A signature that does not hold. The message says why."""


@dataclass(frozen=True)
class Signature:
    """Who signed, and the proof."""

    algorithm: str
    """`ed25519`."""
    certificate: str
    """Of the signing key, PEM. Signed too, so that there is no other way to write it."""
    signature: str
    """Base64."""


def sign(document: bytes, key_pem: bytes, certificate_pem: bytes) -> Signature:
    """Sign `document`. Raises `SignatureError` where key and certificate do not belong together."""
    try:
        key = load_pem_private_key(key_pem, None)
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        fits = isinstance(key, Ed25519PrivateKey) and certificate.public_key() == key.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SignatureError("signing key or certificate cannot be read; renew them") from None
    if not isinstance(key, Ed25519PrivateKey) or not fits:
        raise SignatureError("signing key and certificate do not belong together; renew them")
    said = key.sign(_signed(document, certificate_pem))
    return Signature(ALGORITHM, certificate_pem.decode(), base64.b64encode(said).decode())


def verify(document: bytes, signature: Signature, authority_pem: bytes, at: int) -> None:
    """Check that `document` was signed by who may sign in the authority's name at time `at`.

    The certificate must be issued by a certificate authority in `authority_pem` directly, be for
    signing (extended key usage), and be valid at `at`; so must the authority's.

    Raises:
        SignatureError: One of this is not so.
    """
    if signature.algorithm != ALGORITHM:
        raise SignatureError(f"signature: made by another algorithm than {ALGORITHM}")
    authority, certificate = _chain(signature.certificate, authority_pem)
    key = certificate.public_key()
    if not isinstance(key, Ed25519PublicKey) or not _is_for_signing(certificate):
        raise SignatureError("signing certificate: is not for signing")
    for name, one in (("the hub's", authority), ("signing", certificate)):
        begin, end = one.not_valid_before_utc, one.not_valid_after_utc
        if not begin.timestamp() <= at <= end.timestamp():
            raise SignatureError(
                f"{name} certificate: valid from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} "
                "(UTC) alone; is it over, or is a clock wrong?"
            )
    try:
        said = base64.b64decode(signature.signature, validate=True)
        key.verify(said, _signed(document, signature.certificate.encode()))
    except (ValueError, InvalidSignature):
        raise SignatureError("signature: is not of this document, or not by this key") from None
    # Base64 has several texts for the same bytes.
    if base64.b64encode(said).decode() != signature.signature:
        raise SignatureError("signature: is not in its one form")


def _signed(document: bytes, certificate_pem: bytes) -> bytes:
    digests = hashlib.sha256(certificate_pem).digest() + hashlib.sha256(document).digest()
    return _DOMAIN + digests


def _chain(certificate_pem: str, authority_pem: bytes) -> tuple[x509.Certificate, x509.Certificate]:
    """The authority that issued the certificate, and the certificate."""
    # Of whatever bytes: `cryptography` raises ValueError, InvalidVersion and more.
    try:
        authorities = x509.load_pem_x509_certificates(authority_pem)
    except Exception:
        raise SignatureError("hub-ca.crt: not a certificate") from None
    if len(certificate_pem) > _LONGEST_CERTIFICATE:
        raise SignatureError("signing certificate: is too long")
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
    except Exception:
        raise SignatureError("signing certificate: not a certificate") from None
    for authority in authorities:
        if _may_issue(authority) and _issued(certificate, authority):
            return authority, certificate
    raise SignatureError("signing certificate: was not issued by the hub's authority")


def _issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:
        # As for bytes that are no certificate.
        return False
    return True


def _may_issue(authority: x509.Certificate) -> bool:
    try:
        return authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return False


def _is_for_signing(certificate: x509.Certificate) -> bool:
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return False
    return ExtendedKeyUsageOID.CODE_SIGNING in usage
