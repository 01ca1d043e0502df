from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.policy import PlanRefused, PolicyError, SitePolicy
from conf.schema import (
    JourneyConfig,
    LogisticConfig,
    MlpConfig,
    OptimizerConfig,
    PrivacyConfig,
    Unprotected,
    VisitorDP,
)
from privacy.accountant import PrivacyEvent
from privacy.training import LocalTraining
from protocol.plan import RoundPlan

TEXT = """\
federations: [shops]
purposes: [conversion-model]
releases: [count, weights, histogram]
models: [logistic, mlp]
epsilon: 6
run_epsilon: 3.0
delta: 1e-6
min_noise_multiplier: 0.5
max_sample_rate: 0.25
max_clipping_norm: 3
max_steps: 40
max_parameters: 10000
min_visitors: 500
"""

PLAN = RoundPlan(
    "shops",
    "conversion-model",
    "run",
    1,
    10,
    5,
    LogisticConfig(),
    OptimizerConfig(),
    VisitorDP(epsilon=3.0, delta=1e-6, clipping_norm=3.0),
    JourneyConfig(),
)
TRAINING = LocalTraining(0.25, 40, 256.0, 1.0, 3.0, OptimizerConfig())


def a_policy(tmp_path: Path, text: str = TEXT) -> SitePolicy:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    return SitePolicy.load(path)


@pytest.fixture
def policy(tmp_path: Path) -> SitePolicy:
    return a_policy(tmp_path)


def test_a_policy_is_read_from_its_file(policy: SitePolicy) -> None:
    assert policy.delta == 1e-6
    assert policy.federations == ("shops",)
    assert (policy.epsilon, type(policy.epsilon)) == (6.0, float)
    assert (policy.max_steps, type(policy.max_steps)) == (40, int)


def test_what_the_policy_allows_passes(policy: SitePolicy) -> None:
    policy.check_plan(PLAN)
    policy.check_training(TRAINING)
    policy.check_parameters(10_000)
    policy.check_release("weights", PrivacyEvent(0.5, 0.25, 40))
    policy.check_visitors(500.0, PLAN)
    policy.check_spending(PLAN, 3.0, 6.0)


Ask = Callable[[SitePolicy], None]
WEAKER: dict[str, tuple[Ask, str]] = {
    "federation": (
        lambda p: p.check_plan(replace(PLAN, federation="others")),
        r"federation=others: this site allows shops \(policy: federations\)",
    ),
    "purpose": (
        lambda p: p.check_plan(replace(PLAN, purpose="credit-scoring")),
        r"purpose=credit-scoring: this site allows conversion-model \(policy: purposes\)",
    ),
    "model": (
        lambda p: p.check_plan(replace(PLAN, model=MlpConfig(name="gru"))),
        r"model\.name=gru: this site allows logistic, mlp \(policy: models\)",
    ),
    "unprotected": (
        lambda p: p.check_plan(replace(PLAN, privacy=Unprotected())),
        r"privacy\.name=unprotected: .* differential privacy only",
    ),
    "unknown protection": (
        lambda p: p.check_plan(replace(PLAN, privacy=PrivacyConfig("magic"))),
        r"privacy\.name=magic: unknown protection",
    ),
    "epsilon": (
        lambda p: p.check_plan(replace(PLAN, privacy=VisitorDP(epsilon=3.01, delta=1e-6))),
        r"privacy\.epsilon=3\.01: this site allows at most 3 \(policy: run_epsilon\)",
    ),
    "delta": (
        lambda p: p.check_plan(replace(PLAN, privacy=VisitorDP(delta=1e-5))),
        r"privacy\.delta=1e-05: this site allows at most 1e-06 \(policy: delta\)",
    ),
    "clipping norm": (
        lambda p: p.check_plan(
            replace(PLAN, privacy=VisitorDP(delta=1e-6, clipping_norm=3.5)),
        ),
        r"privacy\.clipping_norm=3\.5: this site allows at most 3 \(policy: max_clipping_norm\)",
    ),
    "noise": (
        lambda p: p.check_release("weights", PrivacyEvent(0.49, 0.1, 40)),
        r"noise multiplier of weights=0\.49: .* at least 0\.5 \(policy: min_noise_multiplier\)",
    ),
    "no noise": (
        lambda p: p.check_release("histogram", PrivacyEvent(0.0)),
        "noise multiplier of histogram=0",
    ),
    "release": (
        lambda p: replace(p, releases=("count",)).check_release("weights", PrivacyEvent(1.0)),
        r"release=weights: this site allows count \(policy: releases\)",
    ),
    "sample rate": (
        lambda p: p.check_training(replace(TRAINING, sample_rate=0.26)),
        r"sample rate=0\.26: this site allows at most 0\.25 \(policy: max_sample_rate\)",
    ),
    "steps": (
        lambda p: p.check_training(replace(TRAINING, steps=41)),
        r"steps=41: this site allows at most 40 \(policy: max_steps\)",
    ),
    "parameters": (
        lambda p: p.check_parameters(10_001),
        r"model parameters=10001: this site allows at most 10000 \(policy: max_parameters\)",
    ),
    "visitors": (
        lambda p: p.check_visitors(499.0, PLAN),
        r"visitors=499: too few, .* at least 500 \(policy: min_visitors\)",
    ),
    "delta of so many visitors": (
        lambda p: p.check_visitors(1e7, PLAN),
        r"privacy\.delta=1e-06: this site allows at most 1e-07",
    ),
    "the run's budget": (
        lambda p: p.check_spending(PLAN, 3.01, 3.01),
        r"epsilon of the run=3\.01: this site allows at most 3",
    ),
    "the run's budget by the policy": (
        lambda p: p.check_spending(replace(PLAN, privacy=VisitorDP(epsilon=9.0)), 3.01, 3.01),
        r"epsilon of the run=3\.01: .* at most 3 \(policy: run_epsilon\)",
    ),
    "the site's budget": (
        lambda p: p.check_spending(PLAN, 1.0, 6.01),
        r"epsilon in all=6\.01: this site allows at most 6 \(policy: epsilon\)",
    ),
    "a spending that is none": (
        lambda p: p.check_spending(PLAN, math.nan, 1.0),
        "epsilon of the run=nan",
    ),
}


