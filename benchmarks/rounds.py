"""A round's engines and the clock beside them, for the benchmarks of simulations.

An engine is one way to run a round over the same random journeys. It has a process of its own,
which runs a round for each line that it is told, so that engines take turns.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parents[1]

if TYPE_CHECKING:
    from flwr.serverapp import Grid
    from torch import Tensor, nn

    from conf.schema import Config
    from journeys.examples import Examples
    from journeys.features import FeatureSpec
    from models.batch import JourneyBatch
    from protocol.replies import Weights
    from simulation.fleet import Fleet

WORKLOADS = {"10x5000": (10, 5000), "100x500": (100, 500), "1000x20": (1000, 20)}
"""Sites, and visitors of each."""
BATCH, TOUCHPOINTS, NOISE, CLIP, DELTA, RATE = 256, 20, 1.0, 1.0, 1e-5, 0.1
SAID = "@"
"""Begins the lines that an engine's process says to the one that measures it."""
IMPORTED = "imported"
"""Said, where that is worth knowing, once an engine's process has imported what it needs."""

TURN_S, TURN_ROUNDS = 1.0, 10
"""An engine's turn: rounds one after the other, as in a run, until so many seconds or rounds are
over. After a pause a machine takes its time to give two processes two cores."""

Round = Callable[[int], None]


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


def draw(journeys: int, spec: FeatureSpec, seed: int = 0) -> Examples:
    """Random journeys of 1 to `TOUCHPOINTS` touchpoints."""
    import numpy as np

    from journeys.examples import Examples

    rng = np.random.default_rng(seed)
    length = rng.integers(1, TOUCHPOINTS + 1, journeys).astype(np.int32)
    real = (np.arange(TOUCHPOINTS) < length[:, None])[:, :, None]
    values = [rng.integers(1, size, (journeys, TOUCHPOINTS)) for _, size in spec.categorical]
    numeric = rng.random((journeys, TOUCHPOINTS, len(spec.numeric)), dtype=np.float32)
    label = (rng.random(journeys) < 0.1).astype(np.float32)
    categorical = (np.stack(values, axis=2) * real).astype(np.uint16)
    return Examples(categorical, (numeric * real).astype(np.float32), length, label)


def store(folder: Path, sites: int, visitors: int) -> None:
    """Random journeys, as a fleet."""
    from journeys.features import feature_spec
    from journeys.site import SiteJourneys
    from simulation.fleet import Fleet

    spec = feature_spec(settings("mlp", 1).data.features)
    # Two visitors held out: evaluation takes no time.
    drawn = [
        SiteJourneys(f"site {i}", draw(visitors, spec, 2 * i), draw(2, spec, 2 * i + 1))
        for i in range(sites)
    ]
    Fleet.store(drawn, 0, folder, folder / "ledgers")


def open_fleet(journeys: Path, ledgers: Path, sites: int, visitors: int) -> Fleet:
    """The fleet that `store` wrote, with ledgers of its own."""
    from simulation.fleet import Fleet

    names = tuple(f"site {i}" for i in range(sites))
    return Fleet(names, (visitors,) * sites, 0, journeys, ledgers)


def serve(one_round: Round) -> None:
    """Run a round for each line that comes in; say how long it took."""
    for round_ in turns():
        one_round(round_)


def turns() -> Iterator[int]:
    """The rounds that are asked for: what is done with one, until the next, is timed."""
    for line in sys.stdin:
        started = time.perf_counter()
        yield int(line)
        print(SAID, time.perf_counter() - started, flush=True)


def plain(fleet: Fleet, config: Config, model: nn.Module | None = None, bags: bool = False) -> None:
    """No privacy, no Flower; with another model than ours, or its bags made beforehand."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    from journeys.features import feature_spec
    from models.registry import build
    from models.weights import get_weights, set_weights

    if model is None:
        torch.manual_seed(config.seed)
        model = build(config.model, feature_spec(config.data.features))
    sites = [whole(fleet.open_journeys(i).train) for i in range(len(fleet.names))]
    if bags:
        sites = [with_bag(data, model) for data in sites]
    state = get_weights(model)

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


def train_by_opacus(model: nn.Module, data: JourneyBatch) -> float:
    """An epoch of one site by Opacus' common pattern, with a new privacy engine; its epsilon."""
    import warnings

    import torch
    from opacus import PrivacyEngine
    from torch.nn.functional import binary_cross_entropy_with_logits
    from torch.utils.data import DataLoader, TensorDataset

    from models.batch import JourneyBatch

    warnings.simplefilter("ignore")
    tensors = TensorDataset(data.categorical, data.numeric, data.length, data.label)
    engine = PrivacyEngine(secure_mode=False)
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), RATE),
        data_loader=DataLoader(tensors, batch_size=BATCH, shuffle=True),
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
    )
    for batch in itertools.starmap(JourneyBatch, loader):
        optimizer.zero_grad()
        torch.autograd.backward(binary_cross_entropy_with_logits(private(batch), batch.label))
        optimizer.step()
    epsilon: float = engine.get_epsilon(DELTA)
    return epsilon


def opacus(fleet: Fleet, config: Config) -> None:
    """A new privacy engine for each site and round, as in Flower's own example."""
    from journeys.features import feature_spec
    from models.registry import build
    from models.weights import get_weights, set_weights
    from server.rounds import initial_weights

    sites = [whole(fleet.open_journeys(i).train) for i in range(len(fleet.names))]
    spec = feature_spec(config.data.features)
    state = initial_weights(config)

    def one_round(_: int) -> None:
        trained = []
        for data in sites:
            model = build(config.model, spec)
            set_weights(model, state)
            train_by_opacus(model, data)
            trained.append(get_weights(model))
        state.update(mean(trained))

    serve(one_round)


