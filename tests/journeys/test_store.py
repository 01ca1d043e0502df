from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from journeys.store import MANIFEST, VISITS, Store, StoreError, read_manifest

ROOT = Path(__file__).parents[2]
TABLE = pl.Schema({"number": pl.Int64()})


def some(*numbers: int, month: int = 9) -> pl.DataFrame:
    """Visits with these numbers, on days of one month."""
    return pl.DataFrame(
        [
            {
                "site": "acme",
                "visitor_id": f"v{number % 3}",
                "visit": number,
                "time": datetime(2026, month, 1 + number % 28, tzinfo=UTC),
                "channel": "direct",
                "converted": False,
                "revenue": 0.0,
            }
            for number in numbers
        ],
        schema=VISITS,
    )


def numbers(store: Store) -> list[int]:
    return store.visits().collect()["visit"].to_list()


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_a_new_store_is_empty(store: Store) -> None:
    assert numbers(store) == []
    assert store.visits().collect_schema() == VISITS
    assert store.table("pending", TABLE).is_empty()
    assert Store(store.folder, read_only=True).manifest == store.manifest


def test_what_was_appended_comes_back_in_its_order_with_cursor_and_tables(store: Store) -> None:
    table = pl.DataFrame({"number": [7]}, schema=TABLE)
    store.append(some(3, 1), {"at": 1}, {"pending": table})
    store.append(some(2, 9, month=10), {"at": 2}, {})
    again = Store(store.folder, read_only=True)
    assert numbers(again) == [3, 1, 2, 9]
    assert again.visits().collect().equals(pl.concat([some(3, 1), some(2, 9, month=10)]))
    assert again.manifest.cursor == {"at": 2}
    assert again.table("pending", TABLE).equals(table)
    assert again.month("2026-10").collect()["visit"].to_list() == [2, 9]
    assert again.month("2026-08").collect().is_empty()
    assert again.manifest.rows == 4


def test_months_lie_apart(store: Store) -> None:
    store.append(pl.concat([some(1), some(2, month=10), some(3)]), None, {})
    assert files(store.folder) == {"2026-09/1.parquet", "2026-10/1.parquet"}
    assert store.month("2026-09").collect()["visit"].to_list() == [1, 3]


def test_removing_leaves_no_file_that_holds_the_visits(store: Store) -> None:
    store.append(some(1, 2, 4), None, {})
    store.append(some(5, month=10), None, {})
    store.append(some(3, 6, 9, month=11), None, {})
    # Visitor v1 has 1, 4; v2 has 2, 5; v0 has 3, 6, 9.
    assert store.remove(pl.col("visitor_id").is_in(["v1", "v0"]), {}) == 5
    assert numbers(store) == [2, 5]
    everything = pl.concat([pl.read_parquet(store.folder / file) for file in files(store.folder)])
    assert set(everything["visitor_id"]) == {"v2"}
    assert not (store.folder / "2026-11").exists()
    assert [part.generation for part in store.manifest.parts] == [1, 2]


def test_removing_nothing_changes_nothing(store: Store) -> None:
    store.append(some(1), None, {})
    before = (store.folder / MANIFEST).read_bytes()
    assert store.remove(pl.col("visit") == 8, {}) == 0
    assert store.remove(pl.lit(True), {}, last_month="2026-08") == 0
    assert (store.folder / MANIFEST).read_bytes() == before


def test_compacting_keeps_all_in_order_and_the_first_generation(store: Store) -> None:
    for number in range(1, 6):
        store.append(some(number), None, {})
    store.append(some(6, month=10), None, {})
    store.compact(most=4)
    assert [part.month for part in store.manifest.parts] == ["2026-10", "2026-09"]
    assert store.month("2026-09").collect()["visit"].to_list() == [1, 2, 3, 4, 5]
    assert {part.month: part.generation for part in store.manifest.parts} == {
        "2026-09": 1,
        "2026-10": 6,
    }
    assert len(files(store.folder)) == 2
    generation = store.manifest.generation
    store.compact(most=4)
    assert store.manifest.generation == generation


def test_one_writer_and_any_reader(store: Store) -> None:
    with pytest.raises(StoreError, match="another process writes"):
        Store(store.folder)
    Store(store.folder, read_only=True)
    store.close()
    with Store(store.folder) as other:
        other.append(some(1), None, {})


def test_a_reader_changes_nothing(store: Store) -> None:
    reader = Store(store.folder, read_only=True)
    with pytest.raises(StoreError, match="for reading only"):
        reader.append(some(1), None, {})
    store.append(some(2), None, {})
    assert numbers(Store(store.folder, read_only=True)) == [2]


