from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from conf.schema import FeatureConfig
from evaluation.metrics import metrics
from journeys.examples import Examples
from journeys.features import feature_spec
from journeys.site import SiteJourneys
from simulation.baseline import last_touch_channel, true_probability

CHANNELS = ["a", "b", "c", "d"]
SPEC = feature_spec(FeatureConfig(channels=CHANNELS, max_touchpoints=3))
RATES = np.array([0.0, 0.05, 0.02, 0.1, 0.3, 0.6])


def examples(n: int, rng: np.random.Generator) -> Examples:
    """Labels by the channel of the last touchpoint; the padding behind it is 0."""
    length = rng.integers(1, 4, n).astype(np.int32)
    categorical = rng.integers(1, 6, (n, 3, len(SPEC.categorical))).astype(np.uint16)
    categorical[np.arange(3) >= length[:, None]] = 0
    rate = RATES[last_channel(categorical, length)]
    label = (rng.random(n) < rate).astype(np.float32)
    return Examples(categorical, np.zeros((n, 3, len(SPEC.numeric)), np.float32), length, label)


def last_channel(categorical: np.ndarray, length: np.ndarray) -> list[int]:
    return [int(row[n - 1, 0]) for row, n in zip(categorical, length, strict=True)]


@pytest.fixture
def sites() -> list[SiteJourneys]:
    rng = np.random.default_rng(0)
    return [
        SiteJourneys(f"site {i}", examples(800, rng), examples(400, rng), None) for i in range(3)
    ]


def test_last_touch_is_the_pooled_rate_of_the_channel(sites: list[SiteJourneys]) -> None:
    shown, converted = dict.fromkeys(range(6), 0), dict.fromkeys(range(6), 0.0)
    for site in sites:
        last = last_channel(site.train.categorical, site.train.length)
        for channel, label in zip(last, site.train.label, strict=True):
            shown[channel] += 1
            converted[channel] += float(label)
    score, label = [], []
    for site in sites:
        for channel in last_channel(site.holdout.categorical, site.holdout.length):
            score.append((converted[channel] + 0.5) / (shown[channel] + 1))
        label += site.holdout.label.tolist()

    got = metrics(last_touch_channel(sites, SPEC))

    assert got.examples == 1200
    assert got.roc_auc == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert got.log_loss == pytest.approx(log_loss(label, score), abs=2e-3)
    assert got.roc_auc > 0.7


def test_training_labels_alone_make_the_rates(sites: list[SiteJourneys]) -> None:
    site = sites[0]
    flipped = Examples(
        site.holdout.categorical, site.holdout.numeric, site.holdout.length, 1 - site.holdout.label
    )

    one = last_touch_channel([site], SPEC)
    other = last_touch_channel([SiteJourneys(site.name, site.train, flipped)], SPEC)

    np.testing.assert_array_equal(one.positive, other.negative)
    np.testing.assert_array_equal(one.negative, other.positive)


def test_a_channel_never_trained_on_has_a_rate(sites: list[SiteJourneys]) -> None:
    holdout = sites[0].holdout
    empty = sites[0].train.take(np.zeros(0, np.int64))

    histogram = last_touch_channel([SiteJourneys("new", empty, holdout)], SPEC)

    assert metrics(histogram).roc_auc == 0.5


def test_true_probability(sites: list[SiteJourneys]) -> None:
    known = []
    for site in sites:
        last = last_channel(site.holdout.categorical, site.holdout.length)
        known.append(
            SiteJourneys(site.name, site.train, site.holdout, RATES[last].astype(np.float32))
        )

    histogram = true_probability(known)

    assert histogram is not None
    label = np.concatenate([site.holdout.label for site in known])
    truth = np.concatenate([site.holdout_probability for site in known])
    assert metrics(histogram).roc_auc == pytest.approx(roc_auc_score(label, truth), abs=1e-12)
    assert true_probability(sites) is None
    assert true_probability([*known, sites[0]]) is None


def test_a_probability_of_0_or_1_has_a_score(sites: list[SiteJourneys]) -> None:
    sure = sites[0].holdout.label.astype(np.float32)
    site = SiteJourneys("sure", sites[0].train, sites[0].holdout, sure)

    histogram = true_probability([site])

    assert histogram is not None
    assert metrics(histogram).roc_auc == 1.0
