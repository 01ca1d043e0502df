"""Sites that misbehave on purpose, for tests of what the coordinator makes of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from flwr.app import Message

from protocol.exchange import read_replies, reply_parts
from protocol.records import from_records, to_records
from protocol.replies import SiteUpdate, Weights


class Fault(StrEnum):
    """What goes wrong."""

    CRASH = "crash"
    """The site's process is gone, as after kill -9."""
    HANG = "hang"
    """It never answers."""
    RAISE = "raise"
    """It raises an error."""
    NAN = "nan"
    """One weight is NaN."""
    HUGE = "huge"
    """One weight is 1e30."""
    SHAPE = "shape"
    """One array has another shape."""
    MISSING_ARRAY = "missing array"
    """One array is left out."""
    WRONG_ROUND = "wrong round"
    """It answers for the round before."""
    DUPLICATE = "duplicate"
    """It answers twice."""


@dataclass(frozen=True)
class Faults:
    """Which site (by index) does what in which training round."""

    planned: tuple[tuple[int, int, Fault], ...] = ()
    """(site index, round, fault)."""

    def of(self, index: int, round_: int) -> Fault | None:
        """The fault planned for a site and a round."""
        for site, at, fault in self.planned:
            if (site, at) == (index, round_):
                return fault
        return None


def misbehave(fault: Fault | None, answer: Callable[[], Message]) -> Message:
    """The reply of `answer`, spoilt by `fault`."""
    match fault:
        case Fault.CRASH:
            os._exit(137)
        case Fault.HANG:
            time.sleep(3600)
        case Fault.RAISE:
            raise RuntimeError("a fault, on purpose")
    message = answer()
    if fault in (None, Fault.DUPLICATE):
        return message
    replies = read_replies(from_records(message.content))
    update = replies.get("train")
    if isinstance(update, SiteUpdate):
        replies["train"] = _spoilt(update, Fault(str(fault)))
        message.content = to_records(reply_parts(replies))
    return message


def _spoilt(update: SiteUpdate, fault: Fault) -> SiteUpdate:
    if fault is Fault.WRONG_ROUND:
        return replace(update, round=update.round - 1)
    weights: Weights = {name: value.copy() for name, value in update.weights.items()}
    first = min(weights)
    match fault:
        case Fault.NAN:
            weights[first].flat[0] = np.nan
        case Fault.HUGE:
            weights[first].flat[0] = 1e30
        case Fault.SHAPE:
            weights[first] = weights[first][np.newaxis]
        case Fault.MISSING_ARRAY:
            del weights[first]
    return replace(update, weights=weights)
