"""Print docs/settings.md: every setting, from the schema itself. `python -m conf`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing

from conf import hub, schema, site
from conf.compose import FOLDER
from conf.hub import HubConfig
from conf.schema import GROUPS, MISSING, Config
from conf.site import SOURCES, SiteConfig, SourceConfig, TableSource

INTRODUCTION = """# Settings

Set any of them on the command line, `python simulate.py group=choice key=value`, or in a YAML
file under `conf/`. Written by `python -m conf`; change `conf/schema.py` instead of this page.
"""


def settings_page() -> str:
    """docs/settings.md, whole."""
    parts = [INTRODUCTION, "## Groups and their choices\n", _groups(), "## The run\n"]
    parts.append(_table(_rows(Config, "")))
    for group, choices in GROUPS.items():
        parts.append(f"## `{group}`\n")
        common = _common(list(choices.values()))
        parts.append(f"{inspect.getdoc(common)}\n")
        shared = _rows(common, f"{group}.") if common is not None else []
        named = {row[0] for row in shared}
        parts.append(_table(shared))
        for name, node in choices.items():
            own = [row for row in _rows(node, f"{group}.") if row[0] not in named]
            if own and node is not common:
                parts.append(f"### {_choice(group, name)}\n\n{inspect.getdoc(node)}\n")
                parts.append(_table(own))
    return "\n".join([*parts, *_site(), HUB_INTRODUCTION, _table(_rows(HubConfig, ""))])


def _site() -> list[str]:
    """What a site's own file may say."""
    parts = [SITE_INTRODUCTION, _table(_rows(SiteConfig, ""))]
    tables = sorted(name for name, node in SOURCES.items() if issubclass(node, TableSource))
    sections: list[tuple[list[str], type[SourceConfig], type[SourceConfig]]] = [
        *(([name], node, SourceConfig) for name, node in SOURCES.items() if name not in tables),
        (tables, TableSource, SourceConfig),
        *(([name], SOURCES[name], TableSource) for name in tables),
    ]
    for names, node, above in sections:
        title = " and ".join(f"`source.name: {name}`" for name in names)
        known = {field.name for field in dataclasses.fields(above)}
        parts.append(f"### {title}\n\n{inspect.getdoc(node)}\n")
        parts.append(_table(_rows(node, "source.", leave_out=known)))
    return parts


SITE_INTRODUCTION = """## A site's own file, `site.yaml`

Each site has its own; no coordinator reads or sets any of it. `python -m client init` writes one
with comments. Of `source`, what all sources have comes first, then what each has of its own.
"""


HUB_INTRODUCTION = """## A hub's own file, `hub.yaml`

`python -m server init` writes one; `python -m server start` reads it.
"""


def meanings(node: type) -> dict[str, str]:
    """The docstring under each field that `node` itself declares, on one line; "" without one."""
    (body,) = (c for c in ast.parse(inspect.getsource(node)).body if isinstance(c, ast.ClassDef))
    found: dict[str, str] = {}
    for statement, following in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = " ".join(str(following.value.value).split())
            found[statement.target.id] = text
    return found


def _groups() -> str:
    rows = []
    for folder in sorted(path for path in FOLDER.iterdir() if any(path.glob("*.yaml"))):
        for file in sorted(folder.glob("*.yaml")):
            comments = [ln for ln in file.read_text().splitlines() if ln.startswith("#")]
            first = next(line for line in comments if "@package" not in line)
            meaning, _, command = first.lstrip("# ").partition(": python ")
            example = f"`python {command}`" if command else ""
            rows.append((f"`{folder.name}={file.stem}`", meaning.rstrip(":."), example))
    return _markdown(("Choice", "Meaning", "Example"), rows)


def _rows(
    node: type, prefix: str, leave_out: typing.Collection[str] = ()
) -> list[tuple[str, str, str, str]]:
    """Key, type, default and meaning of each setting of `node`, without the groups in it."""
    hints = typing.get_type_hints(node)
    texts: dict[str, str] = {}
    for parent in reversed(inspect.getmro(node)):
        if dataclasses.is_dataclass(parent):
            texts |= meanings(parent)
    rows = []
    for field in dataclasses.fields(node):
        key, hint = prefix + field.name, hints[field.name]
        if key in GROUPS or field.name in leave_out:
            continue
        if dataclasses.is_dataclass(hint):
            rows += _rows(typing.cast(type, hint), f"{key}.")
            continue
        rows.append((f"`{key}`", _type(hint), _default(field, key), texts[field.name]))
        of = typing.get_args(hint)[-1:]
        if of and dataclasses.is_dataclass(of[0]):
            rows += _rows(typing.cast(type, of[0]), f"{key}.*.")
    return rows


def _type(hint: object) -> str:
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    for module in (hub, schema, site):
        text = text.replace(f"{module.__name__}.", "")
    return text.replace("|", "or").replace(" None", " null")


def _default(field: dataclasses.Field[object], key: str) -> str:
    made = field.default_factory
    value = made() if made is not dataclasses.MISSING else field.default
    if value is MISSING or value == MISSING:
        return "by the choice" if key.endswith(".name") else "required"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value != "" else '`""`'


def _common(nodes: list[type]) -> type | None:
    """The class that all choices of a group extend, or the only one."""
    if len(nodes) == 1:
        return nodes[0]
    shared = set.intersection(*(set(inspect.getmro(node)) for node in nodes)) - {object}
    return max(shared, key=lambda node: len(inspect.getmro(node)), default=None)


def _choice(group: str, name: str) -> str:
    """How a choice of the schema is asked for: the YAML files that use it."""
    asked = f"/schema/{group}/{name}@_here_"
    files = sorted(f.stem for f in (FOLDER / group).glob("*.yaml") if asked in f.read_text())
    return ", ".join(f"`{group}={stem}`" for stem in files)


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    return _markdown(("Key", "Type", "Default", "Meaning"), rows)


def _markdown(head: tuple[str, ...], rows: typing.Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    cells = [[cell.replace("|", "&#124;") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


if __name__ == "__main__":
    print(settings_page(), end="")
