from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conf.schema import (
    AttentionConfig,
    FeatureConfig,
    GruConfig,
    JourneyConfig,
    LogisticConfig,
    MlpConfig,
    NumericColumn,
    OptimizerConfig,
    Unprotected,
    VisitorDP,
)
from evaluation.histogram import EXACT, NOISED, Bins, ScoreHistogram
from protocol.plan import RoundPlan
from protocol.replies import SiteDescription, SiteEvaluation, SiteRefusal, SiteUpdate
from protocol.wire import LARGEST_TEXT, WireError, from_text, to_text

KINDS = [RoundPlan, SiteDescription, SiteEvaluation, SiteUpdate, SiteRefusal]
JOURNEYS = JourneyConfig(
    FeatureConfig(["email"], categorical={"device": ["mobile"]}, numeric={"n": NumericColumn()})
)
finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(1e-6, 1e6)
names = st.text(max_size=20)
plans = st.builds(
    RoundPlan,
    federation=names,
    purpose=names,
    run=names,
    round=st.integers(),
    rounds=st.integers(),
    evaluations=st.integers(),
    model=st.one_of(
        st.builds(LogisticConfig, name=st.just("logistic")),
        st.builds(MlpConfig, name=st.just("mlp"), embedding=st.integers(1, 99)),
        st.builds(GruConfig, name=st.just("gru"), base_rate=st.floats(0.01, 0.99)),
        st.builds(
            AttentionConfig, name=st.just("attention"), heads=st.just(2), embedding=st.just(8)
        ),
    ),
    optimizer=st.builds(
        OptimizerConfig, name=st.sampled_from(["sgd", "adam"]), learning_rate=positive
    ),
    privacy=st.one_of(
        st.builds(Unprotected, name=st.just("unprotected")),
        st.builds(VisitorDP, name=st.just("visitor_dp"), epsilon=positive, delta=st.just(1e-6)),
    ),
    journeys=st.builds(
        JourneyConfig,
        features=st.builds(
            FeatureConfig,
            channels=st.lists(names, unique=True, max_size=3),
            categorical=st.dictionaries(
                names.map("c {}".format), st.lists(names, unique=True, max_size=3), max_size=2
            ),
            numeric=st.dictionaries(
                names.map("n {}".format),
                st.builds(NumericColumn, low=st.just(0), high=positive, log=st.booleans()),
                max_size=2,
            ),
        ),
        lookback_days=positive,
        horizon_days=positive,
        contributions=st.integers(1, 9),
    ),
    proximal_mu=finite,
)
replies = st.one_of(
    st.builds(SiteDescription, site=names, visitors=finite),
    st.builds(SiteRefusal, site=names, round=st.integers(), reason=names),
)


def a_plan() -> RoundPlan:
    return RoundPlan("f", "p", "r", 1, 3, 2, GruConfig(), OptimizerConfig(), VisitorDP(), JOURNEYS)


def an_evaluation(bins: Bins = NOISED) -> SiteEvaluation:
    counts = np.random.default_rng(1).normal(0, 1e3, (2, bins.count))
    return SiteEvaluation("shop", 2, ScoreHistogram(*counts), 4.5, 1.25)


@given(plan=plans)
@settings(deadline=None)
def test_a_plan_comes_back_equal(plan: RoundPlan) -> None:
    back = from_text(RoundPlan, to_text(plan))
    assert back == plan
    assert type(back.model) is type(plan.model)
    assert type(back.privacy) is type(plan.privacy)


@given(reply=replies)
@settings(deadline=None)
def test_a_reply_comes_back_equal(reply: SiteDescription | SiteRefusal) -> None:
    assert from_text(type(reply), to_text(reply)) == reply


@pytest.mark.parametrize("bins", [EXACT, NOISED], ids=["exact", "noised"])
def test_a_histogram_comes_back_to_the_last_bit(bins: Bins) -> None:
    sent = an_evaluation(bins)
    back = from_text(SiteEvaluation, to_text(sent))
    assert (back.site, back.round, back.noise, back.epsilon) == ("shop", 2, 4.5, 1.25)
    assert np.array_equal(back.histogram.negative, sent.histogram.negative)
    assert np.array_equal(back.histogram.positive, sent.histogram.positive)


def test_an_update_takes_its_weights_from_beside_the_text() -> None:
    sent = SiteUpdate("shop", 3, {"a": np.ones(2, np.float32)}, None)
    text = to_text(sent, leave_out=("weights",))
    assert "weights" not in json.loads(text)
    back = from_text(SiteUpdate, text, weights=sent.weights)
    assert back.weights is sent.weights
    assert back.epsilon is None
    with pytest.raises(WireError, match=r"SiteUpdate\.weights: missing"):
        from_text(SiteUpdate, text)


