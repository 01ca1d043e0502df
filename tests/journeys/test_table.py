from __future__ import annotations

import base64
import io
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf.schema import ColumnNames, FeatureConfig, NumericColumn, SettingError, TableData
from journeys.errors import JourneyDataError
from journeys.features import FIRST, OTHER
from journeys.hashing import hash_text
from journeys.table import EARLIEST, LATEST, in_order, read_touchpoints, touchpoint_schema

FEATURES = FeatureConfig(
    channels=["direct", "email"],
    campaign_buckets=8,
    categorical={"device": ["desktop", "mobile"]},
    numeric={"duration_s": NumericColumn(0, 100, log=True), "pages": NumericColumn(10, 20)},
)
CELLS = {
    "visitor_id": "anna",
    "time": "2026-03-01T10:30:00Z",
    "channel": "email",
    "campaign": "spring",
    "device": "mobile",
    "duration_s": "9",
    "pages": "15",
    "converted": "true",
}
SECRET = "PERSONAL-VALUE"


def table_config(path: Path) -> TableData:
    return TableData(
        path=str(path),
        columns=ColumnNames(campaign="campaign"),
        features=FEATURES,
        site_column=None,
    )


def write_csv(path: Path, rows: Sequence[Mapping[str, str | None]]) -> Path:
    """Rows differ from CELLS by what they give."""
    pl.DataFrame([{**CELLS, **row} for row in rows], infer_schema_length=None).write_csv(path)
    return path


def read_csv(tmp_path: Path, rows: Sequence[Mapping[str, str | None]]) -> pl.DataFrame:
    return read_touchpoints(table_config(write_csv(tmp_path / "touchpoints.csv", rows)))


def refused(tmp_path: Path, rows: Sequence[Mapping[str, str | None]]) -> JourneyDataError:
    with pytest.raises(JourneyDataError) as caught:
        read_csv(tmp_path, rows)
    assert SECRET not in str(caught.value)
    return caught.value


# ---------------------------------------------------------------------------- what is read


def test_a_row_is_encoded(tmp_path: Path) -> None:
    frame = read_csv(tmp_path, [{}])
    assert frame.schema == touchpoint_schema(FEATURES, with_site=False)
    row = frame.row(0, named=True)
    expected_key = pl.select(hash_text(pl.lit("anna"))).item()
    assert row["visitor"] == expected_key
    assert row["time"] == datetime(2026, 3, 1, 10, 30, tzinfo=UTC).timestamp()
    assert row["converted"] is True
    assert (row["channel"], row["device"]) == (FIRST + 1, FIRST + 1)
    assert FIRST <= row["campaign"] < FIRST + 8
    assert (row["hour"], row["weekday"]) == (FIRST + 10, FIRST + 6)  # a Sunday
    assert row["duration_s"] == pytest.approx(math.log(10) / math.log(101))
    assert row["pages"] == pytest.approx(0.5)


