"""What docs/deployment.md names is there: commands, options, metrics, files."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from cryptography import x509
from prometheus_client import CollectorRegistry

import client.__main__
import server.__main__
from client.agent import Agent
from client.folder import create
from conf.hub import HubConfig
from server.front import Front, Limits
from server.hub import create_hub
from server.monitoring import HubFigures
from tests.visits import NOW

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "deployment.md").read_text()
PARSERS = {"client": client.__main__._parser(), "server": server.__main__._parser()}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}[^\n]*\n(.*?)```", DOCS, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """The words of each command of the product's own."""
    lines = "".join(blocks("bash")).splitlines()
    words = [shlex.split(line.partition(" > ")[0]) for line in lines]
    found = [line[line.index("-m") + 1 :] for line in words if ".venv/bin/python" in line]
    assert len(found) > 8
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_product_takes_the_command(words: list[str]) -> None:
    PARSERS[words[0]].parse_args(words[1:])


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options(command)


def test_options_in_the_text_exist() -> None:
    text = re.sub(r"```.*?```", "", DOCS, flags=re.DOTALL)
    named = set(re.findall(r"`(--[a-z-]+)`", text))
    assert named
    assert named <= {name for parser in PARSERS.values() for name in options(parser)}


def metrics(registry: CollectorRegistry) -> set[str]:
    """As they are served."""
    return {
        family.name + ("_total" if family.type == "counter" else "")
        for family in registry.collect()
    }


def test_the_metrics_are_those_that_are_served(tmp_path: Path) -> None:
    hub = create_hub(tmp_path / "hub", HubConfig(host="localhost", superlink_port=1), NOW)
    front = CollectorRegistry()
    Front("https://127.0.0.1:1", httpx.AsyncHTTPTransport(), Limits(), front)
    served = metrics(HubFigures(hub).registry()) | metrics(front)
    folder = create(tmp_path / "acme", NOW)
    (folder.path / "site.yaml").write_text(
        "name: acme\nsource: {name: files, path: x.csv}\nconsent: {upstream: true}\n"
    )
    with Agent(folder) as agent:
        # Before anything was asked there is no time of it.
        agent._last_request = float(NOW)
        served |= metrics(agent.registry)
    named = set(re.findall(r"\bconversion_[a-z_]+", DOCS)) - {"conversion_federation"}
    assert named == served


def test_the_rules_are_of_metrics_that_are_listed() -> None:
    [rules] = [yaml.safe_load(block) for block in blocks("yaml") if block.startswith("groups:")]
    [group] = rules["groups"]
    assert len(group["rules"]) == 3
    for rule in group["rules"]:
        names = set(re.findall(r"\bconversion_[a-z_]+", rule["expr"]))
        assert names
        for name in names:
            assert re.search(rf"^\| `{name}\b", DOCS, flags=re.M), name


def test_files_that_are_linked_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", DOCS)
    assert links
    for link in links:
        assert (ROOT / "docs" / link).exists(), link


def test_a_hub_that_got_a_new_name_gets_a_certificate_for_both(tmp_path: Path) -> None:
    hub = create_hub(tmp_path / "hub", HubConfig(host="old.example.org"), NOW)
    text = hub.settings.read_text()
    hub.settings.write_text(text.replace("old.example.org", "new.example.org"))
    server.__main__.main(["renew", str(hub.path)])
    certificate = x509.load_pem_x509_certificate((hub.certificates / "server.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName)[:2] == ["new.example.org", "old.example.org"]
