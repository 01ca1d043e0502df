"""Several results side by side: on the terminal, as JSON, and as one page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from server import plots
from server.report import write_comparison
from simulation.worth_joining import METRICS, Result

Row = Mapping[str, object]


def show_results(console: Console, folder: Path, results: Sequence[Result]) -> None:
    """Write `comparison.json` and `comparison.html`, and print their table."""
    text = json.dumps([asdict(result) for result in results], indent=1)
    (folder / "comparison.json").write_text(text + "\n")
    rows = [
        {
            "approach": result.approach,
            "learning rate": f"{result.learning_rate:g}",
            **{
                f"{heading}, {over}": interval_text(getattr(result, over)[name])
                for over in ("mean", "pooled")
                for name, heading in METRICS.items()
            },
        }
        for result in results
    ]
    pictures = [
        (
            f"{heading}: mean over sites and all visitors together",
            plots.intervals(
                [result.approach for result in results],
                {
                    "mean over sites": [result.mean[name] for result in results],
                    "all visitors": [result.pooled[name] for result in results],
                },
                heading,
            ),
        )
        for name, heading in METRICS.items()
    ]
    pictures.append(
        (
            "ROC-AUC of each site",
            plots.intervals(
                list(results[0].sites),
                {r.approach: [site["roc_auc"] for site in r.sites.values()] for r in results},
                "ROC-AUC",
            ),
        )
    )
    notes = [
        "Every approach trained with the same number of rounds and steps, and chose its learning "
        "rate from the same three on visitors set apart from training.",
        "All figures are on visitors that no training saw. Dots are the values, lines are 95 % "
        "bootstrap intervals over visitors.",
        "The privacy of a federated approach is for each visitor, over the whole run. The choice "
        "of the learning rate is not counted in it: a simulation may look, a federation may not.",
    ]
    show_comparison(console, folder, "Is joining worth it?", rows, pictures, notes)


def show_comparison(
    console: Console,
    folder: Path,
    title: str,
    rows: Sequence[Row],
    pictures: Sequence[tuple[str, str]],
    notes: Sequence[str],
) -> None:
    """Write `comparison.html` and print its table."""
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)
    page = write_comparison(folder, title, rows, pictures, notes)
    console.print(f"report: {page}", soft_wrap=True)


def interval_text(interval: tuple[float, float, float], form: str = ".3f") -> str:
    """(lower end, value, upper end) as "value [lower, upper]", each formatted by `form`."""
    low, value, high = (format(number, form) for number in interval)
    return f"{value} [{low}, {high}]"
