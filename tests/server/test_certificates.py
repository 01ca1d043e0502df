from __future__ import annotations

import os
import shutil
import socket
import ssl
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from server import certificates
from server.certificates import (
    CertificateError,
    create_authority,
    expiry,
    issue_server,
    issue_signer,
    renew,
)
from tests.publications import hub

NOW = int(time.time())
DAY = 86_400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a hub that no test changes."""
    folder = hub(tmp_path_factory.mktemp("hub") / "certificates", NOW)
    issue_server(folder, ["hub.example.org", "10.1.2.3", "::1", "hub"], NOW)
    return folder


def certificate(folder: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / f"{name}.crt").read_bytes())


def purposes(one: x509.Certificate) -> list[x509.ObjectIdentifier]:
    return list(one.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def hosts(folder: Path) -> list[str]:
    names = certificate(folder, "server").extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    return [str(one.value) for one in names.value]


# ---------------------------------------------------------------------------- what is issued


def test_what_each_certificate_is_for(folder: Path) -> None:
    ca, server, signing = (certificate(folder, name) for name in certificates.NAMES)
    basic = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.digital_signature
    assert purposes(server) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert purposes(signing) == [ExtendedKeyUsageOID.CODE_SIGNING]
    for one in (server, signing):
        one.verify_directly_issued_by(ca)
        assert not one.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_each_key_is_of_its_kind_and_fits_its_certificate(folder: Path) -> None:
    kinds = {"ca": ec.SECP384R1, "server": ec.SECP256R1, "signing": None}
    for name, curve in kinds.items():
        key = load_pem_private_key((folder / f"{name}.key").read_bytes(), None)
        assert key.public_key() == certificate(folder, name).public_key()
        if curve is None:
            assert isinstance(key, ed25519.Ed25519PrivateKey)
        else:
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            assert isinstance(key.curve, curve)


def test_each_is_valid_from_an_hour_ago_and_for_no_longer_than_it_should(folder: Path) -> None:
    for name, days in (("ca", 3650), ("server", 397), ("signing", 730)):
        one = certificate(folder, name)
        assert one.not_valid_before_utc.timestamp() == NOW - 3600
        assert (one.not_valid_after_utc - one.not_valid_before_utc).days == days
    left = expiry(folder, NOW)
    assert left == {
        name: pytest.approx(days - 1 / 24)
        for name, days in (("ca", 3650), ("server", 397), ("signing", 730))
    }
    assert expiry(folder, NOW + 400 * DAY)["server"] < 0


def test_nothing_outlives_the_authority(tmp_path: Path) -> None:
    folder = hub(tmp_path / "hub", NOW)
    late = NOW + 3600 * DAY
    renew(folder, late)
    end = certificate(folder, "ca").not_valid_after_utc
    assert certificate(folder, "server").not_valid_after_utc == end
    assert certificate(folder, "signing").not_valid_after_utc == end
    before = (folder / "server.crt").read_bytes()
    with pytest.raises(CertificateError, match="the authority is over"):
        renew(folder, late + 60 * DAY)
    assert (folder / "server.crt").read_bytes() == before


def test_the_names_of_the_server_and_of_this_machine(folder: Path) -> None:
    assert hosts(folder) == [
        "hub.example.org", "10.1.2.3", "::1", "hub", "localhost", "127.0.0.1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "host",
    ["", "hub.example.org:9092", "https://hub", "a b", "ü.example.org", "-a.org", "a..b", "a.org.",
     "10.0.0.300", "10.0.0", "a" * 64, ".".join(["a" * 60] * 5), "a\n", "*.example.org"],
)  # fmt: skip
def test_a_host_that_is_none_is_refused(folder: Path, host: str) -> None:
    before = (folder / "server.crt").read_bytes()
    with pytest.raises(CertificateError, match="neither a name nor an address"):
        issue_server(folder, [host], NOW)
    assert (folder / "server.crt").read_bytes() == before


# ---------------------------------------------------------------------------- files


def test_keys_are_their_owners_from_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: dict[str, int] = {}
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        # Before anything is given its name.
        for path in tmp_path.rglob("*.tmp"):
            begun[path.name] = stat.S_IMODE(path.stat().st_mode)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    folder = hub(tmp_path / "hub", NOW)
    assert {begun[f"{name}.key.tmp"] for name in certificates.NAMES} == {0o600}
    for name in certificates.NAMES:
        assert stat.S_IMODE((folder / f"{name}.key").stat().st_mode) == 0o600
    assert not list(folder.glob("*.tmp"))


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path) -> None:
    folder = hub(tmp_path / "hub", NOW)
    (folder / "server.key.tmp").write_bytes(b"half a k")
    (folder / "server.key.tmp").chmod(0o666)
    issue_server(folder, ["hub"], NOW)
    assert stat.S_IMODE((folder / "server.key").stat().st_mode) == 0o600


def test_an_authority_is_never_replaced(tmp_path: Path) -> None:
    folder = hub(tmp_path / "hub", NOW)
    before = (folder / "ca.key").read_bytes()
    with pytest.raises(CertificateError, match="has an authority already"):
        create_authority(folder, "other", NOW)
    assert (folder / "ca.key").read_bytes() == before


@pytest.mark.parametrize("name", ["", "a" * 65])
def test_an_authoritys_name_has_a_length(tmp_path: Path, name: str) -> None:
    with pytest.raises(CertificateError, match="1 to 64"):
        create_authority(tmp_path, name, NOW)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("harm", ["missing", "garbage", "another"])
def test_without_its_key_an_authority_issues_nothing(tmp_path: Path, harm: str) -> None:
    folder, other = hub(tmp_path / "hub", NOW), hub(tmp_path / "other", NOW)
    key = folder / "ca.key"
    key.unlink()
    if harm == "garbage":
        key.write_bytes(b"no key")
    elif harm == "another":
        shutil.copy(other / "ca.key", key)
    with pytest.raises(CertificateError, match=r"ca\.key: not"):
        issue_signer(folder, NOW)


def test_a_missing_certificate_is_named(tmp_path: Path) -> None:
    folder = hub(tmp_path / "hub", NOW)
    (folder / "signing.crt").unlink()
    with pytest.raises(CertificateError, match=r"signing\.crt: cannot be read"):
        expiry(folder, NOW)
    (folder / "ca.crt").write_text("-----BEGIN")
    with pytest.raises(CertificateError, match=r"ca\.crt: not a certificate"):
        issue_signer(folder, NOW)


def test_renewed_keys_are_new_and_all_else_is_as_it_was(tmp_path: Path) -> None:
    folder = hub(tmp_path / "hub", NOW - 300 * DAY)
    issue_server(folder, ["hub.example.org", "2001:db8::1"], NOW - 300 * DAY)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    old_hosts = hosts(folder)
    renew(folder, NOW)
    assert hosts(folder) == old_hosts
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"server.key", "server.crt", "signing.key", "signing.crt"}
    assert expiry(folder, NOW)["server"] > 396


# ---------------------------------------------------------------------------- real TLS


def shake_hands(server: Path, authority: Path, host: str) -> None:
    """A TLS connection to a server with `server`'s certificate, called by `host`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server.crt", server / "server.key")
    client = ssl.create_default_context(cafile=authority / "ca.crt")
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)

        def serve() -> None:
            connection, _ = listener.accept()
            connection.settimeout(10)
            try:
                with context.wrap_socket(connection, server_side=True) as secured:
                    secured.sendall(b"hello")
            except (ssl.SSLError, OSError):
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=10) as plain,
                client.wrap_socket(plain, server_hostname=host) as secured,
            ):
                assert secured.recv(5) == b"hello"
        finally:
            thread.join()


