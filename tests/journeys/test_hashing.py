import numpy as np
import polars as pl

from journeys.hashing import draw, draw_fraction, hash_text


def test_hashes_never_change() -> None:
    # Fixed figures: a change would move visitors between training and holdout.
    hashed = pl.DataFrame({"id": ["a", "b", None]}).select(hash_text(pl.col("id"))).to_series()
    assert hashed.to_list() == [3592636987452369503, 10827726489838018469, None]
    assert draw(np.array([1, 2], dtype=np.uint64), "holdout").tolist() == [
        7722537177782689933,
        12594780677990689973,
    ]


def test_draws_are_uniform_and_differ_by_purpose_and_seed() -> None:
    # Neighbouring keys, the hardest input for a mixer.
    keys = np.arange(100_000, dtype=np.uint64)
    fractions = [draw_fraction(keys, *key) for key in (("a",), ("b",), ("a", 1))]
    for drawn in fractions:
        counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
        chi_square = ((counts - 1000) ** 2 / 1000).sum()
        assert 40 < chi_square < 200  # 99 degrees of freedom; both ends beyond 1e-6
    for one, other in ((0, 1), (0, 2), (1, 2)):
        correlation = np.corrcoef(fractions[one], fractions[other])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(len(keys))
