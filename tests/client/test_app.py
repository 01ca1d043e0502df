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
from client.site import Site
from conf.schema import LogisticConfig, OptimizerConfig, Unprotected
from evaluation.histogram import ScoreHistogram
from protocol.exchange import Request, read_replies, request_parts
from protocol.plan import RoundPlan
from protocol.records import from_records, to_records
from protocol.replies import (
    Reply,
    SiteDescription,
    SiteEvaluation,
    SiteRefusal,
    SiteUpdate,
    Weights,
)
from protocol.wire import WireError
from tests.shop import CUT

PLAN = RoundPlan(
    "shops", "ads", "run", 2, 5, 3, LogisticConfig(), OptimizerConfig(), Unprotected(), CUT, 0.25
)
WEIGHTS: Weights = {"w": np.arange(3, dtype=np.float32)}
CONTEXT = Context(1, 7, {}, RecordDict(), {})


class FakeSite:
    """Keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def answer(self, request: Request) -> dict[str, Reply]:
        self.asked.append(request)
        replies: dict[str, Reply] = {}
        for ask, plan in request.plans.items():
            if plan.run == "refused":
                replies[ask] = SiteRefusal("shop", plan.round, "privacy.epsilon=9: at most 3")
            elif ask == "describe":
                replies[ask] = SiteDescription("shop", 12.0)
            elif ask == "evaluate":
                empty = ScoreHistogram.empty()
                replies[ask] = SiteEvaluation("shop", plan.round, empty, 0.0, None)
            else:
                trained = {name: w + 1 for name, w in request.weights.items()}
                replies[ask] = SiteUpdate("shop", plan.round, trained, 0.5)
        return replies


def message(kind: str, content: RecordDict) -> Message:
    TaskIdentity.task_id = TaskIdentity.run_id = 1
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    made = Message(content, 7, kind, group_id="2", ttl=10.0)
    made.metadata.__dict__["_message_id"] = "m"
    return made


def ask(site: FakeSite, kind: str, request: Request) -> Message:
    app = client_app(lambda _: nullcontext(cast(Site, site)))
    reply = app(message(kind, to_records(request_parts(request))), CONTEXT)
    assert reply.metadata.reply_to_message_id == "m"
    return reply


@pytest.mark.parametrize(
    ("kind", "asked", "answer"),
    [
        ("query", "describe", SiteDescription),
        ("train", "train", SiteUpdate),
        ("evaluate", "evaluate", SiteEvaluation),
    ],
)
def test_a_message_reaches_the_site_unchanged(kind: str, asked: str, answer: type[Any]) -> None:
    site = FakeSite()

    message = ask(site, kind, Request({asked: PLAN}, {} if kind == "query" else WEIGHTS))

    [request] = site.asked
    assert request.plans == {asked: PLAN}
    reply = read_replies(from_records(message.content))[asked]
    assert type(reply) is answer
    if kind != "query":
        assert request.weights["w"].tobytes() == WEIGHTS["w"].tobytes()
    if isinstance(reply, SiteUpdate):
        np.testing.assert_array_equal(reply.weights["w"], WEIGHTS["w"] + 1)
        assert (reply.site, reply.round, reply.epsilon) == ("shop", 2, 0.5)


def test_one_message_may_ask_for_several_things() -> None:
    plans = {"evaluate": replace(PLAN, round=1, run="refused"), "train": PLAN}

    message = ask(FakeSite(), "train", Request(plans, WEIGHTS))

    replies = read_replies(from_records(message.content))
    assert replies["evaluate"] == SiteRefusal("shop", 1, "privacy.epsilon=9: at most 3")
    assert isinstance(replies["train"], SiteUpdate)
    assert replies["train"].round == 2


def test_a_refusal_is_an_answer_without_arrays() -> None:
    message = ask(FakeSite(), "train", Request({"train": replace(PLAN, run="refused")}, WEIGHTS))

    replies = read_replies(from_records(message.content))
    assert replies == {"train": SiteRefusal("shop", 2, "privacy.epsilon=9: at most 3")}
    assert not message.content.array_records


def test_a_message_that_is_no_plan_never_reaches_the_site() -> None:
    def unopened(_: Context) -> AbstractContextManager[Site]:
        raise AssertionError("the site was opened")

    content = RecordDict({"text": ConfigRecord({"train": "{}"})})

    with pytest.raises(WireError, match="missing"):
        client_app(unopened)(message("train", content), CONTEXT)