def test_whole_numbers_stand_for_floats_but_not_the_other_way() -> None:
    assert from_text(SiteDescription, '{"site": "a", "visitors": 3}').visitors == 3.0
    with pytest.raises(WireError, match=r"SiteRefusal\.round: not of type"):
        from_text(SiteRefusal, '{"site": "a", "round": 3.0, "reason": ""}')


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_never_sent(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        to_text(SiteDescription("a", value))


FAULTS: list[tuple[tuple[str, ...], object, str]] = [
    (("round",), "1", "RoundPlan.round: not of type"),
    (("round",), True, "RoundPlan.round: not of type"),
    (("round",), None, "RoundPlan.round: not of type"),
    (("round",), 1.0, "RoundPlan.round: not of type"),
    (("federation",), None, "RoundPlan.federation: not of type"),
    (("purpose",), ["ads"], "RoundPlan.purpose: not of type"),
    (("evaluations",), 2.0, "RoundPlan.evaluations: not of type"),
    (("run",), 7, "RoundPlan.run: not of type"),
    (("run",), ["r"], "RoundPlan.run: not of type"),
    (("run",), "\ud800", "RoundPlan.run: half a character"),
    (("proximal_mu",), float("nan"), "RoundPlan.proximal_mu: not of type"),
    (("proximal_mu",), float("inf"), "RoundPlan.proximal_mu: not of type"),
    (("proximal_mu",), 10**400, "RoundPlan.proximal_mu: not of type"),
    (("proximal_mu",), False, "RoundPlan.proximal_mu: not of type"),
    (("model",), "gru", "RoundPlan.model: not an object"),
    (("model", "name"), "lstm", "RoundPlan.model.name: no such choice"),
    (("model", "name"), None, "RoundPlan.model.name: no such choice"),
    (("model", "name"), {"a": 1}, "RoundPlan.model.name: no such choice"),
    (("model", "name"), "mlp", ""),
    (("model", "name"), "logistic", "RoundPlan.model."),
    (("model", "hidden"), "8", "RoundPlan.model.hidden: not of type"),
    (("model", "hidden"), -8, "RoundPlan.model: model.hidden=-8"),
    (("model", "fresh"), 1, "RoundPlan.model.fresh: unknown field"),
    (("privacy",), None, "RoundPlan.privacy: not an object"),
    (("privacy", "name"), "none", "RoundPlan.privacy.name: no such choice"),
    (("privacy", "name"), "unprotected", "RoundPlan.privacy."),
    (("privacy", "epsilon"), -3, "RoundPlan.privacy: privacy.epsilon=-3"),
    (("privacy", "delta"), 2, "RoundPlan.privacy: privacy.delta=2"),
    (("optimizer", "name"), "lbfgs", "RoundPlan.optimizer: optimizer.name=lbfgs"),
    (("optimizer", "momentum"), None, "RoundPlan.optimizer.momentum: not of type"),
    (("fresh",), 1, "RoundPlan.fresh: unknown field"),
    (("journeys",), None, "RoundPlan.journeys: not an object"),
    (("journeys", "horizon_days"), 0, "RoundPlan.journeys: data.horizon_days=0"),
    (("journeys", "features", "channels"), "email", "RoundPlan.journeys.features.channels: not"),
    (("journeys", "features", "channels"), ["a", 1], "RoundPlan.journeys.features.channels[1]:"),
    (("journeys", "features", "channels"), ["a", "a"], "RoundPlan.journeys.features: data."),
    (("journeys", "features", "categorical"), [], "RoundPlan.journeys.features.categorical: not"),
    (
        ("journeys", "features", "categorical"),
        {"a": "b"},
        "RoundPlan.journeys.features.categorical.*: not of type",
    ),
    (("journeys", "features", "numeric"), {"a": 1}, "RoundPlan.journeys.features.numeric.*: not"),
    (
        ("journeys", "features", "numeric", "n", "high"),
        -1,
        "RoundPlan.journeys.features.numeric.*: data.features.numeric.*.high=-1",
    ),
]


@pytest.mark.parametrize(("path", "value", "message"), [f for f in FAULTS if f[2]])
def test_a_wrong_value_is_named(path: tuple[str, ...], value: object, message: str) -> None:
    read = json.loads(to_text(a_plan()))
    inner = read
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(WireError) as caught:
        from_text(RoundPlan, json.dumps(read))
    assert str(caught.value).startswith(message)


def test_every_missing_field_is_named() -> None:
    whole = json.loads(to_text(a_plan()))
    for key in whole:
        with pytest.raises(WireError, match=rf"RoundPlan\.{key}: missing"):
            from_text(RoundPlan, json.dumps({k: v for k, v in whole.items() if k != key}))
    for group in ("model", "privacy", "optimizer", "journeys"):
        for key in set(whole[group]) - ({"name"} if group in ("model", "privacy") else set()):
            less = {k: v for k, v in whole[group].items() if k != key}
            with pytest.raises(WireError, match=rf"RoundPlan\.{group}\.{key}: missing"):
                from_text(RoundPlan, json.dumps({**whole, group: less}))


GOOD: list[Any] = [0] * NOISED.count


@pytest.mark.parametrize(
    "histogram",
    [
        None,
        [],
        {"negative": GOOD},
        {"negative": GOOD, "positive": GOOD, "both": GOOD},
        {"negative": GOOD, "positive": GOOD[1:]},
        {"negative": GOOD, "positive": [0] * EXACT.count},
        {"negative": [], "positive": []},
        {"negative": [0] * 100_000, "positive": [0] * 100_000},
        {"negative": GOOD, "positive": [GOOD]},
        {"negative": GOOD, "positive": 0},
        {"negative": GOOD, "positive": "0" * 24},
        {"negative": GOOD, "positive": ["0"] * 24},
        {"negative": GOOD, "positive": [True] * 24},
        {"negative": GOOD, "positive": [None] * 24},
        {"negative": GOOD, "positive": [{}] * 24},
        {"negative": GOOD, "positive": [float("nan"), *GOOD[1:]]},
        {"negative": [float("-inf"), *GOOD[1:]], "positive": GOOD},
        {"negative": [10**400, *GOOD[1:]], "positive": GOOD},
    ],
)
def test_a_histogram_that_is_none_is_refused(histogram: object) -> None:
    text = json.dumps({**json.loads(to_text(an_evaluation())), "histogram": histogram})
    with pytest.raises(WireError, match=r"^SiteEvaluation\.histogram: "):
        from_text(SiteEvaluation, text)


@pytest.mark.parametrize("noise", [-1, -1e-300, None, "1", True, float("nan"), float("inf")])
def test_noise_that_is_none_is_refused(noise: object) -> None:
    text = json.dumps({**json.loads(to_text(an_evaluation())), "noise": noise})
    with pytest.raises(WireError, match=r"^SiteEvaluation(\.noise)?: n"):
        from_text(SiteEvaluation, text)


@pytest.mark.parametrize("noise", [-1.0, float("nan")])
def test_noise_below_zero_cannot_be_told(noise: float) -> None:
    with pytest.raises(ValueError, match="noise: must be 0 or more"):
        SiteEvaluation("shop", 1, ScoreHistogram.empty(), noise, None)


@pytest.mark.parametrize(
    "text",
    [
        None,
        b"{}",
        7,
        1.5,
        ["{}"],
        "",
        "{",
        "null",
        "[]",
        '"text"',
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 5_000,
        "\x00",
        " " * (LARGEST_TEXT + 1),
        '{"site": "' + "x" * LARGEST_TEXT + '", "visitors": 1}',
    ],
    ids=lambda text: repr(text)[:12],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_none_is_refused(kind: type, text: object) -> None:
    with pytest.raises(WireError, match=rf"^{kind.__name__}"):
        from_text(kind, text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=20,
)


@given(text=st.text())
@example(text='{"site": "a", "visitors": 1e999}')
@settings(deadline=None, max_examples=300)
def test_any_text_is_read_or_refused(text: str) -> None:
    for kind in KINDS:
        with pytest.raises(WireError):
            from_text(kind, text)


@given(value=json_values, path=st.sampled_from([f[0] for f in FAULTS]))
@settings(deadline=None, max_examples=250)
def test_any_json_in_any_place_is_read_or_refused(value: object, path: tuple[str, ...]) -> None:
    read = json.loads(to_text(a_plan()))
    inner = read
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    text = json.dumps(read)
    try:
        back = from_text(RoundPlan, text)
    except WireError:
        return
    assert from_text(RoundPlan, to_text(back)) == back


@given(value=json_values)
@settings(deadline=None, max_examples=200)
def test_any_json_as_a_whole_is_refused(value: object) -> None:
    for kind in KINDS:
        with pytest.raises(WireError):
            from_text(kind, json.dumps(value))
