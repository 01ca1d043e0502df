"""The Flower ServerApp: reads the run's overrides and runs the rounds on Flower's grid."""

from __future__ import annotations

import os

# Before Flower is imported: software for privacy tells no one that it runs.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import logging
import shlex
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from conf.compose import load, to_yaml
from server.federation import Federation
from server.history import EvaluationReport, RoundReport
from server.outcome import write_outcome
from server.rounds import run_rounds

log = logging.getLogger(__name__)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train with the sites that are connected when the run starts."""
    config = load(shlex.split(str(context.run_config.get("overrides", ""))))
    folder = Path("runs") / f"flower-{context.run_id}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    sites = len(list(grid.get_node_ids()))
    weights, final, history = run_rounds(Federation(grid), config, sites, folder, _watch)
    outcome = write_outcome(config, folder, weights, final, history, baselines={})
    log.info("report: %s", outcome.report)


def _watch(report: RoundReport | EvaluationReport) -> None:
    log.info("%s", report.record())
