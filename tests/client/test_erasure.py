from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from client.erasure import DELTA, ErasureError, forget, read_ids, unfinished
from client.folder import SiteFolder
from client.ingest import ingest
from journeys.store import StoreError
from privacy.accountant import PrivacyEvent, epsilon
from privacy.ledger import Ledger, Release, Request
from tests.visits import DAY, NOW, POLICY, csv_row, export, site_with

ROOT = Path(__file__).parents[2]

WEIGHTS = Release("weights", "train", PrivacyEvent(1.1, 0.04, 25))
HISTOGRAM = Release("histogram", "holdout", PrivacyEvent(30.0))


@pytest.fixture
def folder(tmp_path: Path) -> SiteFolder:
    folder = site_with(tmp_path / "acme", [csv_row(number) for number in range(50)])
    ingest(folder, NOW)
    return folder


def release(folder: SiteFolder, run: str, *rounds: int) -> None:
    with Ledger(folder.ledger, durable=False) as ledger:
        for number in rounds:
            ledger.reserve(Request(run, number, "train", "d", (WEIGHTS, HISTOGRAM)))


def pseudonym(folder: SiteFolder, visitor: str) -> str:
    return folder.keys(folder.config()).current()[0].pseudonyms([visitor])[0]


def visitors(folder: SiteFolder) -> set[str]:
    with folder.store(read_only=True) as store:
        return set(store.visits().collect()["visitor_id"])


def test_the_visits_are_gone_and_the_others_stay(folder: SiteFolder) -> None:
    before = visitors(folder)
    receipt = forget(folder, ["visitor 3", "visitor 5", "nobody"])
    gone = {pseudonym(folder, "visitor 3"), pseudonym(folder, "visitor 5")}
    assert visitors(folder) == before - gone
    assert (receipt.asked, receipt.pseudonyms, receipt.visits) == (3, 2, 14)
    for path in folder.visits.rglob("*.parquet"):
        assert not any(one.encode() in path.read_bytes() for one in gone), path


def test_who_was_forgotten_is_not_stored_again(folder: SiteFolder) -> None:
    forget(folder, ["visitor 3"])
    export(folder.path, "2.csv", [csv_row(number) for number in range(100, 114)])
    account = ingest(folder, NOW)
    assert account.removed["erased"] == 2
    assert pseudonym(folder, "visitor 3") not in visitors(folder)
    # Nor under the next key of the pseudonyms.
    later = NOW + 396 * DAY
    export(
        folder.path,
        "3.csv",
        [csv_row(number, time="2027-10-01T10:00:00Z", visit=number + 1) for number in range(7)],
    )
    assert ingest(folder, later).removed["erased"] == 1
    assert len(visitors(folder)) == 6


def test_hex_ids_are_found_in_capitals(tmp_path: Path) -> None:
    rows = [csv_row(number, visitor_id=f"00ab{number % 7}") for number in range(50)]
    folder = site_with(tmp_path / "acme", rows)
    ingest(folder, NOW)
    assert forget(folder, ["00AB3"]).visits == 7


def test_pending_campaigns_forget_them_too(tmp_path: Path) -> None:
    rows = [csv_row(number, campaign=f"c{number}") for number in range(14)]
    folder = site_with(tmp_path / "acme", rows)
    ingest(folder, NOW)
    gone = pseudonym(folder, "visitor 3")
    forget(folder, ["visitor 3"])
    for path in folder.visits.glob("*.parquet"):
        frame = pl.read_parquet(path)
        assert gone not in frame.get_column("visitor_id", default=pl.Series([""])).to_list()


def test_the_receipt_names_the_releases_since_and_bounds_them(folder: SiteFolder) -> None:
    release(folder, "shops/spring", 1, 2)
    release(folder, "shops/autumn", 1)
    receipt = forget(folder, ["visitor 3"])
    assert receipt.releases == {"shops/spring": 2, "shops/autumn": 1}
    assert receipt.delta == 1e-5
    assert receipt.epsilon == epsilon([PrivacyEvent(1.1, 0.04, 75)], 1e-5)
    assert receipt.epsilon > epsilon([PrivacyEvent(30.0, 1, 3)], 1e-5)


def test_releases_before_a_visitor_came_are_none_of_theirs(folder: SiteFolder) -> None:
    release(folder, "shops/spring", 1, 2)
    export(folder.path, "2.csv", [csv_row(100, visitor_id="late")])
    ingest(folder, NOW)
    release(folder, "shops/autumn", 1)
    assert forget(folder, ["late"]).releases == {"shops/autumn": 1}
    assert forget(folder, ["visitor 3"]).releases == {"shops/spring": 2, "shops/autumn": 1}


