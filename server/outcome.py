"""What a finished run leaves in its folder: the model, the summary and the report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.schema import Config, VisitorDP
from evaluation.histogram import ScoreHistogram
from evaluation.metrics import metrics
from journeys.site import natural_order
from protocol.replies import Weights
from server.history import EvaluationReport, History, band_record, metrics_record
from server.statement import privacy_statement

REPORT = "report.html"
"""The page to look at; written last."""


@dataclass(frozen=True)
class Outcome:
    """A run's results, as `summary.json` has them."""

    summary: dict[str, Any]
    folder: Path

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.folder / REPORT


def write_outcome(
    config: Config,
    folder: Path,
    weights: Weights,
    final: EvaluationReport,
    history: History,
    baselines: dict[str, ScoreHistogram],
) -> Outcome:
    """Write `model.safetensors`, `model.json`, `summary.json` and `report.html`."""
    # Here, because it loads torch, for which the rounds have no use.
    from models.saved import save

    rounds = [record for record in history.records if record["kind"] == "round"]
    spent = _last_epsilons(rounds, final)
    epsilon = max(spent.values(), default=None)
    statement = privacy_statement(config, epsilon)
    evaluated = final.record()["sites"]
    sites = sorted({*evaluated, *(s for r in rounds for s in r["sites"])}, key=natural_order)
    summary = {
        "title": f"{len(sites)} sites, {config.model.name}, {_protection(config)}",
        "rounds": config.rounds,
        "seconds": round(sum(record["seconds"] for record in rounds), 2),
        "epsilon": epsilon,
        "delta": config.privacy.delta if isinstance(config.privacy, VisitorDP) else None,
        "seeded": config.runtime.name != "deployment",
        "privacy_statement": statement,
        "global": metrics_record(metrics(final.histogram)),
        "band": band_record(final.band),
        "sites": {
            site: {"metrics": evaluated.get(site), "epsilon": spent.get(site)} for site in sites
        },
        "baselines": [{"name": name, **_areas(histogram)} for name, histogram in baselines.items()],
        "histogram": {
            "negative": final.histogram.negative.tolist(),
            "positive": final.histogram.positive.tolist(),
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    save(
        folder / "model.safetensors",
        weights,
        config.model,
        config.data.features,
        {
            "horizon_days": config.data.horizon_days,
            "lookback_days": config.data.lookback_days,
            "privacy": {**asdict(config.privacy), "spent": epsilon, "statement": statement},
            "metrics": summary["global"],
        },
    )
    # Plots take half a second and 30 MB to load, which a run's rounds do not need.
    from server.report import write_report

    write_report(folder)
    return Outcome(summary, folder)


def _last_epsilons(rounds: list[dict[str, Any]], final: EvaluationReport) -> dict[str, float]:
    spent: dict[str, float] = {}
    for record in rounds:
        for site, told in record["sites"].items():
            if told["epsilon"] is not None:
                spent[site] = told["epsilon"]
    return spent | {e.site: e.epsilon for e in final.evaluations if e.epsilon is not None}


def _areas(histogram: ScoreHistogram) -> dict[str, float | None]:
    record = metrics_record(metrics(histogram))
    return {"roc_auc": record["roc_auc"], "pr_auc": record["pr_auc"]}


def _protection(config: Config) -> str:
    if isinstance(config.privacy, VisitorDP):
        return f"epsilon {config.privacy.epsilon:g}"
    return "unprotected"
