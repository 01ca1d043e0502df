from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conf.compose import check_overrides, from_yaml, load, to_yaml
from conf.schema import GROUPS, Config, SettingError, SyntheticData, TableData, VisitorDP

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "conf").glob("*/*.yaml"))


def choice(file: Path) -> list[str]:
    """The override that asks for a group's file, with what the file leaves to the user."""
    text = file.read_text()
    needs_path = "/schema/data/table@" in text or "/schema/data/criteo@" in text
    return [f"{file.parent.name}={file.stem}", *(["data.path=t.parquet"] if needs_path else [])]


def round_trip(config: Config, folder: Path) -> Config:
    (folder / "config.yaml").write_text(to_yaml(config))
    return from_yaml(folder / "config.yaml")


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_choice_composes_and_round_trips(file: Path, tmp_path: Path) -> None:
    config = load(choice(file))
    group = file.parent.name
    assert round_trip(config, tmp_path) == config
    if group in GROUPS:
        assert type(getattr(config, group)) in GROUPS[group].values()


def test_there_are_choices_in_every_group_of_the_schema() -> None:
    assert set(GROUPS) <= {file.parent.name for file in FILES}


@pytest.mark.parametrize("group", ["optimizer", "strategy", "runtime", "privacy", "model"])
def test_a_file_names_what_it_is(group: str) -> None:
    for file in (ROOT / "conf" / group).glob("*.yaml"):
        assert getattr(load([f"{group}={file.stem}"]), group).name == file.stem


def test_every_data_file_names_a_source_of_the_schema() -> None:
    for file in (ROOT / "conf" / "data").glob("*.yaml"):
        data = load(choice(file)).data
        assert type(data) is GROUPS["data"][data.name]


def test_the_default_is_what_config_yaml_says() -> None:
    config = load([])
    assert (config.rounds, config.seed, config.job) == (10, 0, "train")
    assert isinstance(config.data, SyntheticData)
    assert isinstance(config.privacy, VisitorDP)
    assert (config.model.name, config.strategy.name, config.runtime.name) == (
        "gru",
        "fedavg",
        "local",
    )


def test_overrides_reach_every_depth() -> None:
    config = load(
        [
            "rounds=3",
            "privacy.epsilon=1",
            "data.features.max_touchpoints=4",
            "data.features.channels=[a,b]",
            "data.features.numeric.page_views.high=9",
            "data.holdout_from=2026-01-01",
        ]
    )
    assert config.rounds == 3
    assert isinstance(config.privacy, VisitorDP)
    assert config.privacy.epsilon == 1.0
    assert config.data.features.max_touchpoints == 4
    assert config.data.features.channels == ["a", "b"]
    assert config.data.features.numeric["page_views"].high == 9.0


