"""The coordinator's part of a run: its rounds, one after the other."""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import safetensors.numpy

from conf.schema import Config, JourneyConfig, VisitorDP
from journeys.features import feature_spec
from protocol.exchange import Request
from protocol.plan import RoundPlan
from protocol.replies import Reply, SiteEvaluation, SiteFailure, SiteUpdate, Weights
from protocol.stored import weights_to_bytes
from server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from server.federation import Federation
from server.history import EvaluationReport, History, RoundReport
from server.screening import cap_weights, screen_updates
from server.strategy import Aggregator

Watch = Callable[[RoundReport | EvaluationReport], None]
"""Called with each report as it is made, for a progress bar."""


def run_rounds(
    federation: Federation, config: Config, sites: int, folder: Path, watch: Watch
) -> tuple[Weights, EvaluationReport, History]:
    """Train the global model with `sites` sites; the final model, its evaluation, and the history.

    Goes on from the newest sound checkpoint in `folder`, if there is one, and ends as a run that
    was never interrupted.

    Raises:
        JoinError: Too few sites came.
    """
    checkpoint = load_checkpoint(folder / "checkpoints") or Checkpoint(
        0, 0, initial_weights(config), {}
    )
    history = History(folder / "metrics.jsonl", keep=checkpoint.records)
    aggregator = Aggregator(config.strategy)
    aggregator.restore(checkpoint.strategy)
    weights = checkpoint.weights
    plan = first_plan(config, run=folder.name)
    quorum = max(1, math.ceil(config.strategy.quorum * sites))
    federation.join(plan, sites, quorum, config.strategy.join_timeout_s)

    def report(made: RoundReport | EvaluationReport) -> None:
        history.add(made)
        watch(made)

    for round_ in range(checkpoint.round + 1, config.rounds + 1):
        started = time.monotonic()
        # 1. Ask every site to train, and on the way how good the model is that it gets.
        before, plan = replace(plan, round=round_ - 1), replace(plan, round=round_)
        plans = {"evaluate": before} if round_ - 1 in evaluated_after(config) else {}
        request = Request({**plans, "train": plan}, weights)
        answers = federation.ask(request, config.strategy.round_timeout_s)
        if plans:
            report(_evaluation(before, answers["evaluate"], federation))
        # 2. Keep what is sound.
        told = [
            answer for answer in answers["train"] if isinstance(answer, SiteUpdate | SiteFailure)
        ]
        sound, failed = screen_updates(told, weights, config.strategy.max_update_norm)
        # 3. Combine it, if it is enough; else the model stays as it is.
        completed = len(sound) >= quorum
        reason = "" if completed else f"{len(sound)} of {sites} sound updates, {quorum} needed"
        if completed:
            counts = _site_weights(federation, config)
            weights = aggregator.combine(round_, weights, sound, counts)
        # 4. Put it on record.
        seconds = time.monotonic() - started
        delta = config.privacy.delta if isinstance(config.privacy, VisitorDP) else None
        report(
            RoundReport(
                round_, completed, reason, seconds, delta, sound, [*failed, *federation.absent]
            )
        )
        save_checkpoint(
            folder / "checkpoints",
            Checkpoint(round_, len(history.records), weights, aggregator.state()),
        )

    last = replace(plan, round=config.rounds)
    answers = federation.ask(Request({"evaluate": last}, weights), config.strategy.round_timeout_s)
    final = _evaluation(last, answers["evaluate"], federation)
    report(final)
    return weights, final, history


def first_plan(config: Config, run: str) -> RoundPlan:
    """The plan before the first round; later ones differ in `round` alone."""
    mu = config.strategy.proximal_mu if config.strategy.name == "fedprox" else 0.0
    return RoundPlan(
        config.federation,
        config.purpose,
        run,
        0,
        config.rounds,
        len(evaluated_after(config)),
        config.model,
        config.optimizer,
        config.privacy,
        JourneyConfig(
            config.data.features,
            config.data.lookback_days,
            config.data.horizon_days,
            config.data.contributions,
        ),
        proximal_mu=mu,
    )


def evaluated_after(config: Config) -> set[int]:
    """The rounds after which the model is evaluated; the last one is among them."""
    n = min(config.evaluations, config.rounds)
    return {round(i * config.rounds / n) for i in range(1, n + 1)}


def initial_weights(config: Config) -> Weights:
    """The untrained model, drawn from the run's seed.

    Drawn in a process of its own, unless this one has torch loaded: that takes 140 MB, for which a
    coordinator has no other use.
    """
    if "torch" in sys.modules:
        return _drawn(config)
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_draw, args=(theirs, config))
    process.start()
    theirs.close()
    try:
        return safetensors.numpy.load(ours.recv_bytes())
    finally:
        process.join()
        ours.close()


def _draw(connection: Connection, config: Config) -> None:
    connection.send_bytes(weights_to_bytes(_drawn(config)))


def _drawn(config: Config) -> Weights:
    from models.registry import initial_weights

    return initial_weights(config.model, feature_spec(config.data.features), config.seed)


def _evaluation(
    plan: RoundPlan, answers: list[Reply | SiteFailure], federation: Federation
) -> EvaluationReport:
    evaluations = [answer for answer in answers if isinstance(answer, SiteEvaluation)]
    failures = [answer for answer in answers if isinstance(answer, SiteFailure)]
    return EvaluationReport(plan.round, evaluations, [*failures, *federation.absent])


def _site_weights(federation: Federation, config: Config) -> dict[str, float]:
    visitors = {site: d.visitors for site, d in federation.descriptions.items()}
    if config.strategy.weights == "uniform":
        return dict.fromkeys(visitors, 1.0)
    return cap_weights(visitors, config.strategy.weight_cap)
