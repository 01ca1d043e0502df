"""From YAML files and overrides to one checked `Config`."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.hub import HubConfig
from conf.schema import GROUPS, Config, SettingError
from conf.site import SOURCES, SiteConfig

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
    return typing.cast(Config, _from_yaml(path, Config, GROUPS))


def site_from_yaml(path: Path) -> SiteConfig:
    """A site's own settings, `site.yaml`. Raises `SettingError`, naming file and key."""
    return typing.cast(SiteConfig, _from_yaml(path, SiteConfig, {"source": SOURCES}))


def hub_from_yaml(path: Path) -> HubConfig:
    """A hub's own settings, `hub.yaml`. Raises `SettingError`, naming file and key."""
    return typing.cast(HubConfig, _from_yaml(path, HubConfig, {}))


def _from_yaml(path: Path, node: type, groups: Mapping[str, Mapping[str, type]]) -> object:
    try:
        read = OmegaConf.load(path)
    except (OSError, ValueError, YAMLError) as error:
        raise SettingError(f"{path}: cannot be read, or is not YAML") from error
    if not isinstance(read, DictConfig):
        raise SettingError(f"{path}: not a configuration")
    try:
        typed = OmegaConf.structured(node)
        chosen = {group: _chosen(read, group, choices) for group, choices in groups.items()}
        for group, choice in chosen.items():
            typed[group] = OmegaConf.structured(choice)
        known = _keys(node, "", {group: {"": choice} for group, choice in chosen.items()})
        for key in _leaves(read, ""):
            if not any(_covers(one, key) for one in known):
                raise SettingError(f"{key}: no such setting{_nearest(key, known)}")
        return OmegaConf.to_object(OmegaConf.merge(typed, read))
    except (OmegaConfBaseException, SettingError, KeyError) as error:
        raise SettingError(f"{path}: {innermost(error)}") from error


def _chosen(read: DictConfig, group: str, choices: Mapping[str, type]) -> type:
    """The class that a group's `name` in a file stands for."""
    if len(choices) == 1:
        return next(iter(choices.values()))
    asked = OmegaConf.select(read, f"{group}.name")
    if asked not in choices:
        raise SettingError(
            f"{group}.name={asked}: no such choice{_nearest(str(asked), list(choices))}; "
            f"there are {', '.join(choices)}"
        )
    return choices[asked]


def _leaves(read: DictConfig, prefix: str) -> Iterator[str]:
    for key in map(str, read):
        value = None if OmegaConf.is_missing(read, key) else read[key]
        if isinstance(value, DictConfig) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


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
    keys = _keys(Config, "", GROUPS)
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


def _keys(node: type, prefix: str, groups: Mapping[str, Mapping[str, type]]) -> list[str]:
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
            for choice in groups.get(key, {"": typing.cast(type, hint)}).values():
                keys += _keys(choice, key + ".", groups)
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
