"""Scores a site's visitors with a trained model. The scores are for the site alone."""

from __future__ import annotations

import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from conf.schema import ColumnNames, FeatureConfig, TableData
from journeys.errors import JourneyDataError
from journeys.hashing import hash_text
from journeys.store import VISITS, Store
from models.saved import SavedModelError, load


class OutputError(ValueError):
    """A file that cannot be written. Names it and what is wrong."""


def score(store: Path, model: Path, at: int) -> pl.DataFrame:
    """How likely each visitor of a store converts within the model's horizon, judged at `at`.

    Args:
        store: The store's folder.
        model: The model's `.safetensors` file, its manifest beside it.
        at: UTC seconds. Only what came before it is looked at.

    Returns:
        One row a visitor with a visit in (at - the model's look-back, at): `visitor_id`, the
        pseudonym; `likelihood`, 0 to 1; `decile`, from 1 for the most likely tenth to 10. The most
        likely first, equals in order of their pseudonym.

    Raises:
        SavedModelError: The model's files are damaged, or do not say its look-back.
        JourneyDataError: The store is empty, or the model needs a column that it lacks.
        StoreError: There is no store, or it is damaged.
    """
    saved = load(model)
    _refuse_foreign_columns(saved.features, model.name)
    table = TableData(
        path=str(store),
        columns=ColumnNames(campaign="campaign"),
        decision="snapshot",
        snapshot_at=datetime.fromtimestamp(at, UTC).isoformat(),
        lookback_days=_lookback_days(saved.manifest, model.name),
    )
    with Store(store, read_only=True) as opened:
        scores = saved.score_table(table)
        visitors = opened.visits().select("visitor_id").unique()
    scored = visitors.with_columns(visitor=hash_text(pl.col("visitor_id"))).join(
        scores.lazy(), on="visitor"
    )
    ranked = scored.sort("likelihood", "visitor_id", descending=[True, False])
    return ranked.select(
        "visitor_id",
        "likelihood",
        decile=(pl.int_range(pl.len()) * 10 // pl.len() + 1).cast(pl.Int8),
    ).collect(engine="streaming")


def write_scores(scores: pl.DataFrame, path: Path) -> None:
    """Write a `.parquet` or `.csv` file that the owner alone can read, whole or not at all.

    Raises:
        OutputError: Another suffix, or the folder cannot be written to.
    """
    if path.suffix not in (".parquet", ".csv"):
        raise OutputError(f"{path}: must be a .parquet or a .csv file")
    try:
        # Made with mode 0600.
        descriptor, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(descriptor, "wb") as file:
                if path.suffix == ".parquet":
                    scores.write_parquet(file)
                else:
                    scores.write_csv(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, path)
        except BaseException:
            os.unlink(staged)
            raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None


def _refuse_foreign_columns(features: FeatureConfig, model: str) -> None:
    for column in (*features.categorical, *features.numeric):
        if column not in VISITS:
            raise JourneyDataError(
                model,
                "the model needs this column, which a site's store does not have; train "
                "one with data=site",
                column=column,
            )


def _lookback_days(manifest: dict[str, object], model: str) -> float:
    days = manifest.get("lookback_days")
    if not isinstance(days, int | float) or not 0 < days < 36_525:
        raise SavedModelError(f"{model}: the manifest does not say the model's lookback_days")
    return float(days)