def test_a_file_that_the_manifest_does_not_name_is_none_of_the_store(store: Store) -> None:
    store.append(some(1), None, {})
    stray = store.folder / "2026-09" / "9.parquet"
    some(2).write_parquet(stray)
    assert numbers(Store(store.folder, read_only=True)) == [1]
    store.close()
    with Store(store.folder) as again:
        assert numbers(again) == [1]
    assert not stray.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 2}', b'{"format": 1}', b"\xff"])
def test_a_damaged_manifest_is_refused_and_nothing_deleted(store: Store, content: bytes) -> None:
    store.append(some(1), None, {})
    store.close()
    (store.folder / MANIFEST).write_bytes(content)
    for read_only in (True, False):
        with pytest.raises(StoreError, match=r"manifest.json: damaged; put back"):
            Store(store.folder, read_only=read_only)
    assert files(store.folder) == {"2026-09/1.parquet"}


def test_a_damaged_or_missing_part_is_named(store: Store) -> None:
    store.append(some(1, 2), None, {})
    path = store.folder / "2026-09" / "1.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"1.parquet: damaged"):
        Store(store.folder, read_only=True)
    path.unlink()
    with pytest.raises(StoreError, match=r"1.parquet: cannot be read"):
        Store(store.folder, read_only=True)


def test_there_is_no_store_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store of visits"):
        read_manifest(tmp_path)
    with pytest.raises(StoreError, match="no store of visits"):
        Store(tmp_path / "nix", read_only=True)


# ------------------------------------------------------------------ killed

_KILLED = """
import os, signal, sys
from pathlib import Path
import polars as pl
from journeys import store as module
from tests.journeys.test_store import TABLE, some

folder, change, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def count(function):
    def counted(*arguments, **options):
        global steps
        if steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        steps -= 1
        return function(*arguments, **options)
    return counted

os.fsync = count(os.fsync)
Path.replace = count(Path.replace)
Path.unlink = count(Path.unlink)
pl.DataFrame.write_parquet = count(pl.DataFrame.write_parquet)
store = module.Store(folder)
match change:
    case "append":
        more = pl.concat([some(7), some(8, month=10)])
        store.append(more, {"at": 2}, {"pending": pl.DataFrame({"number": [2]}, schema=TABLE)})
    case "remove":
        gone = pl.col("visitor_id") == "v1"
        store.remove(gone, {"pending": pl.DataFrame({"number": [2]}, schema=TABLE)})
    case "compact":
        store.compact(most=1)
"""


def content(folder: Path) -> dict[str, Any]:
    store = Store(folder, read_only=True)
    return {
        "visits": sorted(numbers(store)),
        "cursor": store.manifest.cursor,
        "pending": store.table("pending", TABLE)["number"].to_list(),
    }


@pytest.mark.parametrize("change", ["append", "remove", "compact"])
def test_killed_at_any_step_a_change_is_whole_or_not_at_all(tmp_path: Path, change: str) -> None:
    after = {
        "append": {"visits": [1, 2, 3, 4, 7, 8], "cursor": {"at": 2}, "pending": [2]},
        "remove": {"visits": [2, 3], "cursor": {"at": 1}, "pending": [2]},
        "compact": {"visits": [1, 2, 3, 4], "cursor": {"at": 1}, "pending": [1]},
    }[change]
    found = []
    for steps in range(40):
        folder = tmp_path / str(steps)
        with Store(folder) as store:
            table = pl.DataFrame({"number": [1]}, schema=TABLE)
            store.append(some(1, 2), {"at": 1}, {"pending": table})
            store.append(some(3, 4), {"at": 1}, {})
        before = content(folder)
        killed = subprocess.run(
            [sys.executable, "-c", _KILLED, str(folder), change, str(steps)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert killed.returncode in (0, -9), killed.stderr
        now = content(folder)
        assert now in (before, after)
        with Store(folder) as store:
            named = {part.file for part in store.manifest.parts}
            assert files(folder) == named | set(store.manifest.tables.values())
        assert content(folder) == now
        found.append(now == after)
        if killed.returncode == 0:
            break
    assert killed.returncode == 0
    assert len(found) > 5
    assert found == sorted(found), "once it is there, it stays"
    assert found[-1]
    if change != "compact":
        assert not found[0]


def test_the_manifest_is_json_that_says_what_is_in_the_store(store: Store) -> None:
    store.append(some(1, 2), {"at": 1}, {})
    read = json.loads((store.folder / MANIFEST).read_text())
    assert read["parts"][0]["month"] == "2026-09"
    assert read["parts"][0]["rows"] == 2
