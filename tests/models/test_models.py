from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from conf.schema import (
    GROUPS,
    AttentionConfig,
    FeatureConfig,
    GruConfig,
    LogisticConfig,
    MlpConfig,
    ModelConfig,
    NumericColumn,
    SettingError,
)
from journeys.examples import Examples
from journeys.features import FeatureSpec, feature_spec
from models.attention import Block
from models.batch import JourneyBatch, to_batch
from models.embedding import TouchpointBag, newest
from models.registry import build
from models.score import logits
from models.weights import get_weights, set_weights

torch.set_num_threads(1)

CONFIGS: list[ModelConfig] = [
    LogisticConfig(),
    MlpConfig(embedding=6, hidden=5),
    GruConfig(embedding=5, hidden=6),
    AttentionConfig(embedding=6, heads=2, layers=2),
]
SPEC = FeatureSpec((("channel", 6), ("hour", 4), ("device", 3)), ("gap", "age"), 7)
WITHOUT_NUMERIC = FeatureSpec((("channel", 4),), (), 3)

each_model = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.name))


def new(config: ModelConfig, spec: FeatureSpec = SPEC, seed: int = 0) -> nn.Module:
    """A model whose weights are all far from their start, so that nothing is zero by accident."""
    torch.manual_seed(seed)
    model = build(config, spec)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def some_journeys(
    length: list[int], spec: FeatureSpec = SPEC, seed: int = 0, steps: int | None = None
) -> JourneyBatch:
    generator = torch.Generator().manual_seed(seed)
    steps = steps or max(length, default=1)
    lengths = torch.tensor(length, dtype=torch.int64)
    present = torch.arange(steps) < lengths.unsqueeze(1)
    shape = (len(length), steps)
    columns = [torch.randint(1, size, shape, generator=generator) for _, size in spec.categorical]
    numeric = torch.rand((*shape, len(spec.numeric)), generator=generator)
    return JourneyBatch(
        categorical=torch.stack(columns, dim=2) * present.unsqueeze(2),
        numeric=numeric * present.unsqueeze(2),
        length=lengths,
        label=(torch.rand(len(length), generator=generator) < 0.5).float(),
    )


def padded(batch: JourneyBatch, more: int) -> JourneyBatch:
    size = len(batch)
    return replace(
        batch,
        categorical=torch.cat(
            [batch.categorical, torch.zeros(size, more, batch.categorical.shape[2]).long()], dim=1
        ),
        numeric=torch.cat([batch.numeric, torch.zeros(size, more, batch.numeric.shape[2])], dim=1),
    )


def row(batch: JourneyBatch, index: int) -> JourneyBatch:
    """One journey alone, cut to its own length."""
    end = int(batch.length[index])
    return JourneyBatch(
        categorical=batch.categorical[index : index + 1, :end],
        numeric=batch.numeric[index : index + 1, :end],
        length=batch.length[index : index + 1],
        label=batch.label[index : index + 1],
    )


def doubled(batch: JourneyBatch) -> JourneyBatch:
    return replace(batch, numeric=batch.numeric.double(), label=batch.label.double())


def loss(model: nn.Module, batch: JourneyBatch) -> Tensor:
    return binary_cross_entropy_with_logits(model(batch), batch.label, reduction="sum")


def test_registry_covers_every_config_and_the_tests_every_model() -> None:
    subclasses = set(ModelConfig.__subclasses__())
    assert set(GROUPS["model"].values()) == subclasses
    assert {type(config) for config in CONFIGS} == subclasses
    for name, node in GROUPS["model"].items():
        assert node().name == name
        assert isinstance(build(node(), SPEC), nn.Module)


def test_unknown_model_is_refused() -> None:
    with pytest.raises(SettingError, match=r"model\.name=lstm"):
        build(ModelConfig(name="lstm"), SPEC)


@each_model
@pytest.mark.parametrize("spec", [SPEC, WITHOUT_NUMERIC], ids=["numeric", "no numeric"])
def test_one_logit_a_journey_of_any_length(config: ModelConfig, spec: FeatureSpec) -> None:
    model = new(config, spec)
    lengths = list(range(1, spec.max_touchpoints + 1))
    for length in ([], [1], [spec.max_touchpoints], lengths):
        result = model(some_journeys(length, spec))
        assert result.shape == (len(length),)
        assert result.dtype == torch.float32
        assert torch.isfinite(result).all()


@each_model
def test_an_empty_batch_has_a_gradient_of_zero(config: ModelConfig) -> None:
    model = new(config)
    torch.autograd.backward(loss(model, some_journeys([])))
    for p in model.parameters():
        assert p.grad is not None
        assert not p.grad.any()


@each_model
def test_a_journey_scores_alone_as_in_a_batch(config: ModelConfig) -> None:
    model = new(config)
    batch = some_journeys([1, 7, 3, 5, 2, 4, 6])
    together = model(batch)
    alone = torch.cat([model(row(batch, index)) for index in range(len(batch))])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert together.std() > 0.01


