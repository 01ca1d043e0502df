from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from journeys.examples import Examples
from journeys.features import FeatureSpec
from models.bags import KeptBags, PackedBags, PlainBags
from models.batch import JourneyBatch, to_batch
from models.embedding import TouchpointBag

torch.set_num_threads(1)

SPEC = FeatureSpec((("channel", 6), ("hour", 4), ("device", 3)), ("gap", "age"), 7)
specs = st.builds(
    FeatureSpec,
    st.lists(st.integers(2, 5), min_size=1, max_size=3).map(
        lambda sizes: tuple((f"c{i}", size) for i, size in enumerate(sizes))
    ),
    st.sampled_from([(), ("gap",), ("gap", "age", "price")]),
    st.sampled_from([1, 3, 255, 256, 300]),
)


def some_examples(n: int, spec: FeatureSpec = SPEC, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    steps = spec.max_touchpoints
    length = rng.integers(1, steps + 1, n).astype(np.int32)
    # One of them with the same value all along: the largest count there is.
    length[:1] = steps
    mask = np.arange(steps) < length[:, None]
    values = np.stack([rng.integers(1, size, (n, steps)) for _, size in spec.categorical], axis=2)
    values[:1] = 1
    numeric = rng.random((n, steps, len(spec.numeric)), dtype=np.float32)
    return Examples(
        categorical=(values * mask[..., None]).astype(np.uint16),
        numeric=(numeric * mask[..., None]).astype(np.float32),
        length=length,
        label=(rng.random(n) < 0.5).astype(np.float32),
    )


def assert_same(batch: JourneyBatch, bag: torch.Tensor, label: torch.Tensor) -> None:
    assert batch.bag is not None
    assert torch.equal(batch.bag, bag)
    assert torch.equal(batch.label, label)


@settings(max_examples=40, deadline=None)
@given(spec=specs, n=st.integers(0, 9), seed=st.integers(0, 2**16))
def test_kept_bags_are_those_of_the_model_to_the_last_bit(
    spec: FeatureSpec, n: int, seed: int
) -> None:
    examples, bag = some_examples(n, spec, seed), TouchpointBag(spec)
    batch = to_batch(examples, slice(None))
    rows = np.random.default_rng(seed).integers(0, max(n, 1), 2 * n)
    for kind in (PlainBags, PackedBags):
        kept = kind(bag, examples)
        assert_same(kept.take(np.arange(n)), bag(batch), batch.label)
        assert_same(kept.take(rows), bag(batch)[rows], batch.label[rows])
    assert bag.pack(batch).shape == (n, bag.packed)


def test_many_examples_are_kept_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.bags._AT_ONCE", 4)
    examples, bag = some_examples(11), TouchpointBag(SPEC)
    batch = to_batch(examples, slice(None))
    for kind in (PlainBags, PackedBags):
        assert_same(kind(bag, examples).take(np.arange(11)), bag(batch), batch.label)


def test_packed_bags_are_a_third_of_the_size() -> None:
    bag = TouchpointBag(FeatureSpec((("channel", 54),), ("gap", "age", "price"), 20))
    assert bag.packed == 2 * 54 + 4 * (2 + 7)
    assert bag.packed < 4 * (bag.width + 1) / 3


def test_who_comes_first_is_kept_plain_then_packed_then_not_at_all() -> None:
    bag = TouchpointBag(SPEC)
    kept = KeptBags(bag)
    kept._free = {PlainBags: 10 * kept._each[PlainBags], PackedBags: 20 * kept._each[PackedBags]}
    first, second, third, fourth = (some_examples(n) for n in (6, 6, 15, 4))

    assert isinstance(kept.of(first), PlainBags)
    assert isinstance(kept.of(second), PackedBags)
    assert kept.of(third) is None
    assert isinstance(kept.of(fourth), PlainBags)
    assert kept.of(first) is kept.of(first)
    assert kept.of(second) is kept.of(second)


def test_what_is_gone_makes_room() -> None:
    kept = KeptBags(TouchpointBag(SPEC))
    kept._free = {kind: 10 * each for kind, each in kept._each.items()}
    before = dict(kept._free)
    plain, packed = some_examples(10), some_examples(10)
    assert isinstance(kept.of(plain), PlainBags)
    assert isinstance(kept.of(packed), PackedBags)
    assert set(kept._free.values()) == {0}
    assert kept.of(some_examples(1)) is None
    del plain, packed
    assert kept._free == before
    assert not kept._kept
