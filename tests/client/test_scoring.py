from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from client.scoring import OutputError, score, write_scores
from conf.compose import load
from conf.schema import ColumnNames, FeatureConfig, LogisticConfig, NumericColumn, TableData
from journeys.errors import JourneyDataError
from journeys.features import feature_spec
from journeys.hashing import hash_text
from journeys.store import VISITS, StoreError
from models import SavedModelError
from models.registry import build
from models.saved import load as load_model
from models.saved import save
from models.weights import get_weights
from tests.visits import store_of, stored

torch.set_num_threads(1)

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
AT = int(NOON.timestamp())
FEATURES = load(["data=site", "data.path=store"]).data.features


def visit(visitor: str, days_ago: float, **changes: Any) -> dict[str, Any]:
    return stored(visitor, NOON - timedelta(days=days_ago), **changes)


def store(folder: Path, *appended: Sequence[dict[str, Any]]) -> Path:
    return store_of(folder / "store", *appended)


def model(folder: Path, features: FeatureConfig = FEATURES, **statements: Any) -> Path:
    """A model of random weights."""
    torch.manual_seed(1)
    module = build(LogisticConfig(), feature_spec(features))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    path = folder / "model.safetensors"
    said = {"lookback_days": 30.0, "horizon_days": 7.0} | statements
    save(path, get_weights(module), LogisticConfig(), features, said)
    return path


def visitors(scores: pl.DataFrame) -> set[str]:
    return set(scores["visitor_id"])


# ---------------------------------------------------------------------------- who is scored


def test_one_row_a_visitor_with_the_models_likelihood_of_its_own_journey(tmp_path: Path) -> None:
    channels = FEATURES.channels
    visits = [
        visit(f"v{i}", days, channel=channels[(i + int(days)) % len(channels)], page_views=i % 7)
        for i in range(25)
        for days in (1, 4.5, 20)[: 1 + i % 3]
    ]
    folder, path = store(tmp_path, visits[::2], visits[1::2]), model(tmp_path)
    scores = score(folder, path, AT)
    assert scores.schema == {
        "visitor_id": pl.String,
        "likelihood": pl.Float64,
        "decile": pl.Int8,
    }
    assert sorted(scores["visitor_id"]) == sorted({v["visitor_id"] for v in visits})
    assert scores["likelihood"].n_unique() > 15
    # Each alone, from a file of its own.
    for visitor, likelihood, _ in scores.head(8).iter_rows():
        alone = tmp_path / "alone.parquet"
        own = [v for v in visits if v["visitor_id"] == visitor]
        pl.DataFrame(own, schema=VISITS).write_parquet(alone)
        table = TableData(
            path=str(alone),
            columns=ColumnNames(),
            decision="snapshot",
            snapshot_at="2026-03-01T12:00:00Z",
        )
        found = load_model(path).score_table(table)
        assert found["visitor"].item() == pl.select(hash_text(pl.lit(visitor))).item()
        assert found["likelihood"].item() == pytest.approx(likelihood, rel=1e-6)


def test_only_who_came_within_the_lookback_and_before_the_decision(tmp_path: Path) -> None:
    second = 1 / 86400
    folder = store(
        tmp_path,
        [
            visit("recent", 1),
            visit("just before", second),
            visit("at the decision", 0),
            visit("after", -1),
            visit("just within", 30 - second),
            visit("just too long ago", 30),
            visit("twice", 45),
            visit("twice", 3),
        ],
    )
    within = {"recent", "just before", "just within", "twice"}
    assert visitors(score(folder, model(tmp_path), AT)) == within
    # The look-back is the model's.
    short = model(tmp_path, lookback_days=2)
    assert visitors(score(folder, short, AT)) == {"recent", "just before"}


def test_what_came_later_has_no_influence(tmp_path: Path) -> None:
    before = [visit("ann", 2), visit("bob", 3, channel="direct")]
    after = [visit("ann", -1, channel="display", converted=True), visit("cat", -2)]
    path = model(tmp_path)
    first = score(store(tmp_path / "1", before), path, AT)
    assert score(store(tmp_path / "2", before, after), path, AT).equals(first)


def test_nobody_came_of_late(tmp_path: Path) -> None:
    scores = score(store(tmp_path, [visit("ann", 90)]), model(tmp_path), AT)
    assert scores.is_empty()
    assert scores.columns == ["visitor_id", "likelihood", "decile"]


