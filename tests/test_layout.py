from __future__ import annotations

import ast
import importlib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
SOURCES = [ROOT / "simulate.py", *(f for name in PACKAGES for f in (ROOT / name).rglob("*.py"))]
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_this_projects(name: str) -> None:
    package = importlib.import_module(name)
    assert package.__file__ is not None
    assert Path(package.__file__) == ROOT / name / "__init__.py"


def test_the_packages_that_users_know_are_there() -> None:
    assert {"client", "conf", "models", "server"} <= set(PACKAGES)
    for name in ("pyproject.toml", "README.md", "tests", "simulate.py"):
        assert (ROOT / name).exists(), name


def test_a_folder_with_code_is_a_package() -> None:
    # Without __init__.py any package of the same name that is installed would win.
    with_code = {file.parent.name for file in ROOT.glob("*/*.py")} - {"tests", "benchmarks"}
    assert with_code == set(PACKAGES)
    for name in PACKAGES:
        for file in (ROOT / name).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file


def test_every_package_is_in_the_wheel_and_under_every_check() -> None:
    tool = PYPROJECT["tool"]
    assert set(tool["hatch"]["build"]["targets"]["wheel"]["only-include"]) == {
        *PACKAGES,
        "simulate.py",
    }
    assert set(tool["mypy"]["packages"]) == set(PACKAGES)
    assert set(tool["importlinter"]["root_packages"]) == set(PACKAGES)


def test_the_project_is_never_published() -> None:
    assert "Private :: Do Not Upload" in PYPROJECT["project"]["classifiers"]


def unsafe(source: str) -> Iterator[str]:
    """What in `source` could run code that stands in data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [alias.name for alias in node.names]
            named.append(str(getattr(node, "module", "")))
            yield from (n for n in named if n.split(".")[0] in UNSAFE_MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given: dict[str | None, Any] = {
            k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
        }
        safe = {
            "torch.load": given.get("weights_only") is True,
            "torch.save": False,
            "np.load": given.get("allow_pickle") is False,
            "np.save": given.get("allow_pickle") is False,
            "numpy.load": given.get("allow_pickle") is False,
            "yaml.load": False,
            "yaml.unsafe_load": False,
            "eval": False,
            "exec": False,
        }
        if not safe.get(called, True) or given.get("allow_pickle") is True:
            yield ast.unparse(node)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_reads_or_writes_a_pickle(file: Path) -> None:
    assert list(unsafe(file.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import os, joblib",
        "from dill import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=maybe)",
        "torch.save(x, f)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "np.lib.format.read_array(f, allow_pickle=True)",
        "eval('1')",
    ],
)
def test_a_pickle_would_be_seen(source: str) -> None:
    assert list(unsafe(source))


def test_safe_readers_are_not_seen() -> None:
    assert not list(unsafe("np.load(f, allow_pickle=False)\ntorch.load(f, weights_only=True)"))
    assert not list(unsafe("model.eval()\nsafetensors.numpy.load(data)\njson.load(f)"))