def our_round(grid: Grid, config: Config, sites: int) -> Round:
    """A round of ours with all sites, which join before: privacy accounts and checks included."""
    import logging

    from protocol.exchange import Request
    from protocol.replies import SiteFailure, SiteUpdate
    from server.federation import Federation
    from server.rounds import first_plan, initial_weights
    from server.screening import screen_updates
    from server.strategy import Aggregator

    logging.getLogger("flwr").setLevel(logging.WARNING)
    federation, aggregator = Federation(grid), Aggregator(config.strategy)
    state = initial_weights(config)
    plan = first_plan(config, "benchmark")
    federation.join(plan, sites, sites, 600.0)
    counts = {name: told.visitors for name, told in federation.descriptions.items()}

    def one_round(round_: int) -> None:
        request = Request({"train": replace(plan, round=round_)}, state)
        answers = federation.ask(request, 3600.0)["train"]
        told = [a for a in answers if isinstance(a, SiteUpdate | SiteFailure)]
        assert len(told) == len(answers), answers
        sound, failed = screen_updates(told, state, 1e6)
        assert not failed, failed
        state.update(aggregator.combine(round_, state, sound, counts))

    return one_round


def federated(fleet: Fleet, config: Config, workers: int, ray: bool) -> None:
    """Our runtime, with all of Flower's objects."""

    def coordinate(grid: Grid) -> None:
        serve(our_round(grid, config, len(fleet.names)))

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


def with_bag(data: JourneyBatch, model: nn.Module) -> JourneyBatch:
    """The same journeys as bags, which their touchpoints are no longer needed for."""
    bag = model.get_submodule("bag")(data)
    none = data.categorical[:, :0].clone(), data.numeric[:, :0].clone()
    return replace(data, categorical=none[0], numeric=none[1], bag=bag)


def select(data: JourneyBatch, rows: Tensor) -> JourneyBatch:
    """The rows of a batch."""
    from models.batch import JourneyBatch

    return JourneyBatch(
        data.categorical[rows],
        data.numeric[rows],
        data.length[rows],
        data.label[rows],
        None if data.bag is None else data.bag[rows],
    )


def mean(models: list[Weights]) -> Weights:
    """The plain mean of models."""
    import numpy as np

    return {name: np.mean([m[name] for m in models], axis=0) for name in models[0]}


# ------------------------------------------------------------------ what measures


class EndedEarly(SystemExit):
    """An engine's process is no more."""


@dataclass
class Engine:
    """An engine's process, and what it took."""

    process: subprocess.Popen[str]
    started: float
    imports: float = 0.0
    """Seconds from the start to the end of the imports, if the process says so."""
    startup: float = 0.0
    """Seconds from the start to the end of the first round, less a round."""
    seconds: tuple[float, ...] = ()
    memory: float = 0.0
    rounds: int = 0
    """That it has run."""

    @property
    def median(self) -> float:
        """Seconds a round."""
        return statistics.median(self.seconds)

    def turn(self) -> None:
        """Run some rounds, and note how long each takes."""
        spent: list[float] = []
        while not spent or (sum(spent) < TURN_S and len(spent) < TURN_ROUNDS):
            spent.append(self.run())
        self.seconds += tuple(spent)

    def run(self) -> float:
        """Seconds that the next round takes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.rounds += 1
        self.process.stdin.write(f"{self.rounds}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            match line.split():
                case [first, said] if first == SAID and said == IMPORTED:
                    self.imports = time.perf_counter() - self.started
                case [first, seconds] if first == SAID:
                    return float(seconds)
        raise EndedEarly("an engine's process ended early; see its error above")


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


def peak_memory(engine: Engine) -> float:
    """Largest memory in one round, sampled."""
    done, peak = threading.Event(), 0.0

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, memory_mb(engine.process.pid))
            done.wait(0.05)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        engine.run()
    finally:
        done.set()
        sampler.join()
    return peak


def measure(
    workload: str,
    model: str,
    commands: Mapping[str, Sequence[str]],
    repeats: int,
    optional: Collection[str] = (),
) -> dict[str, Engine]:
    """All engines on one workload, taking turns; `optional` ones are left out where they fail.

    An engine's command is told, as options, which engine it is and what to run.
    """
    rounds = repeats * TURN_ROUNDS + 2
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    running: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        store(Path(folder), *WORKLOADS[workload])
        try:
            for name, command in commands.items():
                started = time.perf_counter()
                process = subprocess.Popen(
                    [
                        *(*command, "--engine", name, "--folder", folder),
                        *("--models", model, "--workloads", workload, "--repeats", str(rounds)),
                    ],
                    env=environment,
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                running[name] = Engine(process, started)
                with _left_out_where_it_fails(running, name, optional):
                    running[name].run()
                    running[name].startup = time.perf_counter() - started
            for _ in range(repeats):
                for name in list(running):
                    with _left_out_where_it_fails(running, name, optional):
                        running[name].turn()
            for name, engine in list(running.items()):
                engine.startup -= engine.median
                if sys.platform == "linux":
                    with _left_out_where_it_fails(running, name, optional):
                        engine.memory = peak_memory(engine)
        finally:
            for engine in running.values():
                assert engine.process.stdin is not None
                engine.process.stdin.close()
            for engine in running.values():
                engine.process.wait(60)
    return running


@contextlib.contextmanager
def _left_out_where_it_fails(
    running: dict[str, Engine], name: str, optional: Collection[str]
) -> Iterator[None]:
    try:
        yield
    except (EndedEarly, BrokenPipeError):
        if name not in optional:
            raise
        running.pop(name).process.wait(60)
