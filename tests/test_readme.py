"""Every command of the README, run as a user would type it, on less data."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from client.policy import SitePolicy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RUN_FOLDER = "runs/2026-11-24_16-00-00"
"""The run folder that the README's examples name."""

CLIENT = {
    "init": "acme: a new site",
    "check": "source: files can be read",
    "ingest": "stored",
    "kpis": "paid search",
    "forget": "visits deleted: 6",
    "score": "scores.parquet: 198 visitors",
    "budget": "epsilon",
    "audit": "whole; ",
}
"""What each command of a site says, among other things."""

FASTER = {
    "synthetic": ["data.sites=2", "data.visitors=150", "rounds=2", "optimizer.local_epochs=1"],
    "table": ["rounds=2", "optimizer.local_epochs=1"],
    "audit": ["data.sites=1", "data.visitors=400", "rounds=2", "optimizer.local_epochs=1"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).splitlines()
    assert lines
    return [line for line in lines if line.strip()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the README's examples name."""
    folder = tmp_path_factory.mktemp("workplace")
    visitors = range(300)
    pl.DataFrame(
        {
            "visitor_id": [f"v{visitor}" for visitor in visitors for _ in range(3)],
            "time": [
                f"2026-03-{1 + visit * 9:02d}T{visitor % 24:02d}:00:00Z"
                for visitor in visitors
                for visit in range(3)
            ],
            "channel": [
                ["email", "direct", "display"][(visitor + visit) % 3]
                for visitor in visitors
                for visit in range(3)
            ],
            "converted": [
                visit == 2 and visitor % 4 == 0 for visitor in visitors for visit in range(3)
            ],
            "shop": ["north" if visitor % 2 else "south" for visitor in visitors for _ in range(3)],
        }
    ).write_parquet(folder / "touchpoints.parquet")
    header = (
        "Administrative,Administrative_Duration,Informational,Informational_Duration,"
        "ProductRelated,ProductRelated_Duration,BounceRates,ExitRates,PageValues,SpecialDay,Month,"
        "OperatingSystems,Browser,Region,TrafficType,VisitorType,Weekend,Revenue"
    )
    sessions = [
        f"0,0,0,0,{row % 7},{row * 3.5},0.02,0.05,0,0,May,2,2,{1 + row % 2},{1 + row % 4},"
        f"Returning_Visitor,FALSE,{'TRUE' if row % 5 == 0 else 'FALSE'}"
        for row in range(200)
    ]
    (folder / "online_shoppers_intention.csv").write_text("\n".join([header, *sessions]) + "\n")
    return folder


def prepare_site(folder: Path) -> None:
    """The site of the examples, set up as the README shows it, with an export to read."""
    (folder / "acme" / "site.yaml").write_text(blocks("yaml")[0])
    SitePolicy.load(folder / "acme" / "policy.yaml")
    now = int(time.time())
    visits = pl.DataFrame({"number": range(600)}).select(
        visitor=pl.format("v{}", pl.col("number") % 200),
        began=pl.from_epoch(now - 86400 - pl.col("number") * 3600).dt.strftime("%FT%TZ"),
        utm_source=pl.lit("google"),
        utm_medium=(pl.col("number") % 3).replace_strict({0: "cpc"}, default="organic"),
        device=pl.lit("mobile"),
        bought=pl.col("number") % 9 == 0,
        revenue=pl.lit(10),
        consent=pl.lit("yes"),
    )
    (folder / "acme" / "export").mkdir()
    visits.write_csv(folder / "acme" / "export" / "visits.csv")
    (folder / "ids.txt").write_text("v7\nv8\n")


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "client"]:
        words = [sys.executable, *words[1:]]
    else:
        assert words[:2] == ["python", "simulate.py"], command
        arguments = words[2:]
        if not any(word.startswith("resume=") for word in arguments):
            table = any(word.startswith("data=") for word in arguments)
            audit = "experiment=audit" in arguments
            arguments += FASTER["audit" if audit else "table" if table else "synthetic"]
        words = [sys.executable, str(ROOT / "simulate.py"), *arguments]
    return subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def interrupted(workplace: Path) -> Path:
    """The run folder of the examples: a run of which the last round and the end are missing."""
    whole = run(f"python simulate.py hydra.run.dir={RUN_FOLDER} model=logistic", workplace)
    assert whole.returncode == 0, whole.stderr
    folder = workplace / RUN_FOLDER
    for name in ("report.html", "summary.json"):
        (folder / name).unlink()
    for path in (folder / "checkpoints").glob("round-000002.*"):
        path.unlink()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_works(command: str, workplace: Path, interrupted: Path) -> None:
    if "runtime=ray" in command:
        pytest.importorskip("ray", reason="needs Ray: pip install -e '.[simulation]'")
    of_site = "acme" in command and " init " not in command
    if of_site and not (workplace / "acme").exists():
        run("python -m client init acme", workplace)
        prepare_site(workplace)
        run("python -m client ingest acme", workplace)
    ended = run(command, workplace)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    if "-m client" in command:
        assert CLIENT[command.split()[3]] in ended.stdout
        if " init " in command:
            prepare_site(workplace)
        return
    report = Path(re.findall(r"^report: (.+)$", ended.stdout, flags=re.MULTILINE)[-1])
    assert (workplace / report).read_text().startswith("<!doctype html>")
    if "--multirun" in command:
        assert len(list((workplace / report).parent.glob("*/summary.json"))) == 6
    elif "worth_joining" in command:
        assert len(json.loads((workplace / report).with_name("comparison.json").read_text())) == 6
    elif "audit" in command:
        assert len(json.loads((workplace / report).with_name("audit.json").read_text())) == 7
    else:
        folder = (workplace / report).parent
        for name in ("config.yaml", "metrics.jsonl", "model.safetensors", "model.json"):
            assert (folder / name).stat().st_size > 0


@pytest.mark.slow
def test_the_python_of_the_readme_works(workplace: Path, interrupted: Path) -> None:
    (code,) = blocks("python")
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=workplace,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended.stderr
    assert "differential privacy" in ended.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("target", "does"),
    [
        ("simulate", "simulate.py"),
        ("demo", "-m server demo"),
        ("install", "-m pip install"),
        ("test", "pytest"),
        ("check", "lint-imports"),
    ],
)
def test_make_knows_the_commands_of_the_readme(target: str, does: str) -> None:
    assert f"make {target}" in README
    planned = subprocess.run(
        # Even what is made already.
        ["make", "--dry-run", "--always-make", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert does in planned


def test_files_that_the_readme_links_exist() -> None:
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_policy_of_the_readme_is_one(tmp_path: Path) -> None:
    _, policy = blocks("yaml")
    (tmp_path / "policy.yaml").write_text(policy)
    assert SitePolicy.load(tmp_path / "policy.yaml").run_epsilon == 3.0
