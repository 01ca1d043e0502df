from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flwr.app import Error, Message, RecordDict

from client.folder import SiteFolder, create
from client.published import PublicationRefused, accept, check_signature
from conf.compose import load, to_yaml
from conf.schema import SettingError
from protocol.exchange import Parts, reply_parts
from protocol.publication import (
    GUARD,
    MANIFEST,
    MODEL,
    PUBLISH,
    REPORT,
    read_publication,
    verify_publication,
)
from protocol.records import from_records, to_records
from protocol.replies import (
    Reply,
    SiteDescription,
    SiteFailure,
    SiteReceipt,
    SiteRefusal,
)
from server.certificates import issue_signer, renew
from server.federation import Federation
from server.page import PAGE
from server.publication import PublicationError, signed_run
from tests.grid import AnsweringGrid
from tests.publications import hub, model_files, small_weights, with_value
from tests.visits import NOW, POLICY, SITE

DAY = 86_400
RUN = "2026-09-21_13-33-20"

Answer = Callable[[Message], list[Message]]


@dataclass
class Sites(AnsweringGrid):
    """Nodes that answer by a function."""

    nodes: dict[int, Answer]
    asked: list[tuple[int, str]] = field(default_factory=list)

    def answer(self, node: int, message: Message) -> list[Message]:
        self.asked.append((node, message.metadata.message_type))
        return self.nodes[node](message)


def saying(*replies: Reply) -> Answer:
    """A site that answers with these, whatever it is asked."""
    return lambda message: [
        Message(to_records(reply_parts({PUBLISH: reply})), reply_to=message) for reply in replies
    ]


