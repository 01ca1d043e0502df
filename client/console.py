"""What a site's commands show on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import polars as pl
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from client.check import Findings
from client.erasure import Receipt
from client.ingest import Account
from client.kpis import ALL


def show_findings(console: Console, findings: Findings) -> None:
    """What `check` found. For the site's own eyes: it names counts and channels."""
    for line in findings.passed:
        console.print(f"[green]ok[/]       {escape(line)}", highlight=False, soft_wrap=True)
    for line in findings.problems:
        console.print(f"[red]problem[/]  {escape(line)}", highlight=False, soft_wrap=True)
    if findings.account is not None:
        show_account(console, findings.account, stored="would be stored")
    visits = findings.visits
    if visits is not None and visits.height:
        days = visits["time"].dt.strftime("%Y-%m-%d").sort()
        rate = visits.select(pl.col("converted").mean()).item()
        console.print(
            f"{days[0]} to {days[-1]}; {visits['visitor_id'].n_unique():,} visitors; "
            f"conversion rate {rate:.2%} of visits",
            highlight=False,
        )
        table = Table("channel", title="Channels of these visits", title_justify="left")
        for heading in ("visits", "share", "conversion rate"):
            table.add_column(heading, justify="right")
        channels = visits.group_by("channel").agg(pl.len(), pl.col("converted").mean())
        for channel, count, rate in channels.sort("len", "channel", descending=True).iter_rows():
            table.add_row(channel, f"{count:,}", f"{count / visits.height:.1%}", f"{rate:.2%}")
        console.print(table)


def show_account(console: Console, account: Account, stored: str) -> None:
    """How many visits were read, and what became of them."""
    table = Table("visits", title="Visits", title_justify="left")
    table.add_column("number", justify="right")
    table.add_row("read", f"{account.rows:,}")
    for one in account.skipped:
        table.add_row(
            f"unreadable: {escape(one.reason)}, first {escape(one.first)}", f"{one.count:,}"
        )
    for step, count in account.removed.items():
        table.add_row(f"left out: {step}", f"{count:,}")
    table.add_row(stored, f"{account.stored:,}", style="bold")
    if account.expired:
        table.add_row("deleted, past retention", f"{account.expired:,}")
    console.print(table)


@contextmanager
def ingesting(console: Console) -> Iterator[Callable[[Account], None]]:
    """Shows how far an ingest is; nothing where there is no terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("reading")

        def show(account: Account) -> None:
            bar.update(task, description=f"{account.rows:,} read, {account.stored:,} stored")

        yield show


def show_receipt(console: Console, receipt: Receipt) -> None:
    """What was erased, and what left the site before."""
    lines = [
        f"asked for: {receipt.asked}; pseudonyms that had visits: {receipt.pseudonyms}; "
        f"visits deleted: {receipt.visits:,}",
        "none of them will be stored again",
    ]
    if receipt.releases is None:
        lines.append("the ledger is damaged: what was released of them is unknown")
    elif receipt.releases:
        runs = ", ".join(f"{run} ({count})" for run, count in receipt.releases.items())
        lines.append(f"releases that may have used them, by run (requests): {runs}")
        lines.append(
            f"what these reveal of each pseudonym is bounded by epsilon {receipt.epsilon:.3f} at "
            f"delta {receipt.delta:g}"
        )
    else:
        lines.append("nothing was released while they were stored")
    lines.append("the receipt is in the audit log")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def show_kpis(console: Console, table: pl.DataFrame) -> None:
    """The site's own figures (`client.kpis`). Exact: not for anybody else's eyes."""
    shown = Table("month", "channel", title="Exact, for this site alone", title_justify="left")
    for heading in (
        "visits",
        "visitors",
        "conversions",
        "conversion rate",
        "mean duration",
        "bounce rate",
        "revenue",
        "median lag",
    ):
        shown.add_column(heading, justify="right")
    for (month,), of_month in table.partition_by(
        "month", as_dict=True, maintain_order=True
    ).items():
        for number, row in enumerate(of_month.iter_rows(named=True)):
            shown.add_row(
                "" if number else str(month),
                row["channel"],
                f"{row['visits']:,}",
                f"{row['visitors']:,}",
                f"{row['conversions']:,}",
                f"{row['conversion_rate']:.2%}",
                _known(row["duration_s"], lambda seconds: f"{seconds:,.0f} s"),
                _known(row["bounce_rate"], lambda rate: f"{rate:.1%}"),
                f"{row['revenue']:,.2f}",
                _known(row["conversion_lag_days"], lambda days: f"{days:.1f} d"),
                style="bold" if row["channel"] == ALL else "",
            )
        shown.add_section()
    console.print(shown)


def _known(value: float | None, said: Callable[[float], str]) -> str:
    return "" if value is None else said(value)
