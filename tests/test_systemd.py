"""The systemd units of docs/systemd: sound, confined, and in step with the product and its docs."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNITS = ("conversion-hub", "conversion-site-agent", "conversion-site-supernode")
PYTHON = "/opt/conversion-federation/.venv/bin/python"
LARGEST_EXPOSURE = 3.0
"""Of 10; what systemd calls `OK` ends below 4, `SAFE` below 2."""


def settings(name: str) -> dict[str, list[str]]:
    """Each setting of a unit, with all that it is set to, in order."""
    text = (ROOT / "docs" / "systemd" / f"{name}.service").read_text().replace("\\\n", "")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def analyze(*words: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, timeout=60)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with a Python that exists."""
    for name in UNITS:
        text = (ROOT / "docs" / "systemd" / f"{name}.service").read_text()
        assert text.count(PYTHON) == 1
        (tmp_path / f"{name}.service").write_text(text.replace(PYTHON, sys.executable))
    return tmp_path


def test_every_unit_is_tested() -> None:
    assert {path.name for path in (ROOT / "docs" / "systemd").iterdir()} == {
        f"{name}.service" for name in UNITS
    }


@pytest.mark.parametrize("name", UNITS)
def test_systemd_takes_the_unit(units: Path, name: str) -> None:
    done = analyze("verify", str(units / f"{name}.service"))
    said = [line for line in done.stderr.splitlines() if name in line]
    assert (done.returncode, said) == (0, []), done.stderr


@pytest.mark.parametrize("name", UNITS)
def test_the_unit_is_confined(units: Path, name: str) -> None:
    unit = str(units / f"{name}.service")
    done = analyze("security", "--offline=true", "--no-pager", unit)
    if "option" in done.stderr:
        pytest.skip(f"this systemd-analyze has no --offline: {done.stderr.strip()}")
    level = re.search(r"Overall exposure level for .*: ([\d.]+)", done.stdout)
    assert level is not None, done.stdout + done.stderr
    assert float(level[1]) < LARGEST_EXPOSURE, done.stdout


@pytest.mark.parametrize("name", UNITS)
def test_the_product_takes_the_command(name: str) -> None:
    [command] = settings(name)["ExecStart"]
    python, minus_m, side, *words = shlex.split(command)
    assert (python, minus_m) == (PYTHON, "-m")
    options = importlib.import_module(f"{side}.__main__")._parser().parse_args(words)
    assert (
        options.command
        == {
            "conversion-hub": "start",
            "conversion-site-agent": "agent",
            "conversion-site-supernode": "carry",
        }[name]
    )


@pytest.mark.parametrize("name", UNITS)
def test_what_dies_is_started_again_and_leaves_no_core(name: str) -> None:
    unit = settings(name)
    assert unit["Restart"] == ["always"]
    assert int(unit["RestartSec"][0]) >= 1
    assert unit["LimitCORE"] == ["0"]
    # Who waits for the hub is never given up.
    assert (unit["StartLimitIntervalSec"] == ["0"]) == (name == "conversion-site-supernode")


def test_the_agent_has_no_network_and_the_supernode_no_site() -> None:
    agent, node = settings("conversion-site-agent"), settings("conversion-site-supernode")
    assert agent["PrivateNetwork"] == ["yes"]
    assert agent["RestrictAddressFamilies"] == ["AF_UNIX"]
    # It has to see other users as who they are.
    assert "PrivateUsers" not in agent
    assert node["InaccessiblePaths"] == [f"-/var/lib/{agent['StateDirectory'][0]}"]
    assert agent["User"] != node["User"]
    assert {*agent["User"], *node["User"]}.isdisjoint(agent["SupplementaryGroups"])
    assert agent["SupplementaryGroups"] == node["SupplementaryGroups"]


def test_units_and_docs_say_the_same() -> None:
    docs = (ROOT / "docs" / "deployment.md").read_text()
    agent, node = settings("conversion-site-agent"), settings("conversion-site-supernode")
    [user], [group] = node["User"], agent["SupplementaryGroups"]
    socket = f"/run/{agent['RuntimeDirectory'][0]}/agent.sock"
    assert f"  users: [{user}]\n  group: {group}\n  socket: {socket}\n" in docs
    assert f"--socket {socket}" in " ".join(node["ExecStart"][0].split())
    for name in UNITS:
        unit = settings(name)
        [user], [folder] = unit["User"], unit["StateDirectory"]
        assert f"--home-dir /var/lib/{folder} --shell /usr/sbin/nologin {user}\n" in docs
        assert f"install -d -o {user} -g {user} -m 700 /var/lib/{folder}\n" in docs
        assert re.search(rf"^cp .*docs/systemd/{name}\.service .*/etc/systemd/system/$", docs, re.M)
        assert re.search(rf"^systemctl enable --now .*{name}\b", docs, re.M)
        for path in re.findall(r"/var/lib/\S+", unit["ExecStart"][0]):
            assert path.startswith(f"/var/lib/{folder}/"), path
            assert path in docs
