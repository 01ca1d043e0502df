from __future__ import annotations

import math

import numpy as np
import pytest

from privacy.accountant import PrivacyEvent
from privacy.mechanisms import GaussianCount


def test_noise_is_what_the_event_says() -> None:
    count = GaussianCount(20.0)
    rng = np.random.default_rng(0)
    released = np.array([count.release(5000, rng) for _ in range(20_000)])
    # Rounding to whole visitors adds 1/12 to the variance; bounds are four standard errors.
    assert released.std() == pytest.approx(math.sqrt(400 + 1 / 12), rel=0.02)
    assert released.mean() == pytest.approx(5000, abs=0.6)
    assert (released == released.round()).all()
    assert count.event == PrivacyEvent(20.0)


def test_at_least_one_visitor() -> None:
    rng = np.random.default_rng(0)
    released = [GaussianCount(20.0).release(0, rng) for _ in range(100)]
    assert min(released) == 1
    assert max(released) > 1


@pytest.mark.parametrize("noise", [-1.0, math.nan, math.inf])
def test_impossible_noise_is_refused(noise: float) -> None:
    with pytest.raises(ValueError, match=r"privacy\.count_noise"):
        GaussianCount(noise)
