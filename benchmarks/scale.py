"""One very large site, and very many small ones: python benchmarks/scale.py

large   steps of one site, taking turns with those of a small one: microseconds an example, and the
        largest resident memory of the process
many    rounds of many sites in one process: milliseconds a site and round beyond training, seconds
        a round, and memory after the second and after the last round
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
# Before this folder, in which a file has the name of a package.
sys.path.insert(0, str(ROOT))

from rounds import (  # noqa: E402
    BATCH,
    CLIP,
    NOISE,
    TOUCHPOINTS,
    draw,
    open_fleet,
    our_round,
    settings,
    store,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MODELS = ("logistic", "mlp", "gru", "attention")
SMALL = 50_000
"""Journeys of the small site; the large one's are these, over and over."""


def large(model: str, touchpoints: int, steps: int, repeats: int) -> None:
    """One site of so many touchpoints beside a small one."""
    from journeys.examples import Examples
    from journeys.features import feature_spec
    from models.registry import build
    from models.weights import get_weights
    from privacy.randomness import SeededRandomness
    from privacy.training import LocalTraining, Trainer

    config = settings(model, 1)
    spec = feature_spec(config.data.features)
    tile = draw(SMALL, spec)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        sites = {}
        journeys = round(touchpoints / float(tile.length.mean()))
        for label, rows in (("small", SMALL), ("large", journeys)):
            folder = Path(name) / label
            folder.mkdir()
            for field in ("categorical", "numeric", "length", "label"):
                _write(folder / f"{field}.npy", getattr(tile, field), rows)
            sites[label] = Examples.open(folder)
        trainer = Trainer(build(config.model, spec))
        weights = get_weights(trainer.model)
        found: dict[str, list[float]] = {label: [] for label in sites}
        for repeat in range(repeats + 1):
            for label, examples in sites.items():
                batches = len(examples) / BATCH
                training = LocalTraining(
                    1 / batches, steps, float(BATCH), NOISE, CLIP, config.optimizer
                )
                seed = SeededRandomness(repeat)
                started = time.perf_counter()
                trainer.train(weights, examples, training, seed)
                if repeat:
                    spent = time.perf_counter() - started
                    found[label].append(1e6 * spent / steps / BATCH)
        size = sum(path.stat().st_size for path in (Path(name) / "large").iterdir())
    each = {label: statistics.median(values) for label, values in found.items()}
    print(f"{model}, a site of {journeys:,} journeys, {touchpoints:,} touchpoints, {size >> 20} MB")
    print(f"microseconds an example: {each['large']:.1f}, of a small site {each['small']:.1f}")
    print(f"large / small: {each['large'] / each['small']:.2f}")
    print(f"largest resident memory: {_peak_mb()} MB")


def many(model: str, sites: int, journeys: int, repeats: int) -> None:
    """Rounds of so many sites, through Flower's objects, in this process."""
    import privacy.training
    from simulation.local_grid import LocalGrid

    spent = 0.0
    train = privacy.training.Trainer.train

    def timed(*args: Any) -> Any:
        nonlocal spent
        started = time.perf_counter()
        try:
            return train(*args)
        finally:
            spent += time.perf_counter() - started

    privacy.training.Trainer.train = timed  # type: ignore[assignment,method-assign]
    config = settings(model, repeats + 1)
    seconds, beyond, memory = [], [], []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        store(Path(name), sites, journeys)
        fleet = open_fleet(Path(name), Path(name) / "ledgers", sites, journeys)
        with LocalGrid(fleet, 0) as grid:
            one_round = our_round(grid, config, sites)
            for round_ in range(1, repeats + 2):
                spent, started = 0.0, time.perf_counter()
                one_round(round_)
                if round_ > 1:
                    seconds.append(time.perf_counter() - started)
                    beyond.append(1000 * (seconds[-1] - spent) / sites)
                memory.append(_resident_mb())
    print(f"{model}, {sites:,} sites x {journeys:,} journeys, one process")
    print(f"seconds a round: {statistics.median(seconds):.2f}")
    print(f"milliseconds a site and round beyond training: {statistics.median(beyond):.2f}")
    print(f"resident memory after round 2: {memory[1]} MB, after round {len(memory)}: {memory[-1]}")


def _write(path: Path, tile: npt.NDArray[np.generic], rows: int) -> None:
    """The rows of `tile`, over and over, without a memory map, whose pages would count as ours."""
    import numpy as np

    header = {
        "descr": np.lib.format.dtype_to_descr(tile.dtype),
        "fortran_order": False,
        "shape": (rows, *tile.shape[1:]),
    }
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, len(tile)):
            file.write(tile[: rows - start].tobytes())


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _resident_mb() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20


def main() -> None:
    """Measure what is asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("large", "many"), nargs="?", default="large")
    parser.add_argument("--model", choices=MODELS, default="gru")
    parser.add_argument("--touchpoints", type=int, default=50_000_000, help="of the large site")
    parser.add_argument("--steps", type=int, default=200, help="of a large site, timed at once")
    parser.add_argument("--sites", type=int, default=1000, help="of many")
    parser.add_argument("--journeys", type=int, default=500, help="of each of many sites")
    parser.add_argument("--repeats", type=int, default=5, help="that are measured")
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores; {TOUCHPOINTS} places")
    if asked.what == "large":
        large(asked.model, asked.touchpoints, asked.steps, asked.repeats)
    else:
        many(asked.model, asked.sites, asked.journeys, asked.repeats)


if __name__ == "__main__":
    main()
