"""The pages that a run leaves behind: one self-contained HTML file each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from omegaconf import OmegaConf

from evaluation.histogram import ScoreHistogram
from evaluation.metrics import calibration_curve, roc_curve
from journeys.durable import write_durably
from server import plots
from server.history import plus_minus
from server.page import PAGE

DASH = "–"  # noqa: RUF001
METRIC_COLUMNS = {
    "examples": "Examples",
    "base_rate": "Base rate",
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC",
    "log_loss": "Log-loss",
    "normalised_entropy": "Norm. entropy",
    "expected_calibration_error": "Calibration error",
}
_SUMMARY_FIELDS = (
    "title", "rounds", "seconds", "epsilon", "delta", "privacy_statement", "global", "band",
    "sites", "baselines", "histogram",
)  # fmt: skip
_RECORD_FIELDS = {
    "round": ("round", "completed", "reason", "epsilon", "sites"),
    "evaluation": ("round", "global", "band", "sites", "failures"),
}
_NAMED_SITES = 5


class RunFolderError(ValueError):
    """A run folder that cannot be reported on. The message names the file."""


@dataclass(frozen=True)
class Figure:
    """One of the large numbers at the top of a page."""

    name: str
    value: str
    notes: Sequence[tuple[str, str]]
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """A table; a column without text in it is right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    first_is_total: bool = False
    if_empty: str = "No rows."

    def numeric(self) -> list[bool]:
        """For each column whether it holds numbers alone."""
        return [
            not any(isinstance(value, str | bool) for value in c)
            for c in zip(*self.rows, strict=True)
        ]


@dataclass(frozen=True)
class Page:
    """What the template shows, from top to bottom."""

    title: str
    statement: Sequence[str]
    plots: Sequence[tuple[str, str]]
    """Caption and SVG text."""
    tables: Sequence[Table]
    subtitle: str = ""
    figures: Sequence[Figure] = ()
    warning: bool = False
    """Shows the statement as a warning."""
    config: str = ""


def write_report(folder: Path) -> Path:
    """Write `report.html` into the run folder, from what the run wrote there.

    Reads `summary.json`, `metrics.jsonl` and `config.yaml`; raises RunFolderError where one of them
    is missing or unreadable.
    """
    summary = _read_summary(folder / "summary.json")
    rounds, evaluations = _read_metrics(folder / "metrics.jsonl")
    config_text, target = _read_config(folder / "config.yaml")
    page = Page(
        title=summary["title"],
        statement=summary["privacy_statement"],
        plots=_plots(summary, rounds, evaluations, target),
        tables=[_site_table(summary), _problem_table(rounds, evaluations)],
        subtitle=_subtitle(summary, rounds),
        figures=_figures(summary, target),
        warning=summary["epsilon"] is None,
        config=config_text,
    )
    return _write(folder / "report.html", page)


def write_comparison(
    folder: Path,
    title: str,
    rows: Sequence[Mapping[str, object]],
    plots: Sequence[tuple[str, str]],
    notes: Sequence[str],
) -> Path:
    """Write `comparison.html` into `folder`: one table, plots as (title, SVG text), notes on top.

    Columns are the keys of `rows` in the order in which they first appear; a missing one is a dash.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table("", columns, [[row.get(column) for column in columns] for row in rows])
    return _write(folder / "comparison.html", Page(title, notes, plots, [table]))


def _write(path: Path, page: Page) -> Path:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    text = environment.from_string(PAGE).render(page=page)
    # Whole or not there at all: a run that has a report is finished.
    write_durably(path, text.encode())
    return path


# reading the run folder


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunFolderError(f"{path}: missing; is this the folder of a finished run?") from None
    except UnicodeDecodeError:
        raise RunFolderError(f"{path}: not UTF-8 text") from None


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise RunFolderError(f"{path}: not JSON ({error})") from None
    missing = [key for key in _SUMMARY_FIELDS if key not in summary]
    if missing:
        raise RunFolderError(f"{path}: lacks {', '.join(missing)}; was it written by this version?")
    return summary


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rounds and the evaluations, each in order."""
    # By round: a resumed run may have run one twice, and what it did last counts.
    records: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in _RECORD_FIELDS}
    for number, line in enumerate(_read(path).removesuffix("\n").split("\n"), start=1):
        try:
            record = json.loads(line)
            known = records[record["kind"]]
            missing = [key for key in _RECORD_FIELDS[record["kind"]] if key not in record]
        except (json.JSONDecodeError, TypeError, KeyError):
            raise RunFolderError(f"{path}, line {number}: not a round or an evaluation") from None
        if missing:
            raise RunFolderError(f"{path}, line {number}: lacks {', '.join(missing)}")
        known[record["round"]] = record
    return list(records["round"].values()), list(records["evaluation"].values())


