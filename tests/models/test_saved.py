from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from conf.schema import (
    AttentionConfig,
    ColumnNames,
    FeatureConfig,
    GruConfig,
    LogisticConfig,
    MlpConfig,
    ModelConfig,
    NumericColumn,
    TableData,
)
from journeys.errors import JourneyDataError
from journeys.features import feature_spec
from journeys.hashing import hash_text
from models import SavedModel, SavedModelError, load
from models.registry import build
from models.saved import save
from models.weights import get_weights

torch.set_num_threads(1)

FEATURES = FeatureConfig(
    channels=["email", "paid search", "direct"],
    max_touchpoints=4,
    categorical={"device": ["mobile", "desktop"]},
    numeric={"pages": NumericColumn(0, 50, log=True, known_at_end=True)},
)
CONFIGS: list[ModelConfig] = [LogisticConfig(), MlpConfig(), GruConfig(), AttentionConfig()]
TOUCHPOINTS = """\
visitor_id,time,channel,device,pages,converted
ann,2026-01-02T10:00:00Z,email,mobile,3,false
ann,2026-01-03T11:30:00Z,direct,mobile,9,true
bob,2026-01-02T09:00:00Z,paid search,desktop,1,false
cat,2026-01-05T23:59:00Z,carrier pigeon,tablet,,false
"""


def save_new(folder: Path, config: ModelConfig, **statements: Any) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(1)
    model = build(config, feature_spec(FEATURES)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    path = folder / "model.safetensors"
    save(path, get_weights(model), config, FEATURES, statements)
    return path, model


def table(folder: Path, text: str = TOUCHPOINTS) -> TableData:
    path = folder / "touchpoints.csv"
    path.write_text(text)
    return TableData(
        path=str(path),
        features=FeatureConfig(channels=["of", "no", "use"]),
        columns=ColumnNames(),
        decision="snapshot",
        snapshot_at="2026-01-10",
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.name))
def test_a_model_comes_back_as_it_was(config: ModelConfig, tmp_path: Path) -> None:
    path, model = save_new(tmp_path, config, privacy=["epsilon 1"], origin={"run": "r"})
    loaded = load(path)
    assert isinstance(loaded, SavedModel)
    assert type(loaded.model) is type(model)
    assert not loaded.model.training
    assert loaded.features == FEATURES
    assert loaded.manifest["privacy"] == ["epsilon 1"]
    assert loaded.manifest["origin"] == {"run": "r"}
    for name, value in get_weights(model).items():
        assert np.array_equal(get_weights(loaded.model)[name], value)
    scores = loaded.score_table(table(tmp_path))["likelihood"].to_numpy()
    assert np.array_equal(
        scores, SavedModel(model, FEATURES, {}).score_table(table(tmp_path))["likelihood"]
    )
    assert len(set(scores)) == 3
    assert load(str(path)).features == FEATURES


def test_score_table_gives_one_row_a_visitor(tmp_path: Path) -> None:
    path, _ = save_new(tmp_path, GruConfig())
    scores = load(path).score_table(table(tmp_path))
    assert scores.schema == {
        "visitor": pl.UInt64,
        "decision_time": pl.Int64,
        "likelihood": pl.Float64,
    }
    keys = pl.DataFrame({"id": ["ann", "bob", "cat"]}).select(hash_text(pl.col("id"))).to_series()
    assert sorted(scores["visitor"]) == sorted(keys)
    assert set(scores["decision_time"]) == {1_768_003_200}
    assert scores["likelihood"].is_between(0, 1, closed="none").all()


def test_score_table_reads_as_the_model_was_trained(tmp_path: Path) -> None:
    path, _ = save_new(tmp_path, GruConfig())
    model = load(path)
    scores = dict(model.score_table(table(tmp_path)).select("visitor", "likelihood").iter_rows())
    other = TOUCHPOINTS.replace(
        "bob,2026-01-02T09:00:00Z,paid search", "bob,2026-01-02T09:00:00Z,email"
    )
    changed = dict(
        model.score_table(table(tmp_path, other)).select("visitor", "likelihood").iter_rows()
    )
    assert scores.keys() == changed.keys()
    assert sum(scores[visitor] != changed[visitor] for visitor in scores) == 1


