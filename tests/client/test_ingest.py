from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from client.folder import SiteFolder
from client.ingest import Account, BadRowsError, ingest, try_out
from client.preparation import PENDING
from conf.schema import SettingError
from journeys.store import StoreError
from tests.visits import DAY, NOW, SITE, csv_row, export, site_with

ROOT = Path(__file__).parents[2]


def stored(folder: SiteFolder) -> pl.DataFrame:
    with folder.store(read_only=True) as store:
        return store.visits().collect()


@pytest.fixture
def folder(tmp_path: Path) -> SiteFolder:
    return site_with(tmp_path / "acme", [csv_row(number) for number in range(50)])


def test_visits_of_the_source_are_in_the_store(folder: SiteFolder) -> None:
    account = ingest(folder, NOW)
    visits = stored(folder)
    assert (account.rows, account.stored, visits.height) == (50, 50, 50)
    assert visits["visitor_id"].n_unique() == 7
    assert visits["converted"].sum() == 10
    assert visits["revenue"].sum() == 100
    assert set(visits["channel"]) == {"paid search", "organic search"}
    assert set(visits["campaign"]) == {"spring"}
    assert set(visits["site"]) == {"acme"}


def test_a_second_ingest_takes_what_is_new(folder: SiteFolder, tmp_path: Path) -> None:
    ingest(folder, NOW)
    before = stored(folder)
    account = ingest(folder, NOW)
    assert (account.rows, account.stored) == (0, 0)
    assert stored(folder).equals(before)
    # The next export holds some visits that are known.
    export(folder.path, "2.csv", [csv_row(number) for number in range(40, 60)])
    account = ingest(folder, NOW)
    assert (account.rows, account.stored) == (20, 10)
    assert account.removed["stored already"] == 10
    assert stored(folder).height == 60


def test_visits_past_retention_are_not_taken_and_deleted(folder: SiteFolder) -> None:
    ingest(folder, NOW)
    later = NOW + 390 * DAY
    export(folder.path, "2.csv", [csv_row(100, time="2026-09-01T00:00:00Z")])
    account = ingest(folder, later)
    assert account.removed["retention"] == 1
    assert account.expired > 0
    visits = stored(folder)
    assert visits.height == 50 - account.expired
    oldest = visits["time"].dt.epoch("s").min()
    assert isinstance(oldest, int)
    assert oldest > later - 396 * DAY


def test_who_followed_a_rare_campaign_is_forgotten_with_their_visits(tmp_path: Path) -> None:
    rows = [csv_row(number, campaign=f"c{number}") for number in range(14)]
    folder = site_with(tmp_path / "acme", rows)
    ingest(folder, NOW)
    assert ingest(folder, NOW + 500 * DAY).rows == 0
    with folder.store(read_only=True) as store:
        assert store.table("pending", PENDING).is_empty()
        assert store.manifest.rows == 0


def test_a_visit_in_the_future_is_no_visit(folder: SiteFolder) -> None:
    ahead = {"time": "2026-10-01T00:00:00Z"}
    export(folder.path, "2.csv", [csv_row(100, **ahead)])
    account = ingest(folder, NOW)
    assert [one.count for one in account.skipped] == [1]
    assert stored(folder).height == 50
    export(folder.path, "3.csv", [csv_row(100, **ahead), csv_row(101, **ahead), csv_row(102)])
    with pytest.raises(BadRowsError, match="begins in the future"):
        ingest(folder, NOW)
    assert stored(folder).height == 50


def test_too_many_bad_rows_stop_it_and_nothing_of_them_is_stored(folder: SiteFolder) -> None:
    rows = [csv_row(100 + number) for number in range(20)]
    rows[3]["time"] = rows[7]["time"] = "yesterday"
    export(folder.path, "2.csv", rows)
    with pytest.raises(BadRowsError) as error:
        ingest(folder, NOW)
    message = str(error.value)
    assert "2 of 70 rows" in message
    assert 'column "time": not ISO-8601' in message
    assert "2.csv, row 4" in message
    assert "yesterday" not in message
    assert stored(folder).height in (0, 50)


