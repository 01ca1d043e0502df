"""A federated round as others run it, and as we do: python benchmarks/peers.py

Ways to run a round over the same random journeys, each in a process of its own, taking turns (of a
second, or ten rounds; one round if it takes longer). One local epoch, batches of 256, plain SGD;
where there is privacy, that of each visitor at each site (DP-SGD: clipping norm 1, noise multiplier
1) with the epsilon that it costs:

plain      a PyTorch loop over the sites: our model classes, no privacy, no Flower, index-batched
bags       the same, what the model makes of a batch before its first weight made once beforehand
packed     the same with `torch.nn.GRU` on packed sequences in place of our GRU
opacus     the loop with Opacus' common pattern: PrivacyEngine.make_private for each site and round
flower     Flower's own example of Opacus: the same pattern in a ClientApp, FedAvg, Flower's
           simulation runtime on Ray with 2 processes
pfl        pfl-research: its FederatedAveraging on its SimulatedBackend; its own privacy is the
           coordinator's, so that of a site is Opacus': its model a GradSampleModule, made once, its
           local optimizer a DPOptimizer, its data Poisson batches; epsilon once a round, as the
           sites are of one size
flsim      FLSim: its SyncTrainer with its DPClient (Opacus inside, a site's batches made once,
           epsilon for each site and round)
ours       our local runtime, through Flower's objects: ledger, checks, aggregation, DP; one process
ours2      the same with 2 worker processes

Ours draws from a plan for a target epsilon; that its noise is of another size takes no time.

The first round warms up; medians of the others. Start-up is the time from the start of the process
to the end of the first round, less a round; within ours, imports are shown apart. Memory is the
largest PSS, summed over the process and its children, in one more round (Linux only).

pfl-research and FLSim ask for other packages than we do, and get a Python of their own (3.11, at
`--peers-python`); where one of them does not work, its row is skipped:

    python3.11 -m venv .venv-peers
    .venv-peers/bin/pip install 'torch>=2.9,<2.14' 'opacus==1.6.0' 'pfl==0.6.0'
    .venv-peers/bin/pip install 'hydra-core>=1.3.2,<1.4' polars polars-hash safetensors
    .venv-peers/bin/pip install --no-deps 'flsim==0.1.0'
    .venv-peers/bin/pip install pandas scikit-learn tqdm

FLSim is installed without what it asks for, as that is another torch for its examples' pictures;
`hashable_settings` below is what it needs to be imported by a Python of today.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import subprocess
import sys
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
# Before this folder, which has a file with the name of a package.
sys.path.insert(0, str(ROOT))

from rounds import (  # noqa: E402
    BATCH,
    CLIP,
    DELTA,
    IMPORTED,
    NOISE,
    RATE,
    SAID,
    WORKLOADS,
    Engine,
    federated,
    measure,
    opacus,
    open_fleet,
    plain,
    settings,
    train_by_opacus,
    turns,
    whole,
)

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.serverapp import Grid
    from torch import Tensor, nn

    from conf.schema import Config
    from models.batch import JourneyBatch

MODELS = ("logistic", "mlp", "gru", "attention")
ENGINES = {
    "plain": "plain",
    "bags": "plain, bags ready",
    "packed": "packed nn.GRU",
    "opacus": "Opacus",
    "flower": "Flower + Ray + Opacus",
    "pfl": "pfl-research + Opacus",
    "flsim": "FLSim with DP",
    "ours": "ours",
    "ours2": "ours, 2 processes",
}
ONLY = {"bags": ("logistic", "mlp"), "packed": ("gru",)}
"""Models of the engines that cannot do all."""
PEERS = {"pfl": "pfl", "flsim": "flsim"}
"""Packages of the engines that have a Python of their own."""
TABLE = (("mlp", "10x5000"), ("mlp", "100x500"), ("gru", "10x5000"))
"""The README's."""
IMPORTS = (
    "conf.compose",
    "flwr.clientapp",
    "flwr.serverapp",
    "models.registry",
    "opacus",
    "polars",
    "server.federation",
    "server.rounds",
    "server.screening",
    "server.strategy",
    "simulation.fleet_app",
    "simulation.local_grid",
    "torch",
)
"""Of ours: what it takes to import them is Python's, all else of a start ours."""
Case = tuple[str, str]
"""A model and a workload."""


