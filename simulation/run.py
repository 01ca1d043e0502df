"""One simulated run, from a config to a report."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from flwr.serverapp import Grid

from conf.compose import to_yaml
from conf.schema import Config, RuntimeConfig, SettingError, Unprotected
from evaluation.histogram import ScoreHistogram
from journeys.features import feature_spec
from journeys.site import SiteJourneys
from journeys.sites import load_sites
from protocol.replies import Weights
from server.federation import Federation
from server.history import EvaluationReport, History
from server.outcome import Outcome, write_outcome
from server.rounds import Watch, run_rounds
from simulation.baseline import exact_counts, last_touch_channel, true_probability
from simulation.faults import Faults
from simulation.fleet import Fleet
from simulation.local_grid import LocalGrid

T = TypeVar("T")


def simulate(config: Config, folder: Path, watch: Watch, faults: Faults | None = None) -> Outcome:
    """Train with all sites on this machine, and write the run folder.

    Goes on where an interrupted run in `folder` stopped.

    Raises:
        JourneyDataError: The journeys cannot be used.
        JoinError: Too few sites answered.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    sites = load_sites(config.data, config.seed)
    weights, final, history = federate(config, sites, folder, watch, faults)
    baselines = _baselines(sites, config, weights)
    return write_outcome(config, folder, weights, final, history, baselines)


def federate(
    config: Config,
    sites: list[SiteJourneys],
    folder: Path,
    watch: Watch,
    faults: Faults | None = None,
) -> tuple[Weights, EvaluationReport, History]:
    """Run the rounds with `sites`; checkpoints, ledgers and `metrics.jsonl` go to `folder`."""
    # Flower's strategies log each round on INFO; the round reports say it better.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="journeys-") as journeys:
        fleet = Fleet.store(sites, config.seed, Path(journeys), folder / "ledgers")
        return _with_grid(
            config.runtime,
            fleet,
            faults,
            lambda grid: run_rounds(Federation(grid), config, len(fleet.names), folder, watch),
        )


def _with_grid(
    runtime: RuntimeConfig, fleet: Fleet, faults: Faults | None, coordinate: Callable[[Grid], T]
) -> T:
    if runtime.name == "deployment":
        raise SettingError(
            "runtime=deployment: real sites are asked by python -m server run HUB; a simulation "
            "has runtime=local or runtime=ray"
        )
    if runtime.name == "ray":
        try:
            from simulation.ray_runtime import run_on_ray
        except ImportError as error:
            raise SettingError(
                "runtime=ray: Ray is missing; install it with pip install -e '.[simulation]'"
            ) from error
        return run_on_ray(fleet, max(runtime.workers, 1), coordinate)
    with LocalGrid(fleet, runtime.workers, faults) as grid:
        return coordinate(grid)


def _baselines(
    sites: list[SiteJourneys], config: Config, weights: Weights
) -> dict[str, ScoreHistogram]:
    spec = feature_spec(config.data.features)
    baselines = {"last-touch channel": last_touch_channel(sites, spec)}
    if truth := true_probability(sites):
        baselines["true probability"] = truth
    if not isinstance(config.privacy, Unprotected):
        baselines["this model, exact counts"] = exact_counts(sites, config.model, spec, weights)
    return baselines