def test_compacting_makes_the_receipt_say_more_never_less(folder: SiteFolder) -> None:
    for number in range(10):
        release(folder, "shops/spring", number + 1)
        export(folder.path, f"{2 + number}.csv", [csv_row(100 + number, visitor_id="late")])
        ingest(folder, NOW)
    release(folder, "shops/autumn", 1)
    with folder.store(read_only=True) as store:
        assert len(store.manifest.parts) < 11
    receipt = forget(folder, ["late"])
    assert receipt.releases is not None
    assert receipt.releases["shops/autumn"] == 1
    assert receipt.releases["shops/spring"] >= 9


def test_a_visitor_of_a_killed_ingest_is_taken_for_an_early_one(folder: SiteFolder) -> None:
    export(folder.path, "2.csv", [csv_row(100, visitor_id="late")])
    code = (
        "import os, sys, signal; from pathlib import Path; from client.ingest import ingest;"
        "from client.folder import SiteFolder;"
        "ingest(SiteFolder(Path(sys.argv[1])), int(sys.argv[2]),"
        " lambda _: os.kill(os.getpid(), signal.SIGKILL))"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(folder.path), str(NOW)], cwd=ROOT)
    assert killed.returncode < 0
    release(folder, "shops/spring", 1)
    ingest(folder, NOW)
    assert forget(folder, ["late"]).releases == {"shops/spring": 1}


def test_nobody_known_is_still_blocked(folder: SiteFolder) -> None:
    release(folder, "shops/spring", 1)
    receipt = forget(folder, ["stranger"])
    assert (receipt.visits, receipt.releases, receipt.epsilon) == (0, {}, 0.0)
    export(folder.path, "2.csv", [csv_row(100, visitor_id="stranger")])
    assert ingest(folder, NOW).removed["erased"] == 1


def test_the_receipt_in_the_audit_log_holds_no_id(folder: SiteFolder) -> None:
    release(folder, "shops/spring", 1)
    receipt = forget(folder, ["visitor 3"])
    begun, done = folder.audit_log.events()[-2:]
    assert (begun.kind, begun.content) == ("erasure begun", {"asked": 1})
    assert done.kind == "erasure"
    assert done.content == vars(receipt)
    text = folder.audit_log.path.read_text()
    assert "visitor 3" not in text
    assert pseudonym(folder, "visitor 3") not in text


def test_erasing_twice_is_harmless(folder: SiteFolder) -> None:
    forget(folder, ["visitor 3"])
    assert forget(folder, ["visitor 3"]).visits == 0
    assert len(visitors(folder)) == 6


def test_a_damaged_ledger_or_policy_does_not_stop_an_erasure(folder: SiteFolder) -> None:
    (folder.path / "policy.yaml").write_text("epsilon: [")
    release(folder, "shops/spring", 1)
    folder.ledger.write_bytes(b"garbage" * 1000)
    receipt = forget(folder, ["visitor 3"])
    assert receipt.visits == 7
    assert (receipt.releases, receipt.epsilon, receipt.delta) == (None, None, DELTA)


def test_while_another_writes_nothing_is_erased(folder: SiteFolder) -> None:
    with folder.store(), pytest.raises(StoreError, match="another process"):
        forget(folder, ["visitor 3"])
    assert not unfinished(folder.audit_log.events())


def test_a_killed_erasure_shows_and_is_done_by_the_same_command(folder: SiteFolder) -> None:
    code = (
        "import os, sys, signal; from pathlib import Path; from journeys.store import Store;"
        "Store.remove = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "from client.erasure import forget; from client.folder import SiteFolder;"
        "forget(SiteFolder(Path(sys.argv[1])), ['visitor 3'])"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder.path)], cwd=ROOT).returncode < 0
    assert unfinished(folder.audit_log.events())
    assert forget(folder, ["visitor 3"]).visits == 7
    assert not unfinished(folder.audit_log.events())


def test_ids_are_read_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_bytes("\ufeffa b\r\n\n  00ab \r\na b\n".encode())
    assert read_ids(path) == ("a b", "00ab")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "holds no visitor id"), (b" \n", "holds no visitor id"), (b"\xff", "not UTF-8")],
)
def test_a_file_without_ids_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "ids.txt").write_bytes(content)
    with pytest.raises(ErasureError, match=problem):
        read_ids(tmp_path / "ids.txt")
    with pytest.raises(ErasureError, match="cannot be read"):
        read_ids(tmp_path / "nix")


def test_the_policys_delta_is_the_bounds(folder: SiteFolder) -> None:
    (folder.path / "policy.yaml").write_text(POLICY.replace("1.0e-5", "1.0e-6"))
    release(folder, "shops/spring", 1)
    assert forget(folder, ["visitor 3"]).delta == 1e-6
