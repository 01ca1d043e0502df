"""The Flower app bundle: what a coordinator hands to the sites."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
BUNDLED = set(PACKAGES) - {"simulation"}
ENVIRONMENT = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project, with what gathers around a project."""
    copy = tmp_path / "conversion-federation"
    copy.mkdir()
    for name in [*PACKAGES, "tests", "docs"]:
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    for name in ("pyproject.toml", "LICENSE", ".gitignore", "simulate.py"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("README.md", "runs/1/config.yaml", "data/visitors.json", ".venv/lib/x.py"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("x = 1\n")
    return copy


def unpack(fab: Path, into: Path) -> set[str]:
    with zipfile.ZipFile(fab) as archive:
        archive.extractall(into)
        return set(archive.namelist())


def build(project: Path, into: Path) -> Path:
    """The bundle that `flwr build` writes."""
    into.mkdir()
    flwr = Path(sys.executable).with_name("flwr")
    ran = subprocess.run(
        [str(flwr), "build", "--app", str(project)],
        cwd=into,
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "FLWR_HOME": str(into / "home")},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (fab,) = into.glob("*.fab")
    return fab


def test_bundle_holds_the_apps_and_nothing_else(project: Path, tmp_path: Path) -> None:
    names = unpack(build(project, tmp_path / "out"), tmp_path / "app")
    expected = {"LICENSE", "pyproject.toml", ".info/CONTENT"}
    for package in BUNDLED:
        for file in (ROOT / package).rglob("*"):
            if file.suffix in {".py", ".yaml"}:
                expected.add(file.relative_to(ROOT).as_posix())
    assert names == expected
    assert "conf/data/synthetic.yaml" in names


def test_what_runs_from_the_bundle_is_all_in_it(project: Path, tmp_path: Path) -> None:
    app = tmp_path / "app"
    unpack(build(project, tmp_path / "out"), app)
    code = f"""
import sys
sys.path.insert(0, {str(app)!r})
import client.app, server.app
from conf.compose import load
config = load(["model=mlp", "rounds=2"])
from server.report import write_comparison
from pathlib import Path
write_comparison(Path("."), "Title", [{{"a": 1}}], [], [])
for name, module in list(sys.modules.items()):
    if name.split(".")[0] in {sorted(PACKAGES)!r}:
        assert module.__file__.startswith({str(app)!r}), name
print(config.model.name, config.rounds)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "mlp 2\n"


# Flower names a pattern style that pathspec has renamed.
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_only_code_and_settings_change_the_bundle(project: Path) -> None:
    before = build_fab_from_disk(project)
    assert build_fab_from_disk(project) == before
    (project / "README.md").write_text("Other words.\n")
    (project / "docs" / "settings.md").write_text("Other words.\n")
    (project / "tests" / "test_more.py").write_text("")
    (project / "simulation" / "more.py").write_text("")
    assert build_fab_from_disk(project) == before
    for name in ("client/site.py", "conf/model/gru.yaml", "pyproject.toml"):
        text = (project / name).read_text()
        if name == "pyproject.toml":
            changed = text.replace('version = "', 'version = "1')
        else:
            changed = text + "\n# changed\n"
        (project / name).write_text(changed)
        assert build_fab_from_disk(project) != before, name
        (project / name).write_text(text)
    assert build_fab_from_disk(project) == before


def test_components_are_flower_apps() -> None:
    import client.app
    import server.app

    assert isinstance(client.app.app, ClientApp)
    assert isinstance(server.app.app, ServerApp)
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"
