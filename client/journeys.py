"""A site's journeys, cut from its store as a plan asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from client.policy import PlanRefused
from conf.schema import ColumnNames, JourneyConfig, NumericColumn, TableData
from journeys.decisions import decide
from journeys.encode import encode
from journeys.lines import POLARS_ERRORS
from journeys.site import SiteJourneys
from journeys.split import split
from journeys.store import Store, StoreError, read_manifest
from journeys.table import encode_rows, in_order, with_derived

CATEGORICAL = ("campaign", "device", "region")
"""Columns of a store of which a plan may name values."""
NUMERIC = ("visit_number",)
"""Columns of a store that a plan may use as numbers."""
KNOWN_AT_END = ("bounced", "duration_s", "page_views")
"""The same of those that tell how a visit went, so whether it may have ended in a conversion."""

LONGEST_DAYS = 400
"""Of look-back and horizon."""
MOST_TOUCHPOINTS = 200
MOST_CONTRIBUTIONS = 20
MOST_VALUES = 1_000
"""Of channels, and of each column's values."""


def check_cut(cut: JourneyConfig) -> None:
    """Refuse a cut that a store cannot give, or should not. Raises `PlanRefused`, with the field.

    What a plan may use is a closed list, and none of it is the label in other words: that would
    make a model that is good on paper only.
    """
    features = cut.features
    for name, days in (("lookback_days", cut.lookback_days), ("horizon_days", cut.horizon_days)):
        _hold(1 / 24 <= days <= LONGEST_DAYS, name, f"{days:g}", f"1/24 to {LONGEST_DAYS}")
    _at_most("contributions", cut.contributions, MOST_CONTRIBUTIONS)
    _at_most("features.max_touchpoints", features.max_touchpoints, MOST_TOUCHPOINTS)
    _at_most("features.channels", len(features.channels), MOST_VALUES)
    for name, values in features.categorical.items():
        allowed = f"a column of {', '.join(CATEGORICAL)}"
        _hold(name in CATEGORICAL, "features.categorical", name, allowed)
        _at_most(f"features.categorical.{name}", len(values), MOST_VALUES)
    for name, column in features.numeric.items():
        allowed = f"a column of {', '.join((*NUMERIC, *KNOWN_AT_END))}"
        _hold(name in (*NUMERIC, *KNOWN_AT_END), "features.numeric", name, allowed)
        key = f"features.numeric.{name}"
        if name in KNOWN_AT_END:
            _hold(column.known_at_end, f"{key}.known_at_end", "false", "true")
        _hold(_is_range(column), key, f"{column.low:g} to {column.high:g}", "a range of numbers")


class StoredJourneys:
    """Cuts a site's journeys from its store, and keeps the last cut while the store is the same.

    So a round does not read the store again, and who is forgotten is gone from the next one on.
    Whether it succeeds says nothing of the visitors: a store without any gives no examples, and it
    is for the noised count to say so.
    """

    def __init__(self, store: Path, site: str, holdout: float) -> None:
        """`holdout`: the share of the visitors of `site` who are kept from training."""
        self._store = store
        self._site = site
        self._holdout = holdout
        self._last: tuple[JourneyConfig, int, SiteJourneys] | None = None

    def __call__(self, cut: JourneyConfig) -> SiteJourneys:
        """The site's examples by `cut`.

        Raises:
            PlanRefused: `check_cut` refuses it.
            StoreError, JourneyDataError: The store is damaged, or there is none.
        """
        check_cut(cut)
        generation = read_manifest(self._store).generation
        if self._last is None or self._last[:2] != (cut, generation):
            # The old cut is let go first, so that memory holds one.
            self._last = None
            self._last = (cut, *self._read(cut))
        return self._last[2]

    def _read(self, cut: JourneyConfig) -> tuple[int, SiteJourneys]:
        config = TableData(
            path=str(self._store),
            columns=ColumnNames(campaign="campaign"),
            decision="touchpoint",
            holdout=self._holdout,
            features=cut.features,
            lookback_days=cut.lookback_days,
            horizon_days=cut.horizon_days,
            contributions=cut.contributions,
        )
        try:
            with Store(self._store, read_only=True) as store:
                generation = store.manifest.generation
                rows = encode_rows(store.visits(), config, self._store.name)
        except (*POLARS_ERRORS, OSError):
            # Polars' messages may quote cells.
            raise StoreError(f"{self._store}: cannot be read") from None
        touchpoints = in_order(with_derived(rows, config))
        decisions = decide(touchpoints, config)

        train, holdout = (
            encode(touchpoints, decisions.filter(half), config) for half in split(decisions, config)
        )
        return generation, SiteJourneys(self._site, train, holdout)


def _is_range(column: NumericColumn) -> bool:
    """Whether values can be scaled to it without loss."""
    low, high = (np.log1p(v) if column.log else v for v in (column.low, column.high))
    return bool(max(abs(low), abs(high)) <= 1e12 and high - low >= 1e-6)


def _at_most(field: str, asked: int, most: int) -> None:
    _hold(asked <= most, field, str(asked), f"at most {most}")


def _hold(holds: bool, field: str, asked: str, allowed: str) -> None:
    if not holds:
        raise PlanRefused(f"data.{field}={asked}: this site allows {allowed}")
