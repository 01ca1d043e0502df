"""What a model's noised figures are measured against; a simulation may look at all journeys."""

from __future__ import annotations

import numpy as np

from conf.schema import ModelConfig
from evaluation.histogram import ScoreHistogram
from journeys.examples import Examples
from journeys.features import FeatureSpec
from journeys.site import SiteJourneys
from protocol.replies import Weights


def last_touch_channel(sites: list[SiteJourneys], spec: FeatureSpec) -> ScoreHistogram:
    """Scores of the pooled training visitors' conversion rate by last-touch channel.

    Pooled and not private: a simulation may, a federation may not.
    """
    channels = spec.categorical[0][1]
    shown, converted = np.zeros(channels), np.zeros(channels)
    for site in sites:
        last = _last_channel(site.train)
        shown += np.bincount(last, minlength=channels)
        converted += np.bincount(last, weights=site.train.label, minlength=channels)
    # One half of a conversion in one visitor more: a channel never seen has a rate too.
    rate = (converted + 0.5) / (shown + 1.0)
    logit = np.log(rate / (1 - rate)).astype(np.float32)
    histograms = [
        ScoreHistogram.of(logit[_last_channel(site.holdout)], np.asarray(site.holdout.label))
        for site in sites
    ]
    return sum(histograms, ScoreHistogram.empty())


def true_probability(sites: list[SiteJourneys]) -> ScoreHistogram | None:
    """Scores of the probabilities that labels were drawn from; None where they are not known."""
    total = ScoreHistogram.empty()
    for site in sites:
        if site.holdout_probability is None:
            return None
        probability = np.clip(np.asarray(site.holdout_probability, np.float64), 1e-9, 1 - 1e-9)
        logit = np.log(probability / (1 - probability)).astype(np.float32)
        total += ScoreHistogram.of(logit, np.asarray(site.holdout.label))
    return total


def exact_counts(
    sites: list[SiteJourneys], config: ModelConfig, spec: FeatureSpec, weights: Weights
) -> ScoreHistogram:
    """Scores of the model itself on all held-out visitors, without the noise of a release."""
    # Here, because they load torch, for which the rounds have no use.
    from models.registry import build
    from models.score import logits
    from models.weights import set_weights

    model = build(config, spec)
    set_weights(model, weights)
    histograms = [
        ScoreHistogram.of(logits(model, site.holdout), np.asarray(site.holdout.label))
        for site in sites
    ]
    return sum(histograms, ScoreHistogram.empty())


def _last_channel(examples: Examples) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    rows = np.arange(len(examples))
    return np.asarray(examples.categorical[rows, examples.length - 1, 0], dtype=np.int64)
