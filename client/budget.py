"""What a site's ledger says was spent on what, and what is left."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from privacy.accountant import epsilon
from privacy.ledger import Entry, Ledger, Population, Release


def show_budget(console: Console, ledger: Ledger, delta: float, budget: float | None) -> None:
    """What was released in which run, what it cost at `delta`, and what is left of `budget`."""
    table = Table(
        title=f"{escape(str(ledger.path))}, epsilon at delta {delta:g}", title_justify="left"
    )
    for heading in ("run", "release", "visitors"):
        table.add_column(heading)
    for heading in ("rounds", "times", "epsilon"):
        table.add_column(heading, justify="right")
    for run, entries in _by_run(ledger.entries()).items():
        rounds, spent = _rounds(entries), ledger.epsilon(delta, run=run)
        table.add_row(escape(run), "all", "", rounds, "", _number(spent), style="bold")
        kinds = dict.fromkeys((r.name, r.population) for e in entries for r in e.request.releases)
        for name, population in kinds:
            of = [e for e in entries if _named(e, name, population)]
            events = [r.event for e in of for r in _named(e, name, population)]
            cost = _number(epsilon(events, delta))
            table.add_row("", escape(name), population, _rounds(of), str(len(events)), cost)
        table.add_section()
    for population in get_args(Population):
        cost = _number(epsilon(ledger.events(population), delta))
        table.add_row("all runs", "all", population, "", "", cost, style="bold")
    console.print(table)

    waiting = sum(not entry.committed for entry in ledger.entries())
    if waiting:
        console.print(f"charged and not answered yet, requests: {waiting}")
    spent = ledger.epsilon(delta)
    line = f"a visitor has spent epsilon {_number(spent)}"
    if budget is not None:
        line += f" of {budget:g}; left {_number(max(0.0, budget - spent))}"
    console.print(line)


def limits(policy: Path, budget: float | None, delta: float | None) -> tuple[float | None, float]:
    """Budget and delta as given, or else as the policy says. Raises `ValueError` without both."""
    if (budget is None or delta is None) and policy.exists():
        # Here, because the import takes seconds, which an audit need not wait for.
        from client.policy import SitePolicy

        allowed = SitePolicy.load(policy)
        budget = allowed.epsilon if budget is None else budget
        delta = allowed.delta if delta is None else delta
    if delta is None:
        raise ValueError(f"{policy}: no policy; say --delta")
    return budget, delta


def _by_run(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    runs: dict[str, list[Entry]] = {}
    for entry in entries:
        runs.setdefault(entry.request.run, []).append(entry)
    return runs


def _named(entry: Entry, name: str, population: Population) -> list[Release]:
    return [r for r in entry.request.releases if (r.name, r.population) == (name, population)]


def _rounds(entries: Iterable[Entry]) -> str:
    return str(len({entry.request.round for entry in entries}))


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "infinite"
