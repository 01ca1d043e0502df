from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
import safetensors.numpy
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode

from conf.schema import LogisticConfig, OptimizerConfig, Unprotected, VisitorDP
from evaluation.histogram import EXACT, NOISED, Bins, ScoreHistogram
from protocol.exchange import Request, read_request, reply_parts
from protocol.plan import RoundPlan
from protocol.records import from_records, to_records
from protocol.replies import (
    Reply,
    SiteDescription,
    SiteEvaluation,
    SiteFailure,
    SiteRefusal,
    SiteUpdate,
    Weights,
)
from server.federation import Federation, JoinError
from tests.grid import AnsweringGrid
from tests.shop import CUT

PLAN = RoundPlan(
    "federation", "purpose", "run", 0, 5, 2, LogisticConfig(), OptimizerConfig(), Unprotected(), CUT
)
WEIGHTS: Weights = {"w": np.ones(3, np.float32)}
EVALUATE = Request({"evaluate": replace(PLAN, round=3)}, WEIGHTS)

Answer = Callable[[Message, RoundPlan], list[Message]]


@dataclass
class FakeGrid(AnsweringGrid):
    """Each node answers by a function."""

    nodes: dict[int, Answer]
    asked: list[tuple[int, str, RoundPlan]] = field(default_factory=list)

    def answer(self, node: int, message: Message) -> list[Message]:
        plan = list(read_request(from_records(message.content)).plans.values())[-1]
        self.asked.append((node, message.metadata.message_type, plan))
        return self.nodes[node](message, plan)


class ById(FakeGrid):
    """Hands out what is asked for and nothing else, as a network does."""

    def __init__(self, grid: FakeGrid) -> None:
        super().__init__(grid.nodes)
        self.get_node_ids = grid.get_node_ids  # type: ignore[method-assign]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = set(message_ids)
        came = [r for r in self._replies if r.metadata.reply_to_message_id in asked]
        self._replies = [r for r in self._replies if r not in came]
        return came


def update(site: str, round_: int, value: float = 2.0) -> SiteUpdate:
    return SiteUpdate(site, round_, {"w": np.full(3, value, np.float32)}, 0.5)


def evaluation(site: str, round_: int, bins: Bins = EXACT) -> SiteEvaluation:
    return SiteEvaluation(site, round_, ScoreHistogram.empty(bins), 0.0, None)


def honest(site: str, message: Message, plan: RoundPlan) -> Reply:
    match message.metadata.message_type:
        case "query":
            return SiteDescription(site, 100.0)
        case "train":
            return update(site, plan.round)
    return evaluation(site, plan.round)


def reply(message: Message, answer: Reply) -> Message:
    kind = message.metadata.message_type
    ask = "describe" if kind == "query" else kind
    return Message(to_records(reply_parts({ask: answer})), reply_to=message)


def good(site: str) -> Answer:
    return lambda message, plan: [reply(message, honest(site, message, plan))]


def after_joining(site: str, answer: Answer) -> Answer:
    """Joins as `site` and then answers by `answer`."""

    def both(message: Message, plan: RoundPlan) -> list[Message]:
        if message.metadata.message_type == "query":
            return good(site)(message, plan)
        return answer(message, plan)

    return both


def joined(*nodes: Answer, timeout: float = 5.0, needed: int | None = None) -> Federation:
    federation = Federation(FakeGrid({10 * i: node for i, node in enumerate(nodes, 1)}))
    federation.join(PLAN, len(nodes), len(nodes) if needed is None else needed, timeout)
    return federation


def train(federation: Federation, timeout: float = 0.3) -> dict[str, SiteUpdate | SiteFailure]:
    request = Request({"train": replace(PLAN, round=2)}, WEIGHTS)
    answers = cast(list[SiteUpdate | SiteFailure], federation.ask(request, timeout)["train"])
    assert len({a.site for a in answers}) == len(answers)
    return {answer.site: answer for answer in answers}


def with_content(content: RecordDict) -> Answer:
    return lambda message, _: [Message(content, reply_to=message)]


def text(kind: str, value: Any) -> RecordDict:
    return RecordDict({"text": ConfigRecord({kind: value})})


def with_array(data: bytes, stype: str = "safetensors", name: str = "safetensors") -> Answer:
    records = to_records(reply_parts({"train": update("bad", 2)}))
    records["weights"] = ArrayRecord({name: Array("", (), stype, data)})
    return with_content(records)


