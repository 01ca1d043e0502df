from __future__ import annotations

import hashlib
import hmac
import json
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.pseudonyms import Key, Keys
from client.secret import SecretError, read_password, read_secret, write_secret

DAY = 86400
NOW = 1_790_000_000


@given(st.binary(min_size=32, max_size=32), st.lists(st.text(), max_size=5))
@settings(deadline=None)
def test_pseudonyms_are_hmac_sha_256_and_numbers_keyed_blake2b(
    secret: bytes, ids: list[str]
) -> None:
    key = Key(0, 1, secret.hex())
    assert key.pseudonyms(ids) == [
        hmac.digest(secret, one.encode(), "sha256").hex()[:32] for one in ids
    ]
    assert key.numbers(ids).tolist() == [
        int.from_bytes(hashlib.blake2b(one.encode(), digest_size=8, key=secret).digest(), "little")
        for one in ids
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Keys.create(tmp_path / "keys", NOW, 100)
    return tmp_path / "keys"


def test_keys_are_secret_and_no_two_sites_share_one(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    Keys.create(tmp_path / "other", NOW, 100)
    ours, theirs = Keys(folder, 100, 90), Keys(tmp_path / "other", 100, 90)
    assert ours.current()[0].key != theirs.current()[0].key
    assert ours.erasure.key != ours.current()[0].key


def test_the_first_key_is_for_all_that_came_before(folder: Path) -> None:
    (key,) = Keys(folder, 100, 90).current()
    assert key.since < 0
    assert key.until == NOW + 100 * DAY


def test_a_key_turns_when_it_is_due_and_goes_when_its_visits_are_gone(folder: Path) -> None:
    keys = Keys(folder, 100, 90)
    keys.turn(NOW + 99 * DAY)
    assert len(keys.current()) == 1
    keys.turn(NOW + 100 * DAY - 3601)
    assert len(keys.current()) == 1
    # A visit may begin an hour ahead of our clock.
    keys.turn(NOW + 100 * DAY - 3600)
    assert len(keys.current()) == 2
    keys.turn(NOW + 100 * DAY)
    first, second = keys.current()
    assert first.until == second.since
    keys.turn(NOW + 189 * DAY)
    assert keys.current() == (first, second)
    keys.turn(NOW + 190 * DAY)
    assert keys.current() == (second,)
    assert first.key not in (folder / "pseudonyms.json").read_text()
    assert Keys(folder, 100, 90).current() == (second,)
    assert stat.S_IMODE((folder / "pseudonyms.json").stat().st_mode) == 0o600


def test_years_of_silence_leave_keys_for_the_retention_window_alone(folder: Path) -> None:
    keys = Keys(folder, 100, 90)
    keys.turn(NOW + 3650 * DAY)
    assert len(keys.current()) <= 2
    assert keys.current()[-1].until > NOW + 3650 * DAY
    assert keys.current()[0].since <= NOW + 3560 * DAY


def test_keys_are_not_made_twice(folder: Path) -> None:
    before = (folder / "pseudonyms.json").read_bytes()
    with pytest.raises(FileExistsError):
        Keys.create(folder, NOW, 100)
    assert (folder / "pseudonyms.json").read_bytes() == before


@pytest.mark.parametrize("file", ["pseudonyms.json", "erasure.json"])
@pytest.mark.parametrize("harm", ["open", "missing", "empty", "cut", "garbage"])
def test_keys_that_cannot_be_trusted_are_refused_and_not_shown(
    folder: Path, file: str, harm: str
) -> None:
    path = folder / file
    content = path.read_bytes()
    match harm:
        case "open":
            path.chmod(0o640)
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(content[:-7])
        case "garbage":
            path.write_bytes(b"\xff" + content)
    with pytest.raises(SecretError, match=file) as error:
        Keys(folder, 100, 90)
    assert content.decode()[-40:-10] not in str(error.value)


def test_a_gap_between_keys_is_refused(folder: Path) -> None:
    Keys(folder, 100, 90).turn(NOW + 150 * DAY)
    path = folder / "pseudonyms.json"
    keys = json.loads(path.read_text())
    keys[1]["since"] += 1
    path.write_text(json.dumps(keys))
    with pytest.raises(SecretError, match="damaged"):
        Keys(folder, 100, 90)


def test_a_password_is_the_first_line(tmp_path: Path) -> None:
    write_secret(tmp_path / "p", b"s3cret with blank \nmore\n")
    assert read_password(tmp_path / "p") == "s3cret with blank "
    assert read_secret(tmp_path / "p").startswith(b"s3cret")
    write_secret(tmp_path / "e", b"\n")
    with pytest.raises(SecretError, match="is empty"):
        read_password(tmp_path / "e")
    write_secret(tmp_path / "b", b"\xff\xfe")
    with pytest.raises(SecretError, match="not UTF-8"):
        read_password(tmp_path / "b")
