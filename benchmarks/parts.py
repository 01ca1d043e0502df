"""Where a private round's time goes: python benchmarks/parts.py

Each part's own seconds, without those of the parts within it, in the median of some rounds of our
runtime in one process. What is timed is wrapped from outside; a call of that costs 0.3 µs.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Before this folder, in which a file has the name of a package.
sys.path.insert(0, str(ROOT))

from rounds import WORKLOADS, open_fleet, our_round, settings, store  # noqa: E402

MODELS = ("logistic", "mlp", "gru", "attention")
ELSE = "all else (Flower's objects, Python between the parts)"


class Clock:
    """Own seconds of parts that contain one another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._within: list[float] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        self._within.append(0.0)
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] += spent - self._within.pop()
            if self._within:
                self._within[-1] += spent

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Time every call of a function."""
        inner: Callable[..., Any] = getattr(owner, attribute)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return inner(*args, **kwargs)

        setattr(owner, attribute, timed)


def watch_all(clock: Clock) -> None:
    """The parts of a round, by where they are in the code."""
    import torch

    import client.app
    import privacy.sampling
    import privacy.training
    from client.site import Site
    from models.bags import PlainBags
    from models.embedding import TouchpointBag
    from models.flat import FlatParameters
    from privacy.chain import Chain
    from privacy.descent import Descent
    from privacy.engines import BookKeeping
    from privacy.gradients import Kept, Lookups, OuterProducts, Products
    from privacy.ledger import Ledger
    from privacy.optimizer import VisitorDPOptimizer
    from privacy.randomness import SeededRandomness
    from server.federation import Federation
    from server.strategy import Aggregator

    arithmetic = "model: forward and backward"
    clock.watch(BookKeeping, "forward", arithmetic)
    clock.watch(torch.autograd, "grad", arithmetic)
    clock.watch(Chain, "backward", arithmetic)
    clock.watch(TouchpointBag, "forward", arithmetic)
    # A plain backward pass multiplies the same matrices for the gradients of the weights.
    for kind in (Kept, Lookups, OuterProducts, Products):
        clock.watch(kind, "add_weighted", "model: gradients of the weights, weighted")
    clipping = "clipping: visitors' norms and weights"
    clock.watch(BookKeeping, "visitor_gradients", clipping)
    clock.watch(VisitorDPOptimizer, "clip_and_accumulate", clipping)
    clock.watch(SeededRandomness, "normal", "noise: drawing normals")
    clock.watch(VisitorDPOptimizer, "add_noise", "noise: onto the grid and the sum")
    clock.watch(VisitorDPOptimizer, "step", "optimizer's step")
    clock.watch(SeededRandomness, "uniform", "sampling")
    clock.watch(privacy.training, "to_batch", "reading examples")
    clock.watch(PlainBags, "take", "reading examples")
    copies = "copies of the weights, new optimizers"
    clock.watch(FlatParameters, "set", copies)
    clock.watch(FlatParameters, "get", copies)
    clock.watch(Descent, "__init__", copies)
    clock.watch(privacy.training, "_make_private", copies)
    for call in ("reserve", "commit"):
        clock.watch(Ledger, call, "ledger")
    clock.watch(Ledger, "epsilon", "accountant")
    for call in ("read_request", "reply_parts", "from_records", "to_records"):
        clock.watch(client.app, call, "messages: reading and writing")
    clock.watch(Federation, "_read", "messages: reading and writing")
    clock.watch(Federation, "_messages", "messages: reading and writing")
    clock.watch(Aggregator, "combine", "aggregation")
    clock.watch(Site, "answer", "the site's checks, Python between the parts")
    clock.watch(privacy.training.Trainer, "train", "Python between a step's parts")


def measure(model: str, workload: str, repeats: int) -> tuple[float, dict[str, float]]:
    """Median seconds of a round, and of each part of it."""
    from simulation.local_grid import LocalGrid

    clock = Clock()
    watch_all(clock)
    sites, visitors = WORKLOADS[workload]
    config = settings(model, repeats + 1)
    found: dict[str, list[float]] = defaultdict(list)
    seconds = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        store(Path(folder), sites, visitors)
        fleet = open_fleet(Path(folder), Path(folder) / "ledgers", sites, visitors)
        with LocalGrid(fleet, 0) as grid:
            one_round = our_round(grid, config, sites)
            for round_ in range(1, repeats + 2):
                clock.seconds.clear()
                started = time.perf_counter()
                with clock.part(ELSE):
                    one_round(round_)
                if round_ > 1:
                    seconds.append(time.perf_counter() - started)
                    for name, spent in clock.seconds.items():
                        found[name].append(spent)
    return statistics.median(seconds), {n: statistics.median(all_) for n, all_ in found.items()}


def main() -> None:
    """Measure what is asked, one model in one process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="gru")
    parser.add_argument("--workload", choices=WORKLOADS, default="10x5000")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are measured")
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    whole, parts = measure(asked.model, asked.workload, asked.repeats)
    sites, visitors = WORKLOADS[asked.workload]
    print(f"{asked.model}, {sites} sites x {visitors:,} journeys: {whole:.3f} s a round")
    print(f"(load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores)\n")
    print("| part | % | ms |\n| --- | ---: | ---: |")
    for name, spent in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"| {name} | {100 * spent / whole:.1f} | {1000 * spent:.1f} |")


if __name__ == "__main__":
    main()
