"""How fast a touchpoint table becomes examples, and in how much memory.

    PYTHONPATH=. python benchmarks/encode.py [--touchpoints 5000000] [--times timestamp|text]

Makes a Parquet file in a temporary folder (string visitor ids, about 4 touchpoints a visitor,
campaigns, two numeric columns), reads, decides and encodes it three times, each in a fresh process,
and prints the medians. The bar: a million touchpoints a second on two cores, and a peak of memory
below three times the raw table's.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from conf.schema import ColumnNames, FeatureConfig, NumericColumn, TableData
from journeys.decisions import decide
from journeys.encode import encode
from journeys.table import read_touchpoints

CHANNELS = ["direct", "organic search", "paid search", "email", "referral", "display", "affiliate"]
REPEATS = 3


def make_table(touchpoints: int, times: str) -> pl.DataFrame:
    """A table in order of time, as an export would be, of `touchpoints` rows."""
    rng = np.random.default_rng(0)
    visitors = max(1, int(touchpoints / 4.2))
    seconds = np.sort(rng.integers(1_767_225_600, 1_767_225_600 + 120 * 86400, touchpoints))
    table = pl.DataFrame(
        {
            "visitor": rng.integers(0, visitors, touchpoints),
            "time": pl.Series(seconds * 1_000_000).cast(pl.Datetime("us", "UTC")),
            "channel": pl.Series(CHANNELS).gather(rng.integers(0, len(CHANNELS), touchpoints)),
            "campaign": rng.integers(0, 400, touchpoints),
            "duration_s": rng.exponential(120, touchpoints),
            "page_views": rng.integers(1, 30, touchpoints),
            "converted": rng.random(touchpoints) < 0.03,
        }
    )
    return table.select(
        visitor_id=pl.format("v-{}", pl.col("visitor").cast(pl.String).str.zfill(14)),
        time=pl.col("time").dt.to_string("iso:strict") if times == "text" else pl.col("time"),
        channel="channel",
        campaign=pl.format("campaign {} of the year 2026", "campaign"),
        duration_s="duration_s",
        page_views="page_views",
        converted="converted",
    )


def data_config(path: Path) -> TableData:
    """A config that reads every column of `make_table`."""
    return TableData(
        path=str(path),
        columns=ColumnNames(campaign="campaign"),
        features=FeatureConfig(
            channels=CHANNELS,
            campaign_buckets=32,
            numeric={
                "duration_s": NumericColumn(0, 3600, log=True, known_at_end=True),
                "page_views": NumericColumn(0, 50, log=True, known_at_end=True),
            },
        ),
    )


def peak_bytes() -> int:
    """Largest resident size of this process so far (Linux)."""
    # Not getrusage: its figure starts at that of the parent, which made the table.
    status = Path("/proc/self/status").read_text()
    return next(int(ln.split()[1]) for ln in status.splitlines() if ln.startswith("VmHWM")) * 1024


def measure(path: Path) -> dict[str, float]:
    """Seconds of each step and the memory above that of the imports, of one run."""
    config = data_config(path)
    pl.select(pl.lit(1)).lazy().collect(engine="streaming")
    baseline = peak_bytes()
    begun = time.perf_counter()
    touchpoints = read_touchpoints(config)
    read = time.perf_counter()
    decisions = decide(touchpoints, config)
    decided = time.perf_counter()
    examples = encode(touchpoints, decisions, config)
    done = time.perf_counter()
    return {
        "read_s": read - begun,
        "decide_s": decided - read,
        "encode_s": done - decided,
        "total_s": done - begun,
        "examples": len(examples),
        "examples_bytes": sum(
            a.nbytes for a in vars(examples).values() if isinstance(a, np.ndarray)
        ),
        # The reader's child has ended before the table is read: the larger of the two counts.
        "peak_bytes": max(
            peak_bytes() - baseline, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        ),
    }


def main() -> None:
    """Make the table, measure in fresh processes, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--touchpoints", type=int, default=5_000_000)
    parser.add_argument("--times", choices=("timestamp", "text"), default="timestamp")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "touchpoints.parquet"
        table = make_table(arguments.touchpoints, arguments.times)
        raw = table.estimated_size()
        table.write_parquet(path)
        del table
        command = [sys.executable, __file__, "--measure", str(path)]
        runs = [json.loads(subprocess.check_output(command)) for _ in range(REPEATS)]

    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    print(f"touchpoints         {arguments.touchpoints:,}, examples {median['examples']:,.0f}")
    for step in ("read", "decide", "encode", "total"):
        print(f"{step:<20}{median[step + '_s']:.2f} s")
    print(f"touchpoints/s       {arguments.touchpoints / median['total_s']:,.0f}")
    print(f"raw table           {raw / 1e6:,.0f} MB")
    print(f"examples            {median['examples_bytes'] / 1e6:,.0f} MB")
    print(f"peak over baseline  {median['peak_bytes'] / 1e6:,.0f} MB")
    print(f"peak / raw table    {median['peak_bytes'] / raw:.2f}")


if __name__ == "__main__":
    main()
