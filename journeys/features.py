"""The features of a touchpoint: which there are, in which order, how many values each has."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import FeatureConfig

PADDING = 0
"""Index of padding in every vocabulary."""
OTHER = 1
"""Index of a value outside the public list, or of none."""
FIRST = 2
"""Index of the first value of the public list."""


@dataclass(frozen=True)
class FeatureSpec:
    """Names and sizes of the encoded features, in the order of `Examples`' last axis."""

    categorical: tuple[tuple[str, int], ...]
    """(name, vocabulary size, padding and other included) of each categorical feature."""
    numeric: tuple[str, ...]
    """Name of each numeric feature."""
    max_touchpoints: int
    """T: length to which journeys are padded."""


def feature_spec(config: FeatureConfig) -> FeatureSpec:
    """The features that `config` asks for. Reads no data: the same at every site."""
    categorical = [("channel", FIRST + len(config.channels))]
    if config.campaign_buckets:
        categorical.append(("campaign", FIRST + config.campaign_buckets))
    if config.clock:
        categorical += [("hour", FIRST + 24), ("weekday", FIRST + 7)]
    categorical += [(name, FIRST + len(values)) for name, values in config.categorical.items()]
    numeric = list(config.numeric)
    if config.gaps:
        numeric += ["gap", "age"]
    return FeatureSpec(tuple(categorical), tuple(numeric), config.max_touchpoints)
