"""What every source gives: batches of visits in one shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import polars as pl

Cursor = dict[str, Any]
"""Where to go on: JSON, understood by the source that made it alone."""

VISITS = pl.Schema(
    {
        "visitor_id": pl.String(),
        "visit_id": pl.String(),
        "time": pl.Int64(),
        "channel": pl.String(),
        "referrer_type": pl.String(),
        "source": pl.String(),
        "medium": pl.String(),
        "campaign": pl.String(),
        "keyword": pl.String(),
        "click_id": pl.String(),
        "device": pl.String(),
        "country": pl.String(),
        "duration_s": pl.Float64(),
        "page_views": pl.Int64(),
        "visit_number": pl.Int64(),
        "converted": pl.Boolean(),
        "revenue": pl.Float64(),
        "consent": pl.String(),
        "purposes": pl.String(),
        "do_not_track": pl.Boolean(),
        "opted_out": pl.Boolean(),
    }
)
"""One row a visit, as the source says it, in any order. Null: the source does not say.

- `visitor_id`, `time` (UTC seconds of its start), `converted`, `revenue` are never null.
- `visit_id` names a visit within the site; the same visit read twice has the same.
- `channel` only where the source knows one; else it is told from the six columns that follow:
  `referrer_type` (`conf.site.REFERRER_TYPES`), `source`, `medium`, `campaign`, `keyword` and
  `click_id` (its name, never its value).
- `device`: desktop, mobile, tablet or other; `country`: ISO 3166 alpha-2, lower case.
- `consent`, `purposes`: the source's own words. `do_not_track`, `opted_out`: true is a no.
"""


LONGEST_NAME = 200
"""Characters of a channel, source, medium, campaign or keyword that matter."""


class SourceError(RuntimeError):
    """A source that cannot be used. Says which, what is wrong and what to do; never a password, a
    token or a cell.
    """


@dataclass(frozen=True)
class Skipped:
    """Rows that were left out because they cannot be read."""

    reason: str
    """Such as `column "time": not ISO-8601`. Holds nothing of the row."""
    count: int
    first: str
    """Where the first of them is: file and row, or the visit's number."""


def added_up(skipped: Iterable[Skipped]) -> tuple[Skipped, ...]:
    """One for each reason, with the counts added and the first place kept."""
    found: dict[str, Skipped] = {}
    for one in skipped:
        known = found.setdefault(one.reason, Skipped(one.reason, 0, one.first))
        found[one.reason] = replace(known, count=known.count + one.count)
    return tuple(found.values())


@dataclass(frozen=True)
class Batch:
    """Some visits, and where to go on after them."""

    visits: pl.DataFrame
    """Shaped as `VISITS`."""
    rows: int
    """Rows read for it, the skipped ones included."""
    skipped: tuple[Skipped, ...]
    cursor: Cursor
    """Given to `Source.batches`, the next batch comes first. With the batch, it is stored in one
    step, so that a killed ingest goes on here."""


class Source(Protocol):
    """Somewhere to get visits from."""

    def check(self) -> None:
        """Find out whether it can be read: reachable, allowed, all tables and columns there.

        Raises:
            SourceError: It cannot.
        """

    def batches(self, cursor: Cursor | None, now: int) -> Iterator[Batch]:
        """The visits that were not read before, in batches of about `SourceConfig.batch`.

        Args:
            cursor: of the last batch that was stored; None reads from the beginning.
            now: UTC seconds. Visits that may still go on now are left for a later call.

        Raises:
            SourceError: The source cannot be read any further. Batches that were given stay good.
        """
