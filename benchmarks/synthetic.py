"""Time and memory of a million synthetic visitors: python benchmarks/synthetic.py

Each run is a fresh single-threaded process, so that its peak memory is its own. The bar is 30 s.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

SITES, VISITORS, RUNS = 10, 100_000, 3


def run() -> None:
    """Generate once; print seconds, touchpoints, MB of the frames and MB of memory on top."""
    from conf.schema import FeatureConfig, NumericColumn, SyntheticData
    from journeys.synthetic import generate
    from journeys.truth import CHANNELS

    features = FeatureConfig(
        channels=[c.name for c in CHANNELS],
        categorical={"device": ["desktop", "mobile", "tablet"]},
        numeric={
            "duration_s": NumericColumn(0, 3600, log=True),
            "page_views": NumericColumn(0, 50, log=True),
        },
    )
    config = SyntheticData(features=features, sites=SITES, visitors=VISITORS)
    before, start = _peak_mb(), perf_counter()
    journeys = generate(config, seed=0)
    seconds, peak = perf_counter() - start, _peak_mb()
    size = journeys.touchpoints.estimated_size("mb") + journeys.decisions.estimated_size("mb")
    print(seconds, len(journeys.touchpoints), size, peak - before)


def _peak_mb() -> float:
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main() -> None:
    """Run three times and print medians, with the range of the time."""
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root), "POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}
    runs = []
    for _ in range(RUNS):
        done = subprocess.run(
            [sys.executable, __file__, "once"],
            env=env,
            check=True,
            capture_output=True,
            text=True,
        )
        runs.append([float(figure) for figure in done.stdout.split()])
    seconds, touchpoints, size, memory = (statistics.median(x) for x in zip(*runs, strict=True))
    print(
        f"{SITES} sites x {VISITORS:,} visitors, {touchpoints:,.0f} touchpoints, median of {RUNS}"
    )
    print(f"time         {seconds:6.1f} s ({min(runs)[0]:.1f} to {max(runs)[0]:.1f})")
    print(f"frames       {size:6.0f} MB")
    print(f"peak memory  {memory:6.0f} MB above the start")


if __name__ == "__main__":
    run() if sys.argv[1:] == ["once"] else main()
