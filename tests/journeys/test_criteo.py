from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf.compose import load
from conf.schema import CriteoData, FeatureConfig, NumericColumn, SettingError
from journeys.criteo import (
    EPOCH,
    HEADER,
    Impressions,
    converting_rows,
    is_converting,
    read_criteo,
    read_impressions,
)
from journeys.errors import JourneyDataError
from journeys.features import FIRST
from journeys.hashing import hash_text
from journeys.sites import load_sites
from journeys.table import touchpoint_schema

SECRET = "s3cret"
FEATURES = FeatureConfig(
    channels=["one", "two", "three"],
    categorical={"cat1": ["a"]},
    numeric={"click": NumericColumn(known_at_end=True)},
)


def impression(**cells: Any) -> dict[str, str]:
    """A line of the file; what is not given is as without a click and a conversion."""
    ordinary = {
        "timestamp": 0,
        "uid": 20073966,
        "campaign": 22589171,
        "conversion": 0,
        "conversion_timestamp": -1,
        "conversion_id": -1,
        "attribution": 0,
        "click": 0,
        "click_pos": -1,
        "click_nb": -1,
        "cost": "1.0000000000000001e-05",
        "cpo": 0.3,
        "time_since_last_click": -1,
        **{f"cat{i}": 5824233 + i for i in range(1, 10)},
    }
    return {name: str(cell) for name, cell in (ordinary | cells).items()}


