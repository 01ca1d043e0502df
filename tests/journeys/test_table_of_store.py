from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from conf.compose import load
from conf.schema import ColumnNames, FeatureConfig, TableData
from journeys.errors import JourneyDataError
from journeys.hashing import hash_text
from journeys.sites import load_sites
from journeys.store import MANIFEST, VISITS, Store
from journeys.table import read_touchpoints
from tests.visits import store_of, stored

SECRET = "PERSONAL-VALUE"


def visit(visitor: str, month: int, day: int = 1, **changes: Any) -> dict[str, Any]:
    return stored(visitor, datetime(2026, month, day, tzinfo=UTC), **changes)


def site_data(path: Path | str) -> TableData:
    data = load(["data=site", f"data.path='{path}'"]).data
    assert isinstance(data, TableData)
    return data


def key(visitor: str) -> int:
    return int(pl.select(hash_text(pl.lit(visitor))).item())


def refused(data: TableData) -> str:
    with pytest.raises(JourneyDataError) as caught:
        read_touchpoints(data)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    return str(caught.value)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ---------------------------------------------------------------------------- what is read


def test_a_store_reads_as_one_table_of_all_its_files(tmp_path: Path) -> None:
    appended = [
        [visit("ann", 1), visit("bob", 1, 2, converted=True), visit("ann", 2, channel="direct")],
        [visit("ann", 1, 3), visit("bob", 3)],
    ]
    folder = store_of(tmp_path / "store", *appended)
    assert len(list(folder.glob("*/*.parquet"))) == 4
    frame = read_touchpoints(site_data(folder))
    whole = tmp_path / "whole.parquet"
    pl.DataFrame([v for visits in appended for v in visits], schema=VISITS).write_parquet(whole)
    assert frame.equals(read_touchpoints(site_data(whole)))
    assert frame.height == 5
    assert set(frame["visitor"]) == {key("ann"), key("bob")}
    assert frame["visitor"].is_sorted()


def test_rows_alike_in_visitor_and_time_keep_the_order_of_the_manifest(tmp_path: Path) -> None:
    folder = store_of(
        tmp_path / "store", *([visit("ann", 1, page_views=pages)] for pages in (7, 3, 9))
    )
    views = read_touchpoints(site_data(folder))["page_views"].to_list()
    assert [sorted(views).index(v) for v in views] == [1, 0, 2]


def test_a_pattern_reads_all_stores_and_each_is_a_site(tmp_path: Path) -> None:
    for site in ("north", "south"):
        visits = [visit(f"{site} {i}", 1, 1 + i % 9, site=site) for i in range(40)]
        store_of(tmp_path / "sites" / site / "store", visits)
    sites = load_sites(site_data(tmp_path / "sites" / "*" / "store"), seed=0)
    assert [site.name for site in sites] == ["north", "south"]
    assert [site.train.visitors + site.holdout.visitors for site in sites] == [40, 40]


def test_a_pattern_of_files_of_both_kinds(tmp_path: Path) -> None:
    first, second = (pl.DataFrame([visit(v, 1)], schema=VISITS) for v in ("ann", "bob"))
    first.write_parquet(tmp_path / "1.parquet")
    second.with_columns(pl.col("time").dt.to_string("iso:strict")).write_csv(tmp_path / "2.csv")
    assert set(read_touchpoints(site_data(tmp_path / "?.*"))["visitor"]) == {key("ann"), key("bob")}


def test_a_file_whose_name_is_a_pattern_is_itself(tmp_path: Path) -> None:
    for name, visitor in (("[12].parquet", "ann"), ("1.parquet", "bob")):
        pl.DataFrame([visit(visitor, 1)], schema=VISITS).write_parquet(tmp_path / name)
    (tmp_path / "[s]").mkdir()
    store_of(tmp_path / "[s]" / "store", [visit("cat", 1)])
    for path, visitor in (("[12].parquet", "ann"), ("[s]/store", "cat")):
        assert set(read_touchpoints(site_data(tmp_path / path))["visitor"]) == {key(visitor)}


def test_rows_without_ids_are_visitors_of_their_own_over_all_files(tmp_path: Path) -> None:
    row = "email,false\n"
    for name in ("1.csv", "2.csv"):
        (tmp_path / name).write_text(f"channel,converted\n{row}{row}")
    data = TableData(
        path=str(tmp_path / "*.csv"),
        columns=ColumnNames(visitor_id="", time=""),
        decision="visit",
        features=FeatureConfig(channels=["email"], clock=False),
    )
    assert read_touchpoints(data)["visitor"].n_unique() == 4


