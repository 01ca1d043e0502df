"""Flower's strategies as the way to combine screened updates."""

from __future__ import annotations

import time
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
)
from flwr.serverapp.strategy.fedopt import FedOpt

from conf.schema import StrategyConfig
from protocol.replies import SiteUpdate, Weights, flat

_WEIGHT = "num-examples"
_ALL = "all"
"""Flower's strategies work value by value, so that a model goes to them as one array: each costs
0.2 ms."""


class Aggregator:
    """One of Flower's strategies, without its sampling and waiting: `combine` only.

    Updates have passed `screen_updates`, so that what the strategies take for granted holds.
    """

    def __init__(self, config: StrategyConfig) -> None:
        self._strategy = _strategy(config)

    def combine(
        self, round_: int, weights: Weights, updates: list[SiteUpdate], counts: dict[str, float]
    ) -> Weights:
        """The next global model.

        Args:
            round_: 1 for the first.
            weights: the round's model.
            updates: one or more, sound.
            counts: how much each site weighs, above 0; the median and the trimmed mean ignore it.
        """
        if isinstance(self._strategy, FedOpt):
            self._strategy.current_arrays = {_ALL: flat(weights)}
        if isinstance(self._strategy, FedMedian | FedTrimmedAvg):
            told = [flat(update.weights) for update in updates]
        else:
            # All others look at the mean alone.
            told = [_mean(updates, counts)]
        replies = [_as_reply(model) for model in told]
        arrays, _ = self._strategy.aggregate_train(round_, replies)
        assert arrays is not None
        return _like(weights, arrays[_ALL].numpy().astype(np.float32))

    def state(self) -> Weights:
        """What the strategy remembers between rounds: its moments, by name."""
        moments = self._moments()
        return {
            f"{m}.{name}": value for m, values in moments.items() for name, value in values.items()
        }

    def restore(self, state: Weights) -> None:
        """Take up `state` of an earlier process."""
        for moment in self._moments():
            values = {
                key.removeprefix(f"{moment}."): value
                for key, value in state.items()
                if key.startswith(f"{moment}.")
            }
            setattr(self._strategy, f"{moment}_t", values or None)

    def _moments(self) -> dict[str, Weights]:
        if not isinstance(self._strategy, FedOpt):
            return {}
        return {"m": self._strategy.m_t or {}, "v": self._strategy.v_t or {}}


def _strategy(config: StrategyConfig) -> FedAvg:
    common: dict[str, Any] = {"weighted_by_key": _WEIGHT}
    adaptive = {**common, "eta": config.server_learning_rate}
    match config.name:
        case "fedprox":
            return FedProx(**common, proximal_mu=config.proximal_mu)
        case "fedadam":
            return FedAdam(**adaptive)
        case "fedyogi":
            return FedYogi(**adaptive)
        case "fedadagrad":
            return FedAdagrad(**adaptive)
        case "fedmedian":
            return FedMedian(**common)
        case "fedtrimmedavg":
            return FedTrimmedAvg(**common, beta=config.trim)
    return FedAvg(**common)


def _mean(updates: list[SiteUpdate], counts: dict[str, float]) -> npt.NDArray[np.float32]:
    whole = sum(counts[update.site] for update in updates)
    mean = np.zeros_like(flat(updates[0].weights))
    for update in updates:
        mean += flat(update.weights) * np.float32(counts[update.site] / whole)
    return mean


def _like(weights: Weights, vector: npt.NDArray[np.float32]) -> Weights:
    parts: Weights = {}
    for name in sorted(weights):
        part, vector = np.split(vector, [weights[name].size])
        parts[name] = part.reshape(weights[name].shape)
    return {name: parts[name] for name in weights}


def _as_reply(model: npt.NDArray[np.float32]) -> Message:
    arrays = ArrayRecord({_ALL: Array(model)})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({_WEIGHT: 1.0})})
    # By its metadata: a message is else stamped with the identity of a running Flower task.
    message: Message = cast(Any, Message)(
        content=content,
        metadata=Metadata(
            run_id=0,
            message_id="",
            src_node_id=0,
            dst_node_id=0,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=1.0,
            message_type="train",
        ),
    )
    return message
