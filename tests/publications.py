"""What tests of publications share: a hub's certificates, a small model, and it signed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from conf.compose import load
from conf.schema import LogisticConfig
from journeys.features import feature_spec
from models.registry import initial_weights
from models.saved import save
from protocol.exchange import Parts
from protocol.publication import (
    GUARD,
    MANIFEST,
    MODEL,
    PUBLISH,
    REPORT,
    Publication,
    Statement,
    digests,
)
from protocol.replies import Weights
from protocol.signature import sign
from protocol.wire import to_text
from server.certificates import create_authority, issue_server, issue_signer
from tests.visits import NOW

FEATURES = load(["data=site", "data.path=store"]).data.features
CONFIG = LogisticConfig()


def hub(folder: Path, now: int = NOW) -> Path:
    """A folder with all certificates of a new hub."""
    folder.mkdir(parents=True)
    create_authority(folder, "shops", now)
    issue_server(folder, ["hub.example.org"], now)
    issue_signer(folder, now)
    return folder


def model_files(folder: Path, weights: Weights | None = None, **changes: Any) -> dict[str, bytes]:
    """A model's files by name, its manifest with `changes`, and a report."""
    if weights is None:
        weights = initial_weights(CONFIG, feature_spec(FEATURES), seed=1)
    folder.mkdir(parents=True, exist_ok=True)
    said = {"lookback_days": 30.0, "horizon_days": 7.0}
    save(folder / MODEL, weights, CONFIG, FEATURES, said)
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    return {
        MODEL: (folder / MODEL).read_bytes(),
        MANIFEST: json.dumps(manifest).encode(),
        REPORT: f"{GUARD}<h1>Ünï</h1>\r\n".encode(),
    }


def small_weights() -> Weights:
    return initial_weights(CONFIG, feature_spec(FEATURES), seed=1)


def with_value(weights: Weights, value: float) -> Weights:
    """The same weights, but for one value."""
    name = max(weights, key=lambda one: weights[one].size)
    changed = weights[name].copy()
    changed.flat[-1] = value
    return {**weights, name: np.asarray(changed, np.float32)}


def signed(certificates: Path, files: dict[str, bytes], **changes: Any) -> Publication:
    """The files signed by the hub's signer, the statement with `changes`."""
    said = {"federation": "shops", "purpose": "conversion-model", "run": "spring", "time": NOW}
    statement = Statement(**{**said, "sha256": digests(files), **changes})
    key, certificate = (
        (certificates / name).read_bytes() for name in ("signing.key", "signing.crt")
    )
    signature = sign(statement.document, key, certificate)
    return Publication(statement, signature, files[MANIFEST].decode(), files[REPORT].decode())


def sent(certificates: Path, files: dict[str, bytes], **changes: Any) -> Parts:
    """The same as it travels, whatever is wrong with it."""
    return Parts({PUBLISH: to_text(signed(certificates, files, **changes))}, files[MODEL])
