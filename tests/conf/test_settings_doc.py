from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path

import pytest

from conf import __main__ as settings_doc
from conf import schema, site
from conf.schema import GROUPS, Config
from conf.site import SOURCES, SiteConfig

ROOT = Path(__file__).parents[2]
SCHEMA_CLASSES = [
    node
    for module in (schema, site)
    for _, node in inspect.getmembers(module, inspect.isclass)
    if is_dataclass(node) and node.__module__ == module.__name__
]


@dataclass
class WithAFieldLeftOut:
    explained: int = 1
    """What it means."""
    bare: int = 2
    listed: list[int] = field(default_factory=list)
    """Told over
    two lines."""


def test_page_is_what_python_m_conf_prints() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "conf"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert (ROOT / "docs" / "settings.md").read_text() == printed, (
        "write it anew: python -m conf > docs/settings.md"
    )


@pytest.mark.parametrize("node", SCHEMA_CLASSES, ids=lambda node: str(node.__name__))
def test_every_field_is_explained(node: type) -> None:
    fields = settings_doc.meanings(node)
    assert fields
    assert [name for name, text in fields.items() if not text] == []


def test_a_field_without_a_docstring_is_seen() -> None:
    assert settings_doc.meanings(WithAFieldLeftOut) == {
        "explained": "What it means.",
        "bare": "",
        "listed": "Told over two lines.",
    }


def test_every_field_of_every_choice_is_on_the_page() -> None:
    page = settings_doc.settings_page()
    keys = [row[0] for row in settings_doc._rows(Config, "")]
    for group, choices in GROUPS.items():
        for node in choices.values():
            keys += [row[0] for row in settings_doc._rows(node, f"{group}.")]
    assert len(set(keys)) > 60
    keys += [row[0] for row in settings_doc._rows(SiteConfig, "")]
    for source in SOURCES.values():
        keys += [row[0] for row in settings_doc._rows(source, "source.")]
    for key in keys:
        assert f"| {key} |" in page


def test_a_new_field_reaches_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GROUPS, "runtime", {"runtime": WithAFieldLeftOut})
    page = settings_doc.settings_page()
    assert "| `runtime.explained` | int | `1` | What it means. |" in page
    assert "| `runtime.bare` | int | `2` |  |" in page


def test_every_choice_has_a_comment_that_says_what_it_is() -> None:
    page = settings_doc.settings_page()
    for file in (ROOT / "conf").glob("*/*.yaml"):
        assert f"| `{file.parent.name}={file.stem}` | " in page
        assert file.read_text().startswith("# "), file


def test_the_schema_imports_nothing_beyond_the_standard_library() -> None:
    tree = ast.parse(Path(schema.__file__).read_text())
    names = {
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names