def test_a_file_with_no_known_channel_is_fine_among_others(tmp_path: Path) -> None:
    folder = store_of(tmp_path / "store", [visit("ann", 1, channel="other")], [visit("ann", 2)])
    assert read_touchpoints(site_data(folder)).height == 2
    folder = store_of(tmp_path / "other", [visit("ann", 1, channel="other")])
    assert 'other, column "channel": no row has a channel' in refused(site_data(folder))


def test_what_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    folder = store_of(tmp_path / "store", [visit("ann", 1)])
    pl.DataFrame([visit("eve", 1)], schema=VISITS).write_parquet(folder / "2026-01" / "7.parquet")
    (folder / "8.parquet").write_bytes(b"PAR1")
    assert set(read_touchpoints(site_data(folder))["visitor"]) == {key("ann")}


def test_visits_that_were_removed_are_gone(tmp_path: Path) -> None:
    folder = store_of(tmp_path / "store", [visit("ann", 1), visit("bob", 1)], [visit("bob", 2)])
    with Store(folder) as opened:
        assert opened.remove(pl.col("visitor_id") == "bob", {}) == 2
    assert set(read_touchpoints(site_data(folder))["visitor"]) == {key("ann")}


# ---------------------------------------------------------------------------- what is refused


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    folder = store_of(tmp_path / "store", [visit("ann", 1), visit("bob", 2)])
    path = folder / "2026-02" / "1.parquet"
    flip_a_byte(path)
    problem = "damaged, its SHA-256 is not that of the manifest"
    assert refused(site_data(folder)) == f"{path}: {problem}"
    path.unlink()
    assert refused(site_data(folder)) == f"{path}: cannot be read: No such file or directory"


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    folder = store_of(tmp_path / "store", [visit("ann", 1)])
    (folder / MANIFEST).write_text("{")
    assert refused(site_data(folder)).startswith(f"{folder / MANIFEST}: damaged; ")


def test_an_empty_store_is_refused_also_among_others(tmp_path: Path) -> None:
    store_of(tmp_path / "a" / "store", [visit("ann", 1)])
    empty = store_of(tmp_path / "b" / "store")
    for path in (empty, tmp_path / "*" / "store"):
        assert refused(site_data(path)) == f"{empty}: the store holds no visits; ingest some first"


def test_a_pattern_that_nothing_fits_is_refused(tmp_path: Path) -> None:
    pattern = f"{tmp_path}/sites/*/store"
    assert refused(site_data(pattern)) == f"{pattern}: no file and no store fits this pattern"


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    assert refused(site_data(tmp_path)) == (
        f"{tmp_path}: is a folder without manifest.json, so no site's store"
    )


def test_a_bad_row_of_one_of_many_files_is_named_with_its_file(tmp_path: Path) -> None:
    frame = pl.DataFrame([visit("ann", 1), visit("bob", 1)], schema=VISITS)
    text = frame.with_columns(pl.col("time").dt.to_string("iso:strict"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        text.write_csv(tmp_path / name / "t.csv")
    bad = tmp_path / "b" / "t.csv"
    text.with_columns(time=pl.Series(["2026-01-01", SECRET])).write_csv(bad)
    data = site_data(tmp_path / "*" / "t.csv")
    assert refused(data) == f'{bad}, row 2, column "time": not ISO-8601'
    bad.write_text("channel\nemail\n")
    assert refused(data).startswith(f'{bad}, column "converted": the table has no such column')
    bad.write_bytes((tmp_path / "a" / "t.csv").read_bytes().replace(b"bob", b"\xff\xfe"))
    assert refused(data) == f"{bad}: is not UTF-8 text"
    shutil.copyfile(__file__, bad.with_name("t.py"))
    assert refused(site_data(tmp_path / "b" / "t.p*")) == (
        f"{bad.with_name('t.py')}: must be a .parquet or a .csv file, or a site's store"
    )


def test_a_bad_part_of_many_is_named_with_its_row(tmp_path: Path) -> None:
    folder = store_of(
        tmp_path / "store",
        [visit("ann", 1), visit("bob", 1)],
        [visit("cat", 1), visit("dan", 1, duration_s=float("nan"))],
    )
    assert refused(site_data(folder)) == (
        f'{folder / "2026-01" / "2.parquet"}, row 2, column "duration_s": not a finite number'
    )


def test_an_unsound_parquet_file_of_many_is_named_with_its_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pl.DataFrame([visit("ann", 1)], schema=VISITS).write_parquet(tmp_path / name / "t.parquet")
    bad = tmp_path / "b" / "t.parquet"
    bad.write_bytes(b"PAR1" + bytes(100))
    data = site_data(tmp_path / "*" / "t.parquet")
    assert refused(data) == f"{bad}: is not a sound Parquet file"
    # Alone, a file goes by its own name.
    assert refused(replace(data, path=str(bad))) == "t.parquet: is not a sound Parquet file"
