"""Plots as SVG text for a page: no fixed colours, no outside reference, no clashing ids."""

from __future__ import annotations

import hashlib
import html
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Floats = npt.NDArray[np.float64]

# Matplotlib wants a colour, a page that has a dark mode wants a CSS variable: each colour below
# stands for the variable of the same name and is swapped when the SVG is written.
TEXT, MUTED, GRID, ACCENT = "#000001", "#000002", "#000003", "#000004"
SERIES = (ACCENT, "#000005", "#000006", "#000007", "#000008", "#000009")
_VARIABLES = {
    TEXT: "var(--text, #1d2126)",
    MUTED: "var(--muted, #676d76)",
    GRID: "var(--rule, #e2e4e0)",
    ACCENT: "var(--accent, #0a6b6b)",
    SERIES[1]: "var(--series-2, #b9541a)",
    SERIES[2]: "var(--series-3, #5b53a8)",
    SERIES[3]: "var(--series-4, #2f7d3b)",
    SERIES[4]: "var(--series-5, #a3386c)",
    SERIES[5]: "var(--series-6, #7a7f87)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "plots",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": TEXT,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.markersize": 5,
    "legend.handlelength": 1.6,
}
WIDE, SQUARE = (5.0, 3.8), (4.0, 4.0)
"""Width and height of a plot, as matplotlib's inches: for two or three plots side by side."""
_THIN_LINES = 12
_LONGEST_LABEL = 40
_DASHED = (0, (4, 3))
_LEVELS = ((0, (5, 3)), (0, (1, 2)), (0, (6, 2, 1, 2)))


