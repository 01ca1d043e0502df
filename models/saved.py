"""A trained model on disk: weights, and a manifest that says all one needs to use it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError
from torch import nn

from conf.schema import GROUPS, FeatureConfig, ModelConfig, NumericColumn, TableData
from journeys.examples import Examples
from journeys.features import feature_spec
from models.registry import build
from models.score import logits
from models.weights import set_weights

if TYPE_CHECKING:
    import polars as pl


class SavedModelError(ValueError):
    """The files are damaged, or no model of this product. The message names what is wrong."""


@dataclass(frozen=True)
class SavedModel:
    """A model with the features that it reads."""

    model: nn.Module
    features: FeatureConfig
    manifest: dict[str, Any]

    def score(self, examples: Examples) -> npt.NDArray[np.float64]:
        """float64 (N,): the likelihood, 0 to 1, that each journey converts within the horizon."""
        return np.asarray(1.0 / (1.0 + np.exp(-logits(self.model, examples).astype(np.float64))))

    def score_table(self, table: TableData) -> pl.DataFrame:
        """Score each visitor of a touchpoint table, at the decision that `table` describes.

        Returns one row a visitor: `visitor` (UInt64, the key of the visitor id), `decision_time`
        (UTC seconds), `likelihood` (0 to 1). The model's own features replace those of `table`.

        Raises:
            JourneyDataError: The table cannot be used.
        """
        # Training needs none of it, and polars is 28 MB.
        import polars as pl

        from journeys.decisions import decide
        from journeys.encode import encode
        from journeys.table import read_touchpoints

        table = replace(table, features=self.features, contributions=1)
        touchpoints = read_touchpoints(table)
        decisions = decide(touchpoints, table)
        likelihood = self.score(encode(touchpoints, decisions, table))
        return decisions.select("visitor", "decision_time").with_columns(
            likelihood=pl.Series(likelihood)
        )


def save(
    path: Path,
    weights: dict[str, npt.NDArray[np.float32]],
    model: ModelConfig,
    features: FeatureConfig,
    statements: dict[str, Any],
) -> None:
    """Write `path` (.safetensors) and its manifest beside it (.json).

    `statements` are further entries of the manifest: privacy statement, metrics, origin.
    """
    data = safetensors.numpy.save({name: np.ascontiguousarray(v) for name, v in weights.items()})
    path.write_bytes(data)
    manifest = {
        "format": 1,
        "sha256": hashlib.sha256(data).hexdigest(),
        "model": asdict(model),
        "features": asdict(features),
        **statements,
    }
    path.with_suffix(".json").write_text(json.dumps(manifest, indent=2) + "\n")


def load(path: Path | str) -> SavedModel:
    """The model that `save` wrote, on the CPU.

    Raises:
        SavedModelError: A file is missing, damaged or of another format.
    """
    path = Path(path)
    try:
        manifest = json.loads(path.with_suffix(".json").read_bytes())
        data = path.read_bytes()
    except (OSError, ValueError, RecursionError) as error:
        raise SavedModelError(f"{path.name}: cannot be read with its manifest") from error
    if not isinstance(manifest, dict) or manifest.get("format") != 1:
        raise SavedModelError(f"{path.name}: not a model of format 1")
    if hashlib.sha256(data).hexdigest() != manifest.get("sha256"):
        raise SavedModelError(f"{path.name}: damaged, its SHA-256 is not that of the manifest")
    try:
        model_config = GROUPS["model"][manifest["model"]["name"]](**manifest["model"])
        numeric = {
            name: NumericColumn(**column)
            for name, column in manifest["features"]["numeric"].items()
        }
        features = FeatureConfig(**{**manifest["features"], "numeric": numeric})
        model = build(model_config, feature_spec(features))
        set_weights(model, safetensors.numpy.load(data))
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise SavedModelError(f"{path.name}: the manifest does not fit the weights") from error
    return SavedModel(model.eval(), features, manifest)