def real_site(folder: SiteFolder, name: str) -> Answer:
    """A site as its agent answers."""

    def answer(message: Message) -> list[Message]:
        try:
            parts = accept(folder, from_records(message.content), NOW)
        except PublicationRefused as refusal:
            parts = reply_parts({PUBLISH: SiteRefusal(name, 0, str(refusal))})
        return [Message(to_records(parts), reply_to=message)]

    return answer


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub(tmp_path_factory.mktemp("hub") / "certificates", NOW)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run."""
    folder = tmp_path / "runs" / RUN
    model_files(folder)
    (folder / REPORT).write_bytes("<!doctype html><h1>Ünï</h1>\r\n".encode())
    config = load(["data=site", "data.path=store", "federation=shops", "model=logistic"])
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def publish(
    federation: Federation, run: Path, certificates: Path, now: int = NOW
) -> list[SiteReceipt | SiteFailure]:
    return federation.publish(signed_run(run, certificates, now), timeout=5)


def site(folder: Path, name: str, certificates: Path) -> SiteFolder:
    made = create(folder / name, NOW)
    (made.path / "site.yaml").write_text(SITE.replace("acme", name))
    (made.path / "policy.yaml").write_text(POLICY)
    shutil.copy(certificates / "ca.crt", made.path / "hub-ca.crt")
    return made


# ---------------------------------------------------------------------------- the signed run


def test_a_run_is_signed_with_all_its_files(run: Path, certificates: Path) -> None:
    publication, model = read_publication(signed_run(run, certificates, NOW))
    verify_publication(publication, model, (certificates / "ca.crt").read_bytes(), NOW)
    statement = publication.statement
    assert (statement.federation, statement.purpose) == ("shops", "conversion-model")
    assert (statement.run, statement.time) == (RUN, NOW)
    assert model == (run / MODEL).read_bytes()
    assert publication.manifest.encode() == (run / MANIFEST).read_bytes()
    assert publication.report.encode() == GUARD.encode() + (run / REPORT).read_bytes()


def test_a_run_goes_by_its_folders_name_however_it_is_called(
    run: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    for path in (Path(), Path("../") / RUN, Path("checkpoints/..")):
        (run / "checkpoints").mkdir(exist_ok=True)
        assert read_publication(signed_run(path, certificates, NOW))[0].statement.run == RUN


@pytest.mark.parametrize("report", ["x" * 900_000, "ü" * 200_000, '"' * 600_000])
def test_in_the_place_of_a_huge_report_is_a_note(
    run: Path, certificates: Path, report: str
) -> None:
    (run / REPORT).write_text(report)
    publication, _ = read_publication(signed_run(run, certificates, NOW))
    assert publication.report.startswith(GUARD)
    assert "too large to be published" in publication.report


def test_a_large_report_is_published(run: Path, certificates: Path) -> None:
    (run / REPORT).write_text("x" * 790_000)
    publication, _ = read_publication(signed_run(run, certificates, NOW))
    assert len(publication.report) > 790_000


@pytest.mark.parametrize("name", [MODEL, MANIFEST, REPORT])
def test_an_unfinished_run_is_not_published(run: Path, certificates: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(PublicationError, match=rf"{name}: missing; is the run finished\?"):
        signed_run(run, certificates, NOW)


def test_a_run_without_settings_is_not_published(run: Path, certificates: Path) -> None:
    (run / "config.yaml").write_text("federation: 3")
    with pytest.raises(SettingError, match=r"config\.yaml"):
        signed_run(run, certificates, NOW)


def test_what_no_site_would_take_is_refused_here(
    run: Path, certificates: Path, tmp_path: Path
) -> None:
    named = run.rename(run.with_name("privacy.epsilon=1,model=gru"))
    with pytest.raises(PublicationError, match="run: must be"):
        signed_run(named, certificates, NOW)
    run = named.rename(run)
    with pytest.raises(PublicationError, match="signing certificate: valid from"):
        signed_run(run, certificates, NOW + 800 * DAY)
    (run / REPORT).write_text('<link rel="stylesheet" href="//elsewhere">')
    with pytest.raises(PublicationError, match="could do more than be looked at"):
        signed_run(run, certificates, NOW)
    (run / REPORT).write_text("")
    (run / MODEL).write_bytes(bytes(50_000_000))
    with pytest.raises(PublicationError, match="at most 50,000,000 bytes"):
        signed_run(run, certificates, NOW)


def test_without_keys_that_fit_nothing_is_signed(run: Path, tmp_path: Path) -> None:
    folder, other = hub(tmp_path / "hub", NOW), hub(tmp_path / "other", NOW)
    shutil.copy(other / "ca.crt", folder / "ca.crt")
    with pytest.raises(PublicationError, match="not issued by the hub's authority"):
        signed_run(run, folder, NOW)
    shutil.copy(other / "signing.crt", folder / "signing.crt")
    with pytest.raises(PublicationError, match="do not belong together; renew them"):
        signed_run(run, folder, NOW)
    (folder / "signing.key").unlink()
    with pytest.raises(PublicationError, match=r"signing\.key: missing"):
        signed_run(run, folder, NOW)


def test_a_signature_is_made_anew_with_a_new_key(run: Path, tmp_path: Path) -> None:
    folder = hub(tmp_path / "hub", NOW)
    before = read_publication(signed_run(run, folder, NOW))[0]
    issue_signer(folder, NOW)
    after = read_publication(signed_run(run, folder, NOW))[0]
    assert before.statement == after.statement
    assert before.signature.certificate != after.signature.certificate


# ---------------------------------------------------------------------------- to the sites


def test_from_a_run_to_models_that_sites_may_use(
    run: Path, certificates: Path, tmp_path: Path
) -> None:
    sites = {name: site(tmp_path, name, certificates) for name in ("acme", "globex", "initech")}
    policy = sites["globex"].path / "policy.yaml"
    policy.write_text(POLICY.replace("[shops]", "[banks]"))
    grid = Sites({n: real_site(one, name) for n, (name, one) in enumerate(sites.items())})
    admitted = {**dict(enumerate(sites)), 7: "umbrella"}
    federation = Federation(grid, admitted)
    answers = publish(federation, run, certificates)
    assert answers == [
        SiteReceipt("acme", RUN),
        SiteFailure(
            "globex", "refused", "federation=shops: this site allows banks (policy: federations)"
        ),
        SiteReceipt("initech", RUN),
        SiteFailure("umbrella", "missing", "not connected"),
    ]
    for name in ("acme", "initech"):
        kept = sites[name].path / "models" / RUN
        assert (kept / MODEL).read_bytes() == (run / MODEL).read_bytes()
        assert check_signature(kept / MODEL, sites[name])
    assert not (sites["globex"].path / "models").exists()
    # Said again for those that were not there; the hub's keys are new since.
    policy.write_text(POLICY)
    again = publish(federation, run, certificates, NOW + 60)
    assert [type(answer) for answer in again] == [*[SiteReceipt] * 3, SiteFailure]


def test_after_a_renewal_sites_take_what_is_published(run: Path, tmp_path: Path) -> None:
    folder = hub(tmp_path / "hub", NOW)
    one = site(tmp_path, "acme", folder)
    renew(folder, NOW)
    federation = Federation(Sites({1: real_site(one, "acme")}), {1: "acme"})
    assert publish(federation, run, folder) == [SiteReceipt("acme", RUN)]


def test_another_model_under_the_same_name_is_refused_by_who_has_the_first(
    run: Path, certificates: Path, tmp_path: Path
) -> None:
    one = site(tmp_path, "acme", certificates)
    federation = Federation(Sites({1: real_site(one, "acme")}), {1: "acme"})
    publish(federation, run, certificates)
    report = (run / REPORT).read_bytes()
    model_files(run, with_value(small_weights(), 0.5))
    (run / REPORT).write_bytes(report)
    (answer,) = publish(federation, run, certificates)
    assert isinstance(answer, SiteFailure)
    assert answer.outcome == "refused"
    assert "other files under this name" in answer.reason


@pytest.fixture
def parts(run: Path, certificates: Path) -> Parts:
    return signed_run(run, certificates, NOW)


def test_every_admitted_site_that_is_connected_is_asked_once(parts: Parts) -> None:
    grid = Sites({2: saying(SiteReceipt("b", RUN)), 1: saying(SiteReceipt("a", RUN)), 9: saying()})
    answers = Federation(grid, {1: "a", 2: "b", 3: "c"}).publish(parts, timeout=5)
    # Not the ninth: it is not admitted.
    assert sorted(grid.asked) == [(1, "query"), (2, "query")]
    assert [answer.site for answer in answers] == ["a", "b", "c"]
    assert answers[2] == SiteFailure("c", "missing", "not connected")


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (saying(SiteRefusal("a", 0, "no")), SiteFailure("a", "refused", "no")),
        (saying(SiteRefusal("b", 0, "no")), SiteFailure("a", "refused", "no")),
        (
            saying(SiteReceipt("b", RUN)),
            SiteFailure("a", "dropped", "answered under another site's name"),
        ),
        (
            saying(SiteReceipt("a", "other")),
            SiteFailure("a", "dropped", "answered with something else than a receipt"),
        ),
        (
            saying(SiteDescription("a", 3.0), SiteReceipt("a", RUN)),
            SiteFailure("a", "dropped", "answered with something else than a receipt"),
        ),
        (
            lambda message: [Message(RecordDict(), reply_to=message)],
            SiteFailure("a", "dropped", "a message without text"),
        ),
        (
            lambda message: [
                Message(
                    to_records(Parts({PUBLISH: 'SiteReceipt {"site": "a"}'}, None)),
                    reply_to=message,
                )
            ],
            SiteFailure("a", "dropped", "SiteReceipt.run: missing"),
        ),
        (
            lambda message: [Message(Error(1, "agent unreachable"), reply_to=message)],
            SiteFailure("a", "missing", "agent unreachable"),
        ),
    ],
)
def test_what_is_no_receipt_is_named(parts: Parts, answer: Answer, failure: SiteFailure) -> None:
    assert Federation(Sites({1: answer}), {1: "a"}).publish(parts, timeout=5) == [failure]


def test_publishing_waits_no_longer_than_its_time(parts: Parts) -> None:
    grid = Sites({1: saying(), 2: saying(SiteReceipt("b", RUN))})
    started = time.monotonic()
    answers = Federation(grid, {1: "a", 2: "b"}).publish(parts, timeout=0.3)
    assert 0.3 <= time.monotonic() - started < 2
    assert answers == [SiteFailure("a", "missing", "no reply in 0 s"), SiteReceipt("b", RUN)]


def test_with_nobody_there_nobody_is_asked(parts: Parts) -> None:
    assert Federation(Sites({}), {}).publish(parts, timeout=5) == []
    assert Federation(Sites({}), {1: "a"}).publish(parts, timeout=5) == [
        SiteFailure("a", "missing", "not connected")
    ]


def test_every_page_of_this_product_may_be_published(run: Path, certificates: Path) -> None:
    (run / REPORT).write_text(PAGE)
    assert read_publication(signed_run(run, certificates, NOW))[0].report == GUARD + PAGE
