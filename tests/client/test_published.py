from __future__ import annotations

import errno
import json
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors.numpy
import torch

import client.published
from client.__main__ import main
from client.audit_log import AuditLog, AuditLogError
from client.folder import SiteFolder, create
from client.published import (
    MOST_MODELS,
    SIGNATURE,
    PublicationRefused,
    accept,
    check_signature,
)
from client.secret import write_secret
from journeys.store import VISITS
from models.saved import load
from protocol.exchange import Parts, read_replies
from protocol.publication import FILES, GUARD, MANIFEST, MODEL, PUBLISH, REPORT, digests
from protocol.replies import SiteReceipt
from protocol.signature import SignatureError
from protocol.wire import LARGEST_TEXT
from server.certificates import expiry, renew
from tests.publications import hub, model_files, sent, small_weights, with_value
from tests.visits import NOW, POLICY, SITE, stored

torch.set_num_threads(1)

DAY = 86_400
RECEIPT = {PUBLISH: SiteReceipt("acme", "spring")}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub(tmp_path_factory.mktemp("hub") / "certificates", NOW)


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return model_files(tmp_path_factory.mktemp("model"))


@pytest.fixture
def site(tmp_path: Path, certificates: Path) -> SiteFolder:
    folder = create(tmp_path / "acme", NOW)
    (folder.path / "site.yaml").write_text(SITE)
    (folder.path / "policy.yaml").write_text(POLICY)
    shutil.copy(certificates / "ca.crt", folder.path / "hub-ca.crt")
    return folder


def told(answer: Parts) -> object:
    return read_replies(answer, (PUBLISH,))


def models(site: SiteFolder) -> Path:
    return site.path / "models"


def kept(site: SiteFolder) -> list[str]:
    """Names of all models that the site has, half ones too."""
    return sorted(path.name for path in models(site).glob("*")) if models(site).exists() else []


def refused(site: SiteFolder, parts: Parts, message: str, now: int = NOW) -> None:
    """The publication is refused with `message`, and leaves nothing."""
    before = kept(site)
    with pytest.raises(PublicationRefused, match=message) as error:
        accept(site, parts, now)
    assert len(str(error.value)) <= 300
    assert str(site.path) not in str(error.value)
    assert set(kept(site)) - {".lock"} == set(before) - {".lock"}
    assert not [event for event in site.audit_log.events() if event.content.get("run") != "kept"]


# ---------------------------------------------------------------------------- what is taken in


def test_a_model_is_kept_whole_with_its_signature(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes]
) -> None:
    assert told(accept(site, sent(certificates, contents), NOW)) == RECEIPT
    folder = models(site) / "spring"
    assert {path.name for path in folder.iterdir()} == {*FILES, SIGNATURE}
    for name, content in contents.items():
        assert (folder / name).read_bytes() == content
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert check_signature(folder / MODEL, site)
    assert load(folder / MODEL).manifest["lookback_days"] == 30.0


def test_it_is_in_the_audit_log(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes]
) -> None:
    accept(site, sent(certificates, contents), NOW)
    (event,) = site.audit_log.events()
    assert event.kind == "publication"
    assert event.content == {
        "federation": "shops",
        "purpose": "conversion-model",
        "run": "spring",
        "time": NOW,
        "sha256": digests(contents)[MODEL],
    }


def test_the_same_again_is_answered_the_same_and_changes_nothing(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes]
) -> None:
    first = accept(site, sent(certificates, contents), NOW)
    before = {path: path.stat() for path in models(site).rglob("*") if path.name != ".lock"}
    assert accept(site, sent(certificates, contents), NOW + 5) == first
    after = {path: path.stat() for path in models(site).rglob("*") if path.name != ".lock"}
    assert {path: (one.st_ino, one.st_mtime_ns) for path, one in before.items()} == {
        path: (one.st_ino, one.st_mtime_ns) for path, one in after.items()
    }
    assert len(site.audit_log.events()) == 1


def test_the_same_files_signed_anew_have_the_newest_signature(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes], tmp_path: Path
) -> None:
    accept(site, sent(certificates, contents), NOW)
    later = NOW + 7 * DAY
    assert told(accept(site, sent(certificates, contents, time=later), later)) == RECEIPT
    signature = json.loads((models(site) / "spring" / SIGNATURE).read_text())
    assert signature["statement"]["time"] == later
    assert [event.content["time"] for event in site.audit_log.events()] == [NOW, later]
    # The hub began anew; the site joined it again.
    other = hub(tmp_path / "other", later)
    shutil.copy(other / "ca.crt", site.path / "hub-ca.crt")
    with pytest.raises(SignatureError, match="not issued by the hub's authority"):
        check_signature(models(site) / "spring" / MODEL, site)
    accept(site, sent(other, contents, time=later), later)
    assert check_signature(models(site) / "spring" / MODEL, site)