def over_rounds(
    rounds: Sequence[float],
    main: Sequence[float],
    sites: Mapping[str, Sequence[float]],
    levels: Mapping[str, float],
    label: str,
    title: str,
    size: tuple[float, float] = WIDE,
    noise: Sequence[tuple[float, float]] = (),
) -> str:
    """A value over rounds: all sites together bold, each site thin, fixed `levels` dashed.

    `main` and each of `sites` hold one value a round, NaN where there is none; `noise` holds the
    lower and upper end to which privacy noise may have moved `main`. Above twelve sites the thin
    lines become a band from the 10th to the 90th percentile; a single site is not told apart from
    all.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        if len(sites) > _THIN_LINES:
            low, high = _band(sites.values())
            look: dict[str, Any] = {"color": ACCENT, "alpha": 0.18, "label": "middle 80 % of sites"}
            if len(rounds) == 1:
                axes.vlines(rounds, low, high, linewidth=14, **look)
            else:
                axes.fill_between(rounds, low, high, linewidth=0, **look)
        elif len(sites) > 1:
            for index, (name, values) in enumerate(sites.items()):
                (line,) = axes.plot(
                    rounds, values, color=ACCENT, alpha=0.4, linewidth=1, marker=_dot(values)
                )
                line.set_gid(_gid(name))
                line.set_label("each site" if index == 0 else "")
        axes.plot(rounds, main, color=ACCENT, linewidth=2.4, marker=_dot(main), label="all sites")
        if any(high > low for low, high in noise):
            low, high = np.transpose(noise)
            middle = np.asarray(main, np.float64)
            axes.errorbar(
                rounds,
                middle,
                yerr=[middle - low, high - middle],
                fmt="none",
                ecolor=ACCENT,
                elinewidth=1.4,
                capsize=3,
                label="90 % band of the noise",
            )
        for (name, level), style in zip(levels.items(), itertools.cycle(_LEVELS), strict=False):
            if math.isfinite(level):
                axes.axhline(level, color=MUTED, linewidth=1.3, linestyle=style, label=name)
        axes.set(xlabel="round", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        _legend(figure, axes)

    return svg(draw, title, size)


def roc(curves: Mapping[str, tuple[Floats, Floats]], notes: Sequence[str], title: str) -> str:
    """ROC curves: false and true positive rates by name; `notes` are added to the legend."""
    colours = _colours(curves)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, (false, true) in curves.items():
            axes.plot(false, true, color=colours[name], linewidth=2.4, label=name)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=_DASHED, label="chance")
        for note in notes:
            axes.plot([], [], color="none", label=note)
        axes.set(xlim=(0, 1), ylim=(0, 1.01))
        axes.set(xlabel="false positive rate", ylabel="true positive rate")
        _legend(figure, axes)

    return svg(draw, title, SQUARE)


def calibration(predicted: Floats, observed: Floats, size: Floats, title: str) -> str:
    """Observed over predicted rate of groups of examples, with 95 % intervals, and their sizes."""

    def draw(figure: Figure) -> None:
        axes, bars = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        low, high = wilson(observed, size)
        top = max(1.2 * float(np.concatenate([predicted, observed]).max(initial=0.0)), 0.01)
        axes.plot([0, top], [0, top], color=MUTED, linewidth=1.2, linestyle=_DASHED, label="exact")
        axes.vlines(predicted, low, high, color=ACCENT, linewidth=1.3)
        axes.plot(
            predicted, observed, "o-", color=ACCENT, linewidth=1.8, label="groups, 95 % interval"
        )
        axes.set(xlim=(0, top), ylim=(0, top), ylabel="observed rate")
        bars.bar(predicted, size, width=top / 50, color=ACCENT, alpha=0.6)
        bars.set(xlabel="predicted rate", ylabel="examples")
        bars.yaxis.set_major_locator(MaxNLocator(nbins=2, integer=True))
        bars.yaxis.set_major_formatter("{x:,.0f}")
        _legend(figure, axes)

    return svg(draw, title, SQUARE)


def intervals(
    labels: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    xlabel: str,
    title: str = "",
) -> str:
    """Dots with intervals: a row for each label, a colour for each series of (low, middle, high).

    A value of NaN is left out. `title` is `xlabel` where it is not given.
    """
    colours = _colours(series)
    height = 1.2 + 0.3 * len(labels) * (0.5 + 0.5 * len(series))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        rows = np.arange(len(labels), dtype=np.float64)
        shifts = (np.arange(len(series)) - (len(series) - 1) / 2) * 0.6 / max(len(series), 1)
        for (name, values), shift in zip(series.items(), shifts, strict=True):
            low, middle, high = np.asarray(values, dtype=np.float64).reshape(-1, 3).T
            axes.hlines(rows + shift, low, high, color=colours[name], linewidth=2)
            axes.plot(middle, rows + shift, "o", color=colours[name], label=name)
        axes.set_yticks(rows, [_short(label) for label in labels], color=TEXT)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(xlabel)
        if len(series) > 1:
            _legend(figure, axes)

    return svg(draw, title or xlabel, (WIDE[0], height))


def wilson(rate: Floats, size: Floats) -> tuple[Floats, Floats]:
    """95 % interval of a binomial rate (Wilson 1927); contains `rate`, stays in [0, 1]."""
    z2 = 1.96**2
    rate = np.clip(rate, 0.0, 1.0)
    middle = (rate + z2 / (2 * size)) / (1 + z2 / size)
    half = np.sqrt(z2 * rate * (1 - rate) / size + z2**2 / (4 * size**2)) / (1 + z2 / size)
    return np.minimum(middle - half, rate), np.maximum(middle + half, rate)


def svg(draw: Callable[[Figure], None], title: str, size: tuple[float, float] = WIDE) -> str:
    """The SVG element that `draw` paints on a figure, ready to stand in an HTML page.

    `title` is read out by screen readers. Text stays text; ids are prefixed by a hash of the
    picture, so that several fit on one page.
    """
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    body = file.getvalue().partition("<svg")[2].partition(">")[2]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="named:(\w*)">', _hover_title, body)
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    prefix = f"p{hashlib.sha256(body.encode()).hexdigest()[:10]}-"
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = body.replace("url(#", f"url(#{prefix}").replace('xlink:href="#', f'href="#{prefix}')
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    # Points of 1/72 inch become the SVG's own units; the page scales them up, but not without end.
    width, height = size[0] * 72, size[1] * 72
    label = html.escape(title)
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}" '
        f'style="max-width: {1.4 * width:.0f}px"><title>{label}</title>{body}'
    )


def _gid(name: str) -> str:
    """An artist's gid that makes `name` show under the pointer; in hex, as it may hold anything."""
    return f"named:{name.encode().hex()}"


def _hover_title(found: re.Match[str]) -> str:
    return f"<g><title>{html.escape(bytes.fromhex(found[1]).decode())}</title>"


def _colours(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    if len(names) > len(SERIES):
        raise ValueError(f"{len(names)} series, but a plot tells at most {len(SERIES)} apart")
    return dict(zip(names, SERIES, strict=False))


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    labels = [_short(label) for label in labels]
    longest = max(map(len, labels), default=0)
    width = figure.get_figwidth()
    columns = 3 if longest < 2.8 * width else 2 if longest < 6.5 * width else 1
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        borderpad=0.2,
        columnspacing=1.4,
        labelcolor=MUTED,
    )


def _short(label: str) -> str:
    """`label`, cut so that it leaves room for the plot."""
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"


def _dot(values: Sequence[float]) -> str:
    """A marker where a line would be invisible: fewer than two values."""
    return "o" if sum(math.isfinite(value) for value in values) < 2 else ""


def _band(lines: Iterable[Sequence[float]]) -> tuple[Floats, Floats]:
    """10th and 90th percentile over `lines` at each round; NaN where no line has a value."""
    low, high = [], []
    for values in zip(*lines, strict=True):
        known = [value for value in values if math.isfinite(value)]
        low.append(float(np.percentile(known, 10)) if known else math.nan)
        high.append(float(np.percentile(known, 90)) if known else math.nan)
    return np.array(low), np.array(high)
