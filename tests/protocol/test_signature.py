from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
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

from protocol import signature as signature_module
from protocol.signature import Signature, SignatureError, sign, verify
from protocol.wire import from_text, to_text
from server.certificates import issue_signer, renew
from tests.publications import hub

NOW = 1_790_000_000
DAY = 86_400
DOCUMENT = b'{"run": "spring"}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub(tmp_path_factory.mktemp("hub") / "certificates", NOW)


def signed(folder: Path, document: bytes = DOCUMENT, name: str = "signing") -> Signature:
    key, certificate = ((folder / f"{name}.{end}").read_bytes() for end in ("key", "crt"))
    return sign(document, key, certificate)


def authority(folder: Path) -> bytes:
    return (folder / "ca.crt").read_bytes()


def test_a_signature_holds_and_travels_as_json(folder: Path) -> None:
    signature = signed(folder)
    back = from_text(Signature, to_text(signature))
    assert back == signature
    verify(DOCUMENT, back, authority(folder), NOW)


def test_a_signature_is_of_one_document(folder: Path) -> None:
    signature = signed(folder)
    for other in (b"", DOCUMENT + b" ", DOCUMENT[:-1], b"another"):
        with pytest.raises(SignatureError, match="not of this document"):
            verify(other, signature, authority(folder), NOW)


def test_a_signature_for_another_end_does_not_count(folder: Path) -> None:
    """The key signed the very same digests, but not as a publication."""
    key = load_pem_private_key((folder / "signing.key").read_bytes(), None)
    assert isinstance(key, ed25519.Ed25519PrivateKey)
    certificate = (folder / "signing.crt").read_bytes()
    whole = signature_module._signed(DOCUMENT, certificate)
    for message in (DOCUMENT, whole.partition(b"\0")[2], whole.replace(b"1\0", b"2\0")):
        said = base64.b64encode(key.sign(message)).decode()
        forged = Signature("ed25519", certificate.decode(), said)
        with pytest.raises(SignatureError, match="not of this document"):
            verify(DOCUMENT, forged, authority(folder), NOW)


def flips(text: str) -> Iterator[str]:
    for place, letter in enumerate(text):
        yield text[:place] + chr(ord(letter) ^ 1) + text[place + 1 :]
        yield text[:place] + text[place + 1 :]


@pytest.mark.parametrize("field", ["algorithm", "certificate", "signature"])
def test_every_flipped_or_missing_letter_is_refused(folder: Path, field: str) -> None:
    signature = signed(folder)
    for changed in flips(getattr(signature, field)):
        with pytest.raises(SignatureError):
            verify(DOCUMENT, replace(signature, **{field: changed}), authority(folder), NOW)


def test_every_flipped_bit_of_a_certificate_is_refused(folder: Path) -> None:
    """Versions, lengths, types and numbers that are none too."""
    signature = signed(folder)
    der = x509.load_pem_x509_certificate(signature.certificate.encode()).public_bytes(Encoding.DER)
    for place in range(len(der) * 8):
        harmed = bytearray(der)
        harmed[place // 8] ^= 1 << place % 8
        body = base64.encodebytes(bytes(harmed)).decode()
        pem = f"-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n"
        with pytest.raises(SignatureError):
            verify(DOCUMENT, replace(signature, certificate=pem), authority(folder), NOW)


def test_a_signature_has_one_form(folder: Path) -> None:
    """88 letters of base64 hold four bits more than 64 bytes: other letters, the same bytes."""
    signature = signed(folder)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    last = signature.signature[85]
    twin = signature.signature[:85] + letters[letters.index(last) ^ 1] + "=="
    assert base64.b64decode(twin) == base64.b64decode(signature.signature)
    with pytest.raises(SignatureError, match="one form"):
        verify(DOCUMENT, replace(signature, signature=twin), authority(folder), NOW)


@pytest.mark.parametrize(
    ("at", "sound"),
    [
        (NOW - 3601, False),
        (NOW - 3600, True),
        (NOW + 729 * DAY, True),
        (NOW + 731 * DAY, False),
        (-(10**30), False),
        (10**30, False),
    ],
)
def test_a_certificate_counts_within_its_time(folder: Path, at: int, sound: bool) -> None:
    signature = signed(folder)
    if sound:
        verify(DOCUMENT, signature, authority(folder), at)
    else:
        with pytest.raises(SignatureError, match="certificate: valid from"):
            verify(DOCUMENT, signature, authority(folder), at)


def test_an_authority_counts_within_its_time(tmp_path: Path) -> None:
    folder = hub(tmp_path / "hub", NOW)
    renew(folder, NOW + 3600 * DAY)
    signature = signed(folder)
    verify(DOCUMENT, signature, authority(folder), NOW + 3649 * DAY)
    with pytest.raises(SignatureError, match="the hub's certificate: valid from"):
        verify(DOCUMENT, signature, authority(folder), NOW + 3651 * DAY)


def test_what_was_signed_before_a_renewal_stays_good(tmp_path: Path) -> None:
    folder = hub(tmp_path / "hub", NOW)
    signature = signed(folder)
    renew(folder, NOW)
    verify(DOCUMENT, signature, authority(folder), NOW)
    verify(DOCUMENT, signed(folder), authority(folder), NOW)


def test_a_signer_of_another_authority_is_refused(folder: Path, tmp_path: Path) -> None:
    # Of the same name, so that only the key tells them apart.
    other = hub(tmp_path / "other", NOW)
    with pytest.raises(SignatureError, match="not issued by the hub's authority"):
        verify(DOCUMENT, signed(other), authority(folder), NOW)
    # Sites that are told both authorities trust both.
    both = authority(folder) + authority(other)
    verify(DOCUMENT, signed(other), both, NOW)
    verify(DOCUMENT, signed(folder), both, NOW)


def test_who_holds_the_servers_key_cannot_sign(folder: Path) -> None:
    with pytest.raises(SignatureError, match="do not belong together"):
        signed(folder, name="server")
    certificate = (folder / "server.crt").read_text()
    forged = replace(signed(folder), certificate=certificate)
    with pytest.raises(SignatureError, match="is not for signing"):
        verify(DOCUMENT, forged, authority(folder), NOW)


def certificate_by(
    folder: Path, extensions: list[x509.ExtensionType], signer: str = "ca"
) -> tuple[bytes, bytes]:
    """An Ed25519 key, and a certificate of it with `extensions`, signed by `signer`'s key."""
    key = ed25519.Ed25519PrivateKey.generate()
    issuer = x509.load_pem_x509_certificate((folder / f"{signer}.crt").read_bytes())
    issuer_key = load_pem_private_key((folder / f"{signer}.key").read_bytes(), None)
    now = datetime.fromtimestamp(NOW, UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "signing")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    if isinstance(issuer_key, ec.EllipticCurvePrivateKey):
        certificate = builder.sign(issuer_key, SHA384())
    else:
        assert isinstance(issuer_key, ed25519.Ed25519PrivateKey)
        certificate = builder.sign(issuer_key, None)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private, certificate.public_bytes(Encoding.PEM)


CODE = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
TLS = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])