# ---------------------------------------------------------------------------- deciles


@pytest.mark.parametrize("count", [1, 3, 10, 25, 1000])
def test_deciles_are_tenths_of_the_visitors_most_likely_first(tmp_path: Path, count: int) -> None:
    visits = [visit(f"{i:04}", 1 + i / 50) for i in range(count)]
    scores = score(store(tmp_path, visits), model(tmp_path), AT)
    likelihood = scores["likelihood"].to_numpy()
    assert (np.diff(likelihood) <= 0).all()
    assert scores["decile"].to_list() == [1 + 10 * place // count for place in range(count)]
    if count == 1000:
        assert scores.group_by("decile").len()["len"].to_list() == [100] * 10


def test_equals_are_in_order_of_their_pseudonyms(tmp_path: Path) -> None:
    folder = store(tmp_path, [visit(name, 1) for name in "dbeac"])
    scores = score(folder, model(tmp_path), AT)
    assert scores["likelihood"].n_unique() == 1
    assert scores["visitor_id"].to_list() == list("abcde")
    assert scores["decile"].to_list() == [1, 3, 5, 7, 9]


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("kind", ["categorical", "numeric"])
def test_a_model_that_needs_a_column_that_no_store_has(tmp_path: Path, kind: str) -> None:
    column: Any = {"categorical": ["x"], "numeric": NumericColumn()}[kind]
    path = model(tmp_path, FeatureConfig(channels=["email"], **{kind: {"basket": column}}))
    with pytest.raises(
        JourneyDataError, match=r'model\.safetensors, column "basket": the model needs this column'
    ):
        score(store(tmp_path, [visit("ann", 1)]), path, AT)


def test_a_model_of_campaigns_and_further_columns_of_a_store(tmp_path: Path) -> None:
    features = FeatureConfig(
        channels=["email"],
        campaign_buckets=16,
        categorical={"region": ["europe"]},
        numeric={"bounced": NumericColumn()},
    )
    visits = [visit("ann", 1, campaign="spring"), visit("bob", 1, campaign="summer")]
    scores = score(store(tmp_path, visits), model(tmp_path, features), AT)
    assert scores["likelihood"].n_unique() == 2


@pytest.mark.parametrize("lookback", [None, "30", 0, -1, float("inf")])
def test_a_model_that_does_not_say_its_lookback(tmp_path: Path, lookback: object) -> None:
    path = model(tmp_path, lookback_days=lookback)
    with pytest.raises(SavedModelError, match=r"^model\.safetensors: .*lookback_days"):
        score(store(tmp_path, [visit("ann", 1)]), path, AT)


def test_a_store_that_cannot_be_used(tmp_path: Path) -> None:
    path = model(tmp_path)
    with pytest.raises(StoreError, match="no store of visits"):
        score(tmp_path / "store", path, AT)
    with pytest.raises(JourneyDataError, match="holds no visits"):
        score(store(tmp_path), path, AT)
    folder = store(tmp_path, [visit("ann", 1)])
    part = next(folder.glob("*/*.parquet"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(StoreError, match=rf"{part.name}: damaged"):
        score(folder, path, AT)


# ---------------------------------------------------------------------------- the file


SCORES = pl.DataFrame(
    {"visitor_id": ["b", "a"], "likelihood": [0.5, 0.25], "decile": [1, 6]},
    schema_overrides={"decile": pl.Int8},
)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_the_file_is_whole_and_for_the_owner_alone(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scores.{suffix}"
    path.write_text("an older one")
    path.chmod(0o644)
    write_scores(SCORES, path)
    read = pl.read_parquet(path) if suffix == "parquet" else pl.read_csv(path)
    assert read.rows() == SCORES.rows()
    assert read.columns == SCORES.columns
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"scores\.xlsx: must be a \.parquet or a \.csv file"):
        write_scores(SCORES, tmp_path / "scores.xlsx")
    with pytest.raises(
        OutputError, match=r"scores\.csv: cannot be written: No such file"
    ) as caught:
        write_scores(SCORES, tmp_path / "nowhere" / "scores.csv")
    assert ".scores.csv" not in str(caught.value)
    (tmp_path / "scores.csv").mkdir()
    with pytest.raises(OutputError, match=r"scores\.csv: cannot be written: Is a directory"):
        write_scores(SCORES, tmp_path / "scores.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]