@each_model
@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5), more=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_padding_never_changes_a_logit(config: ModelConfig, lengths: list[int], more: int) -> None:
    model = new(config).double()
    batch = doubled(some_journeys(lengths))
    torch.testing.assert_close(model(batch), model(padded(batch, more)), rtol=1e-12, atol=1e-12)


@each_model
def test_what_stands_on_padding_never_matters(config: ModelConfig) -> None:
    model = new(config).double()
    batch = doubled(some_journeys([1, 3, 7, 2, 4]))
    padding = (batch.mask() == 0).unsqueeze(2)
    generator = torch.Generator().manual_seed(9)
    rubbish = replace(
        batch,
        categorical=torch.where(
            padding,
            torch.randint(0, 3, batch.categorical.shape, generator=generator),
            batch.categorical,
        ),
        numeric=torch.where(
            padding,
            torch.randn(batch.numeric.shape, generator=generator).double() * 1e3,
            batch.numeric,
        ),
    )
    assert not torch.equal(rubbish.categorical, batch.categorical)
    for one, other in zip(gradients(model, batch), gradients(model, rubbish), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(batch), model(rubbish), rtol=1e-9, atol=1e-9)


def gradients(model: nn.Module, batch: JourneyBatch) -> list[Tensor]:
    return list(torch.autograd.grad(loss(model, batch), list(model.parameters())))


@each_model
def test_every_touchpoint_of_a_journey_counts(config: ModelConfig) -> None:
    model = new(config).double()
    batch = doubled(some_journeys([5]))
    before = model(batch)
    for step in range(5):
        numeric = batch.numeric.clone()
        numeric[0, step] += 0.5
        assert (model(replace(batch, numeric=numeric)) - before).abs() > 1e-6


@pytest.mark.parametrize("config", CONFIGS[2:], ids=lambda config: str(config.name))
def test_order_counts_where_the_model_reads_in_order(config: ModelConfig) -> None:
    model = new(config)
    batch = some_journeys([4])
    turned = replace(batch, categorical=batch.categorical[:, [1, 0, 2, 3]])
    assert (model(batch) - model(turned)).abs() > 1e-4


def test_attention_sees_no_later_touchpoint() -> None:
    model = new(CONFIGS[3]).double()
    blocks = [module for module in model.modules() if type(module).__name__ == "Block"]
    assert len(blocks) == 2
    sequence = torch.randn(2, 6, 6, dtype=torch.float64, requires_grad=True)
    for block in blocks:
        for step in range(6):
            (seen,) = torch.autograd.grad(block(sequence)[:, step].sum(), sequence)
            assert not seen[:, step + 1 :].any()
            assert (seen[:, : step + 1].abs().sum(dim=2) > 0).all()


def test_the_newest_touchpoint_alone_is_what_it_is_among_all() -> None:
    model = new(CONFIGS[3]).double()
    batch = doubled(some_journeys([1, 6, 3, 6]))
    sequence = torch.randn(4, 6, 6, dtype=torch.float64)
    for block in model.modules():
        if isinstance(block, Block):
            expected = newest(block(sequence), batch)
            torch.testing.assert_close(block.newest(sequence, batch), expected)


@each_model
def test_untrained_model_predicts_the_base_rate(config: ModelConfig) -> None:
    torch.manual_seed(3)
    model = build(replace(config, base_rate=0.02), SPEC).eval()
    batch = some_journeys([1, 2, 3, 4, 5, 6, 7] * 20)
    with torch.no_grad():
        probability = torch.sigmoid(model(batch))
    assert 0.018 < float(probability.mean()) < 0.022
    assert float(probability.min()) > 0.01
    assert float(probability.max()) < 0.04


def expected_parameters(config: ModelConfig, spec: FeatureSpec) -> int:
    words = sum(size for _, size in spec.categorical)
    bag = 2 * words + 2 * len(spec.numeric) + 1
    match config:
        case LogisticConfig():
            return bag + 1
        case MlpConfig(embedding=e, hidden=h):
            return (bag + 1) * e + (e + 1) * h + h + 1
        case GruConfig(embedding=e, hidden=h):
            return words * e + (len(spec.numeric) + 1) * e + 3 * h * (e + 1 + h + 1) + h + 1
        case AttentionConfig(embedding=e, layers=n):
            block = 2 * 2 * e + 3 * e * (e + 1) + e * (e + 1) + 2 * e * (e + 1) + e * (2 * e + 1)
            touchpoint = words * e + (len(spec.numeric) + 1) * e + spec.max_touchpoints * e
            return touchpoint + n * block + 2 * e + e + 1
    raise AssertionError(config)


@each_model
def test_number_of_parameters_follows_from_the_config(config: ModelConfig) -> None:
    for sized in (config, type(config)()):
        count = sum(p.numel() for p in build(sized, SPEC).parameters())
        assert count == expected_parameters(sized, SPEC)