@pytest.mark.parametrize("kind", WEAKER)
def test_promise_12_a_weaker_plan_is_refused_by_name(policy: SitePolicy, kind: str) -> None:
    ask, message = WEAKER[kind]

    with pytest.raises(PlanRefused, match=message):
        ask(policy)


def test_promise_13_without_a_policy_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"policy\.yaml: no policy, and without one nothing"):
        SitePolicy.load(tmp_path / "policy.yaml")


def changed(line: str, by: str) -> str:
    lines = [by if old.startswith(f"{line}:") else old for old in TEXT.splitlines()]
    return "\n".join(lines)


FAULTS = [
    (TEXT + "max_rounds: 3\n", "max_rounds: unknown field"),
    (changed("delta", ""), "delta: missing"),
    (TEXT + "delta: 0.1\n", "not a policy"),
    ("", "delta: missing"),
    ("- a\n- b\n", "not a policy"),
    ("{", "not a policy"),
    ("a: &a [*a]", "not a policy|unknown field|missing"),
    (changed("epsilon", "epsilon: lots"), "epsilon: must be a finite number"),
    (changed("epsilon", "epsilon: true"), "epsilon: must be a finite number"),
    (changed("epsilon", "epsilon: .inf"), "epsilon: must be a finite number"),
    (changed("epsilon", "epsilon: .nan"), "epsilon: must be a finite number"),
    (changed("epsilon", "epsilon: ${run_epsilon}"), "epsilon: must be a finite number"),
    (changed("epsilon", "epsilon: 2"), "run_epsilon=3.0: must be at most epsilon=2"),
    (changed("epsilon", "epsilon: -1"), "epsilon=-1.0: must be above 0"),
    (changed("delta", "delta: 1"), "delta=1.0: must be between 0 and 1"),
    (changed("max_steps", "max_steps: 1.5"), "max_steps: must be a whole number"),
    (changed("max_sample_rate", "max_sample_rate: 1.5"), "max_sample_rate=1.5: must be in"),
    (changed("models", "models: logistic"), "models: must be a list of texts"),
    (changed("models", "models: [forest]"), "models=forest: must be of logistic, mlp"),
    (changed("releases", "releases: [journeys]"), "releases=journeys: must be of count"),
    (changed("federations", "federations: []"), "federations=: must name at least one"),
    (changed("federations", 'federations: ["*"]'), "federations: must be named one by one"),
    (changed("purposes", "purposes: null"), "purposes: must be a list of texts"),
]


@pytest.mark.parametrize(("text", "message"), FAULTS, ids=range(len(FAULTS)))
def test_a_policy_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=r"policy\.yaml: (.*: )?" + f"({message})"):
        a_policy(tmp_path, text)


junk: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(["*"])
)


@settings(deadline=None, max_examples=100)
@given(name=st.sampled_from([f.name for f in fields(SitePolicy)]), value=junk)
def test_no_file_makes_a_policy_without_limits(
    tmp_path_factory: pytest.TempPathFactory, name: str, value: Any
) -> None:
    text = changed(name, f"{name}: {value!r}")
    try:
        policy = a_policy(tmp_path_factory.mktemp("policy"), text)
    except PolicyError:
        return
    assert math.isfinite(policy.epsilon)
    assert policy.run_epsilon <= policy.epsilon
    with pytest.raises(PlanRefused):
        policy.check_plan(replace(PLAN, privacy=Unprotected()))


def test_a_simulation_allows_what_it_is_asked() -> None:
    policy = SitePolicy.of_simulation()

    policy.check_plan(replace(PLAN, privacy=Unprotected(), federation="any"))
    policy.check_release("weights", PrivacyEvent(0.0))
    policy.check_training(replace(TRAINING, sample_rate=1.0, steps=10**6))
    policy.check_parameters(10**9)
    policy.check_visitors(1.0, PLAN)