def test_bad_rows_within_the_limit_are_counted_by_reason(folder: SiteFolder) -> None:
    settings = folder.path / "site.yaml"
    settings.write_text(SITE.replace("  name: files", "  name: files\n  bad_rows: 0.1"))
    export(folder.path, "2.csv", [csv_row(100, time="x"), csv_row(101, visitor_id="")])
    account = ingest(folder, NOW)
    assert {one.reason: one.count for one in account.skipped} == {
        'column "time": not ISO-8601': 1,
        'column "visitor_id": is empty': 1,
    }
    assert account.rows == account.stored + 2 == 52


def test_what_was_ingested_is_in_the_audit_log_without_a_visitor(folder: SiteFolder) -> None:
    ingest(folder, NOW)
    begun, done = folder.audit_log.events()
    assert (begun.kind, begun.content) == ("ingest begun", {"generation": 0, "requests": 0})
    assert done.content["stored"] == 50
    assert "visitor" not in folder.audit_log.path.read_text()


def test_nothing_on_disk_says_who_the_visitors_are(folder: SiteFolder) -> None:
    ingest(folder, NOW)
    (folder.path / "export" / "1.csv").unlink()
    for path in folder.path.rglob("*"):
        if path.is_file():
            assert b"visitor 3" not in path.read_bytes(), path


def test_only_the_owner_may_look(folder: SiteFolder) -> None:
    ingest(folder, NOW)
    for path in (folder.path, folder.visits, folder.path / "keys"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_two_ingests_do_not_meet(folder: SiteFolder) -> None:
    with folder.store(), pytest.raises(StoreError, match="another process"):
        ingest(folder, NOW)


def test_a_trial_stores_nothing(folder: SiteFolder) -> None:
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    account, visits = try_out(folder, NOW, most=1000)
    assert (account.rows, visits.height) == (50, 50)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_a_trial_ends_after_the_batch_that_is_enough(folder: SiteFolder) -> None:
    settings = folder.path / "site.yaml"
    settings.write_text(SITE.replace("  name: files", "  name: files\n  batch: 10"))
    account, _ = try_out(folder, NOW, most=15)
    assert 15 <= account.rows < 50


_KILLED = """
import os, signal, sys
from pathlib import Path
from client.folder import SiteFolder
from client.ingest import ingest

def killed(account):
    if account.rows >= int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

ingest(SiteFolder(Path(sys.argv[1])), int(sys.argv[3]), killed)
"""


def test_a_killed_ingest_goes_on_and_ends_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    site = SITE.replace("  name: files", "  name: files\n  batch: 20")
    rows = [csv_row(number) for number in range(100)]
    folder = site_with(tmp_path / "acme", rows, site)
    export(folder.path, "2.csv", [csv_row(number) for number in range(90, 150)])
    for rows_read in (20, 40, 60):
        killed = subprocess.run(
            [sys.executable, "-c", _KILLED, str(folder.path), str(rows_read), str(NOW)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        visits = stored(folder)
        assert 0 < visits.height < 150
        assert visits["visit"].n_unique() == visits.height
    left: list[int] = []
    ingest(folder, NOW, lambda account: left.append(account.rows))
    assert stored(folder).height == 150
    assert left[-1] < 160 - 20, "what was read before the kills was not read again"

    whole = site_with(tmp_path / "whole", rows, site)
    export(whole.path, "2.csv", [csv_row(number) for number in range(90, 150)])
    for file in ("pseudonyms.json", "erasure.json"):
        os.replace(folder.path / "keys" / file, whole.path / "keys" / file)
    ingest(whole, NOW)
    order = ["visit"]
    same = ["visitor_id", "visit", "channel", "converted", "revenue", "device", "region"]
    assert stored(whole).select(same).sort(order).equals(stored(folder).select(same).sort(order))


def test_a_source_that_now_means_something_else_is_refused(folder: SiteFolder) -> None:
    ingest(folder, NOW)
    before = stored(folder)
    source = "{name: ga4, path: 'export/*.parquet'}"
    changed = f"name: acme\nconsent: {{upstream: true}}\nsource: {source}\n"
    (folder.path / "site.yaml").write_text(changed)
    with pytest.raises(SettingError, match=r"source.name=ga4: was files when the visits in"):
        ingest(folder, NOW)
    assert stored(folder).equals(before)


def test_progress_grows(folder: SiteFolder) -> None:
    seen: list[Account] = []
    ingest(folder, NOW, seen.append)
    assert seen
    assert seen[-1].rows == 50