def impressions(rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Lines in order of time: a visitor has some ten impressions, and converts after a few."""
    rng = np.random.default_rng(seed)
    visitors = rng.integers(0, max(1, rows // 10), rows)
    times = np.sort(rng.integers(0, 30 * 86400, rows))
    converts = visitors % 5 == 0
    return [
        impression(
            timestamp=time,
            uid=f"u{visitor}",
            campaign=int(rng.integers(0, 50)),
            click=int(rng.random() < 0.3),
            conversion=int(convert),
            conversion_id=f"c{visitor}" if convert else -1,
        )
        for time, visitor, convert in zip(times, visitors, converts, strict=True)
    ]


def write(folder: Path, rows: list[dict[str, str]], name: str = "criteo.tsv.gz") -> Path:
    lines = ["\t".join(HEADER), *("\t".join(row.values()) for row in rows)]
    text = ("\n".join(lines) + "\n").encode()
    (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return folder / name


def data(path: Path, **more: Any) -> CriteoData:
    return CriteoData(path=str(path), **{"features": FEATURES, **more})


def test_a_conversion_belongs_to_its_last_impression(tmp_path: Path) -> None:
    pairs = [("a", 1), ("b", 1), ("a", 1), ("a", 2), ("a", 1), ("b", 1), ("c", -1)]
    rows = [
        impression(
            uid=uid, timestamp=min(time, 4), conversion=int(number > 0), conversion_id=number
        )
        for time, (uid, number) in enumerate(pairs)
    ]
    path = write(tmp_path, rows)
    assert converting_rows(path).tolist() == [3, 4, 5]
    assert converting_rows(path, limit=4).tolist() == [1, 2, 3]
    swapped = [
        impression(uid="a", timestamp=t, conversion=1, conversion_id=1) for t in (9, 5, 9, 7)
    ]
    assert converting_rows(write(tmp_path, swapped)).tolist() == [2]


def test_pieces_are_the_file(tmp_path: Path) -> None:
    rows = impressions(100)
    path = write(tmp_path, rows)
    (whole,) = read_impressions(path, ("click",))
    assert whole.table["timestamp"].to_list() == [int(row["timestamp"]) for row in rows]
    pieces = list(read_impressions(path, ("click",), rows=7, limit=95))
    assert pl.concat([piece.table for piece in pieces]).equals(whole.table.head(95))
    converting = converting_rows(path)
    marks = pl.concat([is_converting(piece, converting) for piece in pieces])
    assert marks.equals(is_converting(whole, converting).head(95))
    first: Impressions
    first, *rest = pieces
    again = read_impressions(path, ("click",), rows=7, limit=95, row=7, offset=first.offset)
    assert [piece.row for piece in again] == [piece.row for piece in rest]


def test_encoded_touchpoints(tmp_path: Path) -> None:
    rows = [
        impression(uid="b", timestamp=7, campaign="x", click=1, cat1="a"),
        impression(uid="a", timestamp=9, campaign="y", conversion=1, conversion_id=4),
    ]
    frame = read_criteo(data(write(tmp_path, rows)))
    assert frame.schema == touchpoint_schema(FEATURES, with_site=False)
    texts = pl.DataFrame({"uid": ["b", "a"], "campaign": ["x", "y"]})
    keys = texts.select(hash_text(pl.col("uid")), hash_text(pl.col("campaign")) % 3 + FIRST)
    told = frame.sort("time").select("visitor", "channel", "time", "converted", "click", "cat1")
    assert told.rows() == [
        (keys["uid"][0], keys["campaign"][0], EPOCH + 7, False, 1.0, FIRST),
        (keys["uid"][1], keys["campaign"][1], EPOCH + 9, True, 0.0, 1),
    ]


@pytest.mark.parametrize(
    ("cells", "column", "problem"),
    [
        ({"timestamp": SECRET}, "timestamp", "not whole seconds from 0 to 315360000"),
        ({"timestamp": "-1"}, "timestamp", "not whole seconds from 0 to 315360000"),
        ({"uid": ""}, "uid", "is empty"),
        ({"campaign": ""}, "campaign", "is empty"),
        ({"conversion": SECRET}, "conversion", "not 0 or 1"),
        ({"conversion_id": ""}, "conversion_id", "is empty"),
        ({"click": SECRET}, "click", "not a number"),
        ({"cat9": f"x\t{SECRET}"}, None, "has more columns than the header"),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path,
    cells: dict[str, str],
    column: str | None,
    problem: str,
) -> None:
    rows = [*impressions(40), impression(**cells), *impressions(3), impression(**cells)]
    with pytest.raises(JourneyDataError) as caught:
        read_criteo(data(write(tmp_path, rows)))
    error = caught.value
    assert (error.file, error.row, error.column) == ("criteo.tsv.gz", 41, column)
    assert error.problem == problem
    assert SECRET not in str(error)


def test_lines_are_counted_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dict(read_impressions.__kwdefaults__ or {}, rows=10)
    monkeypatch.setattr(read_impressions, "__kwdefaults__", small)
    for cells in ({"uid": ""}, {"click": "x"}):
        path = write(tmp_path, [*impressions(40), impression(**cells)])
        with pytest.raises(JourneyDataError, match="row 41, column"):
            read_criteo(data(path))


def test_files_that_are_none(tmp_path: Path) -> None:
    whole = write(tmp_path, impressions(2_000)).read_bytes()
    header = "\t".join(HEADER)
    for name, content, problem in (
        ("cut.tsv.gz", whole[:-50], "is not a sound gzip file, or was cut off"),
        ("plain.tsv.gz", header.encode(), "is not a sound gzip file, or was cut off"),
        ("empty.tsv", b"", "has no header line"),
        ("rows.tsv", f"{header}\n".encode(), "has no rows"),
        ("more.tsv", f"{header}\tmore\n".encode(), "has more than 22 columns"),
        ("other.tsv", f"timestamp\t{SECRET}\n".encode(), 'column 2 must be "uid"'),
        ("latin.tsv", f"{header}\n".encode() + b"\xe9", "is not UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(JourneyDataError, match=problem) as caught:
            read_criteo(data(tmp_path / name))
        assert SECRET not in str(caught.value)
    with pytest.raises(JourneyDataError, match="cannot be read: No such file"):
        read_criteo(data(tmp_path / "none.tsv"))


def test_settings_that_contradict_are_refused() -> None:
    for wrong in (
        {"features": FeatureConfig()},
        {"features": FeatureConfig(channels=["a"], numeric={"click_nb": NumericColumn()})},
        {"features": FeatureConfig(channels=["a"], categorical={"attribution": ["1"]})},
        {"limit": -1},
        {"dirichlet_sites": 0},
    ):
        with pytest.raises(SettingError, match=r"^data\."):
            CriteoData(path="t.tsv", **{"features": FEATURES, **wrong})


def test_the_data_group_gives_sites(tmp_path: Path) -> None:
    path = write(tmp_path, impressions(3_000))
    overrides = ["data=criteo", f"data.path={path}", "data.dirichlet_sites=3", "data.limit=2000"]
    config = load(overrides).data
    assert isinstance(config, CriteoData)
    assert len(config.features.channels) == 64
    sites = load_sites(config, seed=1)
    assert [site.name for site in sites] == ["site 0", "site 1", "site 2"]
    uids = {row["uid"] for row in impressions(3_000)[:2_000]}
    assert sum(site.train.visitors + site.holdout.visitors for site in sites) == len(uids)
    labels = np.concatenate([site.train.label for site in sites])
    assert 0 < labels.mean() < 0.2


PATCHES = st.one_of(
    st.binary(max_size=6), st.sampled_from([b"\t", b"\n", b'"', b"\xff", b"-1", b"9" * 20, b"nan"])
)


# 50 lines each.
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), PATCHES), max_size=3))
def test_any_bytes(tmp_path: Path, patches: list[tuple[int, bytes]]) -> None:
    content = bytearray(write(tmp_path, impressions(50), "good.tsv").read_bytes())
    for at, patch in patches:
        content[at % len(content) : at % len(content) + len(patch)] = patch
    (tmp_path / "t.tsv").write_bytes(content)
    try:
        frame = read_criteo(data(tmp_path / "t.tsv"))
    except JourneyDataError:
        return
    assert frame.schema == touchpoint_schema(FEATURES, with_site=False)
    assert frame.null_count().sum_horizontal().item() == 0
    assert frame["channel"].is_between(FIRST, FIRST + 2).all()
