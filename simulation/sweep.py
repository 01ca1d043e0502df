"""Hydra's hook at the end of `--multirun`: one table and one plot over all runs.

Hydra imports it at the start of every run, so that what it needs is imported where it is needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf


class SweepComparison(Callback):
    """Compares the runs of a sweep by their summaries."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Gather the summaries below the sweep's folder."""
        from journeys.site import natural_order
        from server import plots
        from server.console import open_console
        from simulation.comparison import show_comparison
        from simulation.worth_joining import METRICS

        folder = Path(str(config.hydra.sweep.dir))
        runs = sorted(
            (path.parent for path in folder.glob("*/summary.json")),
            key=lambda run: natural_order(run.name),
        )
        if not runs:
            return
        rows, labels, areas = [], [], []
        for run in runs:
            summary = json.loads((run / "summary.json").read_text())
            overrides = OmegaConf.load(run / "hydra" / "overrides.yaml")
            quality = summary["global"]
            labels.append(", ".join(str(override) for override in overrides) or run.name)
            areas.append((quality["roc_auc"],) * 3)
            rows.append(
                {
                    "run": run.name,
                    "overrides": labels[-1],
                    **{heading: f"{quality[name]:.3f}" for name, heading in METRICS.items()},
                    "epsilon": _epsilon(summary["epsilon"]),
                }
            )
        picture = plots.intervals(labels, {"ROC-AUC": areas}, "ROC-AUC")
        pictures = [("ROC-AUC of each run", picture)]
        show_comparison(open_console(), folder, f"{len(runs)} runs", rows, pictures, [])


def _epsilon(spent: float | None) -> str:
    return "unprotected" if spent is None else f"{spent:.2f}"
