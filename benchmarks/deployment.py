"""What a round between real processes costs beyond training, ours and the stock way, in one run.

    PYTHONPATH=. python benchmarks/deployment.py
    PYTHONPATH=. python benchmarks/deployment.py --rounds 5 --repeats 2

Three sites on the loopback address, a model of a few hundred parameters, one training step a round,
so that almost all of a round is what carries it:

- `ours`: hub (SuperLink, TLS front) and sites (agent, SuperNode) as deployed; a round is one
  exchange, with the evaluation in it. What the slowest site's training took is taken off.
- `stock`: Flower's SuperLink and SuperNodes as they come, without TLS, and FedAvg, which trains and
  evaluates in two exchanges; the ClientApp does nothing but import torch and opacus, as one that
  trains privately has to.
- `stock, no torch`: the same with a ClientApp that imports neither.

The ways take turns; medians over rounds, then over repeats.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.deployment.federation import (
    NAMES,
    SMALL,
    environment,
    free_ports,
    open_federation,
    rounds,
    until,
)

PROJECT = """\
[project]
name = "stock"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "stock:server"
clientapp = "stock:client"
[tool.flwr.app.config]
"""
APP = """\
import time
from pathlib import Path
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
{imports}
client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    metrics = MetricRecord({{"num-examples": 1}})
    content = RecordDict({{"arrays": message.content["arrays"], "metrics": metrics}})
    return Message(content, reply_to=message)

@client.evaluate()
def evaluate(message, context):
    metrics = MetricRecord({{"num-examples": 1, "loss": 1.0}})
    return Message(RecordDict({{"metrics": metrics}}), reply_to=message)

class Timed(FedAvg):
    def configure_train(self, *args, **kwargs):
        with Path({times!r}).open("a") as file:
            file.write(f"{{time.time()}}\\n")
        return super().configure_train(*args, **kwargs)

@server.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < {sites}:
        time.sleep(0.1)
    strategy = Timed(min_train_nodes={sites}, min_evaluate_nodes={sites},
                     min_available_nodes={sites})
    arrays = ArrayRecord([np.zeros(300, np.float32)])
    strategy.start(grid, arrays, num_rounds={rounds})
    Path({times!r}).with_suffix(".end").write_text(str(time.time()))
"""


def ours(count: int) -> list[float]:
    """Seconds of each round beyond the slowest site's training."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open_federation(Path(folder)) as federation,
    ):
        step = ("optimizer.local_epochs=0.01", "optimizer.batch_size=256")
        run = federation.run(*SMALL, *step, f"rounds={count}", f"evaluations={count}")
        took = [record["seconds"] for record in rounds(run)]
        trained = []
        for number in range(1, count + 1):
            said = re.compile(rf"train of run {run.name}, round {number}, in ([\d.]+) s")
            logs = [(federation.sites[name] / "logs" / "agent.log").read_text() for name in NAMES]
            trained.append(max(float(found) for log in logs for found in said.findall(log)))
        return [all_ - training for all_, training in zip(took, trained, strict=True)]


def stock(count: int, imports: str) -> list[float]:
    """Seconds of each round."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as running:
        folder = Path(temporary)
        link, *nodes = free_ports(1 + len(NAMES))
        times = folder / "times"
        (folder / "flwr").mkdir()
        connection = (
            f'[superlink]\ndefault = "hub"\n[superlink.hub]\naddress = "127.0.0.1:{link}"\n'
        )
        (folder / "flwr" / "config.toml").write_text(connection + "insecure = true\n")
        (folder / "stock-app").mkdir()
        (folder / "stock-app" / "pyproject.toml").write_text(PROJECT)
        app = APP.format(imports=imports, times=str(times), sites=len(NAMES), rounds=count)
        (folder / "stock-app" / "stock.py").write_text(app)
        binaries = Path(sys.executable).parent
        env = {**environment(), "FLWR_HOME": str(folder / "flwr"), "FLWR_TELEMETRY_ENABLED": "0"}
        env |= {"PATH": f"{binaries}:{os.environ['PATH']}", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        port = ("--insecure", "--host", "127.0.0.1", "--port")
        off = "--disable-runtime-dependency-installation"
        running.enter_context(_kept(folder, env, "flower-superlink", *port, str(link), off))
        time.sleep(5)
        for node in nodes:
            hub = ("--superlink", f"127.0.0.1:{link}")
            running.enter_context(_kept(folder, env, "flower-supernode", *hub, *port, str(node)))
        subprocess.run(
            ["flwr", "run", str(folder / "stock-app"), "hub"],
            env=env,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        end = times.with_suffix(".end")
        log = folder / "flower-superlink.log"
        until(end.exists, "the stock run", lambda: log.read_text()[-3000:], most=60 * count + 120)
        began = [*map(float, times.read_text().split()), float(end.read_text())]
        return [after - before for before, after in itertools.pairwise(began)]


@contextlib.contextmanager
def _kept(folder: Path, env: dict[str, str], *words: str) -> Iterator[None]:
    with (folder / f"{words[0]}.log").open("ab") as log:
        process = subprocess.Popen(
            words, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    """Print the medians and their ratios to ours."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    ways: dict[str, Callable[[], list[float]]] = {
        "ours": lambda: ours(options.rounds),
        "stock": lambda: stock(options.rounds, "import torch, opacus"),
        "stock, no torch": lambda: stock(options.rounds, ""),
    }
    medians: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(options.repeats):
        for name, way in ways.items():
            took = way()
            medians[name].append(statistics.median(took))
            shown = " ".join(f"{seconds:.1f}" for seconds in took)
            print(f"{repeat + 1}: {name:16} {shown}", flush=True)
    base = statistics.median(medians["ours"])
    print(f"\n{'way':16} {'s a round beyond training':>26} {'x ours':>8}")
    for name, found in medians.items():
        median = statistics.median(found)
        print(f"{name:16} {median:26.2f} {median / base:8.1f}")


if __name__ == "__main__":
    main()
