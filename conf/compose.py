"""From YAML files and overrides to one checked `Config`."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.schema import GROUPS, Config, SettingError

FOLDER = Path(__file__).parent

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException)
"""What Hydra raises for settings that do not compose."""


def register() -> None:
    """Make the schema known to Hydra. Call before `@hydra.main` or `compose` runs."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, choices in GROUPS.items():
        for name, node in choices.items():
            store.store(group=f"schema/{group}", name=name, node=node)


def load(overrides: list[str]) -> Config:
    """Compose the configuration outside `@hydra.main`.

    Raises `SettingError`, naming the key, for what is unknown, of the wrong type or out of range.
    """
    check_overrides(overrides)
    register()
    try:
        with initialize_config_dir(str(FOLDER), version_base=None):
            return to_config(compose("config", overrides))
    except COMPOSE_ERRORS as error:
        raise SettingError(innermost(error)) from error


def to_config(composed: DictConfig) -> Config:
    """A composed tree as dataclasses, checked. Raises `SettingError`."""
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise SettingError(innermost(error)) from error
    if not isinstance(config, Config):
        raise SettingError("the composed configuration does not follow conf/schema.py")
    return config


def from_yaml(path: Path) -> Config:
    """The configuration that `to_yaml` wrote. Raises `SettingError`."""
    try:
        read = OmegaConf.load(path)
    except (OSError, ValueError, YAMLError) as error:
        raise SettingError(f"{path}: cannot be read, or is not YAML") from error
    if not isinstance(read, DictConfig):
        raise SettingError(f"{path}: not a configuration")
    typed = OmegaConf.structured(Config)
    try:
        for group, choices in GROUPS.items():
            name = read[group].name
            node = choices[name] if len(choices) > 1 else next(iter(choices.values()))
            typed[group] = OmegaConf.structured(node)
        return to_config(typing.cast(DictConfig, OmegaConf.merge(typed, read)))
    except (OmegaConfBaseException, KeyError) as error:
        raise SettingError(f"{path}: {innermost(error)}") from error


def to_yaml(config: Config) -> str:
    """The configuration with every value written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def check_overrides(overrides: list[str]) -> None:
    """Refuse a key or a group's choice that does not exist, naming the nearest one that does.

    Hydra would refuse most of them too, later and without the suggestion.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise SettingError(innermost(error)) from error
    keys = _keys(Config, "")
    for override in parsed:
        key = override.get_key_element().split("@")[0].lstrip("+~")
        if key.startswith("hydra") or override.is_delete():
            continue
        folder = FOLDER / key
        if folder.is_dir():
            value = override.value()
            _check_choice(key, folder, value.list if isinstance(value, ChoiceSweep) else [value])
        elif not any(_covers(known, key) for known in keys):
            raise SettingError(f"{key}: no such setting{_nearest(key, [*GROUPS, *keys])}")


def _check_choice(group: str, folder: Path, asked: list[typing.Any]) -> None:
    choices = sorted(path.stem for path in folder.glob("*.yaml"))
    for choice in asked:
        if not isinstance(choice, str) or choice not in choices:
            raise SettingError(
                f"{group}={choice}: no such choice{_nearest(str(choice), choices)}; "
                f"there are {', '.join(choices)}"
            )


def _keys(node: type, prefix: str) -> list[str]:
    """Every dotted key of a settings class and of the classes that a group may put in its place.

    A key that ends in a dot is a mapping: what follows is the user's own.
    """
    keys = []
    hints = typing.get_type_hints(node)
    for field in dataclasses.fields(node):
        key, hint = prefix + field.name, hints[field.name]
        if typing.get_origin(hint) is dict:
            keys.append(key + ".")
        elif dataclasses.is_dataclass(hint):
            for choice in GROUPS.get(key, {"": typing.cast(type, hint)}).values():
                keys += _keys(choice, key + ".")
        else:
            keys.append(key)
    return list(dict.fromkeys(keys))


def _covers(known: str, key: str) -> bool:
    return key.startswith(known) or key == known[:-1] if known.endswith(".") else key == known


def _nearest(word: str, known: list[str]) -> str:
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {found[0].rstrip('.')}?" if found else ""


def innermost(error: BaseException) -> str:
    """The message at the bottom of a chain of errors, on one line, with the key it names."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((ln.split(":", 1)[1].strip() for ln in lines if ln.startswith("full_key:")), "")
    if unknown := re.search(r"Key '.*' not in '(\w+)'", str(error)):
        return f"{key}: {_no_such_setting(unknown[1])}"
    return f"{key}: {lines[0]}" if key else " ".join(lines)


def _no_such_setting(class_name: str) -> str:
    for group, choices in GROUPS.items():
        for name, node in choices.items():
            if node.__name__ == class_name and len(choices) > 1:
                is_choice = (FOLDER / group / f"{name}.yaml").exists()
                return f"{group}{'=' if is_choice else '.name='}{name} has no such setting"
    return "no such setting"
