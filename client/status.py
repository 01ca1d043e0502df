"""Whether a site takes part: its agent, its SuperNode, what was asked of it and what that cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.agent_socket import AgentError, ask_status
from client.audit_log import Event
from client.folder import SiteFolder
from client.node import NodeState

LAST_REFUSALS = 5
"""So many are shown."""

SILENT_S = 30.0
"""A SuperNode that is in contact says so more often."""


@dataclass(frozen=True)
class SiteStatus:
    """How a site stands."""

    agent: dict[str, Any] | None
    """What its agent says (`client.agent.Agent.status`); None where it does not."""
    fault: str
    """Why it does not."""
    node: NodeState | None
    """What its SuperNode last said; None where there is none, or another user's."""
    refusals: tuple[Event, ...]
    """The last ones of the audit log."""


def status(folder: SiteFolder) -> SiteStatus:
    """Ask the agent, look at what the SuperNode left, read the audit log.

    Raises:
        SettingError: `site.yaml` cannot be read.
        AuditLogError: The audit log is damaged.
    """
    agent, fault = None, ""
    try:
        agent = ask_status(folder.socket(folder.config()))
    except AgentError as error:
        fault = str(error)
    refusals = [event for event in folder.audit_log.events() if event.kind == "refusal"]
    return SiteStatus(agent, fault, folder.node.state, tuple(refusals[-LAST_REFUSALS:]))


def show_status(console: Console, found: SiteStatus) -> None:
    """As a table."""
    name = "" if found.agent is None else f" {escape(str(found.agent['site']))}"
    table = Table("what", "how", title=f"Site{name}", title_justify="left", show_header=False)
    for what, how in _rows(found, time.time()):
        table.add_row(what, escape(how))
    console.print(table)


def _rows(found: SiteStatus, now: float) -> Iterator[tuple[str, str]]:
    agent = found.agent
    if agent is None:
        yield "agent", f"does not run ({found.fault})"
    else:
        yield "agent", f"runs since {agent['since']}"
    yield "SuperNode", _node(found.node, now)
    if agent is not None:
        yield "policy", str(agent["policy"])
        yield "ledger", str(agent["ledger"])
        work = agent["at_work"]
        if work is not None:
            yield "at work", f"{work['asked']} of run {work['run']}, round {work['round']}"
        yield "last request", str(agent["last_request"] or "none since its start")
        yield "rounds trained", f"{agent['rounds']} since its start"
        yield "refusals", f"{agent['refusals']} since its start"
        budget = agent["epsilon"]
        if budget is not None:
            spent, left = budget["spent"], budget["left"]
            yield "epsilon", f"spent {spent:.3f}, left {left:.3f}, at delta {budget['delta']:g}"
        yield "newest model", str(agent["model"] or "none")
    for event in found.refusals:
        said = ", ".join(str(value) for value in event.content.values())
        yield "refused", f"{event.time} {said}"


def _node(state: NodeState | None, now: float) -> str:
    if state is None:
        return "not known here"
    at = datetime.fromtimestamp(state.contact, UTC).isoformat(timespec="seconds")
    if not state.connected:
        return f"not connected: {state.text} ({at})"
    if now - state.contact > SILENT_S:
        return f"not connected: silent since {at}"
    return f"connected as {state.text}"
