"""What Matomo's database and its API have in common: its words for a visit."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from client.sources.source import VISITS, Skipped
from journeys.table import EARLIEST, LATEST

REFERRERS = {
    1: "direct",
    2: "search",
    3: "website",
    6: "campaign",
    7: "social",
    8: "ai assistant",
}
"""Matomo's `referer_type`. Versions before 5.5 know no AI assistants."""

DEVICES = (
    "desktop",
    "smartphone",
    "tablet",
    "feature phone",
    "console",
    "tv",
    "car browser",
    "smart display",
    "camera",
    "portable media player",
    "phablet",
    "smart speaker",
    "wearable",
    "peripheral",
)
"""Matomo's kinds of device, by their number."""

DEVICE = dict.fromkeys(DEVICES, "other") | {
    "desktop": "desktop",
    "smartphone": "mobile",
    "feature phone": "mobile",
    "phablet": "mobile",
    "tablet": "tablet",
}
"""What we call them."""

RECORDS = pl.Schema(
    {
        "visit_id": pl.String(),
        "visitor_id": pl.String(),
        "time": pl.Int64(),
        "duration_s": pl.Int64(),
        "page_views": pl.Int64(),
        "visit_number": pl.Int64(),
        "referrer_type": pl.String(),
        "referrer_name": pl.String(),
        "referrer_keyword": pl.String(),
        "campaign_name": pl.String(),
        "campaign_source": pl.String(),
        "campaign_medium": pl.String(),
        "campaign_keyword": pl.String(),
        "device": pl.String(),
        "country": pl.String(),
        "consent": pl.String(),
        "purposes": pl.String(),
        "converted": pl.Boolean(),
        "revenue": pl.Float64(),
    }
)
"""One row a visit of Matomo's, its values not looked at yet; empty text is as good as null.

- `visitor_id`: 16 lower-case hexadecimal digits; `time`: UTC seconds of the first action.
- `referrer_type`: one of `REFERRERS`' names; `device`: desktop, mobile, tablet, other.
- `referrer_name`: search engine, site, network or campaign, as `referrer_type` says.
"""


def to_visits(
    records: pl.DataFrame, names: Mapping[str, str]
) -> tuple[pl.DataFrame, tuple[Skipped, ...]]:
    """The visits of `records`, without those that cannot be right.

    Args:
        records: shaped as `RECORDS`.
        names: what Matomo calls `visitor_id`, `time`, `duration_s`, `page_views`,
            `visit_number`, as a message may name it: `column "idvisitor"`.

    Returns:
        Visits shaped as `VISITS`, in the order of `records`, and what was left out.
    """
    time = pl.col("time")
    problems = [
        ("visitor_id", "is empty", pl.col("visitor_id").fill_null("") == ""),
        ("visitor_id", "is not 8 bytes", ~pl.col("visitor_id").str.contains("^[0-9a-f]{16}$")),
        ("time", "is empty or no time", time.is_null()),
        ("time", "is before 1990 or after 2100", ~time.is_between(EARLIEST, LATEST)),
        *((name, "is below 0", pl.col(name) < 0) for name in _COUNTS),
    ]
    problem = pl.coalesce(
        pl.when(there).then(pl.lit(f"{names[name]}: {what}")) for name, what, there in problems
    )
    records = records.with_columns(problem=problem)
    visits = records.filter(pl.col("problem").is_null()).select(_VISIT)
    skipped = (
        records.filter(pl.col("problem").is_not_null())
        .group_by("problem", maintain_order=True)
        .agg(pl.len(), pl.col("visit_id").first())
    )
    return visits, tuple(
        Skipped(problem, count, f"visit {first}") for problem, count, first in skipped.iter_rows()
    )


_COUNTS = ("duration_s", "page_views", "visit_number")


def _text(name: str) -> pl.Expr:
    return pl.when(pl.col(name) != "").then(pl.col(name))


def _visit() -> list[pl.Expr]:
    campaign = pl.col("referrer_type").fill_null("") == "campaign"
    country = pl.col("country").str.to_lowercase()
    made = {
        "referrer_type": _text("referrer_type"),
        # Of a campaign, Matomo's name of the referrer is the campaign's.
        "source": pl.coalesce(
            _text("campaign_source"), pl.when(~campaign).then(_text("referrer_name"))
        ),
        "medium": _text("campaign_medium"),
        "campaign": pl.coalesce(
            _text("campaign_name"), pl.when(campaign).then(_text("referrer_name"))
        ),
        # What somebody searched for is nobody's business; a campaign's keyword was bought.
        "keyword": pl.when(campaign).then(
            pl.coalesce(_text("campaign_keyword"), _text("referrer_keyword"))
        ),
        "country": pl.when(country.str.contains("^[a-z]{2}$") & (country != "xx")).then(country),
        "consent": _text("consent"),
        "purposes": _text("purposes"),
    }
    return [
        made.get(name, pl.col(name) if name in RECORDS else pl.lit(None)).cast(kind).alias(name)
        for name, kind in VISITS.items()
    ]


_VISIT = _visit()