def test_the_purpose_decides_and_not_the_kind_of_key(folder: Path) -> None:
    verify(DOCUMENT, sign(DOCUMENT, *certificate_by(folder, [CODE])), authority(folder), NOW)
    for extensions in ([TLS], []):
        signature = sign(DOCUMENT, *certificate_by(folder, list(extensions)))
        with pytest.raises(SignatureError, match="is not for signing"):
            verify(DOCUMENT, signature, authority(folder), NOW)


@pytest.mark.parametrize("signer", ["signing", "server"])
def test_only_the_authority_issues(folder: Path, signer: str) -> None:
    """Not somebody to whom it issued a certificate, even where a site holds that as its root."""
    signature = sign(DOCUMENT, *certificate_by(folder, [CODE], signer=signer))
    for root in (authority(folder), (folder / f"{signer}.crt").read_bytes()):
        with pytest.raises(SignatureError, match="not issued by the hub's authority"):
            verify(DOCUMENT, signature, root, NOW)


def test_an_authority_cannot_sign_by_itself(folder: Path) -> None:
    forged = replace(signed(folder), certificate=authority(folder).decode())
    with pytest.raises(SignatureError, match="is not for signing"):
        verify(DOCUMENT, forged, authority(folder), NOW)


@pytest.mark.parametrize("root", [b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\n"])
def test_a_root_that_is_none_trusts_nobody(folder: Path, root: bytes) -> None:
    with pytest.raises(SignatureError, match=r"hub-ca\.crt: not a certificate"):
        verify(DOCUMENT, signed(folder), root, NOW)


@pytest.mark.parametrize("certificate", ["", "garbage", "é", "-----BEGIN CERTIFICATE-----\nAA=="])
def test_a_certificate_that_is_none_is_refused(folder: Path, certificate: str) -> None:
    forged = replace(signed(folder), certificate=certificate)
    with pytest.raises(SignatureError, match="signing certificate: not a certificate"):
        verify(DOCUMENT, forged, authority(folder), NOW)


def test_a_huge_certificate_is_not_read(folder: Path) -> None:
    forged = replace(signed(folder), certificate=signed(folder).certificate * 20)
    with pytest.raises(SignatureError, match="too long"):
        verify(DOCUMENT, forged, authority(folder), NOW)


def test_a_key_that_does_not_fit_its_certificate_signs_nothing(tmp_path: Path) -> None:
    """As a renewal leaves them that was killed between the two files."""
    folder = hub(tmp_path / "hub", NOW)
    shutil.copy(folder / "signing.crt", tmp_path / "old.crt")
    issue_signer(folder, NOW)
    shutil.copy(tmp_path / "old.crt", folder / "signing.crt")
    with pytest.raises(SignatureError, match="renew them"):
        signed(folder)
    (folder / "signing.key").write_bytes(b"no key")
    with pytest.raises(SignatureError, match="renew them"):
        signed(folder)
