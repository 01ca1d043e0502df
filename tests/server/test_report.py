from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from evaluation.histogram import NOISED, ScoreHistogram
from evaluation.metrics import Metrics, metrics
from server import plots
from server.report import RunFolderError, write_comparison, write_report

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)> & $x^$ --> {{ 7 * 7 }}'
VOID_TAGS = {"meta", "br", "img", "link", "input"}


# a made-up run


def _record(measured: Metrics) -> dict[str, float | None]:
    return {key: None if math.isnan(v) else v for key, v in asdict(measured).items()}


def _band(measured: Metrics, half: float) -> dict[str, list[float] | None]:
    return {
        key: None if math.isnan(v) else [v - half, v + half] for key, v in asdict(measured).items()
    }


def _histogram(random: np.random.Generator, skill: float, examples: int = 300) -> ScoreHistogram:
    truth = random.normal(-2.5, 1.0, examples)
    labels = (random.random(examples) < 1 / (1 + np.exp(-truth))).astype(np.float32)
    logits = -2.5 + skill * (truth + 2.5) + random.normal(0, 0.5, examples)
    return ScoreHistogram.of(logits.astype(np.float32), labels)


def _write_run(
    folder: Path,
    names: Sequence[str] = ("site 0", "site 1", "site 2"),
    rounds: int = 4,
    protected: bool = True,
    title: str = "made-up run",
    noise: float = 0.0,
) -> Path:
    random = np.random.default_rng(0)
    epsilon, delta = (2.9, 1e-5) if protected else (None, None)
    lines: list[dict[str, Any]] = []
    for number in range(rounds + 1):
        parts = {name: _histogram(random, number / rounds) for name in names}
        total = sum(parts.values(), ScoreHistogram.empty())
        spent = epsilon and epsilon * number / rounds
        if number:
            site = {"outcome": "trained", "reason": "", "epsilon": spent}
            lines.append(
                {
                    "kind": "round",
                    "round": number,
                    "completed": True,
                    "reason": "",
                    "seconds": 1.5,
                    "epsilon": spent,
                    "delta": delta,
                    "sites": {name: dict(site) for name in names},
                }
            )
        lines.append(
            {
                "kind": "evaluation",
                "round": number,
                "global": _record(metrics(total)),
                "band": _band(metrics(total), noise),
                "sites": {name: _record(metrics(part)) for name, part in parts.items()},
                "failures": {},
            }
        )
    summary = {
        "title": title,
        "rounds": rounds,
        "seconds": 41.2,
        "epsilon": epsilon,
        "delta": delta,
        "privacy_statement": ["Said in plain words."],
        "global": _record(metrics(total)),
        "band": _band(metrics(total), noise),
        "sites": {
            name: {"metrics": _record(metrics(part)), "epsilon": epsilon}
            for name, part in parts.items()
        },
        "baselines": [{"name": "last-touch channel", "roc_auc": 0.6125, "pr_auc": 0.1441}],
        "histogram": {"negative": total.negative.tolist(), "positive": total.positive.tolist()},
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(
        "seed: 0\nprivacy:\n  name: visitor_dp\n  epsilon: 3.25\n"
        if protected
        else "seed: 0\nprivacy:\n  name: unprotected\n"
    )
    _write_lines(folder, lines)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def _read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _edit_summary(folder: Path, **changes: object) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# reading a page


class Page(HTMLParser):
    """The elements of a page, its table rows, and whatever it asks a browser to fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.tables: list[list[list[str]]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.pictures: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in VOID_TAGS:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "aria-label" and tag == "svg":
                self.pictures.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID_TAGS:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def _check_self_contained(text: str) -> Page:
    page = Page(text)
    assert page.open == []
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert {found[1:] for found in re.findall(r"url\(([^)]*)\)", text)} <= set(page.ids)
    assert "@import" not in text
    assert not page.handlers
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.count)
    assert len(page.ids) == len(set(page.ids))
    return page


def _report(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    return _check_self_contained(path.read_text(encoding="utf-8"))


# the report


def test_report_shows_what_the_run_measured(tmp_path: Path) -> None:
    page = _report(_write_run(tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    sites, *problems = page.tables
    assert problems == []
    assert [row[0] for row in sites] == ["Site", "All sites", "site 0", "site 1", "site 2"]
    auc = sites[0].index("ROC-AUC")
    assert sites[1][auc] == f"{summary['global']['roc_auc']:.3f}"
    assert sites[3][auc] == f"{summary['sites']['site 1']['metrics']['roc_auc']:.3f}"
    assert sites[1][sites[0].index("Examples")] == "900"
    text = " ".join(page.words)
    for shown in ("made-up run", "Said in plain words.", "2.90", "3.25", "1e-05", "0.613", "0.144"):
        assert shown in text
    assert "every site answered soundly" in text
    assert "noise" not in text
    assert "4 of 4 rounds completed · 3 sites · 900 examples held out · 41 s" in text
    assert page.pictures == [
        "ROC-AUC over rounds",
        "Log-loss over rounds",
        "Epsilon spent over rounds",
        "ROC curve of the final model",
        "Calibration of the final model",
    ]


def test_report_of_an_unprotected_run_warns(tmp_path: Path) -> None:
    page = _report(_write_run(tmp_path, protected=False))
    text = (tmp_path / "report.html").read_text()
    assert 'class="card warning"' in text
    assert 'class="statement warning"' in text
    assert "unprotected" in page.words
    assert "Epsilon spent over rounds" not in page.pictures
    assert "ε" not in page.tables[0][0]


def test_report_lists_what_went_wrong_and_nothing_else(tmp_path: Path) -> None:
    names = [f"site {number}" for number in range(9)]
    folder = _write_run(tmp_path, names)
    lines = _read_lines(folder)
    second, third = (line for line in lines if line["kind"] == "round" and 1 < line["round"] < 4)
    second["sites"]["site 7"].update(
        outcome="dropped", reason="a value is not finite", epsilon=None
    )
    third.update(completed=False, reason="2 of 9 sound updates, 5 needed", epsilon=None)
    for name in names[:7]:
        third["sites"][name].update(outcome="missing", reason="no reply", epsilon=None)
    third["sites"]["site 8"].update(outcome="refused", reason="budget gone", epsilon=None)
    first, *_, last = (line for line in lines if line["kind"] == "evaluation")
    first["failures"] = {"site 3": {"outcome": "dropped", "reason": "a count beyond 1e+12"}}
    last["failures"] = {
        name: {"outcome": "missing", "reason": "no reply"} for name in ("site 1", "site 2")
    }
    _write_lines(folder, lines)
    page = _report(folder)
    assert page.tables[1] == [
        ["Round", "Step", "Outcome", "Reason", "Sites"],
        ["0", "evaluation", "dropped", "a count beyond 1e+12", "site 3"],
        ["2", "training", "dropped", "a value is not finite", "site 7"],
        ["3", "training", "round failed", "2 of 9 sound updates, 5 needed", "all"],
        [
            "3",
            "training",
            "missing",
            "no reply",
            "site 0, site 1, site 2, site 3, site 4 and 2 more",
        ],
        ["3", "training", "refused", "budget gone", "site 8"],
        ["4", "evaluation", "missing", "no reply", "site 1, site 2"],
    ]
    assert any("3 of 4 rounds completed" in word for word in page.words)


@pytest.mark.parametrize(("sites", "rounds"), [(1, 1), (2, 1), (12, 3), (13, 3), (100, 2)])
@pytest.mark.parametrize("protected", [True, False])
def test_report_of_few_and_of_many_sites(
    tmp_path: Path, sites: int, rounds: int, protected: bool
) -> None:
    names = [f"site {number}" for number in range(sites)]
    page = _report(_write_run(tmp_path, names, rounds, protected))
    assert len(page.tables[0]) == sites + 2
    assert ("middle 80 % of sites" in page.words) == (sites > 12)
    assert ("each site" in page.words) == (1 < sites <= 12)


def test_report_leaves_out_what_is_unknown(tmp_path: Path) -> None:
    """One site without conversions, one that never answered, a model without any metric."""
    folder = _write_run(tmp_path)
    lines = _read_lines(folder)
    for line in lines:
        if line["kind"] == "evaluation":
            line["global"] = dict.fromkeys(line["global"])
            line["band"] = dict.fromkeys(line["band"])
            line["sites"]["site 0"].update(roc_auc=None, log_loss=None)
            del line["sites"]["site 1"]
        else:
            line["epsilon"] = None
            del line["sites"]["site 1"]
    _write_lines(folder, lines)
    summary = json.loads((folder / "summary.json").read_text())
    summary["global"] = dict.fromkeys(summary["global"])
    summary["band"] = dict.fromkeys(summary["band"])
    summary["sites"]["site 0"]["metrics"]["roc_auc"] = None
    summary["sites"]["site 1"] = {"metrics": None, "epsilon": None}
    empty = {"negative": [0.0] * 400, "positive": [0.0] * 400}
    baselines = [{"name": "last-touch channel", "roc_auc": None, "pr_auc": None}]
    _edit_summary(folder, **{**summary, "histogram": empty, "baselines": baselines})
    page = _report(folder)
    header, total, first, second, _ = page.tables[0]
    assert total[1:-1] == second[1:-1] == ["–"] * 7  # noqa: RUF001
    assert first[header.index("ROC-AUC")] == "–"  # noqa: RUF001
    assert "nan" not in " ".join(page.words).lower()
    assert page.count["svg"] == 5


def test_report_takes_counts_with_privacy_noise(tmp_path: Path) -> None:
    folder = _write_run(tmp_path)
    counts = np.random.default_rng(1).normal(20, 30, (2, NOISED.count))
    noised = ScoreHistogram(*counts).without_noise_below_zero()
    _edit_summary(
        folder,
        histogram={"negative": noised.negative.tolist(), "positive": noised.positive.tolist()},
    )
    assert _report(folder).count["svg"] == 5


@pytest.mark.parametrize("rounds", [1, 4])
def test_report_shows_what_the_noise_may_have_moved(tmp_path: Path, rounds: int) -> None:
    page = _report(_write_run(tmp_path, rounds=rounds, noise=0.0625))
    assert " ".join(page.words).count("± 0.062") == 3
    # Once in each of the two legends.
    assert page.words.count("90 % band of the noise") == 2


def test_report_takes_a_band_that_is_known_in_one_round_alone(tmp_path: Path) -> None:
    folder = _write_run(tmp_path, noise=0.05)
    lines = _read_lines(folder)
    for line in lines[:-1]:
        if line["kind"] == "evaluation":
            line["band"] = dict.fromkeys(line["band"])
    _write_lines(folder, lines)
    page = _report(folder)
    assert page.words.count("90 % band of the noise") == 2
    assert "nan" not in (folder / "report.html").read_text().lower()


def test_words_from_the_data_stay_words(tmp_path: Path) -> None:
    folder = _write_run(tmp_path, [HOSTILE, "site 1"], title=HOSTILE)
    lines = _read_lines(folder)
    lines[1]["sites"][HOSTILE].update(outcome="dropped", reason=HOSTILE)
    lines[1].update(completed=False, reason=HOSTILE)
    lines[2]["failures"] = {HOSTILE: {"outcome": "dropped", "reason": HOSTILE}}
    _write_lines(folder, lines)
    baselines = [{"name": HOSTILE, "roc_auc": 0.6, "pr_auc": 0.1}]
    _edit_summary(folder, privacy_statement=[HOSTILE], baselines=baselines)
    (folder / "config.yaml").write_text(f"note: '{HOSTILE}'\n")
    page = _report(folder)
    assert page.tables[0][2][0] == HOSTILE
    assert page.tables[1][1][3] == page.tables[1][3][3] == page.tables[1][3][4] == HOSTILE
    assert page.words.count(HOSTILE) >= 11
    assert "49" not in page.words


def test_of_a_round_run_twice_the_last_counts(tmp_path: Path) -> None:
    folder = _write_run(tmp_path)
    lines = _read_lines(folder)
    again = json.loads(json.dumps(lines[1]))
    lines[1]["sites"]["site 0"].update(outcome="missing", reason="stopped")
    _write_lines(folder, [*lines[:3], again, *lines[3:]])
    page = _report(folder)
    assert any("every site answered soundly" in word for word in page.words)
    assert any("4 of 4 rounds completed" in word for word in page.words)


def test_same_run_gives_the_same_page(tmp_path: Path) -> None:
    folder = _write_run(tmp_path)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "config.yaml"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (_write_run(tmp_path) / name).unlink()
    with pytest.raises(RunFolderError, match=rf"{name}: missing"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", b"{", r"summary.json: not JSON"),
        ("summary.json", b"[]", r"summary.json: lacks title"),
        ("summary.json", b'{"title": "x"}', r"summary.json: lacks rounds, seconds, "),
        ("summary.json", b"\xff", r"summary.json: not UTF-8"),
        ("metrics.jsonl", b'{"kind": "round"', r"metrics.jsonl, line 1: not a round or"),
        ("metrics.jsonl", b'{"kind": "lunch"}\n', r"metrics.jsonl, line 1: not a round or"),
        ("metrics.jsonl", b"7\n", r"metrics.jsonl, line 1: not a round or"),
        ("metrics.jsonl", b'{"kind": "evaluation", "round": 1}\n', r"line 1: lacks global, band, "),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (_write_run(tmp_path) / name).write_bytes(content)
    with pytest.raises(RunFolderError, match=message):
        write_report(tmp_path)


# the comparison


def test_comparison_shows_its_table_and_its_plots(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"run": "gru", "ROC-AUC": 0.71234, "visitors": 12345},
        {"run": HOSTILE, "ROC-AUC": None, "privacy.epsilon": 1e-6},
    ]
    dots = {
        "site alone": [(0.55, 0.6, 0.65), (0.5, 0.55, 0.6)],
        "together": [(0.65, 0.7, 0.75), (math.nan, math.nan, math.nan)],
    }
    picture = plots.intervals(["site 0", HOSTILE], dots, "ROC-AUC")
    path = write_comparison(tmp_path, "two runs", rows, [("Dots", picture)] * 1, [HOSTILE])
    assert path == tmp_path / "comparison.html"
    page = _check_self_contained(path.read_text(encoding="utf-8"))
    assert page.tables == [
        [
            ["run", "ROC-AUC", "visitors", "privacy.epsilon"],
            ["gru", "0.712", "12,345", "–"],  # noqa: RUF001
            [HOSTILE, "–", "–", "1.0e-06"],  # noqa: RUF001
        ]
    ]
    assert page.pictures == ["ROC-AUC"]
    assert HOSTILE in page.words
    header = re.findall(r'<th scope="col"( class="number")?>', path.read_text())
    assert [bool(numeric) for numeric in header] == [False, True, True, True]


def test_comparison_of_nothing(tmp_path: Path) -> None:
    path = write_comparison(tmp_path, "nothing", [], [], [])
    page = _check_self_contained(path.read_text(encoding="utf-8"))
    assert page.tables == []
    assert "No rows." in page.words


# the plots


def test_a_plot_tells_at_most_six_series_apart() -> None:
    dots = {f"series {number}": [(0.0, 1.0, 2.0)] for number in range(7)}
    with pytest.raises(ValueError, match="7 series"):
        plots.intervals(["row"], dots, "value")


def test_labels_of_a_plot_are_not_read_as_formulas() -> None:
    picture = plots.intervals(["$x^$ </svg>"], {"a": [(0, 1, 2)], "b$_$": [(0, 1, 2)]}, "$_$")
    assert {"$x^$ </svg>", "b$_$"} <= set(Page(picture).words)


def test_plots_leave_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    plots.over_rounds([0, 1], [0.5, 0.6], {}, {"level": 0.7}, "value", "title")
    assert dict(matplotlib.rcParams) == before


def test_colours_of_a_plot_follow_the_page() -> None:
    picture = plots.over_rounds([0, 1], [0.5, 0.6], {}, {"level": 0.7}, "value", "title")
    assert not re.findall(r"(?<!, )#[0-9a-f]{6}", picture)
    assert "var(--accent, " in picture


@pytest.mark.parametrize(("rate", "size"), [(0.0, 10.0), (1.0, 10.0), (0.08, 500.0), (-0.2, 3.0)])
def test_interval_of_a_rate_holds_the_rate(rate: float, size: float) -> None:
    (low,), (high,) = plots.wilson(np.array([rate]), np.array([size]))
    assert 0 <= low <= np.clip(rate, 0, 1) <= high <= 1
    assert high > low


def test_interval_of_a_rate_is_that_of_the_paper() -> None:
    """Newcombe 1998, table I, method 3: 81 of 263."""
    (low,), (high,) = plots.wilson(np.array([81 / 263]), np.array([263.0]))
    assert (low, high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))


# a real browser


def _browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no browser: install Chromium, e.g. apt-get install chromium")


def _open_page(page: Path, folder: Path, *options: str) -> str:
    """What Chromium prints when it opens `page`, with the given options."""
    command = [
        _browser(),
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--hide-scrollbars", f"--user-data-dir={folder / 'browser'}"),
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_report(tmp_path: Path, scheme: str) -> None:
    path = write_report(_write_run(tmp_path, ["<b>site 0</b>", "site 1", "site 2"]))
    page = Page(_open_page(path, tmp_path, "--dump-dom"))
    assert page.count["svg"] == 5
    assert page.count["tr"] == 5
    assert "b" not in page.tables[0][2][0].replace("<b>site 0</b>", "")
    assert all(link.startswith("#") for link in page.links)

    picture = tmp_path / "page.png"
    preferred = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    _open_page(path, tmp_path, f"--screenshot={picture}", "--window-size=1400,1800", preferred)
    pixels = matplotlib.image.imread(picture)[..., :3].mean(axis=2)
    assert pixels.shape == (1800, 1400)
    background = np.median(pixels)
    assert (background > 0.9) if scheme == "light" else (background < 0.2)
    # Title and figures, the curves, the three plots below them, the table: none of them blank.
    for top, bottom in [(0, 300), (450, 950), (950, 1330), (1330, 1700)]:
        for left, right in [(150, 700), (700, 1250)]:
            region = pixels[top:bottom, left:right]
            assert (np.abs(region - np.median(region)) > 0.3).mean() > 0.005


@pytest.mark.slow
@pytest.mark.parametrize("width", [380, 760, 1400])
def test_the_report_fits_its_window(tmp_path: Path, width: int) -> None:
    """No sideways scrolling, also on a phone: asked from inside a frame of that width."""
    endless = "site" * 100
    path = write_report(_write_run(tmp_path, [endless, "site 1"], title=endless))
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<iframe src='{path.name}' width={width} height=900 style='border:0'></iframe><p></p>"
        "<script>onload = () => { const page = frames[0].document.documentElement;"
        "document.querySelector('p').textContent ="
        "`${page.clientWidth} and ${page.scrollWidth}` }</script>"
    )
    shown = _open_page(frame, tmp_path, "--dump-dom", "--allow-file-access-from-files")
    found = re.search(r"<p>(\d+) and (\d+)</p>", shown)
    assert found is not None
    assert (int(found[1]), int(found[2])) == (width, width)