def test_csv_and_parquet_of_any_types_agree(tmp_path: Path) -> None:
    rows = [{"visitor_id": str(i), "time": f"2026-03-0{i}T01:02:03", "pages": "11"} for i in (1, 2)]
    text = read_csv(tmp_path, rows)
    frame = pl.read_csv(tmp_path / "touchpoints.csv", try_parse_dates=True)
    assert frame["time"].dtype == pl.Datetime("us")
    frame = frame.with_columns(
        pl.col("channel").cast(pl.Categorical), pl.col("pages").cast(pl.UInt8)
    )
    for times in (
        frame["time"],
        frame["time"].dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo"),
        frame["time"].cast(pl.Datetime("ns")),
    ):
        frame.with_columns(times.alias("time")).write_parquet(tmp_path / "touchpoints.parquet")
        typed = read_touchpoints(table_config(tmp_path / "touchpoints.parquet"))
        assert typed.equals(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-03-01T10:30:00Z", (2026, 3, 1, 10, 30, 0)),
        ("2026-03-01 10:30:00", (2026, 3, 1, 10, 30, 0)),
        ("2026-03-01T10:30:59.999999+00:00", (2026, 3, 1, 10, 30, 59)),
        ("2026-03-01T10:30:00.5+02:00", (2026, 3, 1, 8, 30, 0)),
        ("2026-03-01T10:30:00-0530", (2026, 3, 1, 16, 0, 0)),
        ("2026-03-01T10:30+01:00", (2026, 3, 1, 9, 30, 0)),
        ("2026-03-01T10:30", (2026, 3, 1, 10, 30, 0)),
        ("2026-03-01", (2026, 3, 1, 0, 0, 0)),
        ("2024-02-29T23:59:59Z", (2024, 2, 29, 23, 59, 59)),
    ],
)
def test_times(tmp_path: Path, text: str, expected: tuple[int, ...]) -> None:
    year, month, day, *clock = expected
    utc = datetime(year, month, day, *clock, tzinfo=UTC)  # type: ignore[arg-type,misc]
    assert read_csv(tmp_path, [{"time": text}])["time"].to_list() == [utc.timestamp()]


@given(
    st.datetimes(datetime(1990, 1, 2), datetime(2099, 12, 30), timezones=st.timezones()),
    st.sampled_from(["auto", "seconds", "milliseconds", "minutes"]),
    st.sampled_from("T "),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_times_as_python_writes_them(
    tmp_path: Path, time: datetime, precision: str, separator: str
) -> None:
    text = time.isoformat(separator, precision)
    parsed = datetime.fromisoformat(text)
    if len(text) > 6 and text[-6] not in "+-":
        return  # an offset to the second: not ISO 8601
    read = read_csv(tmp_path, [{"time": text}])["time"].item()
    assert read == math.floor(parsed.timestamp())


@pytest.mark.parametrize("yes", ["true", "TRUE", "True", "1", "yes"])
@pytest.mark.parametrize("no", ["false", "FALSE", "0", "No"])
def test_booleans(tmp_path: Path, yes: str, no: str) -> None:
    rows = [{"converted": yes}, {"converted": no, "time": "2026-03-02"}]
    assert read_csv(tmp_path, rows)["converted"].to_list() == [True, False]


def test_missing_features_are_no_error(tmp_path: Path) -> None:
    empty = {"channel": None, "campaign": None, "device": "", "duration_s": None, "pages": ""}
    row = read_csv(tmp_path, [empty, {"visitor_id": "x"}]).filter(pl.col("channel") == OTHER)
    assert row.select("channel", "campaign", "device").row(0) == (OTHER, OTHER, OTHER)
    assert row.select("duration_s", "pages").row(0) == (0, 0)


def test_numbers_are_cut_to_the_public_range(tmp_path: Path) -> None:
    rows = [{"pages": "-1e300", "duration_s": "-5"}, {"pages": "1e300", "duration_s": "1e9"}]
    frame = read_csv(tmp_path, rows)
    assert frame["pages"].to_list() == [0, 1]
    assert frame["duration_s"].to_list() == [0, 1]


def test_the_frame_is_in_order_and_ties_keep_the_tables_order(tmp_path: Path) -> None:
    times = ["2026-03-02", "2026-03-01", "2026-03-02", "2026-03-01"]
    rows = [
        {"visitor_id": visitor, "time": time, "pages": str(11 + i)}
        for i, (visitor, time) in enumerate((v, t) for v in ("a", "b") for t in times)
    ]
    frame = read_csv(tmp_path, rows[::-1])
    expected = frame.sample(fraction=1, shuffle=True, seed=1).sort("visitor", "time")
    assert frame.select("visitor", "time").equals(expected.select("visitor", "time"))
    for _, visitor in frame.group_by("visitor"):
        pages = [round(10 * x) for x in visitor["pages"]]
        offset = min(pages) - 1
        assert [page - offset for page in pages] == [4, 2, 3, 1]
    assert in_order(frame) is frame


def test_rows_without_ids_are_visitors_of_their_own_whatever_the_others(tmp_path: Path) -> None:
    rows = [{"pages": str(11 + i % 5)} for i in range(12)]
    path = write_csv(tmp_path / "touchpoints.csv", rows)
    columns = ColumnNames(visitor_id="", campaign="campaign")
    config = replace(table_config(path), columns=columns)
    keys = set(read_touchpoints(config)["visitor"])
    assert len(keys) == 12
    for left_out in range(12):
        write_csv(path, rows[:left_out] + rows[left_out + 1 :])
        others = set(read_touchpoints(config)["visitor"])
        assert others < keys
        assert len(others) == 11


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("visitor_id", "", "is empty"),
        ("time", SECRET, "not ISO-8601"),
        ("time", "2026-02-30", "not ISO-8601"),
        ("time", "2026-03-01T24:00:00Z", "not ISO-8601"),
        ("time", "2026-03-01T10", "not ISO-8601"),
        ("time", "2026-3-1", "not ISO-8601"),
        ("time", "2026-03-01T10:30:00Z ", "not ISO-8601"),
        ("time", "1767225600", "not ISO-8601"),
        ("time", "", "is empty"),
        ("time", "1989-12-31T23:59:59Z", "is before 1990 or after 2100"),
        ("time", "2101-01-01", "is before 1990 or after 2100"),
        ("converted", SECRET, "not true/false, 1/0 or yes/no"),
        ("converted", "2", "not true/false, 1/0 or yes/no"),
        ("converted", "", "is empty"),
        ("pages", SECRET, "not a number"),
        ("pages", "1,5", "not a number"),
        ("pages", "NaN", "not a finite number"),
        ("duration_s", "-inf", "not a finite number"),
    ],
)
def test_a_bad_cell_is_named(tmp_path: Path, column: str, value: str, problem: str) -> None:
    error = refused(tmp_path, [{}, {}, {column: value}, {}, {column: value}])
    assert (error.row, error.column, error.problem) == (3, column, problem)
    assert str(error) == f'touchpoints.csv, row 3, column "{column}": {problem}'


