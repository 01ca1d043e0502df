"""One exchange between coordinator and site: what is asked, and what is answered to each ask.

A request may ask for several things of one model, such as its evaluation and the next round's
training, so that a round costs one message each way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from protocol.plan import RoundPlan
from protocol.replies import REPLIES, Reply, SiteUpdate, Weights
from protocol.stored import weights_from_bytes, weights_to_bytes
from protocol.wire import WireError, from_text, to_text

ASKS = ("describe", "evaluate", "train")
"""What can be asked, in the order in which a site answers. A finished model travels apart from
these (`protocol.publication`)."""


@dataclass(frozen=True)
class Parts:
    """A request or its answer as it travels, unread."""

    texts: Mapping[str, str]
    """JSON, by what is asked."""
    weights: bytes | None
    """A model in the format of safetensors."""


@dataclass(frozen=True)
class Request:
    """What the coordinator asks, in one message."""

    plans: Mapping[str, RoundPlan]
    """By what is asked (`ASKS`); at least one."""
    weights: Weights = field(default_factory=dict)
    """The model that is to be evaluated or trained; empty where there is none."""


def request_parts(request: Request) -> Parts:
    """A request, to be sent."""
    texts = {ask: plan.text for ask, plan in request.plans.items()}
    return Parts(texts, weights_to_bytes(request.weights) if request.weights else None)


def read_request(parts: Parts) -> Request:
    """The request that `request_parts` wrote. Raises `WireError`."""
    _check_asks(parts, ASKS)
    plans = {ask: _read_plan(text) for ask, text in parts.texts.items()}
    return Request(plans, _read_model(parts.weights))


# A round asks all the sites of a process the same, of the same model (`_read_model`).


@lru_cache(maxsize=4)
def _read_plan(text: str) -> RoundPlan:
    return from_text(RoundPlan, text)


def reply_parts(replies: Mapping[str, Reply]) -> Parts:
    """The answers to one request, by what was asked."""
    texts, weights = {}, None
    for ask, reply in replies.items():
        texts[ask] = f"{type(reply).__name__} {to_text(reply, leave_out=('weights',))}"
        if isinstance(reply, SiteUpdate):
            weights = weights_to_bytes(reply.weights)
    return Parts(texts, weights)


def read_replies(parts: Parts, known: Sequence[str] = ASKS) -> dict[str, Reply]:
    """The answers that `reply_parts` wrote, to what is in `known`. Raises `WireError`."""
    _check_asks(parts, known)
    replies: dict[str, Reply] = {}
    for ask, told in parts.texts.items():
        kind, _, text = told.partition(" ")
        if kind not in REPLIES:
            raise WireError(f"{ask}: no such reply")
        if kind == "SiteUpdate":
            replies[ask] = from_text(SiteUpdate, text, weights=read_weights(parts.weights))
        else:
            replies[ask] = from_text(REPLIES[kind], text)
    return replies


def _check_asks(parts: Parts, known: Sequence[str]) -> None:
    if not parts.texts:
        raise WireError("a message without text")
    for ask in parts.texts:
        if ask not in known:
            raise WireError(f"a message that asks for something else than {', '.join(known)}")


def read_weights(data: bytes | None) -> Weights:
    """The arrays of a model that came; none where there is none. Raises `WireError`."""
    return {} if data is None else weights_from_bytes(data)


_read_model = lru_cache(maxsize=1)(read_weights)
