"""How fast a site's visits get into its store, and in how much memory.

    PYTHONPATH=. python benchmarks/ingest.py [files|matomo_db] [--visits 1000000] [--repeats 3]

Makes visits of 13 months, three a visitor, as a Parquet file or in a MariaDB server of its own, and
runs `python -m client ingest` on them as an operator would, the start of the program included, each
time into an empty store. Prints the medians. The bars, on two cores: 200,000 visits a second from
Parquet and 50,000 from MariaDB, in less than 1.5 GB for 10 million visits.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from client.folder import create
from tests.mariadb import Database, load, mariadb, matomo_schema, random_visits, reader

ROOT = Path(__file__).parents[1]
DAYS = 390
SITE = """\
name: shop
source: {{{source}}}
consent: {{accepted: ["yes"]}}
"""
FILES = """\
name: files, path: "{path}", columns: {{visit_id: visit, referrer_type: kind, source: source,
  medium: medium, campaign: campaign, device: device, country: country, duration_s: seconds,
  page_views: pages, visit_number: number, revenue: revenue, consent: consent}}"""
MATOMO = "name: matomo_db, user: reader, port: {port}, consent_column: custom_dimension_1"


@contextmanager
def source(name: str, count: int, folder: Path) -> Iterator[str]:
    """Make the visits; gives the settings of their source while they can be read."""
    if name == "files":
        path = folder / "visits.parquet"
        _apart(_write, path, count)
        yield FILES.format(path=path)
        return
    (folder / "database").mkdir()
    with mariadb(folder / "database") as database:
        _apart(_load, database, count)
        yield MATOMO.format(port=database.port)


def _apart(make: Callable[..., None], *arguments: Any) -> None:
    """In a process of its own: the memory that a child is said to take starts at its parent's."""
    process = multiprocessing.get_context("spawn").Process(target=make, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit("error: the visits could not be made")


def _visits(count: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    return random_visits(count, days=DAYS, until=int(time.time()) - 86400)


def _write(path: Path, count: int) -> None:
    """The visits as a warehouse would export them."""
    visits, conversions = _visits(count)
    kinds = {1: "direct", 2: "search", 3: "website", 6: "campaign", 7: "social"}
    devices = {0: "desktop", 1: "mobile", 2: "tablet"}
    bought = conversions.select("idvisit", "revenue", converted=True)
    visits.join(bought, on="idvisit", how="left", maintain_order="left").select(
        visitor_id="idvisitor",
        visit="idvisit",
        time=pl.col("visit_first_action_time").str.to_datetime("%F %T", time_zone="UTC"),
        kind=pl.col("referer_type").replace_strict(kinds),
        source=pl.coalesce("campaign_source", "referer_name"),
        medium="campaign_medium",
        campaign="campaign_name",
        device=pl.col("config_device_type").replace_strict(devices),
        country="location_country",
        seconds="visit_total_time",
        pages="visit_total_actions",
        number="visitor_count_visits",
        converted=pl.col("converted").fill_null(False),
        revenue="revenue",
        consent="custom_dimension_1",
    ).write_parquet(path)


def _load(database: Database, count: int) -> None:
    matomo_schema(database)
    reader(database)
    for table, rows in zip(("visit", "conversion"), _visits(count), strict=True):
        load(database, f"matomo_log_{table}", rows)


def ingest(site: Path) -> tuple[float, int]:
    """Seconds and largest resident size in bytes (Linux) of a whole ingest."""
    command = [sys.executable, "-m", "client", "ingest", str(site)]
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
    )
    # Of this child alone, and of those that it had itself.
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit("error: the ingest failed")
    return seconds, used.ru_maxrss * 1024


def main() -> None:
    """Make the visits, ingest them into new sites, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("source", nargs="?", choices=("files", "matomo_db"), default="files")
    parser.add_argument("--visits", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    runs = []
    with (
        tempfile.TemporaryDirectory() as folder,
        source(arguments.source, arguments.visits, Path(folder)) as settings,
    ):
        for number in range(arguments.repeats):
            site = Path(folder) / str(number)
            create(site, int(time.time()))
            (site / "site.yaml").write_text(SITE.format(source=settings))
            runs.append(ingest(site))

    seconds, peak = (statistics.median(column) for column in zip(*runs, strict=True))
    print(f"visits         {arguments.visits:,} from {arguments.source}")
    print(f"seconds        {seconds:.2f}")
    print(f"visits/s       {arguments.visits / seconds:,.0f}")
    print(f"peak memory    {peak / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
