"""A simulation on Flower's runtime on Ray: for more than one machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar

# Before Ray is imported: software for privacy tells no one that it runs.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray's coming default; without it each start prints a warning about accelerators.
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from simulation.fleet import Fleet
from simulation.fleet_app import shared_sites

T = TypeVar("T")


def run_on_ray(fleet: Fleet, workers: int, coordinate: Callable[[Grid], T]) -> T:
    """Call `coordinate` with a grid whose sites run in `workers` Ray actors.

    An actor serves whichever site is next, so that each opens the journeys of many; they are
    memory-mapped from `fleet.journeys`, which every machine has to see.
    """
    answers: list[T] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        answers.append(coordinate(grid))

    # `run_simulation` logs that `flwr run` would be newer; that one leaves a server running.
    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(
        server,
        shared_sites(fleet),
        num_supernodes=len(fleet.names),
        backend_config={
            "init_args": {"num_cpus": workers, "log_to_driver": False, "logging_level": "ERROR"},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    return answers[0]