def test_other_files_under_the_same_name_are_refused(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes], tmp_path: Path
) -> None:
    accept(site, sent(certificates, contents, run="kept"), NOW)
    before = {path: path.read_bytes() for path in (models(site) / "kept").iterdir()}
    other = model_files(tmp_path / "other", with_value(small_weights(), 0.5))
    changed = {**contents, REPORT: contents[REPORT] + b"more"}
    for files in (other, changed):
        refused(site, sent(certificates, files, run="kept"), "run=kept: this site has other files")
    assert {path: path.read_bytes() for path in (models(site) / "kept").iterdir()} == before


def test_several_at_once_are_kept_once(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes]
) -> None:
    answers = []
    parts = sent(certificates, contents)
    threads = [
        threading.Thread(target=lambda: answers.append(told(accept(site, parts, NOW))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [RECEIPT] * 4
    assert len(site.audit_log.events()) == 1
    assert set(kept(site)) == {".lock", "spring"}


# ---------------------------------------------------------------------------- who may publish


def test_without_the_hubs_certificate_nobody_is_trusted(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes]
) -> None:
    (site.path / "hub-ca.crt").unlink()
    refused(site, sent(certificates, contents), r"hub-ca\.crt: is missing")
    (site.path / "hub-ca.crt").write_bytes(b"")
    refused(site, sent(certificates, contents), r"hub-ca\.crt: not a certificate")


def test_another_hub_is_refused(
    site: SiteFolder, contents: dict[str, bytes], tmp_path: Path
) -> None:
    other = hub(tmp_path / "other", NOW)
    refused(site, sent(other, contents), "not issued by the hub's authority")


def test_the_hubs_server_is_refused(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes], tmp_path: Path
) -> None:
    parts = sent(certificates, contents)
    read = json.loads(parts.texts[PUBLISH])
    read["signature"]["certificate"] = (certificates / "server.crt").read_text()
    refused(site, Parts({PUBLISH: json.dumps(read)}, parts.weights), "is not for signing")


def test_an_expired_signer_is_refused_whenever_it_says_that_it_signed(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes]
) -> None:
    late = NOW + 800 * DAY
    for signed_at in (late, NOW + 700 * DAY):
        parts = sent(certificates, contents, time=signed_at)
        refused(site, parts, "signing certificate: valid from", now=late)


def test_a_signer_is_refused_before_its_time(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes]
) -> None:
    refused(site, sent(certificates, contents, time=NOW - DAY), "valid from")
    refused(site, sent(certificates, contents), "valid from", now=NOW - DAY)


def test_clocks_may_differ_by_an_hour(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes]
) -> None:
    refused(site, sent(certificates, contents, time=NOW + 3601), "signed in the future")
    accept(site, sent(certificates, contents, time=NOW + 3600), NOW)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federation": "rivals"}, r"federation=rivals: this site allows shops \(policy: fed"),
        ({"purpose": "advertising"}, r"purpose=advertising: this site allows conversion-model"),
        ({"federation": "f" * 200, "purpose": "p" * 200}, "federation=fff"),
        ({"federation": "*"}, r"federation=\*"),
    ],
)
def test_what_the_policy_does_not_name_is_refused(
    site: SiteFolder,
    certificates: Path,
    contents: dict[str, bytes],
    changes: dict[str, str],
    message: str,
) -> None:
    refused(site, sent(certificates, contents, **changes), message)


def test_without_policy_or_settings_nothing_is_taken(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes]
) -> None:
    (site.path / "policy.yaml").unlink()
    refused(site, sent(certificates, contents), "policy cannot be read")
    (site.path / "site.yaml").write_text("name: [")
    refused(site, sent(certificates, contents), "settings cannot be read")


# ---------------------------------------------------------------------------- hostile content


def flips(content: bytes, count: int) -> Iterator[bytes]:
    """The content with one bit flipped, at places all over it."""
    for place in sorted({int(one) for one in np.linspace(0, len(content) - 1, count)}):
        yield content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_a_flipped_bit_anywhere_is_refused(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes]
) -> None:
    parts = sent(certificates, contents)
    assert parts.weights is not None
    for text in flips(parts.texts[PUBLISH].encode(), 60):
        refused(site, Parts({PUBLISH: text.decode(errors="replace")}, parts.weights), ".")
    for weights in flips(parts.weights, 20):
        refused(site, Parts(parts.texts, weights), "is not what was signed")


