from __future__ import annotations

import gzip
import os
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.channels import channel
from client.sources.criteo import Criteo
from client.sources.source import VISITS, Batch, Cursor, SourceError
from conf.site import CriteoSource
from journeys.criteo import EPOCH, HEADER

SECRET = "s3cret"


def line(uid: str, second: object, conversion: int = -1, campaign: str = "c") -> str:
    cells = [str(second), uid, campaign, str(int(conversion >= 0)), "-1", str(conversion)]
    return "\t".join([*cells, *["0"] * 7, *["9"] * 9])


def write(folder: Path, lines: list[str], name: str = "criteo.tsv.gz") -> Path:
    text = "\n".join(["\t".join(HEADER), *lines]).encode()
    (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return folder / name


def read(folder: Path, cursor: Cursor | None = None, batch: int = 1_000) -> list[Batch]:
    source = Criteo(CriteoSource(path="criteo.*", batch=batch), folder)
    batches = list(source.batches(cursor, 0))
    assert all(batch.visits.schema == VISITS for batch in batches)
    return batches


def visits(batches: list[Batch]) -> pl.DataFrame:
    return pl.concat([VISITS.to_frame(), *(batch.visits for batch in batches)])


def test_impressions_are_visits(tmp_path: Path) -> None:
    write(tmp_path, [line("a", 0, 7), line("b", 3), line("a", 5, 7, "d"), line("a", 9)])
    (batch,) = read(tmp_path)
    told = ["visitor_id", "visit_id", "time", "campaign", "converted", "revenue"]
    assert batch.visits.select(told).rows() == [
        ("a", "0", EPOCH, "c", False, 0.0),
        ("b", "1", EPOCH + 3, "c", False, 0.0),
        ("a", "2", EPOCH + 5, "d", True, 0.0),
        ("a", "3", EPOCH + 9, "c", False, 0.0),
    ]
    assert batch.visits.select(channel())["channel"].unique().to_list() == ["display"]
    assert batch.visits["consent"].null_count() == 4


def test_bad_lines_are_left_out_and_convert_nothing(tmp_path: Path) -> None:
    lines = [line("a", 0, 7), line("a", SECRET, 7), line("", 3, 7), line("a", 4, 7) + "\t1"]
    write(tmp_path, [*lines, line("a", 5, 7, campaign="")], "criteo.tsv")
    (batch,) = read(tmp_path)
    assert batch.visits.select("visit_id", "converted").rows() == [("0", True)]
    assert batch.rows == 5
    assert sorted((one.reason, one.count, one.first) for one in batch.skipped) == [
        ("cannot be taken apart into its columns", 1, "criteo.tsv, row 4"),
        ('column "campaign": is empty', 1, "criteo.tsv, row 5"),
        ('column "timestamp": not whole seconds from 0 to 315360000', 1, "criteo.tsv, row 2"),
        ('column "uid": is empty', 1, "criteo.tsv, row 3"),
    ]


@pytest.mark.parametrize("name", ["criteo.tsv", "criteo.tsv.gz"])
def test_any_cursor_goes_on_where_it_was_taken(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, [line(f"u{i % 4}", i, i % 4) for i in range(11)], name)
    whole = visits(read(tmp_path))
    assert whole["converted"].to_list() == [False] * 7 + [True] * 4
    batches = read(tmp_path, batch=3)
    assert [len(batch.visits) for batch in batches] == [3, 3, 3, 2]
    for done, batch in enumerate(batches, start=1):
        rest = read(tmp_path, batch.cursor, batch=2)
        assert visits([*batches[:done], *rest]).equals(whole)
    assert read(tmp_path, batches[-1].cursor) == []
    os.utime(path, ns=(0, 1))
    assert visits(read(tmp_path, batches[0].cursor)).equals(whole)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    source = Criteo(CriteoSource(path="criteo.*"), tmp_path)
    with pytest.raises(SourceError, match=r"there is no such \.tsv"):
        source.check()
    path = write(tmp_path, [line(f"u{i}", i) for i in range(9_999)])
    source.check()
    path.write_bytes(path.read_bytes()[:-99])
    with pytest.raises(SourceError, match=r"^criteo.tsv.gz: is not a sound gzip file") as caught:
        read(tmp_path)
    assert caught.value.__cause__ is None
    path.write_bytes(gzip.compress(b"timestamp\tuser\n"))
    for refused in (source.check, lambda: read(tmp_path)):
        with pytest.raises(SourceError, match='column 2 must be "uid"'):
            refused()


PATCHES = st.one_of(
    st.binary(max_size=6), st.sampled_from([b"\t", b"\n", b'"', b"\xff", b"-1", b"9" * 20])
)


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), PATCHES), max_size=4))
def test_any_bytes(tmp_path: Path, patches: list[tuple[int, bytes]]) -> None:
    lines = [line(f"u{i % 3}", i, i % 3) for i in range(12)]
    content = bytearray(write(tmp_path, lines, "good.tsv").read_bytes())
    for at, patch in patches:
        content[at % len(content) : at % len(content) + len(patch)] = patch
    (tmp_path / "criteo.tsv").write_bytes(content)
    try:
        batches = read(tmp_path, batch=5)
    except SourceError:
        return
    for batch in batches:
        assert batch.rows == len(batch.visits) + sum(one.count for one in batch.skipped)
        needed = batch.visits.select("visitor_id", "visit_id", "time", "converted", "revenue")
        assert needed.null_count().sum_horizontal().item() == 0
