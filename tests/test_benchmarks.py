"""The benchmarks of docs/speed.md run; what they measure is for a quiet machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            "simulation.py --models mlp --workloads 10x5000 --runtimes plain direct local0",
            ["plain ", "direct ", "local0 "],
        ),
        (
            "peers.py --models logistic --workloads 10x5000 --engines plain ours flsim"
            " --peers-python nowhere",
            ["| ours |", "Skipped: FLSim with DP: no Python at", "start-up of ours beyond imports"],
        ),
        ("parts.py --model logistic", ["| model: forward and backward |", "| ledger |"]),
        (
            "scale.py large --model logistic --touchpoints 600000",
            ["large / small: ", "largest resident memory: "],
        ),
        (
            "scale.py many --model logistic --sites 20 --journeys 50",
            ["milliseconds a site and round beyond training: ", "resident memory after round 2"],
        ),
    ],
)
def test_a_benchmark_runs(command: str, says: list[str]) -> None:
    script, *options = command.split()
    words = [sys.executable, f"benchmarks/{script}", *options, "--repeats", "1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for said in says:
        assert said in done.stdout


def test_docs_name_benchmarks_that_exist() -> None:
    text = (ROOT / "docs" / "speed.md").read_text() + (ROOT / "README.md").read_text()
    named = {word for word in text.replace("`", " ").split() if word.startswith("benchmarks/")}
    scripts = {word.rstrip(").,;:") for word in named} - {"benchmarks/"}
    assert scripts
    for script in scripts:
        assert (ROOT / script).is_file(), script
