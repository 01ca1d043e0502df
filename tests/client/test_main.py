from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from client.__main__ import main
from privacy.accountant import PrivacyEvent, epsilon
from privacy.ledger import Ledger, Release, Request, Reservation
from tests.visits import SITE, csv_row, export

ROOT = Path(__file__).parents[2]

COUNT = Release("count", "train", PrivacyEvent(20.0))
WEIGHTS = Release("weights", "train", PrivacyEvent(1.1, 0.04, 25))
HISTOGRAM = Release("histogram", "holdout", PrivacyEvent(30.0))

POLICY = """
federations: [shops]
purposes: [attribution]
releases: [count, weights, histogram]
models: [gru]
epsilon: 8
run_epsilon: 4
delta: 1.0e-5
min_noise_multiplier: 0.5
max_sample_rate: 0.2
max_clipping_norm: 2
max_steps: 1000
max_parameters: 100000
min_visitors: 100
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    with Ledger(tmp_path / "ledger.sqlite", durable=False) as ledger:
        for run in ("spring", "[red]autumn"):
            count = Request(run, 0, "describe", "d", (COUNT,))
            rounds = [Request(run, r, "train", "d", (WEIGHTS, HISTOGRAM)) for r in (1, 2)]
            for request in (count, *rounds):
                reservation = ledger.reserve(request)
                assert isinstance(reservation, Reservation)
                ledger.commit(reservation)
        ledger.reserve(Request("spring", 3, "train", "d", (WEIGHTS, HISTOGRAM)))
    return tmp_path


def rows(printed: str) -> list[list[str]]:
    lines = (line for line in printed.splitlines() if line.startswith("│"))
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_budget_says_what_was_spent_on_what(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # While another owns the ledger.
    with Ledger(site / "ledger.sqlite", durable=False):
        main(["budget", str(site), "--epsilon", "8", "--delta", "1e-5"])
    printed = capsys.readouterr().out

    def cost(*releases: Release) -> str:
        return f"{epsilon([release.event for release in releases], 1e-5):.3f}"

    assert rows(printed) == [
        ["spring", "all", "", "4", "", cost(COUNT, *[WEIGHTS] * 3)],
        ["", "count", "train", "1", "1", cost(COUNT)],
        ["", "weights", "train", "3", "3", cost(*[WEIGHTS] * 3)],
        ["", "histogram", "holdout", "3", "3", cost(*[HISTOGRAM] * 3)],
        ["[red]autumn", "all", "", "3", "", cost(COUNT, *[WEIGHTS] * 2)],
        ["", "count", "train", "1", "1", cost(COUNT)],
        ["", "weights", "train", "2", "2", cost(*[WEIGHTS] * 2)],
        ["", "histogram", "holdout", "2", "2", cost(*[HISTOGRAM] * 2)],
        ["all runs", "all", "train", "", "", cost(*[COUNT] * 2, *[WEIGHTS] * 5)],
        ["all runs", "all", "holdout", "", "", cost(*[HISTOGRAM] * 5)],
    ]
    spent = epsilon([COUNT.event, *[WEIGHTS.event] * 5, COUNT.event], 1e-5)
    assert f"a visitor has spent epsilon {spent:.3f} of 8; left {8 - spent:.3f}" in printed
    assert "not answered yet, requests: 1" in printed


def test_budget_takes_the_limits_of_the_sites_policy(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (site / "policy.yaml").write_text(POLICY)
    main(["budget", str(site / "ledger.sqlite")])
    printed = capsys.readouterr().out
    assert "epsilon at delta 1e-05" in printed
    assert " of 8; left " in printed


def test_audit_finds_a_ledger_whole(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["audit", str(site)])
    assert "ledger.sqlite: whole; 13 records, hash " in capsys.readouterr().out


def test_audit_names_the_first_bad_record(site: Path) -> None:
    with sqlite3.connect(site / "ledger.sqlite") as database:
        database.execute("UPDATE records SET content = '{}' WHERE number = 5")
    database.close()
    command = [sys.executable, "-m", "client", "audit", str(site)]
    found = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert "ledger.sqlite: damaged at record 5: " in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "nowhere"], "nowhere: no ledger"),
        (["budget", "nowhere"], "nowhere: no ledger"),
        (["budget", "."], "policy.yaml: no policy; say --delta"),
        (["budget", ".", "--delta", "2"], "delta=2.0: must be between 0 and 1"),
    ],
)
def test_errors_are_one_line(
    site: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    message: str,
) -> None:
    monkeypatch.chdir(site)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_policy_that_cannot_be_read_is_named(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (site / "policy.yaml").write_text("epsilon: 8")
    with pytest.raises(SystemExit):
        main(["budget", str(site)])
    assert "policy.yaml: " in capsys.readouterr().err


# ------------------------------------------------------------------ the commands of a site


def client(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "client", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_site_from_its_beginning_to_an_erasure(tmp_path: Path) -> None:
    made = client(tmp_path, "init", "acme")
    assert made.returncode == 0, made.stderr
    assert "next: python -m client check acme" in made.stdout
    again = client(tmp_path, "init", "acme")
    assert again.returncode == 2
    assert "acme: is a site already" in again.stderr

    (tmp_path / "acme" / "site.yaml").write_text(SITE)
    days = [time.strftime("%Y-%m-%d", time.gmtime(time.time() - day * 86400)) for day in (2, 1)]
    visits = [csv_row(number, time=f"{days[number % 2]}T10:00:00Z") for number in range(50)]
    export(tmp_path / "acme", "1.csv", [*visits, csv_row(99, consent="no")])
    checked = client(tmp_path, "check", "acme")
    assert checked.returncode == 0, checked.stdout
    assert ["left out: consent", "1"] in rows(checked.stdout)
    assert ["would be stored", "50"] in rows(checked.stdout)
    assert f"{days[0]} to {days[1]}; 7 visitors; conversion rate 20.00% of visits" in checked.stdout
    assert ["paid search", "25", "50.0%", "20.00%"] in rows(checked.stdout)

    assert ["stored", "50"] in rows(client(tmp_path, "ingest", "acme").stdout)
    assert ["stored", "0"] in rows(client(tmp_path, "ingest", "acme").stdout)
    shown = rows(client(tmp_path, "kpis", "acme").stdout)
    assert shown[-1][1:6] == ["all", "50", "7", "10", "20.00%"]

    (tmp_path / "ids.txt").write_text("visitor 3\n")
    forgotten = client(tmp_path, "forget", "acme", "--visitor-file", "ids.txt")
    assert forgotten.returncode == 0, forgotten.stderr
    assert "visits deleted: 7" in forgotten.stdout
    assert "nothing was released while they were stored" in forgotten.stdout
    audited = client(tmp_path, "audit", "acme")
    assert "audit.jsonl: whole; 6 events" in audited.stdout

    (tmp_path / "acme" / "audit.head").write_text("1 0\n")
    assert client(tmp_path, "audit", "acme").returncode == 1
    assert client(tmp_path, "check", "acme").returncode == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ingest", "nowhere"], "nowhere/site.yaml: cannot be read"),
        (["kpis", "nowhere"], "nowhere/store: no store of visits"),
        (["forget", "nowhere", "--visitor-file", "nix"], "nix: cannot be read"),
        (["score", "nowhere", "--model", "m.safetensors", "--out", "s.csv"], "m.safetensors"),
        (["score", "nowhere", "--model", "m", "--out", "s.csv", "--at", "noon"], "ISO 8601"),
        (["check"], "the following arguments are required: site"),
        (["chek", "acme"], "invalid choice"),
    ],
)
def test_a_mistake_of_a_site_is_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    ended = client(tmp_path, *words)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