def spoilt(change: Callable[[SiteUpdate], Reply]) -> Answer:
    return lambda message, _: [reply(message, change(update("bad", 2)))]


BAD: dict[str, tuple[Answer, str, str]] = {
    "error": (
        lambda m, _: [Message(Error(1, "the process died"), reply_to=m)],
        "missing",
        "the process died",
    ),
    "error without a reason": (
        lambda m, _: [Message(Error(1), reply_to=m)],
        "missing",
        "the site failed",
    ),
    "silence": (lambda m, _: [], "missing", "no reply in"),
    "refusal": (
        lambda m, _: [reply(m, SiteRefusal("bad", 2, "privacy.epsilon=9: at most 3"))],
        "refused",
        "privacy.epsilon=9: at most 3",
    ),
    "earlier round": (
        spoilt(lambda u: replace(u, round=1)),
        "dropped",
        "answered for round 1 instead of 2",
    ),
    "later round": (
        spoilt(lambda u: replace(u, round=3)),
        "dropped",
        "answered for round 3 instead of 2",
    ),
    "other name": (spoilt(lambda u: replace(u, site="a")), "dropped", "another site's name"),
    "other kind": (
        lambda m, _: [reply(m, SiteDescription("bad", 1e9))],
        "dropped",
        "answered with a SiteDescription",
    ),
    "no content": (with_content(RecordDict()), "dropped", "without text"),
    "unknown kind": (with_content(text("train", "Site {}")), "dropped", "train: no such reply"),
    "plan": (with_content(text("train", "RoundPlan {}")), "dropped", "no such reply"),
    "something else": (with_content(text("score", "SiteUpdate {}")), "dropped", "something else"),
    "another ask": (
        with_content(text("describe", 'SiteDescription {"site": "bad", "visitors": 1}')),
        "dropped",
        "no answer to train",
    ),
    "bytes": (with_content(text("train", b"\x80\x04.")), "dropped", "train: no text"),
    "number": (with_content(text("train", 7)), "dropped", "train: no text"),
    "no JSON": (with_content(text("train", "SiteUpdate {")), "dropped", "not JSON"),
    "no object": (with_content(text("train", "SiteUpdate [1]")), "dropped", "not an object"),
    "no fields": (with_content(text("train", "SiteUpdate {}")), "dropped", "missing"),
    "evaluation": (
        lambda m, _: [reply(m, evaluation("bad", 2))],
        "dropped",
        "answered with a SiteEvaluation",
    ),
    "arrays of garbage": (with_array(b"garbage"), "dropped", "weights: arrays"),
    "arrays of nothing": (with_array(b""), "dropped", "weights: arrays"),
    "pickle for arrays": (with_array(b"\x80\x04N."), "dropped", "weights: arrays"),
    "pickle, and says so": (with_array(b"\x80\x04N.", "pickle"), "dropped", "weights: not in"),
    "arrays of another library": (with_array(b"", "numpy.ndarray"), "dropped", "weights: not in"),
    "arrays one by one": (with_array(b"", name="w"), "dropped", "weights: not in"),
    "header too large": (with_array((2**63).to_bytes(8, "little")), "dropped", "weights: arrays"),
    "float64": (
        with_array(safetensors.numpy.save({"w": np.ones(3)})),
        "dropped",
        "weights.w: float64 instead of float32",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_one_site_answers_costs_no_other(kind: str) -> None:
    answer, outcome, reason = BAD[kind]
    federation = joined(good("a"), after_joining("bad", answer), good("z"))

    answers = train(federation)

    assert list(answers) == ["a", "bad", "z"]
    assert isinstance(answers["a"], SiteUpdate)
    assert isinstance(answers["z"], SiteUpdate)
    failure = answers["bad"]
    assert isinstance(failure, SiteFailure)
    assert failure.outcome == outcome
    assert reason in failure.reason


def test_the_first_of_two_replies_counts() -> None:
    twice: Answer = lambda m, _: [  # noqa: E731
        reply(m, update("bad", 2, 5.0)),
        reply(m, update("bad", 2, 7.0)),
    ]

    answers = train(joined(after_joining("bad", twice), good("b")))

    first = answers["bad"]
    assert isinstance(first, SiteUpdate)
    assert first.weights["w"][0] == 5.0
    assert set(answers) == {"bad", "b"}


def test_an_error_first_is_not_made_good_by_a_second_reply() -> None:
    twice: Answer = lambda m, _: [  # noqa: E731
        Message(Error(1, "broke"), reply_to=m),
        reply(m, update("bad", 2)),
    ]

    answers = train(joined(after_joining("bad", twice), good("b")))

    assert answers["bad"] == SiteFailure("bad", "missing", "broke")


def test_a_reply_of_a_node_that_was_not_asked_is_dropped() -> None:
    def forged(message: Message, plan: RoundPlan) -> list[Message]:
        false = reply(message, update("ghost", 2))
        false.metadata.__dict__["_src_node_id"] = 99
        return [false, *good("a")(message, plan)]

    answers = train(joined(after_joining("a", forged), good("b")))

    assert set(answers) == {"a", "b"}
    assert all(isinstance(answer, SiteUpdate) for answer in answers.values())


def test_a_site_that_did_not_join_is_not_asked_to_train() -> None:
    refuses: Answer = lambda m, _: [reply(m, SiteRefusal("shy", 0, "privacy: too weak"))]  # noqa: E731
    federation = joined(good("b"), refuses, good("a"), needed=2)

    answers = train(federation)

    assert list(answers) == ["a", "b"]
    assert list(federation.descriptions) == ["a", "b"]
    assert federation.absent == [SiteFailure("shy", "refused", "privacy: too weak")]


def test_who_refuses_to_join_cannot_take_anothers_name() -> None:
    refuses: Answer = lambda m, _: [reply(m, SiteRefusal("a", 0, "privacy: too weak"))]  # noqa: E731
    federation = joined(good("b"), refuses, good("a"), needed=2)

    assert list(federation.descriptions) == ["a", "b"]
    assert federation.absent == [SiteFailure("node 20", "refused", "privacy: too weak")]


def test_all_are_asked_and_listed_in_the_order_of_names() -> None:
    grid = FakeGrid({1: good("c"), 2: good("a"), 3: good("b")})
    federation = Federation(grid)
    federation.join(PLAN, 3, 3, 5.0)
    grid.asked.clear()

    assert list(train(federation)) == ["a", "b", "c"]

    assert [node for node, _, _ in grid.asked] == [2, 3, 1]
    assert {kind for _, kind, _ in grid.asked} == {"train"}
    assert {plan.round for _, _, plan in grid.asked} == {2}


def test_evaluations() -> None:
    mixed = after_joining("b", lambda m, _: [Message(Error(1, "broke"), reply_to=m)])
    federation = joined(good("a"), mixed)

    answers = federation.ask(EVALUATE, 1.0)["evaluate"]

    assert [a.site for a in answers] == ["a", "b"]
    assert isinstance(answers[0], SiteEvaluation)
    assert answers[0].round == 3
    assert answers[1] == SiteFailure("b", "missing", "broke")


def counts(value: float, bins: Bins = EXACT) -> ScoreHistogram:
    histogram = ScoreHistogram.empty(bins)
    histogram.positive[3] = value
    return histogram


BAD_EVALUATIONS: dict[str, tuple[SiteEvaluation, str]] = {
    "earlier round": (evaluation("bad", 2), "answered for round 2 instead of 3"),
    "other name": (evaluation("a", 3), "another site's name"),
    "bins for noise": (evaluation("bad", 3, NOISED), "histogram: 24 bins instead of 400"),
    "huge count": (
        SiteEvaluation("bad", 3, counts(2e12), 0.0, None),
        "histogram: a count beyond 1e+12",
    ),
    "huge count below zero": (
        SiteEvaluation("bad", 3, counts(-1.7e308), 0.0, None),
        "histogram: a count beyond 1e+12",
    ),
    "huge noise": (SiteEvaluation("bad", 3, counts(1), 1.7e308, None), "noise: beyond 1e+12"),
}


@pytest.mark.parametrize("kind", BAD_EVALUATIONS)
def test_an_evaluation_that_is_not_sound_is_dropped_alone(kind: str) -> None:
    bad, reason = BAD_EVALUATIONS[kind]
    federation = joined(good("a"), after_joining("bad", lambda m, _: [reply(m, bad)]), good("z"))

    answers = federation.ask(EVALUATE, 1.0)["evaluate"]

    assert [type(a) for a in answers] == [SiteEvaluation, SiteFailure, SiteEvaluation]
    assert answers[1].site == "bad"
    assert isinstance(answers[1], SiteFailure)
    assert answers[1].outcome == "dropped"
    assert reason in answers[1].reason


def test_where_visitors_are_protected_counts_without_noise_are_dropped() -> None:
    noised = after_joining("noised", lambda m, p: [reply(m, evaluation("noised", p.round, NOISED))])
    federation = joined(good("exact"), noised)

    protected = replace(PLAN, round=3, privacy=VisitorDP())
    answers = federation.ask(Request({"evaluate": protected}, WEIGHTS), 1.0)["evaluate"]

    reason = "histogram: 400 bins instead of 24"
    assert answers[0] == SiteFailure("exact", "dropped", reason)
    assert isinstance(answers[1], SiteEvaluation)


# ------------------------------------------------------------------ bounded waiting


def silent(message: Message, plan: RoundPlan) -> list[Message]:
    return []


def test_training_waits_no_longer_than_its_time() -> None:
    federation = joined(good("a"), after_joining("b", silent))
    started = time.monotonic()

    answers = train(federation, timeout=0.5)

    assert 0.5 <= time.monotonic() - started < 3.0
    assert isinstance(answers["a"], SiteUpdate)
    assert answers["b"] == SiteFailure("b", "missing", "no reply in 0 s")


def second_time(answer: Callable[[list[Message]], list[Message]]) -> Answer:
    """Says nothing to the first message, and to the second what `answer` makes of both."""
    asked: list[Message] = []

    def silent_at_first(message: Message, plan: RoundPlan) -> list[Message]:
        asked.append(message)
        return answer(asked) if len(asked) == 2 else []

    return silent_at_first


def good_update(message: Message) -> Message:
    return reply(message, update("b", 2))


def expired(message: Message) -> Message:
    return superlink(ErrorCode.MESSAGE_UNAVAILABLE)(message, PLAN)[0]


@pytest.mark.parametrize(
    "answer",
    [
        lambda asked: [good_update(asked[1])],
        lambda asked: [good_update(asked[0])],
        lambda asked: [good_update(asked[0]), good_update(asked[1])],
        lambda asked: [expired(asked[0]), good_update(asked[1])],
        lambda asked: [expired(asked[1]), good_update(asked[0])],
    ],
)
def test_a_site_that_says_nothing_is_asked_once_more(
    answer: Callable[[list[Message]], list[Message]],
) -> None:
    grid = FakeGrid({1: good("a"), 2: after_joining("b", second_time(answer))})
    federation = Federation(ById(grid), {1: "a", 2: "b"})
    federation.join(PLAN, 2, 2, 5.0)
    started = time.monotonic()

    answers = train(federation, timeout=5.0)

    assert isinstance(answers["b"], SiteUpdate)
    # At a tenth of the time, and not a second one more is waited.
    assert 0.5 <= time.monotonic() - started < 2.5


def test_who_stays_silent_is_asked_twice_and_who_has_answered_once() -> None:
    grid = FakeGrid({1: good("a"), 2: after_joining("b", silent)})
    federation = Federation(grid, {1: "a", 2: "b"})
    federation.join(PLAN, 2, 2, 5.0)

    answers = train(federation, timeout=0.3)

    assert answers["b"] == SiteFailure("b", "missing", "no reply in 0 s")
    assert [node for node, kind, _ in grid.asked if kind == "train"] == [1, 2, 2]


def test_nothing_is_asked_twice_in_a_simulation() -> None:
    grid = FakeGrid({1: good("a"), 2: after_joining("b", silent)})
    federation = Federation(grid)
    federation.join(PLAN, 2, 2, 5.0)

    train(federation, timeout=0.3)

    assert [node for node, kind, _ in grid.asked if kind == "train"] == [1, 2]


def test_who_joins_is_asked_once_more_too() -> None:
    answer = second_time(lambda asked: [reply(asked[1], SiteDescription("b", 100.0))])
    grid = FakeGrid({1: good("a"), 2: answer})
    federation = Federation(grid, {1: "a", 2: "b"})

    federation.join(PLAN, expected=2, needed=2, timeout=2.0)

    assert list(federation.descriptions) == ["a", "b"]


def test_a_late_reply_of_an_earlier_round_does_not_count_for_a_later_one() -> None:
    held: list[Message] = []

    def late(message: Message, plan: RoundPlan) -> list[Message]:
        released, held[:] = list(held), [reply(message, update("b", plan.round))]
        return released

    federation = joined(good("a"), after_joining("b", late))
    federation.ask(Request({"train": replace(PLAN, round=1)}, WEIGHTS), 0.2)

    answers = train(federation)

    assert answers["b"] == SiteFailure("b", "missing", "no reply in 0 s")


def superlink(code: int) -> Answer:
    """What Flower's SuperLink answers in a node's place."""

    def answer(message: Message, plan: RoundPlan) -> list[Message]:
        error = Message(Error(code, "a reason"), reply_to=message)
        error.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
        return [error]

    return answer


def test_joining_does_not_wait_for_a_reply_whose_time_is_over() -> None:
    grid = ById(FakeGrid({1: good("a"), 2: superlink(ErrorCode.MESSAGE_UNAVAILABLE)}))
    federation = Federation(grid, {1: "a", 2: "b"})
    started = time.monotonic()

    with pytest.raises(JoinError, match=r"1 of 2 sites joined .*\(b: no reply in time\)"):
        federation.join(PLAN, expected=2, needed=2, timeout=20.0)

    assert time.monotonic() - started < 3.0
    # It is asked again with the next round.
    grid.nodes[2] = good("b")
    train(federation)
    assert set(train(federation)) == {"a", "b"}


def test_who_goes_offline_while_it_joins_is_asked_anew_once_it_is_back() -> None:
    grid = ById(FakeGrid({1: good("a"), 2: superlink(ErrorCode.NODE_UNAVAILABLE)}))
    here = iter([[1, 2], [1], [1]])
    answers = iter([grid.nodes[2]])
    grid.nodes[2] = lambda message, plan: next(answers, good("b"))(message, plan)
    grid.get_node_ids = lambda: next(here, [1, 2])  # type: ignore[method-assign]
    federation = Federation(grid, {1: "a", 2: "b"})

    federation.join(PLAN, expected=2, needed=2, timeout=20.0)

    assert [node for node, *_ in grid.asked] == [1, 2, 2]
    assert list(federation.descriptions) == ["a", "b"]


def test_who_goes_offline_for_good_is_named_when_joining_ends() -> None:
    grid = ById(FakeGrid({1: good("a"), 2: superlink(ErrorCode.NODE_UNAVAILABLE)}))
    here = iter([[1, 2]])
    grid.get_node_ids = lambda: next(here, [1])  # type: ignore[method-assign]

    with pytest.raises(JoinError, match=r"1 of 2 sites joined .*\(b: not connected\)"):
        Federation(grid, {1: "a", 2: "b"}).join(PLAN, expected=2, needed=2, timeout=0.5)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (ErrorCode.MESSAGE_UNAVAILABLE, "no reply in 20 s"),
        (ErrorCode.NODE_UNAVAILABLE, "went offline"),
    ],
)
def test_a_round_does_not_wait_for_whom_the_superlink_has_given_up(code: int, reason: str) -> None:
    federation = joined(good("a"), after_joining("b", superlink(code)))
    started = time.monotonic()

    answers = train(federation, timeout=20.0)

    assert time.monotonic() - started < 3.0
    assert isinstance(answers["a"], SiteUpdate)
    assert answers["b"] == SiteFailure("b", "missing", reason)


