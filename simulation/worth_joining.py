"""Is joining worth it? Each site alone, the federation, with and without privacy, and the union.

All are the same training with the same budget of steps: a site alone is a federation of one, the
centralised upper bound is a federation of one site that holds all journeys.
"""

from __future__ import annotations

import math
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from conf.schema import Config, PrivacyConfig, Unprotected, VisitorDP
from evaluation.histogram import ScoreHistogram
from evaluation.metrics import Metrics, metrics
from journeys.examples import concatenate
from journeys.features import feature_spec
from journeys.site import SiteJourneys
from models.registry import build
from models.score import logits
from models.weights import set_weights
from protocol.replies import Weights
from simulation.run import federate

EPSILONS = (1.0, 3.0, 8.0)
LEARNING_RATES = (0.3, 1.0, 3.0)
"""Factors of `optimizer.learning_rate`; every approach chooses one on validation data."""
VALIDATION = 0.2
"""Share of a site's training visitors set apart for that choice."""
RESAMPLES = 300
METRICS = {"roc_auc": "ROC-AUC", "pr_auc": "PR-AUC", "log_loss": "log-loss"}

Interval = tuple[float, float, float]
"""Lower end, value, upper end."""
Scored = list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]
"""Logits and labels of each site's holdout."""


@dataclass(frozen=True)
class Approach:
    """One way to get a model for each site."""

    name: str
    privacy: PrivacyConfig
    joined: str
    """Who trains together: `none` (each alone), `federation`, or `union` (all journeys pooled)."""


@dataclass(frozen=True)
class Result:
    """What an approach achieved on the visitors that no training saw."""

    approach: str
    learning_rate: float
    pooled: dict[str, Interval]
    """Each metric over the sites' visitors together, each scored by its site's model."""
    mean: dict[str, Interval]
    """Each metric's mean over sites."""
    sites: dict[str, dict[str, Interval]]
    """Each metric by site."""


