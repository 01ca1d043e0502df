"""Seconds a round and memory of simulations, side by side: python benchmarks/simulation.py

Seven ways to run a round over the same random journeys, each in a process of its own, taking turns
(of a second, or ten rounds; one round if it takes longer):

plain      a PyTorch loop over the sites: no privacy, no Flower, index-batched
opacus     the common pattern: PrivacyEngine.make_private and get_epsilon for each site and round
direct     our DP training alone, called in a loop over the sites
local0     our local runtime: Flower's messages, ledger, screening, aggregation, DP; in one process
local1     the same with 1 worker process
local2     the same with 2 workers
ray2       the same on Flower's runtime on Ray with 2 workers

The first round warms up; medians of the others. Start-up is the time from the start of the process
to the end of the first round, less a round. Memory is the largest PSS, summed over the process and
its children, in one more round (Linux only). Bars: local1 adds at most 5 ms a site and round to
direct; local1 is 1.3 times faster than opacus on 10x5000 MLP and 5 times on 100x500; local2 is 1.7
times faster than local1; a worker needs less than 1.5 times the memory of plain.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parents[1]
# Before this folder, in which this file has the name of a package.
sys.path.insert(0, str(ROOT))

from rounds import (  # noqa: E402
    BATCH,
    CLIP,
    NOISE,
    WORKLOADS,
    Engine,
    federated,
    mean,
    measure,
    opacus,
    open_fleet,
    plain,
    serve,
    settings,
)

if TYPE_CHECKING:
    from conf.schema import Config
    from simulation.fleet import Fleet

ASKED = ("10x5000", "100x500")
MODELS = ("mlp", "gru")
ENGINES = ("plain", "opacus", "direct", "local0", "local1", "local2", "ray2")


def direct(fleet: Fleet, config: Config) -> None:
    """What a site of ours does in `Trainer.train`, and nothing around it."""
    from journeys.features import feature_spec
    from models.registry import build
    from privacy.randomness import SeededRandomness
    from privacy.training import LocalTraining, Trainer
    from server.rounds import initial_weights

    sites = [fleet.open_journeys(i).train for i in range(len(fleet.names))]
    trainer = Trainer(build(config.model, feature_spec(config.data.features)))
    state = initial_weights(config)

    def one_round(round_: int) -> None:
        trained = []
        for index, examples in enumerate(sites):
            batches = round(len(examples) / BATCH)
            training = LocalTraining(
                1 / batches, batches, len(examples) / batches, NOISE, CLIP, config.optimizer
            )
            seed = SeededRandomness(0, index, round_)
            trained.append(trainer.train(state, examples, training, seed))
        state.update(mean(trained))

    serve(one_round)


def engine_process(engine: str, model: str, workload: str, folder: Path, rounds: int) -> None:
    """What an engine's process does."""
    sites, visitors = WORKLOADS[workload]
    fleet = open_fleet(folder, folder / "ledgers" / f"{engine}-{model}", sites, visitors)
    config = settings(model, rounds)
    match engine:
        case "plain":
            plain(fleet, config)
        case "opacus":
            opacus(fleet, config)
        case "direct":
            direct(fleet, config)
        case _:
            federated(fleet, config, workers=int(engine[-1]), ray=engine.startswith("ray"))


def show(workload: str, model: str, engines: dict[str, Engine]) -> None:
    """One table."""
    sites, visitors = WORKLOADS[workload]
    print(f"\n{model}, {sites} sites x {visitors:,} journeys, one local epoch, batch {BATCH}")
    print("engine   s a round (range)          / plain   start-up s   memory MB")
    plain_ = engines.get("plain")
    for name, engine in engines.items():
        ratio = f"{engine.median / plain_.median:7.2f}" if plain_ else "      –"  # noqa: RUF001
        spread = f"({min(engine.seconds):.3f} to {max(engine.seconds):.3f})"
        print(
            f"{name:8} {engine.median:7.3f} {spread:18} {ratio}      {engine.startup:7.1f}"
            f"     {engine.memory:7.0f}"
        )

    def bar(text: str, one: str, other: str, value: Callable[[Engine, Engine], float]) -> None:
        if one in engines and other in engines:
            print(f"{text:44} {value(engines[one], engines[other]):6.2f}")

    bar("ms a site and round of local1 over direct", "local1", "direct",
        lambda a, b: 1000 * (a.median - b.median) / sites)  # fmt: skip
    bar("times faster: local1 than opacus", "local1", "opacus", lambda a, b: b.median / a.median)
    bar("times faster: local2 than local1", "local2", "local1", lambda a, b: b.median / a.median)
    bar("times faster: local2 than ray2", "local2", "ray2", lambda a, b: b.median / a.median)
    bar("memory of local1 / plain", "local1", "plain", lambda a, b: a.memory / b.memory)
    bar("memory of local2 / plain / 2", "local2", "plain", lambda a, b: a.memory / b.memory / 2)


def main() -> None:
    """Measure what is asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--workloads", nargs="+", choices=ASKED, default=list(ASKED))
    parser.add_argument("--runtimes", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--repeats", type=int, default=5, help="turns of each engine")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.engine:
        engine_process(
            asked.engine, asked.models[0], asked.workloads[0], asked.folder, asked.repeats
        )
        return
    print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    for workload in asked.workloads:
        for model in asked.models:
            commands = dict.fromkeys(asked.runtimes, (sys.executable, __file__))
            show(workload, model, measure(workload, model, commands, asked.repeats))


if __name__ == "__main__":
    main()