# ------------------------------------------------------------------ what runs in a process


def packed_gru(config: Config) -> nn.Module:
    """What one would write with PyTorch's own GRU."""
    from torch import nn
    from torch.nn.utils.rnn import pack_padded_sequence

    from conf.schema import GruConfig
    from journeys.features import feature_spec
    from models.embedding import TouchpointEmbedding, output_layer

    assert isinstance(config.model, GruConfig)
    sizes, spec = config.model, feature_spec(config.data.features)

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = TouchpointEmbedding(spec, sizes.embedding)
            self.gru = nn.GRU(sizes.embedding, sizes.hidden, batch_first=True)
            self.output = output_layer(sizes.hidden, sizes.base_rate)

        def forward(self, batch: JourneyBatch) -> Tensor:
            sequence = pack_padded_sequence(
                self.embedding(batch), batch.length, batch_first=True, enforce_sorted=False
            )
            logits: Tensor = self.output(self.gru(sequence)[1].squeeze(0))
            return logits.squeeze(1)

    return Packed()


def tensors(journeys: Path, index: int) -> tuple[Tensor, ...]:
    """A site's training journeys: categorical, numeric, length, label."""
    from journeys.examples import Examples

    data = whole(Examples.open(journeys / str(index) / "train"))
    return data.categorical, data.numeric, data.length, data.label