def test_the_first_bad_row_is_named_over_all_columns(tmp_path: Path) -> None:
    error = refused(tmp_path, [{}, {"pages": "x"}, {"visitor_id": ""}])
    assert (error.row, error.column) == (2, "pages")


def test_an_empty_text_is_as_empty_as_none(tmp_path: Path) -> None:
    path = tmp_path / "touchpoints.csv"
    path.write_text(",".join(CELLS) + '\n"",' + ",".join(list(CELLS.values())[1:]) + "\n")
    with pytest.raises(JourneyDataError, match='row 1, column "visitor_id": is empty'):
        read_touchpoints(table_config(path))


@pytest.mark.parametrize(
    ("column", "values", "problem"),
    [
        ("time", [datetime(2026, 1, 1), datetime(1970, 1, 1)], "is before 1990 or after 2100"),
        ("time", [date(2026, 1, 1), None], "is empty"),
        ("pages", [1.0, math.nan], "not a finite number"),
        ("pages", ["1", SECRET], "not a number"),
        ("converted", [1, 2], "not true/false, 1/0 or yes/no"),
        ("converted", [True, None], "is empty"),
        ("visitor_id", [7, None], "is empty"),
    ],
)
def test_a_bad_parquet_cell_is_named(
    tmp_path: Path, column: str, values: list[object], problem: str
) -> None:
    path = tmp_path / "touchpoints.parquet"
    frame = pl.DataFrame([CELLS, CELLS]).with_columns(pl.Series(column, values))
    frame.write_parquet(path)
    with pytest.raises(JourneyDataError) as caught:
        read_touchpoints(table_config(path))
    error = caught.value
    assert (error.row, error.column, error.problem) == (2, column, problem)


