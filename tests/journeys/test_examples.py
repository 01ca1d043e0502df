from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from journeys.examples import Examples, concatenate


def examples(visitor: list[int] | None, n: int = 5) -> Examples:
    """n journeys whose label is their row."""
    return Examples(
        categorical=np.ones((n, 2, 1), dtype=np.uint16),
        numeric=np.zeros((n, 2, 1), dtype=np.float32),
        length=np.ones(n, dtype=np.int32),
        label=np.arange(n, dtype=np.float32),
        visitor=None if visitor is None else np.array(visitor, dtype=np.int64),
    )


def test_visitors_are_counted_once() -> None:
    assert examples(None).visitors == 5
    assert examples([7, -1, 7, 7, 3]).visitors == 3
    assert examples([7, -1, 7, 7, 3]).take(np.array([0, 2, 3])).visitors == 1
    assert examples(None, n=0).visitors == examples([], n=0).visitors == 0


def test_rows_by_visitor() -> None:
    rows, count = examples([7, -1, 7, 7, 3]).by_visitor()
    assert (rows.tolist(), count.tolist()) == ([1, 4, 0, 2, 3], [1, 1, 3])
    rows, count = examples(None).by_visitor()
    assert (rows.tolist(), count.tolist()) == ([0, 1, 2, 3, 4], [1] * 5)


@pytest.mark.parametrize("visitor", [None, [7, -1, 7, 7, 3]])
def test_what_is_opened_is_what_was_saved(tmp_path: Path, visitor: list[int] | None) -> None:
    saved = examples(visitor)
    # Over others: nothing of them may stay.
    examples([1, 1, 1, 1, 1]).save(tmp_path)
    saved.save(tmp_path)
    opened = Examples.open(tmp_path)
    assert opened.visitors == saved.visitors
    assert (opened.visitor is None) == (visitor is None)
    for name in ("categorical", "numeric", "length", "label"):
        np.testing.assert_array_equal(getattr(opened, name), getattr(saved, name))
    if opened.visitor is not None:
        np.testing.assert_array_equal(opened.visitor, np.array(visitor))


@pytest.mark.parametrize(
    "rows",
    [
        np.array([4, 0, 0, 2]),
        np.array([], dtype=np.int64),
        np.array([True, False, False, True, True]),
        slice(1, 4),
        slice(3, 99),
        slice(None),
    ],
)
def test_of_large_files_the_same_is_read_without_their_map(
    rows: np.ndarray | slice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    whole = Examples(
        categorical=rng.integers(0, 999, (5, 2, 3)).astype(np.uint16),
        numeric=rng.random((5, 2, 2), dtype=np.float32),
        length=np.arange(5, dtype=np.int32),
        label=rng.random(5, dtype=np.float32),
        visitor=np.array([7, -1, 7, 7, 3]),
    )
    whole.save(tmp_path)
    opened = Examples.open(tmp_path)
    monkeypatch.setattr("journeys.examples.LARGE_BYTES", 0)
    taken, expected = opened.take(rows), whole.take(rows)
    for name in ("categorical", "numeric", "length", "label", "visitor"):
        np.testing.assert_array_equal(getattr(taken, name), getattr(expected, name))
        assert getattr(taken, name).dtype == getattr(expected, name).dtype
    with (tmp_path / "numeric.npy").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(OSError, match=r"numeric\.npy: shorter than it was"):
        opened.take(np.array([4]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_unloaded_takes_no_memory_and_can_be_read_again(tmp_path: Path) -> None:
    n = 20_000
    saved = Examples(
        np.ones((n, 20, 4), np.uint16),
        np.ones((n, 20, 2), np.float32),
        np.full(n, 20, np.int32),
        np.ones(n, np.float32),
    )
    saved.save(tmp_path)
    examples = Examples.open(tmp_path)

    def mapped_kb() -> int:
        """Of this file, in this process's memory."""
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        return sum(
            int(next(line for line in lines if line.startswith("Rss:")).split()[1])
            for head in lines
            if head.endswith(str(tmp_path / "numeric.npy"))
        )

    for _ in range(2):
        assert float(examples.numeric.sum()) == n * 20 * 2
        assert mapped_kb() > 3000
        examples.unload()
        assert mapped_kb() == 0
    saved.unload()


def test_visitors_of_different_parts_are_different() -> None:
    parts = [examples([7, -1, 7, 7, 3]), examples(None), examples([3, 3, 3, 3, 3])]
    together = concatenate(parts)
    assert len(together) == 15
    assert together.visitors == 3 + 5 + 1
    _, count = together.by_visitor()
    assert sorted(count.tolist()) == [1, 1, 1, 1, 1, 1, 1, 3, 5]
    assert concatenate([examples(None)] * 2).visitor is None
    assert replace(together, visitor=None).visitors == 15
