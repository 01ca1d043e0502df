"""What happened in a run, round by round, in `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluation.band import Band, noise_band
from evaluation.histogram import ScoreHistogram
from evaluation.metrics import Metrics, metrics
from journeys.durable import naming, write_durably
from journeys.site import natural_order
from protocol.replies import SiteEvaluation, SiteFailure, SiteUpdate


@dataclass(frozen=True)
class RoundReport:
    """How a training round went."""

    round: int
    completed: bool
    """Did the global model move? False leaves it bit-identical."""
    reason: str
    """Why it failed; empty where it completed."""
    seconds: float
    delta: float | None
    updates: list[SiteUpdate]
    failures: list[SiteFailure]

    @property
    def epsilon(self) -> float | None:
        """The largest privacy loss of a visitor over the sites so far; None: unprotected."""
        spent = [update.epsilon for update in self.updates if update.epsilon is not None]
        return max(spent, default=None)

    def record(self) -> dict[str, Any]:
        """As one line of `metrics.jsonl`."""
        trained = {
            update.site: {"outcome": "trained", "reason": "", "epsilon": update.epsilon}
            for update in self.updates
        }
        failed = {
            failure.site: {"outcome": failure.outcome, "reason": failure.reason, "epsilon": None}
            for failure in self.failures
        }
        told = {**trained, **failed}
        return {
            "kind": "round",
            "round": self.round,
            "completed": self.completed,
            "reason": self.reason,
            "seconds": round(self.seconds, 4),
            "epsilon": self.epsilon,
            "delta": self.delta,
            "sites": {site: told[site] for site in sorted(told, key=natural_order)},
        }


@dataclass(frozen=True)
class EvaluationReport:
    """How the model after `round` rounds does on visitors that training never saw."""

    round: int
    evaluations: list[SiteEvaluation]
    failures: list[SiteFailure]

    @cached_property
    def histogram(self) -> ScoreHistogram:
        """Over all sites."""
        histograms = [e.histogram for e in self.evaluations] or [ScoreHistogram.empty()]
        return sum(histograms[1:], histograms[0]).without_noise_below_zero()

    @cached_property
    def band(self) -> Band:
        """How far the noise may have moved each metric of `histogram`."""
        noise = math.hypot(*(e.noise for e in self.evaluations))
        return noise_band(self.histogram, noise)

    def record(self) -> dict[str, Any]:
        """As one line of `metrics.jsonl`."""
        return {
            "kind": "evaluation",
            "round": self.round,
            "global": metrics_record(metrics(self.histogram)),
            "band": band_record(self.band),
            "sites": {
                e.site: metrics_record(metrics(e.histogram.without_noise_below_zero()))
                for e in self.evaluations
            },
            "failures": {f.site: {"outcome": f.outcome, "reason": f.reason} for f in self.failures},
        }


class History:
    """The lines of `metrics.jsonl`, appended as they come."""

    def __init__(self, path: Path, keep: int = 0) -> None:
        """Continue the file after its first `keep` lines; later ones are dropped."""
        self._path = path
        lines = path.read_text().splitlines()[:keep] if keep and path.exists() else []
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]
        write_durably(path, "".join(line + "\n" for line in lines).encode())

    def add(self, report: RoundReport | EvaluationReport) -> None:
        """Append one record."""
        record = report.record()
        with naming(self._path), self._path.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        self.records.append(record)


def metrics_record(values: Metrics) -> dict[str, float | None]:
    """Metrics for JSON: what is unknown is null."""
    return {name: None if math.isnan(v) else v for name, v in asdict(values).items()}


def band_record(band: Band) -> dict[str, list[float] | None]:
    """A noise band for JSON: what is unknown is null."""
    return {name: None if math.isnan(low) else [low, high] for name, (low, high) in band.items()}


def plus_minus(band: Sequence[float] | None, value: float | None) -> str:
    """A recorded band around `value` as "± 0.021"; empty where it is unknown or without width."""
    if band is None or value is None or not band[1] > band[0]:
        return ""
    # One of the two ends may have been cut off at the end of the metric's range.
    return f"± {max(band[1] - value, value - band[0]):.3f}"
