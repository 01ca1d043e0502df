"""Seconds a round and memory of simulations, side by side: python benchmarks/simulation.py

Seven ways to run a round over the same random journeys, each in a process of its own, taking turns:

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
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from conf.schema import Config
    from journeys.examples import Examples
    from models.batch import JourneyBatch
    from protocol.replies import Weights
    from simulation.fleet import Fleet

WORKLOADS = {"10x5000": (10, 5000), "100x500": (100, 500)}
MODELS = ("mlp", "gru")
ENGINES = ("plain", "opacus", "direct", "local0", "local1", "local2", "ray2")
BATCH, TOUCHPOINTS, NOISE, CLIP, DELTA, RATE = 256, 20, 1.0, 1.0, 1e-5, 0.1
SAID = "@"
"""Begins the lines that an engine's process says to this one."""


# ------------------------------------------------------------------ what runs in a process


def settings(model: str, rounds: int) -> Config:
    """The config of the runs."""
    from conf.compose import load

    return load(
        [
            f"model={model}",
            f"rounds={rounds}",
            f"data.features.max_touchpoints={TOUCHPOINTS}",
            f"optimizer.batch_size={BATCH}",
            f"optimizer.learning_rate={RATE}",
        ]
    )


def store(folder: Path, sites: int, visitors: int) -> None:
    """Random journeys, as a fleet."""
    import numpy as np

    from journeys.examples import Examples
    from journeys.features import feature_spec
    from journeys.site import SiteJourneys
    from simulation.fleet import Fleet

    spec = feature_spec(settings("mlp", 1).data.features)
    rng = np.random.default_rng(0)

    def draw(n: int) -> Examples:
        length = rng.integers(1, TOUCHPOINTS + 1, n).astype(np.int32)
        real = (np.arange(TOUCHPOINTS) < length[:, None])[:, :, None]
        values = [rng.integers(1, size, (n, TOUCHPOINTS)) for _, size in spec.categorical]
        numeric = rng.random((n, TOUCHPOINTS, len(spec.numeric)), dtype=np.float32)
        label = (rng.random(n) < 0.1).astype(np.float32)
        categorical = (np.stack(values, axis=2) * real).astype(np.uint16)
        return Examples(categorical, (numeric * real).astype(np.float32), length, label)

    # Two visitors held out: evaluation takes no time.
    drawn = [SiteJourneys(f"site {i}", draw(visitors), draw(2)) for i in range(sites)]
    Fleet.store(drawn, 0, folder, folder / "ledgers")


def open_fleet(journeys: Path, ledgers: Path, sites: int, visitors: int) -> Fleet:
    """The fleet that `store` wrote, with ledgers of its own."""
    from simulation.fleet import Fleet

    names = tuple(f"site {i}" for i in range(sites))
    return Fleet(names, (visitors,) * sites, 0, journeys, ledgers)


Round = Callable[[int], None]


def serve(one_round: Round) -> None:
    """Run a round for each line that comes in; say how long it took."""
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        started = time.perf_counter()
        one_round(int(line))
        print(SAID, time.perf_counter() - started, flush=True)


def plain(fleet: Fleet, config: Config) -> None:
    """No privacy, no Flower."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    from journeys.features import feature_spec
    from models.registry import build
    from models.weights import get_weights, set_weights
    from server.rounds import initial_weights

    model = build(config.model, feature_spec(config.data.features))
    sites = [whole(fleet.open_journeys(i).train) for i in range(len(fleet.names))]
    state = initial_weights(config)

    def one_round(_: int) -> None:
        trained = []
        for data in sites:
            set_weights(model, state)
            optimizer = torch.optim.SGD(model.parameters(), RATE)
            order = torch.randperm(len(data))
            for start in range(0, len(order), BATCH):
                optimizer.zero_grad()
                batch = select(data, order[start : start + BATCH])
                torch.autograd.backward(binary_cross_entropy_with_logits(model(batch), batch.label))
                optimizer.step()
            trained.append(get_weights(model))
        state.update(mean(trained))

    serve(one_round)


def opacus(fleet: Fleet, config: Config) -> None:
    """A new privacy engine for each site and round, as in Flower's own example."""
    import warnings

    import torch
    from opacus import PrivacyEngine
    from torch.nn.functional import binary_cross_entropy_with_logits
    from torch.utils.data import DataLoader, TensorDataset

    from journeys.features import feature_spec
    from models.batch import JourneyBatch
    from models.registry import build
    from models.weights import get_weights, set_weights
    from server.rounds import initial_weights

    warnings.simplefilter("ignore")
    sets = []
    for index in range(len(fleet.names)):
        data = whole(fleet.open_journeys(index).train)
        sets.append(TensorDataset(data.categorical, data.numeric, data.length, data.label))
    spec = feature_spec(config.data.features)
    state = initial_weights(config)

    def one_round(_: int) -> None:
        trained = []
        for data in sets:
            model = build(config.model, spec)
            set_weights(model, state)
            engine = PrivacyEngine(secure_mode=False)
            private, optimizer, loader = engine.make_private(
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), RATE),
                data_loader=DataLoader(data, batch_size=BATCH, shuffle=True),
                noise_multiplier=NOISE,
                max_grad_norm=CLIP,
            )
            for tensors in loader:
                optimizer.zero_grad()
                batch = JourneyBatch(*tensors)
                torch.autograd.backward(
                    binary_cross_entropy_with_logits(private(batch), batch.label)
                )
                optimizer.step()
            engine.get_epsilon(DELTA)
            trained.append(get_weights(model))
        state.update(mean(trained))

    serve(one_round)