@pytest.mark.parametrize("column", ["visitor_id", "time", "channel", "pages"])
def test_a_parquet_column_of_a_foreign_type_is_named(tmp_path: Path, column: str) -> None:
    path = tmp_path / "touchpoints.parquet"
    pl.DataFrame([CELLS]).with_columns(pl.Series(column, [[1]])).write_parquet(path)
    with pytest.raises(JourneyDataError, match=r"holds List\(Int64\)") as caught:
        read_touchpoints(table_config(path))
    assert caught.value.column == column


def test_a_missing_column_is_named_with_its_nearest(tmp_path: Path) -> None:
    path = tmp_path / "touchpoints.csv"
    pl.DataFrame([CELLS]).rename({"converted": "is_converted"}).write_csv(path)
    with pytest.raises(JourneyDataError, match="no such column; nearest: is_converted") as caught:
        read_touchpoints(table_config(path))
    assert caught.value.column == "converted"


def test_a_missing_site_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "touchpoints.csv", [{"shop": "north"}, {"shop": None}])
    with pytest.raises(JourneyDataError, match='row 2, column "shop": is empty'):
        read_touchpoints(replace(table_config(path), site_column="shop"))


def test_a_table_without_any_known_channel_is_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, [{"channel": "Email"}])
    assert error.column == "channel"
    assert "no row has a channel" in error.problem


def test_unreadable_files(tmp_path: Path) -> None:
    header, row = ",".join(CELLS), ",".join(CELLS.values())
    contents = {
        "has no rows": f"{header}\n".encode(),
        "is not UTF-8 text": f"{header}\n{row}\n".encode().replace(b"anna", b"\xff\xfe"),
        "row 2: has 9 fields, the header has 8": f"{header}\n{row}\n{row},{SECRET}\n".encode(),
        "not a sound CSV": b"",
    }
    path = tmp_path / "touchpoints.csv"
    for problem, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(JourneyDataError, match=problem) as caught:
            read_touchpoints(table_config(path))
        assert SECRET not in str(caught.value)
        assert caught.value.__cause__ is None
    for name, problem in (
        ("none.csv", "no such file"),
        ("none.parquet", "no such file"),
        ("touchpoints.xlsx", r"must be a \.parquet or a \.csv file"),
    ):
        with pytest.raises(JourneyDataError, match=problem):
            read_touchpoints(table_config(tmp_path / name))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(JourneyDataError, match="not a sound Parquet file"):
        read_touchpoints(table_config(tmp_path / "bad.parquet"))


def test_settings_that_contradict_are_refused() -> None:
    for wrong in (
        {"decision": "visit"},
        {"columns": ColumnNames(time="")},
        {"columns": ColumnNames(channel="")},
        {"features": FeatureConfig(campaign_buckets=4)},
        {"decision": "snapshot", "snapshot_at": "soon"},
        {"holdout_from": "2026-13-01"},
    ):
        with pytest.raises(SettingError, match=r"^data\."):
            TableData(path="t.csv", **wrong)
    for clash in ("time", "channel", "hour", "gap"):
        with pytest.raises(SettingError, match=clash):
            FeatureConfig(numeric={clash: NumericColumn()})


# ---------------------------------------------------------------------------- any bytes at all


def _valid_bytes() -> tuple[bytes, bytes]:
    rows = [
        CELLS | {"visitor_id": f"v{i % 3}", "time": f"2026-03-0{i + 1}T10:30:00+01:00"}
        for i in range(4)
    ]
    frame = pl.DataFrame(rows)
    parquet = io.BytesIO()
    frame.with_columns(pl.col("pages").cast(pl.Int64)).write_parquet(parquet)
    return frame.write_csv().encode(), parquet.getvalue()


