"""Simulate a federation on this machine: `python simulate.py [group=choice] [setting=value]`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

# Before Flower is imported anywhere: software for privacy tells no one that it runs.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from conf.compose import (
    COMPOSE_ERRORS,
    check_overrides,
    from_yaml,
    innermost,
    register,
    to_config,
)
from conf.schema import Config, SettingError
from conf.usage import usage

if TYPE_CHECKING:
    from rich.console import Console


@hydra.main(version_base=None, config_path="conf", config_name="config")
def run_composed(composed: DictConfig) -> None:
    """One run of what Hydra composed, in the folder that Hydra made."""
    try:
        run(to_config(composed), Path(HydraConfig.get().runtime.output_dir))
    except SettingError as error:
        # Raised further, Hydra would print its own line and a traceback.
        sys.exit(f"error: {error}")


def run(config: Config, folder: Path) -> None:
    """Do the config's job in `folder`."""
    from server.console import open_console

    job = {"train": _train, "worth_joining": _worth_joining, "audit": _audit}[config.job]
    try:
        job(config, folder, open_console())
    except Exception as error:
        if not isinstance(error, _told_in_a_line()):
            raise
        sys.exit(f"error: {error}")


def _told_in_a_line() -> tuple[type[Exception], ...]:
    """Errors whose message says all that a user needs."""
    # Here, because loading them loads Flower, which the progress bar need not wait for.
    from journeys.errors import JourneyDataError
    from privacy.ledger import LedgerError
    from server.federation import JoinError

    return JourneyDataError, JoinError, LedgerError


def _train(config: Config, folder: Path, console: Console) -> None:
    from server.console import RunProgress, show_outcome

    with RunProgress(console, config.rounds) as progress:
        # Under the bar: it loads torch.
        from simulation.run import simulate

        outcome = simulate(config, folder, progress.watch)
    show_outcome(console, outcome)


def _worth_joining(config: Config, folder: Path, console: Console) -> None:
    from journeys.sites import load_sites
    from simulation.comparison import show_results
    from simulation.worth_joining import compare_approaches

    sites = load_sites(config.data, config.seed)
    with _counting(console, "trainings") as done:
        results = compare_approaches(config, sites, done)
    show_results(console, folder, results)


def _audit(config: Config, folder: Path, console: Console) -> None:
    from journeys.sites import load_sites
    from simulation.audit import audit_builds, show_findings

    site = load_sites(config.data, config.seed)[0]
    with _counting(console, "builds") as done:
        findings = audit_builds(config, site, done)
    show_findings(console, folder, config, findings)


@contextmanager
def _counting(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that is told how many are done, and of how many."""
    from rich.progress import Progress

    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


def main() -> None:
    """The command line."""
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments):
        # Hydra's own takes seconds and lists the schema beside the choices.
        print(usage())
        return
    overrides = [argument for argument in arguments if "=" in argument and argument[0] != "-"]
    resumed = [word.removeprefix("resume=") for word in overrides if word.startswith("resume=")]
    try:
        if resumed:
            if len(arguments) > 1:
                raise SettingError("resume= goes alone: the run folder holds its settings")
            folder = Path(resumed[0])
            # A run goes by its folder's name, at the sites too.
            folder = folder if folder.name not in ("", "..") else folder.resolve()
            run(from_yaml(folder / "config.yaml"), folder)
            return
        check_overrides(overrides)
        register()
        # Composing fails with Hydra's errors, which it would else print on several lines.
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")
        run_composed()
    except SettingError as error:
        sys.exit(f"error: {error}")
    except COMPOSE_ERRORS as error:
        sys.exit(f"error: {innermost(error)}")


if __name__ == "__main__":
    main()