def compare_approaches(
    config: Config, sites: list[SiteJourneys], done: Callable[[int, int], None]
) -> list[Result]:
    """Train every approach with the same rounds and steps, tuned alike, and evaluate them alike.

    `done` is called with the trainings finished and their number. Intervals are 95 % bootstrap
    intervals over visitors.
    """
    chosen: dict[str, tuple[float, float]] = {}
    parts = [_set_apart(site, config.seed + index) for index, site in enumerate(sites)]
    trials = [(approach, factor) for approach in approaches() for factor in LEARNING_RATES]
    total, finished = len(trials) + len(approaches()), 0
    results: dict[str, Result] = {}
    workers = max(config.runtime.workers, 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {
            pool.submit(_train, _configured(config, a, factor, parts), a, parts): (a, factor)
            for a, factor in trials
        }
        for future in as_completed(futures):
            approach, factor = futures[future]
            loss = _pooled(_score(config, future.result(), parts)).log_loss
            chosen[approach.name] = min(chosen.get(approach.name, (math.inf, 1.0)), (loss, factor))
            done(finished := finished + 1, total)
        final = {}
        for approach in approaches():
            factor = chosen[approach.name][1]
            tuned = _configured(config, approach, factor, sites)
            final[pool.submit(_train, tuned, approach, sites)] = (approach, tuned)
        for future in as_completed(final):
            approach, tuned = final[future]
            scored = _score(config, future.result(), sites)
            results[approach.name] = _result(approach, tuned, sites, scored, config.seed)
            done(finished := finished + 1, total)
    return [results[approach.name] for approach in approaches()]


def approaches() -> list[Approach]:
    """What is compared, in the order of the table."""
    return [
        Approach("each site alone", Unprotected(), "none"),
        Approach("federated, unprotected", Unprotected(), "federation"),
        *(
            Approach(f"federated, epsilon {epsilon:g}", VisitorDP(epsilon=epsilon), "federation")
            for epsilon in EPSILONS
        ),
        Approach("centralised, unprotected", Unprotected(), "union"),
    ]


def _configured(
    config: Config, approach: Approach, factor: float, sites: list[SiteJourneys]
) -> Config:
    privacy = approach.privacy
    if isinstance(privacy, VisitorDP) and isinstance(config.privacy, VisitorDP):
        privacy = replace(config.privacy, epsilon=privacy.epsilon)
    optimizer = replace(config.optimizer, learning_rate=config.optimizer.learning_rate * factor)
    if approach.joined == "union":
        # As many steps as the site that takes the most: the same budget, on more journeys.
        largest = max(site.train.visitors for site in sites)
        pooled = sum(site.train.visitors for site in sites)
        steps = max(1.0, largest / optimizer.batch_size) * optimizer.local_epochs
        optimizer = replace(optimizer, local_epochs=steps / max(1, pooled / optimizer.batch_size))
    runtime = replace(config.runtime, name="local", workers=0)
    return replace(config, privacy=privacy, optimizer=optimizer, runtime=runtime)


def _train(config: Config, approach: Approach, sites: list[SiteJourneys]) -> list[Weights]:
    """A model for each site; the same for all where they train together."""
    match approach.joined:
        case "none":
            groups = [[site] for site in sites]
        case "union":
            groups = [[_union(sites)]]
        case _:
            groups = [sites]
    models = []
    for group in groups:
        with tempfile.TemporaryDirectory(prefix="approach-") as folder:
            weights, _, _ = federate(config, group, Path(folder), lambda report: None)
            models.append(weights)
    return models if approach.joined == "none" else models * len(sites)


def _union(sites: list[SiteJourneys]) -> SiteJourneys:
    return SiteJourneys(
        "all journeys",
        concatenate([site.train for site in sites]),
        concatenate([site.holdout for site in sites]),
    )


def _set_apart(site: SiteJourneys, seed: int) -> SiteJourneys:
    """The site's training visitors, some of them as the holdout; the true holdout stays unseen."""
    rows, count = site.train.by_visitor()
    held = np.random.default_rng(seed).random(len(count)) < VALIDATION
    first = rows[np.cumsum(count) - count]
    stay = rows[~np.repeat(held, count)]
    return SiteJourneys(site.name, site.train.take(stay), site.train.take(first[held]))


def _score(config: Config, models: list[Weights], sites: list[SiteJourneys]) -> Scored:
    """Each site's holdout, scored by the site's model."""
    model = build(config.model, feature_spec(config.data.features))
    scored = []
    for weights, site in zip(models, sites, strict=True):
        set_weights(model, weights)
        scored.append((logits(model, site.holdout), np.asarray(site.holdout.label)))
    return scored


def _pooled(scored: Scored) -> Metrics:
    return metrics(sum(_resampled(scored, None), ScoreHistogram.empty()))


def _result(
    approach: Approach,
    config: Config,
    sites: list[SiteJourneys],
    scored: Scored,
    seed: int,
) -> Result:
    resamples = (_resampled(scored, np.random.default_rng([seed, i])) for i in range(RESAMPLES))
    drawn = [_resampled(scored, None), *resamples]
    by_site = [[metrics(histogram) for histogram in draw] for draw in drawn]
    pooled = [metrics(sum(draw, ScoreHistogram.empty())) for draw in drawn]

    def interval(values: list[float]) -> Interval:
        low, high = np.nanquantile(values[1:], [0.025, 0.975])
        return float(low), values[0], float(high)

    return Result(
        approach.name,
        config.optimizer.learning_rate,
        {m: interval([getattr(p, m) for p in pooled]) for m in METRICS},
        {
            m: interval([float(np.nanmean([getattr(s, m) for s in draw])) for draw in by_site])
            for m in METRICS
        },
        {
            site.name: {m: interval([getattr(draw[i], m) for draw in by_site]) for m in METRICS}
            for i, site in enumerate(sites)
        },
    )


def _resampled(scored: Scored, rng: np.random.Generator | None) -> list[ScoreHistogram]:
    """The sites' score histograms, of visitors drawn with replacement where there is an `rng`."""
    histograms = []
    for logit, label in scored:
        rows = slice(None) if rng is None else rng.integers(0, len(label), len(label))
        histograms.append(ScoreHistogram.of(logit[rows], label[rows]))
    return histograms
