"""A site on the terminal: `python -m client COMMAND SITE`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

# The imports within the commands cost seconds that the other commands need not wait for.


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line.

    Ends with 1 if what was looked at is not in order (`check`, `audit`), with 2 on other errors.
    """
    options = _parser().parse_args(arguments)
    # A file or a pipe, which says no width, is wide enough for every table.
    console = Console(width=None if sys.stdout.isatty() else 140)
    command: Callable[[argparse.Namespace, Console], None] = options.run
    try:
        command(options, console)
    except SystemExit:
        raise
    except KeyboardInterrupt:
        _fail("interrupted; what was stored before stays stored", 130)
    except _errors() as error:
        from privacy.ledger import LedgerDamagedError

        _fail(str(error), 1 if isinstance(error, LedgerDamagedError) else 2)


def _errors() -> tuple[type[Exception], ...]:
    """What can be wrong with a site. Imported when something is: `carry` does without."""
    from client.check import SITE_ERRORS
    from client.erasure import ErasureError

    return (*SITE_ERRORS, ErasureError, ValueError)


def _init(options: argparse.Namespace, console: Console) -> None:
    from client.folder import create

    try:
        folder = create(options.site, _now())
    except FileExistsError:
        _fail(f"{options.site}: is a site already", 2)
    public_key = f"{folder.node.name}.pub"
    console.print(
        f"{options.site}: a new site\n"
        f"  site.yaml     where visits come from and how they are prepared: edit it\n"
        f"  policy.yaml   what may leave the site: edit it\n"
        f"  keys/         of the pseudonyms; keep a copy in a safe place, show them to nobody\n"
        f"  ledger.sqlite what was released: nothing yet\n"
        f"  node/         the key by which the hub will know this site\n"
        f"give {options.site / public_key} to the coordinator\n"
        f"next: python -m client check {options.site}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _join(options: argparse.Namespace, console: Console) -> None:
    from client.folder import SiteFolder
    from client.join import join

    join(SiteFolder(options.site), options.superlink, options.root_certificates, options.json_logs)


def _agent(options: argparse.Namespace, console: Console) -> None:
    from service.health import HealthError
    from service.logs import configure
    from service.processes import until_stopped

    configure(options.json_logs)
    with until_stopped() as stopped:
        from client.folder import SiteFolder

        folder = SiteFolder(options.site)
        # What is wrong with it is said before all that takes seconds.
        folder.config()
        from client.agent import run

        try:
            run(folder, stopped.is_set)
        except HealthError as error:
            _fail(f"agent.port: {error}", 2)


def _carry(options: argparse.Namespace, console: Console) -> None:
    from client.node import NodeFolder
    from client.supernode import carry

    carry(
        NodeFolder(options.node),
        options.superlink,
        options.root_certificates,
        options.socket,
        options.json_logs,
    )


def _status(options: argparse.Namespace, console: Console) -> None:
    from client.folder import SiteFolder
    from client.status import show_status, status

    found = status(SiteFolder(options.site))
    show_status(console, found)
    if found.agent is None:
        sys.exit(1)


def _check(options: argparse.Namespace, console: Console) -> None:
    from client.check import check
    from client.console import show_findings
    from client.folder import SiteFolder

    findings = check(SiteFolder(options.site), _now(), options.visits)
    show_findings(console, findings)
    if findings.problems:
        sys.exit(1)


def _ingest(options: argparse.Namespace, console: Console) -> None:
    from client.console import ingesting, show_account
    from client.folder import SiteFolder
    from client.ingest import ingest

    with ingesting(console) as progress:
        account = ingest(SiteFolder(options.site), _now(), progress)
    show_account(console, account, stored="stored")


def _forget(options: argparse.Namespace, console: Console) -> None:
    from client.console import show_receipt
    from client.erasure import forget, read_ids
    from client.folder import SiteFolder

    show_receipt(console, forget(SiteFolder(options.site), read_ids(options.visitor_file)))


def _score(options: argparse.Namespace, console: Console) -> None:
    from client.folder import SiteFolder
    from client.published import check_signature
    from client.scoring import score, write_scores
    from models.saved import SavedModelError

    at = _now() if options.at is None else options.at
    folder = SiteFolder(options.site)
    if not check_signature(options.model, folder):
        said = f"{options.model}: is not from a hub and not signed; used as it is"
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    try:
        scores = score(folder.visits, options.model, at)
    except SavedModelError as error:
        raise ValueError(str(error)) from error
    write_scores(scores, options.out)
    console.print(f"{options.out}: {scores.height:,} visitors", highlight=False, markup=False)


def _kpis(options: argparse.Namespace, console: Console) -> None:
    from client.console import show_kpis
    from client.folder import SiteFolder
    from client.kpis import kpis

    with SiteFolder(options.site).store(read_only=True) as store:
        table = kpis(store)
    show_kpis(console, table)


def _budget(options: argparse.Namespace, console: Console) -> None:
    from client.budget import limits, show_budget
    from privacy.ledger import Ledger

    path = _ledger_file(options.site)
    ledger = Ledger(path, read_only=True)
    budget, delta = limits(path.with_name("policy.yaml"), options.epsilon, options.delta)
    show_budget(console, ledger, delta, budget)


def _audit(options: argparse.Namespace, console: Console) -> None:
    from client.audit_log import AuditLogError
    from client.folder import SiteFolder
    from privacy.ledger import Ledger

    path = _ledger_file(options.site)
    records, hash_ = Ledger(path, read_only=True).head
    lines = [f"{path}: whole; {records} records, hash {hash_}"]
    log = SiteFolder(path.parent).audit_log
    if log.path.exists():
        try:
            events = log.events()
        except AuditLogError as error:
            _fail(str(error), 1)
        lines.append(f"{log.path}: whole; {len(events)} events, hash {events[-1].hash}")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m client", description="Run and inspect a site.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(
        name: str, run: Any, meaning: str, folder: tuple[str, str] = ("site", "the site's folder")
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=meaning, description=meaning)
        command.add_argument(folder[0], type=Path, help=folder[1])
        command.set_defaults(run=run)
        return command

    def add_hub(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--superlink", required=True, metavar="HOST:PORT", help="where the hub hears sites"
        )
        command.add_argument(
            "--root-certificates",
            type=Path,
            required=True,
            metavar="FILE",
            help="the hub's hub-ca.crt, which vouches for it",
        )
        command.add_argument("--json-logs", action="store_true", help="log JSON, an object a line")

    add("init", _init, "begin a site: commented settings, policy, keys, an empty ledger")
    add_hub(add("join", _join, "take part: run agent and SuperNode, start again what dies"))
    agent = add("agent", _agent, "be the agent alone, for a user of its own (`join` runs both)")
    agent.add_argument("--json-logs", action="store_true", help="log JSON, an object a line")
    carry = add(
        "carry",
        _carry,
        "be the SuperNode alone, for a user of its own (`join` runs it otherwise)",
        ("node", "the SuperNode's folder: SITE/node, or where that was moved"),
    )
    add_hub(carry)
    carry.add_argument("--socket", type=Path, required=True, help="where the agent listens")
    add("status", _status, "is the site taking part? Ends with 1 if its agent does not run")
    check = add(
        "check",
        _check,
        "are settings, policy and source in order? Stores nothing; ends with 1 if not",
    )
    check.add_argument(
        "--visits", type=int, default=100_000, help="visits to try (default: %(default)s)"
    )
    add("ingest", _ingest, "read new visits, prepare them, store them")
    forget = add("forget", _forget, "erase visitors, and write a receipt into the audit log")
    forget.add_argument(
        "--visitor-file", type=Path, required=True, help="their original ids, one a line"
    )
    score = add("score", _score, "the conversion likelihood of each current visitor")
    score.add_argument("--model", type=Path, required=True, help="a model.safetensors")
    score.add_argument("--out", type=Path, required=True, help="a .parquet or .csv file to write")
    score.add_argument("--at", type=_time, help="ISO 8601 time to judge at (default: now)")
    add("kpis", _kpis, "the site's own figures by month and channel, exact, for the site alone")
    budget = add("budget", _budget, "what was spent on what, and what is left")
    budget.add_argument("--epsilon", type=float, help="budget, instead of the site's policy's")
    budget.add_argument("--delta", type=float, help="delta, instead of the site's policy's")
    add("audit", _audit, "check every record of ledger and audit log; ends with 1 if one is bad")
    return parser


def _ledger_file(site: Path) -> Path:
    from client.folder import SiteFolder

    return SiteFolder(site).ledger if site.is_dir() else site


def _time(text: str) -> int:
    try:
        time_ = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError("must be an ISO 8601 time") from None
    return int(time_.replace(tzinfo=time_.tzinfo or UTC).timestamp())


def _now() -> int:
    return int(time.time())


def _fail(message: str, code: int) -> Any:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
