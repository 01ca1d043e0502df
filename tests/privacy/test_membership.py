from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from privacy.membership import infer_membership, largest_true_positive_rate


def test_shifted_normals() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.normal(1.0, 1.0, 2000), rng.normal(0.0, 1.0, 2000)
    found = infer_membership(members, others, rng)
    low, auc, high = found.auc
    labels = np.repeat([1, 0], 2000)
    assert auc == pytest.approx(roc_auc_score(labels, np.concatenate([members, others])))
    assert low < 0.7602 < high  # Phi(1 / sqrt(2))
    low, rate, high = found.true_positive_rate
    assert low < 0.0924 < high  # Phi(1 - 2.326)
    assert low <= rate <= high


def test_ties_count_half_and_find_nobody() -> None:
    found = infer_membership(np.zeros(200), np.zeros(200), np.random.default_rng(0))
    assert found.auc == (0.5, 0.5, 0.5)
    assert found.true_positive_rate == (0.0, 0.0, 0.0)


def test_at_most_one_percent_of_others_are_accused() -> None:
    others = np.arange(1000.0)
    members = np.array([988.0, 989.0, 990.0, 991.0])
    rate = infer_membership(members, others, np.random.default_rng(0)).true_positive_rate[1]
    assert rate == 0.5  # above 989 are 10 of 1,000


def test_too_few_or_broken_scores_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="1 members, 99 others"):
        infer_membership(np.zeros(1), np.zeros(99), rng)
    with pytest.raises(ValueError, match="NaN"):
        infer_membership(np.array([math.nan]), np.zeros(100), rng)


def test_randomised_response_reaches_what_is_allowed() -> None:
    """It tells a visitor's presence truly with probability p: rates (1 - p, p)."""
    for epsilon in (0.1, 1.0, 5.0):
        truly = 1 / (1 + math.exp(-epsilon))
        assert largest_true_positive_rate(1 - truly, epsilon, 0.0) == pytest.approx(truly)


def test_what_is_allowed_grows_with_the_claim() -> None:
    assert largest_true_positive_rate(0.01, 0.0, 0.0) == pytest.approx(0.01)
    assert largest_true_positive_rate(0.01, 3.0, 0.0) == pytest.approx(0.01 * math.e**3)
    assert largest_true_positive_rate(0.01, 3.0, 0.1) == pytest.approx(0.01 * math.e**3 + 0.1)
    assert largest_true_positive_rate(0.01, 10.0, 0.0) == pytest.approx(1 - 0.99 * math.e**-10)
    assert largest_true_positive_rate(0.01, 2000.0, 0.0) == 1.0
    assert largest_true_positive_rate(0.01, math.inf, 0.0) == 1.0
