"""From three sites' Matomo databases to a model that scores their visitors, by commands alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from journeys.store import Store
from tests.mariadb import (
    Database,
    a_conversion,
    a_visit,
    load,
    mariadb,
    matomo_schema,
    random_visits,
    reader,
)

ROOT = Path(__file__).parents[1]
SITES = {"north": 1, "east": 2, "south": 3}
"""Matomo's `idsite` of each."""
VISITS = 9_000
"""Of each site, by about a third as many visitors."""
PASSWORD = "read-only-and-secret"
FORGOTTEN = "C0FFEE0000001073"
"""The visitor of north with the most visits, as Matomo shows the id."""

SECRETS = (
    PASSWORD.encode(),
    b"c0ffee000000",
    b"C0FFEE000000",
    bytes.fromhex("c0ffee000000"),
    b"0a000001",
    b"10.0.0.1",
    b"somebody@",
    b"/private",
)
"""What the databases hold and no file may: visitors' ids, IP addresses, user ids, pages."""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    with mariadb(tmp_path_factory.mktemp("mariadb")) as server:
        matomo_schema(server)
        reader(server, password=PASSWORD)
        yield server


def fill(database: Database, now: int) -> dict[str, int]:
    """Load three months of visits of each site; returns how many have consent."""
    for number in SITES.values():
        visits, conversions = random_visits(VISITS, seed=number, until=now - 3 * 3600, lift=5)
        whose = (pl.col("idvisit") + number * 1_000_000, pl.lit(number).alias("idsite"))
        more = {"user_id": "somebody@example.org", "referer_url": "https://example.org/private"}
        told = visits.with_columns(*whose, **{name: pl.lit(text) for name, text in more.items()})
        load(database, "matomo_log_visit", told)
        load(database, "matomo_log_conversion", conversions.with_columns(*whose))
    consented = dict(
        database.execute(
            "SELECT idsite, COUNT(*) FROM matomo_log_visit WHERE custom_dimension_1 = 'yes' "
            "GROUP BY idsite"
        )
    )
    return {site: consented[number] for site, number in SITES.items()}


def set_up(folder: Path, site: str, port: int) -> None:
    """What an operator writes after `init`."""
    password = folder / "keys" / "matomo.password"
    password.write_text(PASSWORD)
    password.chmod(0o600)
    settings = (folder / "site.yaml").read_text()
    for before, after in (
        ("port: 3306", f"port: {port}"),
        ("site_id: 1\n  goals", f"site_id: {SITES[site]}\n  goals"),
        ('consent_column: ""', "consent_column: custom_dimension_1"),
        ("source:\n", "source:\n  settle_minutes: 1\n"),
    ):
        assert before in settings
        settings = settings.replace(before, after, 1)
    (folder / "site.yaml").write_text(settings)


def run(command: str, folder: Path) -> str:
    words = command.split()
    words = [str(ROOT / word) if word == "simulate.py" else word for word in words[1:]]
    ended = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def row(table: str, name: str) -> int:
    """The number beside a name in a table that a command printed; 0 if it is not there."""
    found = re.search(rf"{name}\s+[│┃]\s+([\d,]+)", table)
    return int(found[1].replace(",", "")) if found else 0


def stored(folder: Path) -> pl.DataFrame:
    with Store(folder / "store", read_only=True) as store:
        return store.visits().collect()


def new_visits(database: Database, now: int) -> None:
    """At north a new visitor comes and buys, one to forget comes again, an old visit goes on."""
    ended = f"{datetime.fromtimestamp(now - 60, UTC):%Y-%m-%d %H:%M:%S}"
    times = {"visit_first_action_time": ended, "visit_last_action_time": ended}
    came = ("c0ffee00000fffff", FORGOTTEN.lower())
    visits = [
        a_visit(9_000_000 + number, idvisitor=visitor, **times)
        for number, visitor in enumerate(came)
    ]
    load(database, "matomo_log_visit", visits)
    load(database, "matomo_log_conversion", [a_conversion(9_000_000, 0, revenue=25)])
    database.execute(
        f"UPDATE matomo_log_visit SET visit_last_action_time = '{ended}' "
        f"WHERE idvisit = (SELECT MAX(idvisit) FROM matomo_log_visit WHERE idvisit < 2000000 "
        f"AND custom_dimension_1 = 'yes' AND idvisitor != UNHEX('{FORGOTTEN}'))"
    )