@each_model
def test_nothing_mixes_visitors_and_nothing_is_hidden_from_the_weights(config: ModelConfig) -> None:
    model = new(config)
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not [m for m in model.modules() if isinstance(m, nn.EmbeddingBag)]
    assert not [m for m in model.modules() if getattr(m, "padding_idx", None) is not None]
    assert not list(model.buffers())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@each_model
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
    numeric=st.integers(0, 2),
    categorical=st.integers(1, 3),
)
@settings(max_examples=15, deadline=None)
def test_per_visitor_gradients_equal_a_loop_over_visitors(
    config: ModelConfig, lengths: list[int], seed: int, numeric: int, categorical: int
) -> None:
    spec = FeatureSpec(SPEC.categorical[:categorical], SPEC.numeric[:numeric], 6)
    model = new(config, spec, seed).double()
    batch = doubled(some_journeys(lengths, spec, seed))
    loop = [gradients(model, row(batch, index)) for index in range(len(batch))]

    wrapped = GradSampleModule(model.train(), loss_reduction="sum")
    with warnings.catch_warnings():
        # Said by torch of layers whose input needs no gradient; their own is right.
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        torch.autograd.backward(loss(wrapped, batch))
    for index, p in enumerate(model.parameters()):
        expected = torch.stack([one[index] for one in loop])
        got = vars(p)["grad_sample"]
        scale = float(expected.abs().max()) or 1.0
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) <= 1e-9 * scale


def test_bag_is_what_it_says() -> None:
    spec = FeatureSpec((("channel", 4), ("device", 3)), ("gap",), 3)
    batch = JourneyBatch(
        categorical=torch.tensor([[[2, 1], [2, 2], [3, 1]], [[1, 2], [0, 0], [0, 0]]]),
        numeric=torch.tensor([[[0.0], [0.3], [0.9]], [[0.5], [0.0], [0.0]]]),
        length=torch.tensor([3, 1]),
        label=torch.zeros(2),
    )
    bag = TouchpointBag(spec)
    expected = [
        [0, 0, 2 / 3, 1 / 3, 0, 2 / 3, 1 / 3, 0, 0, 0, 1, 0, 1, 0, 0.4, 0.9, math.log(3) / 3],
        [0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0.5, 0.5, 0],
    ]
    assert bag.width == len(expected[0])
    torch.testing.assert_close(bag(batch), torch.tensor(expected))


def test_features_of_a_config_fit_the_models() -> None:
    features = FeatureConfig(
        channels=["a", "b"],
        max_touchpoints=4,
        campaign_buckets=3,
        categorical={"device": ["x"]},
        numeric={"pages": NumericColumn(0, 9)},
    )
    spec = feature_spec(features)
    for config in CONFIGS:
        assert build(config, spec)(some_journeys([4, 1], spec)).shape == (2,)


def some_examples(lengths: list[int], seed: int = 0) -> Examples:
    batch = some_journeys(lengths, seed=seed, steps=SPEC.max_touchpoints)
    return Examples(
        categorical=batch.categorical.numpy().astype(np.uint16),
        numeric=batch.numeric.numpy(),
        length=batch.length.numpy().astype(np.int32),
        label=batch.label.numpy(),
    )


@pytest.mark.parametrize("rows", [slice(0, 0), slice(0, 3), np.array([2, 0]), np.array([], int)])
def test_to_batch_cuts_to_the_longest_and_copies(rows: slice | npt.NDArray[np.int64]) -> None:
    examples = some_examples([2, 3, 1, 7])
    before = examples.numeric.copy()
    batch = to_batch(examples, rows)
    longest = max(examples.length[rows], default=1)
    assert batch.categorical.shape == (len(examples.length[rows]), longest, 3)
    assert (batch.categorical.dtype, batch.numeric.dtype) == (torch.int64, torch.float32)
    batch.numeric.fill_(5.0)
    batch.label.fill_(5.0)
    assert np.array_equal(examples.numeric, before)
    assert examples.label.max() <= 1


@each_model
def test_scores_of_examples(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new(config).train()
    examples = some_examples([1, 2, 3, 4, 5, 6, 7])
    whole = logits(model, examples)
    assert whole.shape == (7,)
    assert model.training
    assert logits(model, some_examples([])).shape == (0,)
    monkeypatch.setattr("models.score.BATCH", 3)
    np.testing.assert_allclose(logits(model, examples), whole, rtol=1e-5, atol=1e-5)


@each_model
def test_weights_go_out_and_in_unchanged_and_apart(config: ModelConfig) -> None:
    one, other = new(config, seed=1), new(config, seed=2)
    batch = some_journeys([1, 4, 7])
    weights = get_weights(one)
    assert all(value.dtype == np.float32 for value in weights.values())
    set_weights(other, weights)
    assert torch.equal(one(batch), other(batch))
    for value in weights.values():
        value += 1.0
    assert torch.equal(one(batch), other(batch))


@each_model
def test_weights_of_another_shape_or_name_are_refused(config: ModelConfig) -> None:
    model = new(config)
    weights = get_weights(model)
    name = next(iter(weights))
    for wrong in (
        {**weights, name: weights[name][:-1]},
        {**weights, "fresh": weights[name]},
        {key: value for key, value in weights.items() if key != name},
    ):
        with pytest.raises(RuntimeError, match=f"{name}|fresh"):
            set_weights(model, wrong)