@pytest.mark.parametrize("run", ["../x", "..", ".hidden", "a/b", "x\0", ""])
def test_a_name_that_is_a_path_is_refused(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes], run: str
) -> None:
    parts = sent(certificates, contents)
    read = json.loads(parts.texts[PUBLISH])
    read["statement"]["run"] = run
    before = sorted(site.path.parent.rglob("*"))
    refused(site, Parts({PUBLISH: json.dumps(read)}, parts.weights), "run: must be")
    assert sorted(site.path.parent.rglob("*")) == before


def refit(contents: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    """Files whose manifest says something else; digests are right again."""
    manifest = json.loads(contents[MANIFEST]) | changes
    return {**contents, MANIFEST: json.dumps(manifest).encode()}


def manifest_of(contents: dict[str, bytes], part: str, **changes: Any) -> dict[str, bytes]:
    return refit(contents, **{part: json.loads(contents[MANIFEST])[part] | changes})


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for a model is never asked for."""

    def build(*args: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("models.saved.build", build)


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("model", {"name": "transformer"}, "ModelConfig.name: no such choice"),
        ("model", {"name": ["gru"]}, "ModelConfig.name: no such choice"),
        ("model", {"name": "gru"}, "ModelConfig.*: missing"),
        ("model", {"depth": 3}, "depth: unknown field"),
        ("model", {"base_rate": "0.1"}, "base_rate: not of type"),
        ("model", {"base_rate": float("nan")}, "base_rate: not of type"),
        ("model", {"name": "mlp", "embedding": 65536, "hidden": 65536}, "model parameters=.*e.09"),
        ("model", {"name": "mlp", "embedding": 10**9, "hidden": 1}, "must be 1 to 65,536"),
        ("model", {"name": "mlp", "embedding": 8, "hidden": 8}, "missing or unknown"),
        ("features", {"max_touchpoints": 10**9}, "max_touchpoints=1000000000: must be at most"),
        ("features", {"max_touchpoints": -1}, "must be above 0"),
        ("features", {"channels": "all"}, "channels: not of type"),
        ("features", {"channels": []}, "shape .* instead of"),
        ("features", {"campaign_buckets": 64_999}, "model parameters="),
        ("features", {"numeric": {"n": {"low": 1}}}, "missing"),
        ("features", {"further": 1}, "further: unknown field"),
    ],
)
def test_a_model_that_is_none_is_refused_before_it_is_built(
    site: SiteFolder,
    certificates: Path,
    contents: dict[str, bytes],
    part: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    refused(site, sent(certificates, manifest_of(contents, part, **changes)), message)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "not of format 1"),
        (b'{"format": 2}', "not of format 1"),
        (b'{"format": 1, "sha256": "0"}', "is of another model"),
        (b"[" * 100_000, "not JSON"),
        (b'{"format": 1' + b"0" * 5_000 + b"}", "not JSON"),
    ],
)
def test_a_manifest_that_is_none_is_refused(
    site: SiteFolder,
    certificates: Path,
    contents: dict[str, bytes],
    manifest: bytes,
    message: str,
) -> None:
    refused(site, sent(certificates, {**contents, MANIFEST: manifest}), message)


def test_a_manifest_without_model_or_features_is_refused(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes]
) -> None:
    for part in ("model", "features"):
        wrong: list[object] = [None, [], "gru"]
        for value in wrong:
            parts = sent(certificates, refit(contents, **{part: value}))
            refused(site, parts, "not an object")


def test_a_huge_manifest_is_not_read(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes]
) -> None:
    parts = sent(certificates, refit(contents, further="x" * LARGEST_TEXT))
    refused(site, parts, "at most 50,000,000 bytes")


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(
    site: SiteFolder, certificates: Path, tmp_path: Path, value: float
) -> None:
    contents = model_files(tmp_path / "model", with_value(small_weights(), value))
    refused(site, sent(certificates, contents), "a value is not finite")


@pytest.mark.usefixtures("unbuilt")
def test_weights_of_other_shapes_names_or_types_are_refused(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes], tmp_path: Path
) -> None:
    sound = small_weights()
    name = max(sound, key=lambda one: sound[one].size)
    first = {**sound, name: sound[name][..., :-1]}
    for weights, message in (
        (first, "shape .* instead of"),
        ({**sound, "further": sound[name]}, "further: missing or unknown"),
        ({}, "missing or unknown"),
    ):
        refused(site, sent(certificates, model_files(tmp_path / "m", weights)), message)
    halves = safetensors.numpy.save({k: v.astype(np.float16) for k, v in sound.items()})
    for model, message in (
        (halves, "float16 instead of float32"),
        (b"", "cannot be read"),
        (contents[MODEL][:-1], "cannot be read"),
        (b"\xff" * 9, "cannot be read"),
    ):
        digest = digests({MODEL: model})[MODEL]
        files = refit({**contents, MODEL: model}, sha256=digest)
        refused(site, sent(certificates, files), message)


def test_a_report_that_could_do_something_is_refused(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes]
) -> None:
    for report in ("<h1>bare</h1>", f"{GUARD}<meta http-equiv=refresh content='0;url=//evil'>"):
        files = {**contents, REPORT: report.encode()}
        refused(site, sent(certificates, files), "could do more than be looked at")


def test_a_refusal_is_short(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes]
) -> None:
    parts = sent(certificates, contents)
    text = json.dumps(json.loads(parts.texts[PUBLISH]) | {"x" * 10_000: 1})
    refused(site, Parts({PUBLISH: text}, parts.weights), r"Publication\.xxx")


def test_a_message_with_a_plan_is_refused(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes]
) -> None:
    parts = sent(certificates, contents)
    refused(site, Parts({**parts.texts, "train": "{}"}, parts.weights), "one text and a model")


# ---------------------------------------------------------------------------- the disk


def test_a_hub_cannot_fill_the_disk(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes]
) -> None:
    for number in range(MOST_MODELS):
        (models(site) / f"old-{number}").mkdir(parents=True)
    refused(site, sent(certificates, contents), "keeps 100 models already")
    (models(site) / "old-7").rmdir()
    assert told(accept(site, sent(certificates, contents), NOW)) == RECEIPT


def test_what_a_killed_process_left_is_swept(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes]
) -> None:
    half = models(site) / ".staged-abc"
    half.mkdir(parents=True)
    (half / MODEL).write_bytes(b"half")
    accept(site, sent(certificates, contents), NOW)
    assert set(kept(site)) == {".lock", "spring"}


@pytest.mark.parametrize("after", [0, 1, 3])
def test_on_a_full_disk_nothing_is_left(
    site: SiteFolder,
    certificates: Path,
    contents: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    written: list[Path] = []

    def full(path: Path, content: bytes) -> None:
        if len(written) == after:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        write_secret(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(client.published, "write_secret", full)
        refused(site, sent(certificates, contents), "cannot be stored: No space left on device$")
    assert told(accept(site, sent(certificates, contents), NOW)) == RECEIPT


def test_nothing_is_kept_that_the_audit_log_does_not_have(
    site: SiteFolder,
    certificates: Path,
    contents: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: object) -> None:
        assert not (models(site) / "spring").exists()
        raise AuditLogError("cannot be written: /the/path")

    monkeypatch.setattr(AuditLog, "append", broken)
    refused(site, sent(certificates, contents), "audit log cannot be written$")


@pytest.mark.parametrize("harm", ["file", "link", "empty", "damaged"])
def test_what_is_in_the_way_stays(
    site: SiteFolder, certificates: Path, contents: dict[str, bytes], harm: str
) -> None:
    models(site).mkdir()
    place = models(site) / "spring"
    if harm == "file":
        place.write_text("mine")
    elif harm == "link":
        place.symlink_to(site.path / "nowhere")
    elif harm == "empty":
        place.mkdir()
    else:
        accept(site, sent(certificates, contents, run="kept"), NOW)
        (models(site) / "kept").rename(place)
        (place / MODEL).write_bytes(b"damaged")
    refused(site, sent(certificates, contents), "cannot be stored|other files")
    assert place.exists() or place.is_symlink()


# ---------------------------------------------------------------------------- before use


@pytest.fixture
def published(site: SiteFolder, certificates: Path, contents: dict[str, bytes]) -> Path:
    accept(site, sent(certificates, contents), NOW)
    return models(site) / "spring"


@pytest.mark.parametrize("name", [*FILES, SIGNATURE])
def test_a_changed_file_of_a_published_model_is_found(
    site: SiteFolder, published: Path, name: str
) -> None:
    content = (published / name).read_bytes()
    for changed in flips(content, 40):
        (published / name).write_bytes(changed)
        with pytest.raises(SignatureError, match="used only as it was signed"):
            check_signature(published / MODEL, site)
    (published / name).unlink()
    with pytest.raises(SignatureError, match=rf"{name}: No such file.*published again"):
        check_signature(published / MODEL, site)


def test_another_model_in_the_folder_of_models_is_refused(
    site: SiteFolder, published: Path, contents: dict[str, bytes]
) -> None:
    shutil.copy(published / MODEL, published / "other.safetensors")
    shutil.copytree(published, models(site) / "autumn")
    for path in (published / "other.safetensors", models(site) / "autumn" / MODEL):
        with pytest.raises(SignatureError, match=r"was signed as spring/model\.safetensors"):
            check_signature(path, site)
    own = models(site) / "own"
    model_files(own)
    for path in (own / MODEL, models(site) / MODEL):
        with pytest.raises(SignatureError, match="No such file"):
            check_signature(path, site)


def test_a_signature_outlives_its_certificate(
    site: SiteFolder, contents: dict[str, bytes], tmp_path: Path
) -> None:
    """Over for years, or renewed: the model was taken in when it held."""
    then = int(time.time()) - 1000 * DAY
    old = hub(tmp_path / "old", then)
    shutil.copy(old / "ca.crt", site.path / "hub-ca.crt")
    accept(site, sent(old, contents, time=then), then)
    assert expiry(old, int(time.time()))["signing"] < 0
    assert check_signature(models(site) / "spring" / MODEL, site)
    renew(old, then + DAY)
    assert check_signature(models(site) / "spring" / MODEL, site)


def test_without_the_hubs_certificate_no_published_model_is_used(
    site: SiteFolder, published: Path
) -> None:
    (site.path / "hub-ca.crt").unlink()
    with pytest.raises(SignatureError, match=r"hub-ca\.crt: is missing"):
        check_signature(published / MODEL, site)


def test_a_model_from_elsewhere_is_not_asked_for_a_signature(
    site: SiteFolder, tmp_path: Path
) -> None:
    model_files(tmp_path / "own")
    assert not check_signature(tmp_path / "own" / MODEL, site)
    assert not check_signature(site.path / "models-of-mine" / MODEL, site)
    assert not check_signature(site.path / MODEL, site)


def test_no_link_leads_around_the_signature(
    site: SiteFolder, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    model_files(own, with_value(small_weights(), 0.5))
    (published / MODEL).unlink()
    (published / MODEL).symlink_to(own / MODEL)
    (models(site) / "linked").symlink_to(own)
    (tmp_path / "alias").symlink_to(site.path)
    (tmp_path / "run").symlink_to(published)
    monkeypatch.chdir(site.path)
    for path in (
        published / MODEL,
        models(site) / "linked" / MODEL,
        tmp_path / "alias" / "models" / "spring" / MODEL,
        tmp_path / "run" / MODEL,
        Path("models/spring") / MODEL,
        Path("models/../models/spring") / MODEL,
        Path("../acme/models/spring") / MODEL,
    ):
        with pytest.raises(SignatureError):
            check_signature(path, site)
    elsewhere = SiteFolder(tmp_path / "alias")
    with pytest.raises(SignatureError):
        check_signature(published / MODEL, elsewhere)


def test_score_uses_a_signed_model_and_says_when_one_is_not(
    site: SiteFolder, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = datetime.fromtimestamp(NOW, UTC)
    with site.store() as store:
        rows = [stored(f"v{i}", at - timedelta(days=1)) for i in range(3)]
        store.append(pl.DataFrame(rows, schema=VISITS), None, {})
    out = tmp_path / "scores.csv"
    options = ["score", str(site.path), "--out", str(out), "--at", at.isoformat(), "--model"]
    main([*options, str(published / MODEL)])
    said = capsys.readouterr().out
    assert "3 visitors" in said
    assert "not signed" not in said
    model_files(tmp_path / "own")
    main([*options, str(tmp_path / "own" / MODEL)])
    said = capsys.readouterr().out
    assert f"{tmp_path / 'own' / MODEL}: is not from a hub and not signed" in said.replace("\n", "")
    out.unlink()
    (published / MANIFEST).write_bytes((published / MANIFEST).read_bytes() + b" ")
    with pytest.raises(SystemExit) as ended:
        main([*options, str(published / MODEL)])
    assert ended.value.code == 2
    assert "model.json: is not what was signed" in capsys.readouterr().err
    assert not out.exists()