def test_joining_waits_no_longer_than_its_time() -> None:
    federation = Federation(FakeGrid({1: good("a")}))
    started = time.monotonic()

    with pytest.raises(JoinError, match="1 of 4 sites joined within 0 s, 2 are needed"):
        federation.join(PLAN, expected=4, needed=2, timeout=0.3)

    assert time.monotonic() - started < 3.0


# ------------------------------------------------------------------ joining


def test_join_without_all_but_with_enough() -> None:
    federation = Federation(FakeGrid({1: good("a"), 2: good("b")}))

    federation.join(PLAN, expected=3, needed=2, timeout=0.2)

    assert {s: d.visitors for s, d in federation.descriptions.items()} == {"a": 100.0, "b": 100.0}


def test_join_error_says_what_to_do_and_why_a_site_did_not_come() -> None:
    refuses: Answer = lambda m, _: [reply(m, SiteRefusal("b", 0, "privacy.epsilon=9"))]  # noqa: E731

    with pytest.raises(JoinError) as raised:
        joined(good("a"), refuses, timeout=2.0)

    assert str(raised.value) == (
        "1 of 2 sites joined within 2 s, 2 are needed (b: privacy.epsilon=9); start the missing "
        "sites or lower strategy.quorum"
    )


def test_join_with_no_site_at_all() -> None:
    federation = Federation(FakeGrid({}))

    with pytest.raises(JoinError, match="0 of 2 sites joined"):
        federation.join(PLAN, expected=2, needed=1, timeout=0.2)


