"""The state of a run after a round, on disk: whole or not at all."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import safetensors.numpy
from safetensors import SafetensorError, safe_open

from journeys.durable import write_durably
from protocol.replies import Weights
from protocol.stored import tensors_to_bytes

log = logging.getLogger(__name__)

KEPT = 2
"""So many checkpoints stay: when the newest is damaged, the one before it is used."""


@dataclass(frozen=True)
class Checkpoint:
    """All that a coordinator needs to go on."""

    round: int
    """Rounds done, failed ones included."""
    records: int
    """Lines of `metrics.jsonl` that belong to them."""
    weights: Weights
    strategy: Weights
    """The strategy's memory (`Aggregator.state`)."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint beside the earlier ones, then delete the oldest."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        **{f"weights.{name}": value for name, value in checkpoint.weights.items()},
        **{f"strategy.{name}": value for name, value in checkpoint.strategy.items()},
    }
    counters = {"round": str(checkpoint.round), "records": str(checkpoint.records)}
    data = tensors_to_bytes(tensors, counters)
    path = folder / f"round-{checkpoint.round:06d}.safetensors"
    write_durably(path, data)
    # The digest comes second: without it there is no checkpoint.
    write_durably(path.with_suffix(".sha256"), hashlib.sha256(data).hexdigest().encode())
    for old in _digests(folder)[KEPT:]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest sound checkpoint, None where there is none. A damaged one is named in the log."""
    for path in _digests(folder):
        try:
            return _read(path)
        except (OSError, ValueError, SafetensorError) as error:
            log.warning("checkpoint %s is damaged (%s); using the one before it", path.stem, error)
    return None


def _digests(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*.sha256"), reverse=True)


def _read(digest: Path) -> Checkpoint:
    path = digest.with_suffix(".safetensors")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest().encode() != digest.read_bytes():
        raise ValueError("its SHA-256 does not match")
    with safe_open(path, framework="numpy") as file:
        counters = file.metadata()
    parts: dict[str, Weights] = {"weights": {}, "strategy": {}}
    for key, value in safetensors.numpy.load(data).items():
        part, name = key.split(".", 1)
        parts[part][name] = value
    return Checkpoint(int(counters["round"]), int(counters["records"]), **parts)