def test_score_table_says_what_is_wrong_with_the_table(tmp_path: Path) -> None:
    path, _ = save_new(tmp_path, LogisticConfig())
    model = load(path)
    with pytest.raises(JourneyDataError, match=r"nowhere\.csv"):
        model.score_table(replace(table(tmp_path), path=str(tmp_path / "nowhere.csv")))
    with pytest.raises(JourneyDataError, match="device"):
        model.score_table(table(tmp_path, TOUCHPOINTS.replace("device", "gadget")))


def test_manifest_says_which_bytes_it_is_of(tmp_path: Path) -> None:
    path, _ = save_new(tmp_path, GruConfig(embedding=3, hidden=2))
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert manifest["format"] == 1
    assert manifest["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["model"] == {"name": "gru", "base_rate": 0.08, "embedding": 3, "hidden": 2}
    assert manifest["features"]["channels"] == FEATURES.channels


def test_any_flipped_byte_of_the_weights_is_detected(tmp_path: Path) -> None:
    path, _ = save_new(tmp_path, GruConfig(embedding=3, hidden=2))
    data = path.read_bytes()
    for position in [0, 7, 8, 50, len(data) // 2, len(data) - 1]:
        broken = bytearray(data)
        broken[position] ^= 1
        path.write_bytes(broken)
        with pytest.raises(SavedModelError, match=r"model\.safetensors: damaged, its SHA-256"):
            load(path)
    path.write_bytes(data[:-1])
    with pytest.raises(SavedModelError, match="damaged"):
        load(path)
    path.write_bytes(data)
    load(path)


def drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return change


def put(value: object, *keys: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        drop("format"),
        put(2, "format"),
        drop("sha256"),
        put("0" * 64, "sha256"),
        put(None, "sha256"),
        drop("model"),
        put("gru", "model"),
        put(None, "model"),
        put("lstm", "model", "name"),
        put([], "model", "name"),
        put("mlp", "model", "name"),
        put(7, "model", "hidden"),
        put("7", "model", "hidden"),
        put(-1, "model", "hidden"),
        put(2.5, "model", "hidden"),
        put(None, "model", "base_rate"),
        put(1, "model", "fresh"),
        drop("features"),
        put([], "features"),
        put(["email"], "features", "channels"),
        put(3, "features", "channels"),
        put(None, "features", "categorical"),
        put({"pages": 3}, "features", "numeric"),
        put(None, "features", "numeric"),
        put({"pages": {"low": 2, "high": 1}}, "features", "numeric"),
        put(1, "features", "fresh"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    path, _ = save_new(tmp_path, GruConfig())
    manifest = json.loads(path.with_suffix(".json").read_text())
    change(manifest)
    path.with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.raises(SavedModelError, match=r"^model\.safetensors: "):
        load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": 1}', "[" * 100_000, "\x80\udcff"])
def test_a_manifest_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    path, _ = save_new(tmp_path, LogisticConfig())
    path.with_suffix(".json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SavedModelError, match=r"^model\.safetensors: "):
        load(path)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_missing_file_is_named(suffix: str, tmp_path: Path) -> None:
    path, _ = save_new(tmp_path, LogisticConfig())
    path.with_suffix(suffix).unlink()
    with pytest.raises(SavedModelError, match=r"model\.safetensors: cannot be read"):
        load(path)


@pytest.mark.parametrize("data", [b"", b"\x80\x04K\x01.", b"PK\x03\x04" + b"\0" * 40, b"\xff" * 64])
def test_bytes_that_are_no_weights_are_refused_even_if_the_manifest_names_them(
    data: bytes, tmp_path: Path
) -> None:
    path, _ = save_new(tmp_path, LogisticConfig())
    path.write_bytes(data)
    manifest = json.loads(path.with_suffix(".json").read_text())
    manifest["sha256"] = hashlib.sha256(data).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.raises(SavedModelError, match="does not fit"):
        load(path)
