"""A run on the terminal: progress while it works, a table at the end."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from evaluation.metrics import metrics
from server.history import EvaluationReport, RoundReport, plus_minus

if TYPE_CHECKING:
    from server.outcome import Outcome

COLUMNS = {
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC",
    "log_loss": "log-loss",
    "normalised_entropy": "norm. entropy",
    "expected_calibration_error": "calib. error",
}


def open_console() -> Console:
    """The terminal; a file or a pipe, which says no width, is wide enough for every table."""
    return Console(width=None if sys.stdout.isatty() else 140)


class RunProgress:
    """A progress bar over rounds; silent where the output is not a terminal."""

    def __init__(self, console: Console, rounds: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[news]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("rounds", total=rounds, news="preparing journeys")
        self._epsilon = ""
        self._quality = ""

    def __enter__(self) -> RunProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, line: str) -> None:
        """Say something above the bar, which a file or a pipe gets too."""
        self._progress.console.print(line, highlight=False, markup=False)

    def watch(self, report: RoundReport | EvaluationReport) -> None:
        """Show the newest figures."""
        if isinstance(report, RoundReport):
            spent = report.epsilon
            self._epsilon = f"epsilon {spent:.2f}" if spent is not None else "unprotected"
            self._progress.update(self._task, completed=report.round)
            if not report.completed:
                self._progress.console.print(f"round {report.round} failed: {report.reason}")
            for failure in report.failures:
                self._progress.console.print(
                    f"round {report.round}: {failure.site} {failure.outcome}: {failure.reason}"
                )
        else:
            values = metrics(report.histogram)
            self._quality = f"ROC-AUC {values.roc_auc:.3f}  log-loss {values.log_loss:.4f}"
            for failure in report.failures:
                self._progress.console.print(
                    f"evaluation after round {report.round}: {failure.site} {failure.outcome}: "
                    f"{failure.reason}"
                )
        self._progress.update(self._task, news=f"{self._epsilon}  {self._quality}")


def show_outcome(console: Console, outcome: Outcome) -> None:
    """The result in one table, and where the report is."""
    summary = outcome.summary
    table = Table(title=summary["title"], title_justify="left")
    table.add_column("site")
    for heading in ("held out", *COLUMNS.values(), "epsilon"):
        table.add_column(heading, justify="right")
    table.add_row("all sites", *_cells(summary["global"], summary["epsilon"]), style="bold")
    noise = [plus_minus(summary["band"][key], summary["global"][key]) for key in COLUMNS]
    if any(noise):
        table.add_row("noise (90 %)", "", *noise, style="dim")
    table.add_section()
    for name, site in summary["sites"].items():
        table.add_row(name, *_cells(site["metrics"], site["epsilon"]))
    table.add_section()
    for baseline in summary["baselines"]:
        areas = [_number(baseline[key]) for key in ("roc_auc", "pr_auc")]
        table.add_row(baseline["name"], "", *areas, style="dim")
    console.print(table)
    if summary["delta"] is None:
        console.print("unprotected: nothing hides a visitor in this model")
    elif summary["epsilon"] is None:
        console.print("no site's update came: this is the model that the run began with")
    else:
        warning = "; seeded noise, for simulation only" if summary["seeded"] else ""
        console.print(
            f"epsilon {summary['epsilon']:.3f} at delta {summary['delta']:g} for each visitor, "
            f"over the whole run{warning}"
        )
    console.print(f"report: {outcome.report}", soft_wrap=True)


def _cells(values: dict[str, Any] | None, epsilon: float | None) -> list[str]:
    held_out = "–" if values is None else f"{values['examples']:.0f}"  # noqa: RUF001
    numbers = [_number(None if values is None else values[key]) for key in COLUMNS]
    return [held_out, *numbers, "–" if epsilon is None else f"{epsilon:.2f}"]  # noqa: RUF001


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"  # noqa: RUF001