def everything_in(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file, Parquet in plain text."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "matomo.password":
            yield path, path.read_bytes()
            if path.suffix == ".parquet":
                table = pl.read_parquet(path)
                assert table.width
                yield path, table.with_columns(pl.all().cast(pl.String)).write_csv().encode()


@pytest.mark.slow
def test_from_three_databases_to_scores(database: Database, tmp_path: Path) -> None:
    consented = fill(database, int(time.time()))
    for site in SITES:
        begin_site(tmp_path, site, database.port, consented[site])
    forgotten = forget_one(tmp_path, database)
    ingest_again(tmp_path, database)
    assert forgotten not in stored(tmp_path / "north")["visitor_id"]
    look_at_kpis(tmp_path, database)
    train(tmp_path)
    at = datetime.fromtimestamp(int(time.time()), UTC)
    for site in SITES:
        scores = score(tmp_path, site, at)
        assert forgotten not in scores["visitor_id"]

    looked_at = list(everything_in(tmp_path))
    assert len(looked_at) > 40
    for path, content in looked_at:
        for secret in SECRETS:
            assert secret not in content, path


def begin_site(folder: Path, site: str, port: int, consented: int) -> None:
    run(f"python -m client init {site}", folder)
    set_up(folder / site, site, port)
    checked = run(f"python -m client check {site}", folder)
    assert "problem" not in checked
    assert row(checked, "would be stored") == consented
    assert stored(folder / site).is_empty()
    ingested = run(f"python -m client ingest {site}", folder)
    assert row(ingested, "read") == VISITS
    assert row(ingested, "left out: consent") == VISITS - consented
    assert row(ingested, "stored") == consented
    assert stored(folder / site)["site"].unique().to_list() == [site]


def forget_one(folder: Path, database: Database) -> str:
    """A visitor of north wants to be forgotten; returns the pseudonym."""
    [(theirs,)] = database.execute(
        f"SELECT COUNT(*) FROM matomo_log_visit WHERE idvisitor = UNHEX('{FORGOTTEN}') "
        "AND idsite = 1 AND custom_dimension_1 = 'yes'"
    )
    assert theirs > 1
    before = stored(folder / "north")
    (folder / "ids.txt").write_text(f"{FORGOTTEN}\n")
    receipt = run("python -m client forget north --visitor-file ids.txt", folder)
    (folder / "ids.txt").unlink()
    assert f"visits deleted: {theirs}\n" in receipt
    after = stored(folder / "north")
    gone = before.join(after, on="visit", how="anti")
    assert (gone.height, after.height) == (theirs, before.height - theirs)
    [pseudonym] = gone["visitor_id"].unique()
    assert pseudonym not in after["visitor_id"]
    return str(pseudonym)


def ingest_again(folder: Path, database: Database) -> None:
    before = stored(folder / "north")
    new_visits(database, int(time.time()))
    time.sleep(1)  # The window of the next ingest begins where that of the last one ended.
    ingested = run("python -m client ingest north", folder)
    assert row(ingested, "read") == 3
    assert row(ingested, "left out: erased") == 1
    assert row(ingested, "left out: stored already") == 1
    assert row(ingested, "stored") == 1
    new = stored(folder / "north").join(before, on="visit", how="anti")
    assert new.select("converted", "revenue").rows() == [(True, 25)]


def look_at_kpis(folder: Path, database: Database) -> None:
    figures = run("python -m client kpis north", folder)
    total = re.split(r"\s*│\s*", figures.strip().splitlines()[-2].strip("│ "))
    [(bought, revenue)] = database.execute(
        "SELECT COUNT(*), SUM(ROUND(revenue, 2)) FROM matomo_log_conversion AS conversion "
        "JOIN matomo_log_visit USING (idvisit) WHERE conversion.idsite = 1 "
        f"AND custom_dimension_1 = 'yes' AND conversion.idvisitor != UNHEX('{FORGOTTEN}')"
    )
    assert total[:2] == ["all", f"{stored(folder / 'north').height:,}"]
    assert (total[3], total[-2]) == (f"{bought:,}", f"{revenue:,.2f}")


def train(folder: Path) -> None:
    run(
        "python simulate.py data=site data.path=*/store model=logistic rounds=2 "
        "runtime.workers=0 hydra.run.dir=runs/first",
        folder,
    )
    summary = json.loads((folder / "runs/first/summary.json").read_text())
    assert set(summary["sites"]) == set(SITES)
    for told in summary["sites"].values():
        assert told["metrics"]["roc_auc"] > 0.5
        assert 0 < told["epsilon"] <= 3
    assert summary["global"]["roc_auc"] > 0.6
    report = (folder / "runs/first/report.html").read_text()
    assert all(site in report for site in SITES)


def score(folder: Path, site: str, at: datetime) -> pl.DataFrame:
    """The scores of a site's visitors at a time."""
    out = f"--out {site}.parquet --at {at:%FT%T}"
    run(f"python -m client score {site} --model runs/first/model.safetensors {out}", folder)
    scores = pl.read_parquet(folder / f"{site}.parquet")
    visits = stored(folder / site)
    current = visits.filter(pl.col("time").is_between(at - timedelta(days=30), at, closed="none"))
    assert current["visitor_id"].n_unique() < visits["visitor_id"].n_unique()
    assert sorted(scores["visitor_id"]) == sorted(current["visitor_id"].unique())
    assert scores["likelihood"].is_between(0, 1).all()
    assert scores["likelihood"].n_unique() > 100
    sizes = scores.group_by("decile").len().sort("decile")
    assert sizes["decile"].to_list() == list(range(1, 11))
    assert sizes["len"].max() - sizes["len"].min() <= 1
    return scores
