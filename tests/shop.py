"""What tests of a site share: features of a small shop, and journeys that nobody may read."""

from __future__ import annotations

from conf.schema import FeatureConfig, JourneyConfig, NumericColumn
from journeys.examples import Examples
from journeys.features import feature_spec

CUT = JourneyConfig(
    FeatureConfig(
        channels=["a", "b", "c"], max_touchpoints=4, numeric={"pages": NumericColumn(high=9)}
    )
)
SPEC = feature_spec(CUT.features)


class Untouchable:
    """Journeys of a site whose name may be read and nothing else."""

    name = "shop"

    @property
    def train(self) -> Examples:
        raise AssertionError("the journeys were read")

    holdout = train