CSV, PARQUET = _valid_bytes()
FRAGMENTS = [b'"', b",", b"\n", b"\r\n", b"\x00", b"\xff", b"\xef\xbb\xbf", b"NaN", b"-1e999", b"+"]


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """A few bytes of `valid` replaced, inserted or cut out, now and then all of them."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        width = draw(st.integers(0, 4))
        patch = draw(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=4)))
        content[at : at + width] = patch
    if draw(st.integers(0, 9)) == 0:
        del content[draw(st.integers(0, len(content))) :]
    return bytes(content)


def check_reads_or_refuses(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        frame = read_touchpoints(table_config(path))
    except JourneyDataError:
        return
    assert frame.schema == touchpoint_schema(FEATURES, with_site=False)
    assert frame.null_count().sum_horizontal().item() == 0
    assert len(frame) > 0
    assert frame["time"].is_between(EARLIEST, LATEST).all()
    numbers = frame.select(pl.col(pl.Float32))
    assert numbers.select(pl.all().is_between(0, 1).all()).row(0) == (True, True)
    assert frame["channel"].is_between(OTHER, FIRST + 1).all()
    assert frame["campaign"].is_between(OTHER, FIRST + 7).all()


def fuzz(inputs: int) -> settings:
    return settings(
        max_examples=inputs,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


@pytest.mark.slow
@fuzz(3_500)
@given(mutated(CSV))
def test_mutated_csv(tmp_path: Path, content: bytes) -> None:
    check_reads_or_refuses(tmp_path / "t.csv", content)


@pytest.mark.slow
@fuzz(6_420)
@given(st.binary(max_size=400))
def test_random_bytes_as_csv(tmp_path: Path, content: bytes) -> None:
    check_reads_or_refuses(tmp_path / "t.csv", content)


# Few: each starts a process.
@pytest.mark.slow
@fuzz(80)
@given(st.one_of(mutated(PARQUET), st.binary(max_size=400).map(lambda b: b"PAR1" + b + b"PAR1")))
def test_damaged_parquet(tmp_path: Path, content: bytes) -> None:
    check_reads_or_refuses(tmp_path / "t.parquet", content)


ABORTING = (
    "eNqFUs1u00AQ3jVJKKKHHjIrW/LBl1qtiIrjktpGXDYQkkApbiQahZubtUlEaqP81AkX3oHXgQNPwBNw4MCpvABH"
    "ZhITbjDSzs83s58/724oe3UogQ32KQbGWBlXfBWNJxVM1HgaD+fAQICowQfYgwogfovmPt3l5Y8Mdo0Gq+wZ+u3h"
    "KErTeAJM6GIplnbH3mFIWYVqwcxx1ck5SIhwDfQ/hBqiOuflpLLluzPM0ut4Oo/VmlEJZd9w+zNnhik64AvcgdkN"
    "hxNKQTMedUrTLJtDCTXta1s9++zUpAHC/nIWqNAN06jZX7j57/8QPzSoMvurZv5fn/ilgWDiGxe6vYOhSkL1Xdnr"
    "vew/nA1HeLj6d36f7ESStcj511gvz4t6DT2XciYfr+O5vBdiP88J70r5ppjrUnTINcm9eIJD/mBLuplrPpWFbfrP"
    "KB24wUJdXaxU++It1R7xr/LtpvZG2itJH292iR9ji/Sg5Ru+8D3xtdYtgtpn2aDfWLzu55LpZ2E2iaYz6+Ddaj7K"
    "0kMLT2s2zlLLPaofOdbB5WI8UZaXBI57qY6TRLlekviuqj9wPT9ygsgNGkniJl4Uq8A9NGp4YXRnP/EJhfhqfwOc"
    "GJk1"
)
"""A Parquet file, deflated, with one byte changed in a validity bitmap: polars 2.1 asks for 2^61
bytes and aborts its process."""


def test_parquet_that_aborts_polars_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(zlib.decompress(base64.b64decode(ABORTING)))
    config = TableData(
        path=str(path),
        columns=ColumnNames(visitor_id="", time=""),
        decision="visit",
        features=FeatureConfig(channels=["email", "direct"], clock=False),
    )
    with pytest.raises(JourneyDataError, match="not a sound Parquet file"):
        read_touchpoints(config)
