from __future__ import annotations

from pathlib import Path

import pytest

from client.check import check
from client.folder import SiteFolder, create
from client.ingest import ingest
from tests.visits import NOW, POLICY, SITE, csv_row, site_with


@pytest.fixture
def folder(tmp_path: Path) -> SiteFolder:
    folder = site_with(tmp_path / "acme", [csv_row(number) for number in range(50)])
    (folder.path / "policy.yaml").write_text(POLICY)
    return folder


def test_a_site_in_order_has_no_problem_and_shows_its_visits(folder: SiteFolder) -> None:
    ingest(folder, NOW)
    findings = check(folder, NOW, 1000)
    assert findings.problems == []
    assert "store: whole, 50 visits" in findings.passed
    assert "source: files can be read" in findings.passed
    assert findings.account is not None
    assert findings.account.removed["stored already"] == 50


def test_a_new_site_as_it_is_made_is_asked_for_its_password_alone(tmp_path: Path) -> None:
    findings = check(create(tmp_path / "acme", NOW), NOW, 10)
    assert len(findings.problems) == 1
    assert "matomo.password: no such file; write the password" in findings.problems[0]


def harm_policy(folder: SiteFolder) -> None:
    (folder.path / "policy.yaml").unlink()


def harm_purpose(folder: SiteFolder) -> None:
    (folder.path / "site.yaml").write_text("purpose: resale\n" + SITE)


def harm_settings(folder: SiteFolder) -> None:
    (folder.path / "site.yaml").write_text(SITE.replace("consent", "consnt"))


def harm_keys(folder: SiteFolder) -> None:
    (folder.path / "keys" / "pseudonyms.json").chmod(0o644)


def harm_ledger(folder: SiteFolder) -> None:
    folder.ledger.write_bytes(b"garbage" * 999)


def harm_store(folder: SiteFolder) -> None:
    part = next(folder.visits.glob("*/*.parquet"))
    part.write_bytes(part.read_bytes()[:-9])


def harm_audit_log(folder: SiteFolder) -> None:
    path = folder.audit_log.path
    path.write_text(path.read_text().replace('"stored": 50', '"stored": 51'))


def harm_source(folder: SiteFolder) -> None:
    (folder.path / "export" / "1.csv").unlink()


def harm_rows(folder: SiteFolder) -> None:
    path = folder.path / "export" / "1.csv"
    path.write_text(path.read_text().replace("T10", "Tten"))


def harm_erasure(folder: SiteFolder) -> None:
    folder.audit_log.append("erasure begun", {"asked": 1})


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (harm_policy, "policy.yaml: no policy, and without one nothing is released"),
        (harm_purpose, "purpose=resale: the policy allows conversion-model"),
        (harm_settings, "no such setting"),
        (harm_keys, "pseudonyms.json: others can read it; say chmod 600"),
        (harm_ledger, "ledger.sqlite"),
        (harm_store, "damaged, its SHA-256 is not that of the manifest"),
        (harm_audit_log, "audit.jsonl: line 2 is not what was written"),
        (harm_source, "export/*.csv"),
        (harm_rows, 'column "time": not ISO-8601'),
        (harm_erasure, "an erasure was begun and not finished: say forget again"),
    ],
)
def test_what_is_wrong_is_named_and_the_rest_is_looked_at(
    folder: SiteFolder, harm: object, problem: str
) -> None:
    ingest(folder, NOW)
    assert callable(harm)
    harm(folder)
    findings = check(folder, NOW, 1000)
    assert any(problem in one for one in findings.problems), findings.problems
    assert len(findings.problems) <= 2
    assert len(findings.passed) >= 4


def test_it_stores_nothing(folder: SiteFolder) -> None:
    ingest(folder, NOW)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    check(folder, NOW, 1000)
    after = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    assert after == before
