from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from models.saved import load
from tests.deployment.federation import descendants, environment


@pytest.mark.slow
def test_the_demo_runs_a_federation_and_leaves_a_report_and_nothing_else(tmp_path: Path) -> None:
    # The paths of sockets have to be short.
    with tempfile.TemporaryDirectory(prefix="demo-") as temporary:
        _run_demo(tmp_path, Path(temporary))


def _run_demo(tmp_path: Path, temporary: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "demo", "model=logistic"],
        cwd=tmp_path,
        env={**environment(), "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    started: set[int] = set()
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        started |= {pid for pid, _ in descendants(process.pid)}
        time.sleep(0.2)
    said, _ = process.communicate(timeout=10)
    assert process.returncode == 0, said
    assert "report: demo/report.html" in said
    for words in ("server init hub", "client join shoes", "server run hub", "server publish hub"):
        assert f"$ python -m {words}" in said, said
    assert said.count(": has it") == 3
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["rounds"] == 5
    assert sorted(summary["sites"]) == ["bakery", "books", "shoes"]
    assert 0 < summary["epsilon"] <= 3
    assert not summary["seeded"]
    saved = load(tmp_path / "demo" / "model.safetensors")
    assert "operating system" in " ".join(saved.manifest["privacy"]["statement"])
    assert (tmp_path / "demo" / "report.html").read_text().startswith("<!doctype html>")
    # torch has a folder of its own there.
    assert list(temporary.glob("federation-*")) == []
    assert len(started) > 10
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