def flower(journeys: Path, sites: int, config: Config) -> None:
    """Flower's pattern; each message opens its site's journeys, which are memory-mapped."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    from journeys.features import feature_spec
    from models.registry import build

    logging.getLogger("flwr").setLevel(logging.ERROR)
    spec = feature_spec(config.data.features)
    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        import torch

        from models.batch import JourneyBatch

        torch.set_num_threads(1)
        data = JourneyBatch(*tensors(journeys, int(context.node_config["partition-id"])))
        model = build(config.model, spec)
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        epsilon = train_by_opacus(model, data)
        told = MetricRecord({"num-examples": len(data), "epsilon": epsilon})
        arrays = ArrayRecord(model.state_dict())
        return Message(RecordDict({"arrays": arrays, "metrics": told}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
        arrays = ArrayRecord(build(config.model, spec).state_dict())
        for _ in turns():
            arrays = strategy.start(grid, arrays, num_rounds=1).arrays

    run_simulation(
        server,
        client,
        num_supernodes=sites,
        backend_config={
            "init_args": {"num_cpus": 2, "log_to_driver": False, "logging_level": "ERROR"},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


def pfl(journeys: Path, sites: int, config: Config) -> None:
    """pfl-research's algorithm and backend, with Opacus where a site takes a step."""
    import torch
    from opacus import GradSampleModule
    from opacus.accountants import RDPAccountant
    from opacus.optimizers import DPOptimizer
    from pfl.aggregate.simulate import SimulatedBackend  # type: ignore[import-not-found]
    from pfl.algorithm.base import NNAlgorithmParams  # type: ignore[import-not-found]
    from pfl.algorithm.federated_averaging import (  # type: ignore[import-not-found]
        FederatedAveraging,
    )
    from pfl.callback.base import TrainingProcessCallback  # type: ignore[import-not-found]
    from pfl.data.federated_dataset import FederatedDataset  # type: ignore[import-not-found]
    from pfl.data.pytorch import PyTorchTensorDataset  # type: ignore[import-not-found]
    from pfl.data.sampling import get_user_sampler  # type: ignore[import-not-found]
    from pfl.hyperparam import NNTrainHyperParams  # type: ignore[import-not-found]
    from pfl.metrics import Metrics  # type: ignore[import-not-found]
    from pfl.model.pytorch import PyTorchModel  # type: ignore[import-not-found]
    from torch import nn
    from torch.nn.functional import binary_cross_entropy_with_logits

    from journeys.features import feature_spec
    from models.batch import JourneyBatch
    from models.registry import build

    warnings.simplefilter("ignore")
    held = {str(index): tensors(journeys, index) for index in range(sites)}
    visitors = len(held["0"][0])
    steps = -(-visitors // BATCH)
    accountant = RDPAccountant()

    class Private(nn.Module):
        """What pfl asks of a model."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = GradSampleModule(build(config.model, feature_spec(config.data.features)))

        def loss(self, *batch: Tensor) -> Tensor:
            journeys = JourneyBatch(*batch)
            return binary_cross_entropy_with_logits(self.inner(journeys), journeys.label)

        def metrics(self, *batch: Tensor) -> dict[str, float]:
            return {}

    class Poisson(PyTorchTensorDataset):  # type: ignore[misc]
        """Batches in which each visitor is by chance, as the accountant takes for granted."""

        def iter(self, batch_size: int | None) -> Iterator[list[Tensor]]:
            for _ in range(steps):
                rows = (torch.rand(len(self)) < 1 / steps).nonzero()[:, 0]
                yield [tensor[rows] for tensor in self.raw_data]

    class Turns(TrainingProcessCallback):  # type: ignore[misc]
        """Waits for its turn before each round, and says what one cost."""

        def on_train_begin(self, *, model: Any) -> Any:
            self.turns = turns()
            next(self.turns)
            return Metrics()

        def after_central_iteration(self, *args: Any, **kwargs: Any) -> tuple[bool, Any]:
            for _ in range(steps):
                accountant.step(noise_multiplier=NOISE, sample_rate=1 / steps)
            accountant.get_epsilon(DELTA)
            return next(self.turns, None) is None, Metrics()

    def local_optimizer(parameters: Iterator[nn.Parameter], lr: float) -> DPOptimizer:
        return DPOptimizer(
            torch.optim.SGD(parameters, lr),
            noise_multiplier=NOISE,
            max_grad_norm=CLIP,
            expected_batch_size=visitors / steps,
        )

    model = Private()
    users = get_user_sampler("minimize_reuse", list(held))
    FederatedAveraging().run(
        backend=SimulatedBackend(FederatedDataset(lambda user: Poisson(held[user]), users), None),
        model=PyTorchModel(model, local_optimizer, torch.optim.SGD(model.parameters(), 1.0)),
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=sys.maxsize,
            evaluation_frequency=sys.maxsize,
            train_cohort_size=sites,
            val_cohort_size=0,
        ),
        model_train_params=NNTrainHyperParams(
            local_batch_size=BATCH, local_num_epochs=1, local_learning_rate=RATE
        ),
        callbacks=[Turns()],
    )


def flsim(journeys: Path, sites: int, config: Config) -> None:
    """FLSim's trainer and private clients; an epoch of its trainer is a round."""
    # Else a bar for each round.
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    with hashable_settings("flsim"):
        from flsim.clients.dp_client import DPClientConfig  # type: ignore[import-not-found]
        from flsim.data.data_provider import (  # type: ignore[import-not-found]
            FLDataProviderFromList,
        )
        from flsim.interfaces.batch_metrics import (  # type: ignore[import-not-found]
            IFLBatchMetrics,
        )
        from flsim.interfaces.model import IFLModel  # type: ignore[import-not-found]
        from flsim.optimizers.local_optimizers import (  # type: ignore[import-not-found]
            LocalOptimizerSGDConfig,
        )
        from flsim.privacy.common import PrivacySetting  # type: ignore[import-not-found]
        from flsim.trainers.sync_trainer import (  # type: ignore[import-not-found]
            SyncTrainer,
            SyncTrainerConfig,
        )
    from omegaconf import OmegaConf

    from journeys.features import feature_spec
    from models.batch import JourneyBatch
    from models.registry import build

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

    class Metrics(IFLBatchMetrics):  # type: ignore[misc]
        """What FLSim asks of a step."""

        def __init__(self, loss: Tensor, logits: Tensor, batch: JourneyBatch) -> None:
            self._loss, self._logits, self._batch = loss, logits, batch

        loss = property(lambda self: self._loss)
        num_examples = property(lambda self: len(self._batch))
        predictions = property(lambda self: self._logits)
        targets = property(lambda self: self._batch.label)
        model_inputs = property(lambda self: self._batch)

    class Model(IFLModel):  # type: ignore[misc]
        """What FLSim asks of a model."""

        def __init__(self) -> None:
            self.inner = build(config.model, feature_spec(config.data.features))

        def fl_forward(self, batch: JourneyBatch) -> Metrics:
            logits = self.inner(batch)
            return Metrics(binary_cross_entropy_with_logits(logits, batch.label), logits, batch)

        def fl_create_training_batch(self, batch: JourneyBatch, **kwargs: Any) -> JourneyBatch:
            return batch

        def fl_get_module(self) -> nn.Module:
            return self.inner

        def fl_cuda(self) -> None:
            pass

        def get_eval_metrics(self, batch: JourneyBatch) -> Metrics:
            with torch.no_grad():
                return self.fl_forward(batch)

        def get_num_examples(self, batch: JourneyBatch) -> int:
            return len(batch)

    model = Model()
    # As FLSim's data loaders do it: a site's batches are made once.
    users = []
    for index in range(sites):
        whole = JourneyBatch(*tensors(journeys, index))
        sizes = [min(BATCH, len(whole) - start) for start in range(0, len(whole), BATCH)]
        users.append(list(whole.split(sizes)))
    # Its clients do not read the alphas; to copy the default thousand takes longer than to train.
    privacy = PrivacySetting(
        alphas=[], noise_multiplier=NOISE, clipping_value=CLIP, target_delta=DELTA
    )
    client = DPClientConfig(
        epochs=1, optimizer=LocalOptimizerSGDConfig(lr=RATE), privacy_setting=privacy
    )
    settings = SyncTrainerConfig(
        epochs=1, do_eval=False, report_train_metrics=False, users_per_round=sites, client=client
    )
    trainer = SyncTrainer(model=model, cuda_enabled=False, **OmegaConf.structured(settings))
    provider = FLDataProviderFromList(users, [], [], model)
    for _ in turns():
        trainer.train(provider, None, num_total_users=sites, distributed_world_size=1)


@contextlib.contextmanager
def hashable_settings(package: str) -> Iterator[None]:
    """Let a package of before Python 3.11 have instances of dataclasses as defaults.

    Python refuses them since then unless they have a hash, which they get here.
    """
    made = dataclasses.dataclass

    def dataclass(cls: type[Any] | None = None, /, **options: Any) -> Any:
        if cls is None:
            return lambda cls: dataclass(cls, **options)
        if cls.__module__.partition(".")[0] == package:
            options["unsafe_hash"] = True
        return made(cls, **options)

    with unittest.mock.patch.object(dataclasses, "dataclass", dataclass):
        yield


def engine_process(engine: str, model: str, workload: str, folder: Path, rounds: int) -> None:
    """What an engine's process does."""
    sites, visitors = WORKLOADS[workload]
    if engine.startswith("ours"):
        for name in IMPORTS:
            importlib.import_module(name)
        print(SAID, IMPORTED, flush=True)
    config = settings(model, rounds)
    if engine == "flower":
        return flower(folder, sites, config)
    if engine == "pfl":
        return pfl(folder, sites, config)
    if engine == "flsim":
        return flsim(folder, sites, config)
    fleet = open_fleet(folder, folder / "ledgers" / f"{engine}-{model}", sites, visitors)
    match engine:
        case "plain":
            plain(fleet, config)
        case "bags":
            plain(fleet, config, bags=True)
        case "packed":
            plain(fleet, config, packed_gru(config))
        case "opacus":
            opacus(fleet, config)
        case "ours":
            federated(fleet, config, workers=0, ray=False)
        case "ours2":
            federated(fleet, config, workers=2, ray=False)
        case _:
            raise SystemExit(f"{engine}: no such engine")


# ------------------------------------------------------------------ what is shown


@dataclasses.dataclass(frozen=True)
class Bar:
    """What was promised of ours."""

    text: str
    unit: str
    limit: float
    case: Callable[[str, str], bool]
    """Whether it is about a model and a workload."""
    value: Callable[[dict[str, Engine]], float]
    """Raises KeyError where an engine did not run."""
    least: bool = False
    """Whether more is better."""


def _over(other: str) -> Callable[[dict[str, Engine]], float]:
    return lambda engines: engines["ours"].median / engines[other].median


def _large(workload: str) -> bool:
    return workload != "1000x20"


BARS = (
    Bar("ours / plain", "x", 0.75, lambda m, w: (m, w) == ("mlp", "10x5000"), _over("plain")),
    Bar("ours / plain", "x", 1.0, lambda m, w: (m, w) == ("mlp", "100x500"), _over("plain")),
    Bar(
        "ours / plain",
        "x",
        1.0,
        lambda m, w: m in ("logistic", "gru") and _large(w),
        _over("plain"),
    ),
    Bar("ours / packed nn.GRU", "x", 1.35, lambda m, w: m == "gru" and _large(w), _over("packed")),
    Bar("ours / plain", "x", 1.4, lambda m, w: m == "attention" and _large(w), _over("plain")),
    Bar(
        "ours / ours, 2 processes",
        "x",
        1.7,
        lambda m, w: _large(w),
        lambda engines: engines["ours"].median / engines["ours2"].median,
        least=True,
    ),
    Bar(
        "start-up of ours beyond imports",
        "s",
        2.0,
        lambda m, w: True,
        lambda engines: engines["ours"].startup - engines["ours"].imports,
    ),
    Bar(
        "memory of ours",
        "GB",
        0.6,
        lambda m, w: m != "gru",
        lambda engines: engines["ours"].memory / 1000,
    ),
    Bar(
        "memory of ours",
        "GB",
        0.7,
        lambda m, w: m == "gru",
        lambda engines: engines["ours"].memory / 1000,
    ),
    Bar(
        "a round of ours",
        "s",
        0.7,
        lambda m, w: (m, w) == ("logistic", "1000x20"),
        lambda engines: engines["ours"].median,
    ),
)


def show(case: Case, engines: dict[str, Engine]) -> None:
    """One case's table."""
    model, workload = case
    sites, visitors = WORKLOADS[workload]
    print(f"\n{model}, {sites} sites x {visitors:,} journeys, one local epoch, batch {BATCH}")
    print(f"{'':22} s a round (range)            / plain  start-up s  (imports)   memory MB")
    for name, engine in engines.items():
        spread = f"({min(engine.seconds):.3f} to {max(engine.seconds):.3f})"
        imports = f"({engine.imports:.1f})" if engine.imports else ""
        print(
            f"{ENGINES[name]:22} {engine.median:7.3f} {spread:20} {_ratio(engine, engines):>7}"
            f" {engine.startup:11.1f}  {imports:>9} {engine.memory:11.0f}",
            flush=True,
        )


def _ratio(engine: Engine | None, engines: dict[str, Engine]) -> str:
    base = engines.get("plain")
    if engine is None or base is None:
        return ""
    ratio = engine.median / base.median
    return f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"


def show_markdown(results: dict[Case, dict[str, Engine]]) -> None:
    """What the README shows: start-up and memory are the largest of all cases."""
    columns = [f"{model} {workload}" for model, workload in results]
    print(f"\n| time of a round / plain | {' | '.join(columns)} | start-up s | memory MB |")
    print(f"| --- |{' ---: |' * (len(columns) + 2)}")
    for name, text in ENGINES.items():
        ran = [engines[name] for engines in results.values() if name in engines]
        if ran:
            ratios = [_ratio(engines.get(name), engines) for engines in results.values()]
            startup = f"{max(engine.startup for engine in ran):.1f}"
            memory = f"{max(engine.memory for engine in ran):.0f}"
            print(f"| {' | '.join([text, *ratios, startup, memory])} |")


def show_bars(results: dict[Case, dict[str, Engine]]) -> None:
    """Which of what was promised was reached, where it was measured."""
    print("\nbars")
    for (model, workload), engines in results.items():
        for bar in BARS:
            if not bar.case(model, workload):
                continue
            try:
                value = bar.value(engines)
            except KeyError:
                continue
            reached = value >= bar.limit if bar.least else value <= bar.limit
            print(
                f"{model + ' ' + workload:18} {bar.text:32} {value:6.2f} {bar.unit:2}"
                f" {'at least' if bar.least else 'at most':8} {bar.limit:5.2f}"
                f"  {'reached' if reached else 'NOT REACHED'}"
            )


VERSIONS = """
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""


def peer_versions(python: Path, package: str) -> dict[str, str] | str:
    """The versions of a peer and what it runs on, or why it cannot be run."""
    try:
        told = subprocess.run(
            [python, "-c", VERSIONS, package, "torch", "opacus"],
            capture_output=True,
            text=True,
            check=True,
        )
    except OSError:
        return f"no Python at {python}: the head of this file says how to make it"
    except subprocess.CalledProcessError as error:
        last = str(error.stderr).strip().splitlines()[-1:]
        return f"not installed in {python}: {' '.join(last)}"
    versions: dict[str, str] = json.loads(told.stdout)
    return versions


def main() -> None:
    """Measure what is asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--repeats", type=int, default=5, help="turns of each engine")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers/bin/python")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.engine:
        engine_process(
            asked.engine, asked.models[0], asked.workloads[0], asked.folder, asked.repeats
        )
        return

    cases = list(TABLE)
    if asked.models or asked.workloads:
        workloads = asked.workloads or ("10x5000", "100x500")
        cases = list(itertools.product(asked.models or ("mlp", "gru"), workloads))
    packages = ("torch", "opacus", "flwr", "ray")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    commands: dict[str, tuple[str, str]] = {}
    skipped: dict[str, str] = {}
    for name in asked.engines:
        python = Path(sys.executable)
        if name in PEERS:
            python = asked.peers_python.absolute()
            found = peer_versions(python, PEERS[name])
            if isinstance(found, str):
                skipped[ENGINES[name]] = found
                continue
            own, *others = (f"{package} {version}" for package, version in found.items())
            versions.append(f"{own} (with {', '.join(others)})")
        commands[name] = (str(python), __file__)

    print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    results: dict[Case, dict[str, Engine]] = {}
    for case in cases:
        model, workload = case
        able = {n: c for n, c in commands.items() if model in ONLY.get(n, MODELS)}
        results[case] = measure(workload, model, able, asked.repeats, optional=PEERS)
        show(case, results[case])
        for name in able.keys() - results[case].keys():
            skipped[f"{ENGINES[name]}, {model} {workload}"] = "failed; see its error above"

    show_markdown(results)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    print(f"\n{', '.join(versions)}; {machine}.")
    for name, reason in skipped.items():
        print(f"Skipped: {name}: {reason}")
    show_bars(results)


if __name__ == "__main__":
    main()