def test_two_sites_of_one_name_are_refused() -> None:
    with pytest.raises(JoinError, match="two sites call themselves 'shop'"):
        joined(good("shop"), good("other"), good("shop"))


def test_sites_may_be_slow_to_appear() -> None:
    grid = FakeGrid({1: good("a")})
    appear = iter([[1], [1], [1, 2]])
    grid.nodes[2] = good("b")
    grid.get_node_ids = lambda: next(appear, [1, 2])  # type: ignore[method-assign]
    federation = Federation(grid)

    federation.join(PLAN, expected=2, needed=2, timeout=5.0)

    assert list(federation.descriptions) == ["a", "b"]


def test_a_site_is_asked_as_soon_as_it_is_there() -> None:
    grid = FakeGrid({1: good("a"), 2: good("b")})
    federation = Federation(grid)
    # The second one comes once the first one has been asked.
    grid.get_node_ids = lambda: [1, 2] if grid.asked else [1]  # type: ignore[method-assign]

    federation.join(PLAN, expected=2, needed=2, timeout=5.0)

    assert [node for node, *_ in grid.asked] == [1, 2]


def test_who_fails_to_join_is_asked_once_more_with_the_first_round() -> None:
    answers = iter([lambda m: Message(Error(0, "no agent"), reply_to=m)])

    def restarted(message: Message, plan: RoundPlan) -> list[Message]:
        broken = next(answers, None)
        return [broken(message)] if broken else good("b")(message, plan)

    grid = ById(FakeGrid({1: good("a"), 2: restarted}))
    federation = Federation(grid)

    federation.join(PLAN, expected=2, needed=1, timeout=0.5)

    assert list(federation.descriptions) == ["a"]
    assert [failure.reason for failure in federation.absent] == ["no agent"]
    assert [node for node, *_ in grid.asked] == [1, 2]
    train(federation)
    assert list(train(federation)) == ["a", "b"]