def _read_config(path: Path) -> tuple[str, float]:
    """The text of the config, and the epsilon that was aimed at (NaN: none)."""
    text = _read(path)
    return text, _number(OmegaConf.select(OmegaConf.create(text), "privacy.epsilon"))


# the parts of the page


def _subtitle(summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> str:
    completed = sum(bool(record["completed"]) for record in rounds)
    parts = [
        f"{completed} of {summary['rounds']} rounds completed",
        f"{len(summary['sites'])} site{'s' if len(summary['sites']) != 1 else ''}",
        f"{_cell(_metric_cells(summary['global'])[0])} examples held out",
        f"{summary['seconds']:,.0f} s",
    ]
    return " · ".join(parts)


def _figures(summary: Mapping[str, Any], target: float) -> list[Figure]:
    measured, baselines = summary["global"], summary["baselines"]

    def noise(key: str) -> list[tuple[str, str]]:
        half = plus_minus(summary["band"].get(key), measured[key])
        return [("noise (90 %)", half)] if half else []

    figures = [
        Figure(
            "ROC-AUC",
            _cell(measured["roc_auc"]),
            [
                *noise("roc_auc"),
                *((line["name"], _cell(line["roc_auc"])) for line in baselines),
                ("chance", "0.500"),
            ],
        ),
        Figure(
            "PR-AUC",
            _cell(measured["pr_auc"]),
            [
                *noise("pr_auc"),
                *((line["name"], _cell(line["pr_auc"])) for line in baselines),
                ("chance", _cell(measured["base_rate"])),
            ],
        ),
        Figure(
            "Normalised entropy",
            _cell(measured["normalised_entropy"]),
            [
                *noise("normalised_entropy"),
                ("always the base rate", "1.000"),
                ("log-loss", _cell(measured["log_loss"])),
                ("calibration error", _cell(measured["expected_calibration_error"])),
            ],
        ),
    ]
    if summary["delta"] is None:
        return [*figures, Figure("Privacy", "unprotected", [("no guarantee for anyone", "")], True)]
    if summary["epsilon"] is None:
        return [*figures, Figure("ε spent", "0", [("no site's update came", "")], True)]
    notes = [("δ", f"{summary['delta']:g}")]
    notes += [("target", f"{target:g}")] if math.isfinite(target) else []
    return [*figures, Figure("ε spent, largest of the sites", f"{summary['epsilon']:.2f}", notes)]


def _plots(
    summary: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    target: float,
) -> list[tuple[str, str]]:
    baselines = {line["name"]: _number(line["roc_auc"]) for line in summary["baselines"]}
    pictures = []
    # What is this model's is of its last round alone.
    fixed = {name: auc for name, auc in baselines.items() if not name.startswith("this model")}
    for key, label, levels in [("roc_auc", "ROC-AUC", fixed), ("log_loss", "Log-loss", {})]:
        title = f"{label} over rounds"
        curves = _curves(evaluations, summary["sites"], key)
        overall = [_number(record["global"][key]) for record in evaluations]
        rounds_evaluated = [record["round"] for record in evaluations]
        bands = [record["band"].get(key) or (math.nan, math.nan) for record in evaluations]
        picture = plots.over_rounds(
            rounds_evaluated, overall, curves, levels, label, title, noise=bands
        )
        pictures.append((title, picture))
    if summary["epsilon"] is not None:
        curves = _curves(rounds, summary["sites"], "epsilon")
        picture = plots.over_rounds(
            [0, *(record["round"] for record in rounds)],
            [0.0, *(_number(record["epsilon"]) for record in rounds)],
            {name: [0.0, *curve] for name, curve in curves.items()},
            {"target": target},
            "ε",
            "Epsilon spent over rounds",
            plots.SQUARE,
        )
        pictures.append(("Privacy spent over rounds", picture))
    histogram = ScoreHistogram(
        np.array(summary["histogram"]["negative"], dtype=np.float64),
        np.array(summary["histogram"]["positive"], dtype=np.float64),
    )
    model = {f"model: {_cell(summary['global']['roc_auc'])}": roc_curve(histogram)}
    notes = [f"{name}: {_cell(value)}" for name, value in baselines.items()]
    pictures.append(("ROC curve", plots.roc(model, notes, "ROC curve of the final model")))
    picture = plots.calibration(*calibration_curve(histogram), "Calibration of the final model")
    pictures.append(("Calibration", picture))
    return pictures


def _curves(
    records: Sequence[Mapping[str, Any]], names: Iterable[str], key: str
) -> dict[str, list[float]]:
    """For each site its values of `key` over `records`, NaN where it has none."""
    return {
        name: [_number((record["sites"].get(name) or {}).get(key)) for record in records]
        for name in names
    }


def _site_table(summary: Mapping[str, Any]) -> Table:
    columns = ["Site", *METRIC_COLUMNS.values(), "ε"]
    rows = [["All sites", *_metric_cells(summary["global"]), summary["epsilon"]]]
    for name, site in summary["sites"].items():
        rows.append([name, *_metric_cells(site["metrics"]), site["epsilon"]])
    if summary["epsilon"] is None:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table("Sites", columns, rows, first_is_total=True)


def _problem_table(
    rounds: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> Table:
    """What did not go as planned, one row for all sites with the same outcome in a round."""
    rows: list[list[object]] = []
    # Sorting keeps the order of equals: a round's training comes before its evaluation.
    for record in sorted([*rounds, *evaluations], key=lambda record: int(record["round"])):
        step = "training" if record["kind"] == "round" else "evaluation"
        if not record.get("completed", True):
            rows.append([record["round"], step, "round failed", record["reason"], "all"])
        alike: dict[tuple[str, str], list[str]] = {}
        for name, site in record["sites" if step == "training" else "failures"].items():
            if site["outcome"] != "trained":
                alike.setdefault((site["outcome"], site["reason"]), []).append(name)
        for (outcome, reason), names in alike.items():
            more = f" and {len(names) - _NAMED_SITES} more" if len(names) > _NAMED_SITES else ""
            sites = ", ".join(names[:_NAMED_SITES]) + more
            rows.append([record["round"], step, outcome, reason, sites])
    return Table(
        "What went wrong",
        ["Round", "Step", "Outcome", "Reason", "Sites"],
        rows,
        if_empty="Nothing: every site answered soundly whenever it was asked.",
    )


def _metric_cells(measured: Mapping[str, Any] | None) -> list[object]:
    values = {key: _number((measured or {}).get(key)) for key in METRIC_COLUMNS}
    if math.isfinite(values["examples"]):
        values["examples"] = round(values["examples"])
    return list(values.values())


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _cell(value: object) -> str:
    """`value` as a table shows it: three decimals, thousands set apart, a dash for unknown."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    if isinstance(value, float):
        if (value == round(value) and abs(value) >= 10) or abs(value) >= 1000:
            return f"{value:,.0f}"
        return f"{value:.3f}" if value == 0 or abs(value) >= 5e-4 else f"{value:.1e}"
    return f"{value:,}" if type(value) is int else str(value)
