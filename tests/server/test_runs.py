from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from flwr.app import Message
from flwr.serverapp import Grid

import server.runs
from conf.compose import from_yaml, load
from conf.hub import HubConfig
from conf.schema import Config, SettingError
from journeys.sites import load_sites
from server.federation import JoinError
from server.history import EvaluationReport, RoundReport
from server.hub import HubError, HubFolder, SuperLinkError, create_hub
from server.outcome import Outcome
from server.runs import train
from simulation.fleet import Fleet
from simulation.local_grid import LocalGrid

NAMES = {1: "site 0", 2: "site 1", 3: "site 2"}


def settings(*overrides: str) -> Config:
    tiny = ["debug=tiny", "model=logistic", "rounds=4", "strategy=fedadam", "runtime=deployment"]
    return load([*tiny, "strategy.join_timeout_s=5", *overrides])


class FakeSuperLink:
    """Its grids lead to simulated sites. Each dies at a push of its own, 0 never."""

    def __init__(self, config: Config, folder: Path, dies: Iterable[int] = ()) -> None:
        sites = load_sites(config.data, config.seed)
        self.fleet = Fleet.store(sites, config.seed, folder / "journeys", folder / "ledgers")
        self.dies = list(dies)
        self.opened = 0

    @contextmanager
    def open_grid(self) -> Iterator[Grid]:
        self.opened += 1
        with LocalGrid(self.fleet, 0) as grid:
            dies_at = self.dies.pop(0) if self.dies else 0
            push, pushes = grid.push_messages, 0

            def dying(messages: Iterable[Message]) -> Iterable[str]:
                nonlocal pushes
                pushes += 1
                if pushes == dies_at:
                    raise httpx.ConnectError("gone")
                return push(messages)

            grid.push_messages = dying  # type: ignore[method-assign]
            yield grid


@pytest.fixture
def hub(tmp_path: Path) -> HubFolder:
    return create_hub(tmp_path / "hub", HubConfig(host="hub.example.org"), 1_790_000_000)


def connect(
    monkeypatch: pytest.MonkeyPatch, superlink: FakeSuperLink, names: dict[int, str] = NAMES
) -> None:
    monkeypatch.setattr(server.runs, "open_superlink", lambda hub: superlink)
    monkeypatch.setattr(server.runs, "tell_superlink", lambda hub, superlink: names)


def run(hub: HubFolder, config: Config, folder: Path) -> tuple[Outcome, list[int], list[str]]:
    rounds: list[int] = []
    told: list[str] = []

    def watch(report: RoundReport | EvaluationReport) -> None:
        if isinstance(report, RoundReport):
            rounds.append(report.round)

    return train(hub, config, folder, watch, told.append), rounds, told


def test_a_run_leaves_model_and_report(
    hub: HubFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings()
    connect(monkeypatch, FakeSuperLink(config, tmp_path))
    folder = hub.new_run()
    outcome, rounds, told = run(hub, config, folder)
    assert rounds == [1, 2, 3, 4]
    assert told == []
    assert outcome.report == folder / "report.html"
    assert from_yaml(folder / "config.yaml") == config
    statement = " ".join(json.loads((folder / "summary.json").read_text())["privacy_statement"])
    assert "Each site drew its noise from its own operating system" in statement
    assert "simulation" not in statement
    assert not hub.is_held("run")


def test_a_superlink_that_dies_costs_no_round(
    hub: HubFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings()
    connect(monkeypatch, FakeSuperLink(config, tmp_path / "a"))
    whole, *_ = run(hub, config, hub.runs / "one")
    # It dies when the sites are asked who they are, then in round 2, then at the last evaluation.
    superlink = FakeSuperLink(config, tmp_path / "b", dies=[1, 3, 4])
    connect(monkeypatch, superlink)
    (tmp_path / "again").mkdir()
    broken, rounds, told = run(hub, config, tmp_path / "again" / "one")
    assert superlink.opened == 4
    assert rounds == [1, 2, 3, 4]
    assert told == ["the SuperLink is lost; waiting for it"] * 3
    for file in ("model.safetensors",):
        assert (broken.folder / file).read_bytes() == (whole.folder / file).read_bytes()


def test_a_superlink_that_stays_away_ends_the_run_in_time(
    hub: HubFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("strategy.join_timeout_s=2")
    superlink = FakeSuperLink(config, tmp_path, dies=[1] * 100)
    connect(monkeypatch, superlink)
    folder = hub.new_run()
    with pytest.raises(SuperLinkError, match=f"within 2 s; .*run {hub.path} resume={folder}$"):
        run(hub, config, folder)
    assert 2 <= superlink.opened <= 5
    assert not hub.is_held("run")


def test_without_a_superlink_there_is_no_run(hub: HubFolder) -> None:
    with pytest.raises(SuperLinkError, match="no SuperLink answers at localhost:9093; start it"):
        run(hub, settings(), hub.new_run())
    assert list(hub.runs.iterdir()) == []


def test_without_a_site_there_is_no_run(
    hub: HubFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings()
    connect(monkeypatch, FakeSuperLink(config, tmp_path), names={})
    with pytest.raises(HubError, match=r"no site is admitted; admit one with: .* SITE\.pub"):
        run(hub, config, hub.new_run())
    assert list(hub.runs.iterdir()) == []


def test_a_site_under_another_name_than_it_was_admitted_by_does_not_join(
    hub: HubFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("strategy.quorum=1")
    connect(monkeypatch, FakeSuperLink(config, tmp_path), names={**NAMES, 2: "books"})
    with pytest.raises(JoinError, match=r"2 of 3 sites joined .*books: .*another site's name"):
        run(hub, config, hub.new_run())


@pytest.mark.parametrize("override", ["runtime=local", "job=audit"])
def test_a_simulation_is_not_run_over_a_hub(hub: HubFolder, override: str) -> None:
    with pytest.raises(SettingError, match="begin with experiment=production"):
        run(hub, settings(override), hub.new_run())


def test_two_runs_at_once_are_refused(hub: HubFolder) -> None:
    with hub.held("run"), pytest.raises(HubError, match="a run is going on already"):
        run(hub, settings(), hub.new_run())