def test_a_further_numeric_column_by_override() -> None:
    config = load(
        ["data=events", "data.path=t.csv", "+data.features.numeric={pages: {low: 0, high: 9}}"]
    )
    assert config.data.features.numeric["pages"].high == 9.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # a misspelt key, with the nearest one
        (["privacy.epsilom=3"], "privacy.epsilom: no such setting; did you mean privacy.epsilon?"),
        (["optimizer.learning_rat=1"], "did you mean optimizer.learning_rate?"),
        (["roundz=3"], "roundz: no such setting; did you mean rounds?"),
        (["modle=gru"], "modle: no such setting; did you mean model?"),
        (["+privacy.fresh=3"], "privacy.fresh: no such setting"),
        (["data.features.max_touchpoint=3"], "did you mean data.features.max_touchpoints?"),
        # a group's choice
        (["model=gur"], "model=gur: no such choice; did you mean gru?"),
        (["strategy=fedsgd"], "there are fedadagrad, fedadam, fedavg"),
        (["privacy=null"], "privacy=None: no such choice; there are unprotected, visitor_dp"),
        (["privacy=[visitor_dp,unprotected]"], "no such choice"),
        (["model=gru,gur"], "model=gur: no such choice; did you mean gru?"),
        # a setting of another choice
        (["data.path=x"], "data.path: data=synthetic has no such setting"),
        (["model.heads=2"], "model.heads: model=gru has no such setting"),
        (["privacy=unprotected", "privacy.epsilon=1"], "privacy.epsilon: privacy=unprotected has"),
        (["data=events", "data.path=x", "data.sites=3"], "data.sites: data.name=table has no such"),
        (["data=events", "data.path=x", "debug=tiny"], "data.sites: data.name=table has no such"),
        # a value that has to be given
        (["data=events"], "data.path: "),
        (["~privacy"], "privacy: "),
        # a wrong type
        (["privacy.epsilon=abc"], "privacy.epsilon: Value 'abc'"),
        (["rounds=1.5"], "rounds: Value '1.5'"),
        (["data.features.channels=3"], "data.features.channels: "),
        (["data.features.clock=maybe"], "data.features.clock: "),
        (["rounds=null"], "rounds: "),
        # out of range
        (["rounds=0"], "rounds=0: must be above 0"),
        (["evaluations=0"], "evaluations=0: must be above 0"),
        (["federation=''"], "federation=: must not be empty"),
        (["purpose=''"], "purpose=: must not be empty"),
        (["seed=-1"], "seed=-1: "),
        (["job=tea"], "job=tea: must be train, "),
        (["privacy.epsilon=0"], "privacy.epsilon=0.0: must be above 0"),
        (["privacy.epsilon=nan"], "privacy.epsilon=nan: must be a finite number"),
        (["privacy.epsilon=inf"], "privacy.epsilon=inf: must be a finite number"),
        (["privacy.delta=1"], "privacy.delta=1.0: must be between 0 and 1"),
        (["optimizer.momentum=1"], "optimizer.momentum=1.0: "),
        (["optimizer.weight_decay=-1"], "optimizer.weight_decay=-1.0: "),
        (["optimizer.name=lbfgs"], "optimizer.name=lbfgs: must be sgd or adam"),
        (["strategy.name=fedsgd"], "strategy.name=fedsgd: must be one of"),
        (["strategy.quorum=0"], "strategy.quorum=0.0: "),
        (["strategy.trim=0.5"], "strategy.trim=0.5: "),
        (["strategy.weight_cap=0.5"], "strategy.weight_cap=0.5: "),
        (["strategy.weights=size"], "strategy.weights=size: "),
        (["runtime.workers=-1"], "runtime.workers=-1: "),
        (["runtime.name=spark"], "runtime.name=spark: "),
        (["model.base_rate=0"], "model.base_rate=0.0: "),
        (["model=attention", "model.heads=3"], "model.embedding=32: must be a multiple"),
        (["data.holdout=1"], "data.holdout=1.0: "),
        (["data.holdout_from=yesterday"], "data.holdout_from=yesterday: must be an ISO 8601"),
        (["data.contributions=2"], "data.contributions=2: "),
        (["data.features.channels=[a,a]"], "data.features.channels=['a', 'a']: names a value"),
        (["+data.features.categorical.time=[a]"], "data.features=time: "),
        (["data.features.numeric.page_views.high=-1"], "data.features.numeric.*.high=-1.0: "),
        (["data=events", "data.path=x", "data.decision=snapshot"], "data.snapshot_at=None: "),
        (["data=events", "data.path=x", "data.decision=visit"], "data.columns.visitor_id="),
        # no override at all
        (["rounds"], "rounds"),
        (["privacy.epsilon='1"], "privacy.epsilon='1"),
        (["privacy.epsilon=1,2"], "--multirun"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_hold_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(SettingError) as caught:
        load(overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checks_before_hydra_accept_what_hydra_accepts() -> None:
    check_overrides(
        [
            "hydra.run.dir=x",
            "model=gru,mlp",
            "privacy.epsilon=1,2",
            "rounds=range(1,4)",
            "debug=tiny",
            "+data.features.numeric.pages.low=0",
        ]
    )


def test_a_second_load_is_not_changed_by_the_first() -> None:
    first = load(["model=attention", "rounds=4"])
    with pytest.raises(SettingError):
        load(["rounds=x"])
    assert load([]) == load([])
    assert load(["model=attention", "rounds=4"]) == first


def test_yaml_round_trip_keeps_what_the_user_named(tmp_path: Path) -> None:
    config = load(["data=online_shoppers", "data.path=sessions.csv", "model=mlp"])
    back = round_trip(config, tmp_path)
    assert isinstance(back.data, TableData)
    assert back.data.path == "sessions.csv"
    assert back.data.features.categorical["Weekend"] == ["FALSE", "TRUE"]
    assert replace(back, rounds=99) != back


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rounds: [", "cannot be read, or is not YAML"),
        ("- a\n- b\n", "not a configuration"),
        ("rounds: 3\n", "config.yaml"),
        ("", "config.yaml"),
    ],
)
def test_a_file_that_is_no_configuration(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SettingError, match=message):
        from_yaml(tmp_path / "config.yaml")


def test_a_configuration_file_that_was_tampered_with(tmp_path: Path) -> None:
    text = to_yaml(load([]))
    for old, new, message in [
        ("rounds: 10", "rounds: ten", "rounds"),
        ("rounds: 10", "rounds: -1", "rounds=-1: must be above 0"),
        ("rounds: 10", "roundz: 10", "roundz"),
        ("name: gru", "name: lstm", "lstm"),
    ]:
        assert old in text
        (tmp_path / "config.yaml").write_text(text.replace(old, new))
        with pytest.raises(SettingError, match=message):
            from_yaml(tmp_path / "config.yaml")


def test_a_missing_configuration_file(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot be read"):
        from_yaml(tmp_path / "nix" / "config.yaml")


def simulate(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "simulate.py"), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["privacy.epsilom=3"], "privacy.epsilom: no such setting; did you mean privacy.epsilon?"),
        (["privacy.epsilon=abc"], "privacy.epsilon: Value 'abc'"),
        (["privacy.epsilon=-1"], "privacy.epsilon=-1.0: must be above 0"),
        (["model=gur"], "model=gur: no such choice; did you mean gru?"),
        (["data=events", "data.path=nowhere.csv"], "nowhere.csv"),
        (["resume=nowhere"], "cannot be read"),
        (["privacy.epsilom=1,2", "--multirun"], "did you mean privacy.epsilon?"),
        (["privacy.epsilon=abc,1", "--multirun"], "privacy.epsilon: Value 'abc'"),
        (["privacy.epsilon=-1,1", "-m"], "privacy.epsilon=-1.0: must be above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_no_traceback(
    words: list[str], message: str, tmp_path: Path
) -> None:
    ran = simulate(tmp_path, *words)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: ")
    assert message in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_help_names_the_groups(tmp_path: Path) -> None:
    ran = simulate(tmp_path, "--help")
    assert ran.returncode == 0
    for group in GROUPS:
        assert f"\n{group}=\n" in ran.stdout
        for file in (ROOT / "conf" / group).glob("*.yaml"):
            (line,) = [s for s in ran.stdout.splitlines() if s.startswith(f"  {file.stem} ")]
            assert len(line.split()) > 1
    assert list(tmp_path.iterdir()) == []


def test_importing_the_configuration_does_nothing_else(tmp_path: Path) -> None:
    code = (
        "import sys, os, conf, conf.schema\n"
        "assert 'hydra' not in sys.modules and 'omegaconf' not in sys.modules\n"
        "import conf.compose, conf.__main__\n"
        "from hydra.core.config_store import ConfigStore\n"
        "from hydra.core.global_hydra import GlobalHydra\n"
        "assert 'schema.yaml' not in ConfigStore.instance().repo\n"
        "assert not GlobalHydra.instance().is_initialized()\n"
        "assert not os.listdir()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
