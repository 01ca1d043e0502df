from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity

from client.app import client_app
from client.policy import PlanRefused
from client.site import Site
from conf.schema import LogisticConfig, OptimizerConfig, Unprotected
from evaluation.histogram import ScoreHistogram
from protocol.plan import RoundPlan
from protocol.records import plan_records, read_reply
from protocol.replies import (
    Reply,
    SiteDescription,
    SiteEvaluation,
    SiteRefusal,
    SiteUpdate,
    Weights,
)
from protocol.wire import WireError

PLAN = RoundPlan(
    "shops", "ads", "run", 2, 5, 3, LogisticConfig(), OptimizerConfig(), Unprotected(), 0.25
)
WEIGHTS: Weights = {"w": np.arange(3, dtype=np.float32)}
CONTEXT = Context(1, 7, {}, RecordDict(), {})


class FakeSite:
    """Keeps what it is asked."""

    name = "shop"

    def __init__(self) -> None:
        self.asked: list[tuple[str, RoundPlan, Weights]] = []

    def describe(self, plan: RoundPlan) -> SiteDescription:
        self.asked.append(("describe", plan, {}))
        return SiteDescription(self.name, 12.0)

    def train(self, plan: RoundPlan, weights: Weights) -> SiteUpdate:
        self.asked.append(("train", plan, weights))
        if plan.run == "refused":
            raise PlanRefused("privacy.epsilon=9: at most 3")
        trained = {name: w + 1 for name, w in weights.items()}
        return SiteUpdate(self.name, plan.round, trained, 0.5)

    def evaluate(self, plan: RoundPlan, weights: Weights) -> SiteEvaluation:
        self.asked.append(("evaluate", plan, weights))
        return SiteEvaluation(self.name, plan.round, ScoreHistogram.empty(), 0.0, None)


def message(kind: str, content: RecordDict) -> Message:
    TaskIdentity.task_id = TaskIdentity.run_id = 1
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    made = Message(content, 7, kind, group_id="2", ttl=10.0)
    made.metadata.__dict__["_message_id"] = "m"
    return made


def ask(site: FakeSite, kind: str, plan: RoundPlan = PLAN) -> Reply:
    app = client_app(lambda _: nullcontext(cast(Site, site)))
    weights = None if kind == "query" else WEIGHTS
    reply = app(message(kind, plan_records(plan, weights)), CONTEXT)
    assert reply.metadata.reply_to_message_id == "m"
    return read_reply(reply.content)


@pytest.mark.parametrize(
    ("kind", "method", "answer"),
    [
        ("query", "describe", SiteDescription),
        ("train", "train", SiteUpdate),
        ("evaluate", "evaluate", SiteEvaluation),
    ],
)
def test_a_message_reaches_its_method_unchanged(kind: str, method: str, answer: type[Any]) -> None:
    site = FakeSite()

    reply = ask(site, kind)

    [(asked, plan, weights)] = site.asked
    assert (asked, plan) == (method, PLAN)
    assert type(reply) is answer
    if kind != "query":
        assert weights["w"].tobytes() == WEIGHTS["w"].tobytes()
    if isinstance(reply, SiteUpdate):
        np.testing.assert_array_equal(reply.weights["w"], WEIGHTS["w"] + 1)
        assert (reply.site, reply.round, reply.epsilon) == ("shop", 2, 0.5)


def test_a_refusal_is_an_answer_without_arrays() -> None:
    plan = replace(PLAN, run="refused")
    site = FakeSite()
    app = client_app(lambda _: nullcontext(cast(Site, site)))

    reply = app(message("train", plan_records(plan, WEIGHTS)), CONTEXT)

    assert read_reply(reply.content) == SiteRefusal("shop", 2, "privacy.epsilon=9: at most 3")
    assert not reply.content.array_records


def test_a_message_that_is_no_plan_never_reaches_the_site() -> None:
    def unopened(_: Context) -> AbstractContextManager[Site]:
        raise AssertionError("the site was opened")

    content = RecordDict({"text": ConfigRecord({"RoundPlan": "{}"})})

    with pytest.raises(WireError, match="missing"):
        client_app(unopened)(message("train", content), CONTEXT)