def direct(fleet: Fleet, config: Config) -> None:
    """What a site of ours does in `Trainer.train`, and nothing around it."""
    import numpy as np

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
            seed = np.random.SeedSequence(0, spawn_key=(index, round_))
            trained.append(trainer.train(state, examples, training, SeededRandomness(seed)))
        state.update(mean(trained))

    serve(one_round)


def federated(fleet: Fleet, config: Config, workers: int, ray: bool) -> None:
    """Our runtime: all of Flower's objects, privacy accounts and checks included."""
    import logging

    from protocol.exchange import Request
    from server.federation import Federation
    from server.rounds import first_plan, initial_weights
    from server.screening import screen_updates
    from server.strategy import Aggregator

    logging.getLogger("flwr").setLevel(logging.WARNING)

    def coordinate(grid: Grid) -> None:
        federation, aggregator = Federation(grid), Aggregator(config.strategy)
        state = initial_weights(config)
        plan = first_plan(config, "benchmark")
        sites = len(fleet.names)
        federation.join(plan, sites, sites, 300.0)
        counts = {name: told.visitors for name, told in federation.descriptions.items()}

        def one_round(round_: int) -> None:
            request = Request({"train": replace(plan, round=round_)}, state)
            answers = federation.ask(request, 600.0)["train"]
            sound, failed = screen_updates(answers, state, 1e6)
            assert not failed, failed
            state.update(aggregator.combine(round_, state, sound, counts))

        serve(one_round)

    if ray:
        from simulation.ray_runtime import run_on_ray

        run_on_ray(fleet, workers, coordinate)
    else:
        from simulation.local_grid import LocalGrid

        with LocalGrid(fleet, workers) as grid:
            coordinate(grid)


def whole(examples: Examples) -> JourneyBatch:
    """All examples as tensors."""
    from models.batch import to_batch

    return to_batch(examples, slice(None))


def select(data: JourneyBatch, rows: object) -> JourneyBatch:
    """The rows of a batch."""
    from models.batch import JourneyBatch

    fields = (data.categorical, data.numeric, data.length, data.label)
    return JourneyBatch(*(field[rows] for field in fields))  # type: ignore[index]


def mean(models: list[Weights]) -> Weights:
    """The plain mean of models."""
    import numpy as np

    return {name: np.mean([m[name] for m in models], axis=0) for name in models[0]}


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


# ------------------------------------------------------------------ what measures


@dataclass
class Engine:
    """An engine's process, and what it took."""

    process: subprocess.Popen[str]
    startup: float = 0.0
    seconds: tuple[float, ...] = ()
    memory: float = 0.0

    @property
    def median(self) -> float:
        """Seconds a round."""
        return statistics.median(self.seconds)

    def run(self, round_: int) -> float:
        """Seconds that one round takes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{round_}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(SAID):
                return float(line.split()[1])
        raise SystemExit("an engine's process ended early; see its error above")


def tree(root: int) -> Iterator[int]:
    """A process and all below it."""
    yield root
    for path in Path(f"/proc/{root}/task").glob("*/children"):
        for child in path.read_text().split():
            yield from tree(int(child))


def memory_mb(root: int) -> float:
    """PSS of a process and all below it: shared pages count once."""
    total = 0
    for process in tree(root):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def peak_memory(engine: Engine, round_: int) -> float:
    """Largest memory in one round, sampled."""
    done, peak = threading.Event(), 0.0

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, memory_mb(engine.process.pid))
            done.wait(0.05)

    sampler = threading.Thread(target=sample)
    sampler.start()
    engine.run(round_)
    done.set()
    sampler.join()
    return peak


def measure(workload: str, model: str, engines: list[str], repeats: int) -> dict[str, Engine]:
    """All engines on one workload, taking turns."""
    rounds = repeats + 2
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    running: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        store(Path(folder), *WORKLOADS[workload])
        try:
            for name in engines:
                started = time.perf_counter()
                process = subprocess.Popen(
                    [
                        *(sys.executable, __file__, "--engine", name, "--folder", folder),
                        *("--models", model, "--workloads", workload, "--repeats", str(rounds)),
                    ],
                    env=environment,
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                running[name] = Engine(process)
                running[name].run(1)
                running[name].startup = time.perf_counter() - started
            for round_ in range(2, repeats + 2):
                for engine in running.values():
                    engine.seconds += (engine.run(round_),)
            for engine in running.values():
                engine.startup -= engine.median
                if sys.platform == "linux":
                    engine.memory = peak_memory(engine, rounds)
        finally:
            for engine in running.values():
                assert engine.process.stdin is not None
                engine.process.stdin.close()
            for engine in running.values():
                engine.process.wait(60)
    return running


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
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--runtimes", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are measured")
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
            show(workload, model, measure(workload, model, asked.runtimes, asked.repeats))


if __name__ == "__main__":
    main()
