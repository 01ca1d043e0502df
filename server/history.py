"""What happened in a run, round by round, in `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.histogram import ScoreHistogram
from evaluation.metrics import Metrics, metrics
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

    @property
    def histogram(self) -> ScoreHistogram:
        """Over all sites."""
        return sum((e.histogram for e in self.evaluations), ScoreHistogram.empty())

    def record(self) -> dict[str, Any]:
        """As one line of `metrics.jsonl`."""
        return {
            "kind": "evaluation",
            "round": self.round,
            "global": metrics_record(metrics(self.histogram)),
            "sites": {e.site: metrics_record(metrics(e.histogram)) for e in self.evaluations},
        }


class History:
    """The lines of `metrics.jsonl`, appended as they come."""

    def __init__(self, path: Path, keep: int = 0) -> None:
        """Continue the file after its first `keep` lines; later ones are dropped."""
        self._path = path
        lines = path.read_text().splitlines()[:keep] if keep and path.exists() else []
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]
        path.write_text("".join(line + "\n" for line in lines))

    def add(self, report: RoundReport | EvaluationReport) -> None:
        """Append one record."""
        record = report.record()
        with self._path.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        self.records.append(record)


def metrics_record(values: Metrics) -> dict[str, float | None]:
    """Metrics for JSON: what is unknown is null."""
    return {name: None if math.isnan(v) else v for name, v in asdict(values).items()}
