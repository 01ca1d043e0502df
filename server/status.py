"""How a hub stands: its sites, its runs, its certificates."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from conf.compose import from_yaml
from conf.schema import SettingError
from journeys.site import natural_order
from server.admission import admitted_keys
from server.certificates import expiry
from server.hub import HubFolder, SuperLinkError
from server.outcome import REPORT
from server.runs import CONFIG, open_superlink


@dataclass(frozen=True)
class SiteState:
    """An admitted site."""

    name: str
    online: bool
    last_contact: float
    """UTC seconds; 0: never."""


@dataclass(frozen=True)
class RunState:
    """A run, as its folder tells."""

    folder: Path
    rounds: int
    """Rounds that it is to have; 0 where its config cannot be read."""
    done: int
    """Rounds done, failed ones included."""
    failed: int
    """Rounds without a quorum."""
    refusals: int
    """Answers that sites refused to give, over all rounds and evaluations."""
    missing: int
    """Answers that did not come, or were dropped."""
    epsilon: float | None
    finished: bool


def sites(hub: HubFolder) -> list[SiteState]:
    """The admitted sites by name. Raises `SuperLinkError` where nobody can say who is online."""
    by_key = {node.public_key: node for node in open_superlink(hub).nodes()}
    states = []
    for name, key in sorted(admitted_keys(hub).items(), key=lambda one: natural_order(one[0])):
        node = by_key.get(key)
        states.append(
            SiteState(name, node is not None and node.online, node.last_contact if node else 0.0)
        )
    return states


def runs(hub: HubFolder) -> list[RunState]:
    """The runs, oldest first."""
    return [_run(folder.parent) for folder in sorted(hub.runs.glob(f"*/{CONFIG}"))]


def show_status(console: Console, hub: HubFolder) -> bool:
    """Tables of sites and runs; whether the hub is up."""
    now = time.time()
    config = hub.config()
    try:
        states = sites(hub)
    except SuperLinkError:
        states = None
    up = "up" if states is not None else "not started"
    console.print(
        f"hub {config.host}:{config.port}, federation {config.federation}: {up}", highlight=False
    )
    table = Table("site", "state", "last contact", title="Sites", title_justify="left")
    if states is None:
        for name in sorted(admitted_keys(hub), key=natural_order):
            table.add_row(name, "unknown", "")
    for site in states or []:
        state = "online" if site.online else "away"
        table.add_row(site.name, state, _ago(now - site.last_contact) if site.last_contact else "")
    console.print(table)
    going_on = hub.is_held("run")
    table = Table("run", title="Runs", title_justify="left")
    table.add_column("state")
    for heading in ("rounds", "failed", "refused", "missing", "epsilon"):
        table.add_column(heading, justify="right")
    found = runs(hub)
    newest = max(found, key=lambda run: _changed(run.folder), default=None)
    for run in found:
        state = "finished" if run.finished else "stopped"
        if run is newest and going_on and not run.finished:
            state = "going on"
        table.add_row(
            run.folder.name,
            state,
            f"{run.done}/{run.rounds}",
            f"{run.failed}",
            f"{run.refusals}",
            f"{run.missing}",
            "" if run.epsilon is None else f"{run.epsilon:.2f}",
        )
    console.print(table)
    for name, days in expiry(hub.certificates, int(now)).items():
        if days < 30:
            console.print(
                f"the {name} certificate ends in {days:.0f} days: "
                f"python -m server renew {hub.path}",
                highlight=False,
                soft_wrap=True,
            )
    return states is not None


def _run(folder: Path) -> RunState:
    try:
        rounds = from_yaml(folder / CONFIG).rounds
    except SettingError:
        rounds = 0
    records = []
    metrics = folder / "metrics.jsonl"
    for line in metrics.read_text().splitlines() if metrics.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            # The last line may be half written.
            break
    trained = [record for record in records if record["kind"] == "round"]
    outcomes = [
        one["outcome"]
        for record in records
        for one in record["sites" if record["kind"] == "round" else "failures"].values()
    ]
    spent = [record["epsilon"] for record in trained if record["epsilon"] is not None]
    return RunState(
        folder,
        rounds,
        len(trained),
        sum(not record["completed"] for record in trained),
        outcomes.count("refused"),
        outcomes.count("missing") + outcomes.count("dropped"),
        max(spent, default=None),
        (folder / REPORT).exists(),
    )


def _changed(folder: Path) -> float:
    metrics = folder / "metrics.jsonl"
    return (metrics if metrics.exists() else folder).stat().st_mtime


def _ago(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s ago"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min ago"
    return f"{seconds / 3600:.0f} h ago" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} d ago"