@pytest.mark.parametrize("host", ["hub.example.org", "10.1.2.3", "::1", "localhost", "127.0.0.1"])
def test_a_site_reaches_the_hub_by_each_of_its_names(folder: Path, host: str) -> None:
    shake_hands(folder, folder, host)


@pytest.mark.parametrize("host", ["example.org", "evil.hub.example.org", "10.1.2.4"])
def test_under_another_name_the_hub_is_not_the_hub(folder: Path, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="match"):
        shake_hands(folder, folder, host)


def test_a_hub_of_another_authority_is_not_the_hub(folder: Path, tmp_path: Path) -> None:
    # Of the same name, so that only the key tells them apart.
    other = hub(tmp_path / "other", NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
        shake_hands(other, folder, "hub.example.org")


def test_a_renewal_may_add_a_name(tmp_path: Path) -> None:
    folder = hub(tmp_path / "hub", NOW)
    before = hosts(folder)
    renew(folder, NOW, [before[0]])
    assert hosts(folder) == before
    renew(folder, NOW, ["new.example.org"])
    assert hosts(folder) == ["new.example.org", *before]


def test_after_renewal_sites_need_nothing_new(tmp_path: Path) -> None:
    folder = hub(tmp_path / "hub", NOW - 500 * DAY)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        shake_hands(folder, folder, "hub.example.org")
    authority = tmp_path / "site"
    authority.mkdir()
    shutil.copy(folder / "ca.crt", authority)
    renew(folder, NOW)
    shake_hands(folder, authority, "hub.example.org")


@pytest.mark.parametrize(("name", "purpose"), [("server", "sslserver"), ("signing", "any")])
def test_openssl_agrees(folder: Path, tmp_path: Path, name: str, purpose: str) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    other = hub(tmp_path / "other", NOW)
    for authority, sound in ((folder, True), (other, False)):
        asked = subprocess.run(
            ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile",
             authority / "ca.crt", folder / f"{name}.crt"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (asked.returncode == 0) == sound, asked.stderr