def test_a_site_that_comes_late_joins_with_the_next_round() -> None:
    grid = FakeGrid({1: good("a"), 2: good("b"), 3: good("c")})
    here = [1, 2]
    grid.get_node_ids = lambda: here  # type: ignore[method-assign]
    federation = Federation(ById(grid))
    federation.join(PLAN, expected=3, needed=2, timeout=0.2)
    here.append(3)

    assert list(train(federation)) == ["a", "b"]
    assert list(train(federation)) == ["a", "b", "c"]


def test_who_refused_is_not_asked_to_join_again() -> None:
    refuses: Answer = lambda m, _: [reply(m, SiteRefusal("shy", 0, "privacy: too weak"))]  # noqa: E731
    grid = FakeGrid({1: good("a"), 2: refuses})
    federation = Federation(grid)
    federation.join(PLAN, expected=2, needed=1, timeout=0.2)

    train(federation)
    train(federation)

    assert [kind for node, kind, _ in grid.asked if node == 2] == ["query"]


def test_only_admitted_nodes_are_asked_and_under_their_own_names() -> None:
    grid = FakeGrid({1: good("a"), 2: good("a"), 3: good("stranger")})
    federation = Federation(grid, admitted={1: "a", 2: "b"})

    federation.join(PLAN, expected=2, needed=1, timeout=0.2)

    assert {node for node, _, _ in grid.asked} == {1, 2}
    assert list(federation.descriptions) == ["a"]
    assert federation.absent == [SiteFailure("b", "dropped", "answered under another site's name")]


def test_an_admitted_site_that_is_not_there_is_named() -> None:
    federation = Federation(FakeGrid({1: good("a")}), admitted={1: "a", 2: "b"})

    federation.join(PLAN, expected=2, needed=1, timeout=0.2)

    assert federation.absent == [SiteFailure("b", "missing", "not connected")]
