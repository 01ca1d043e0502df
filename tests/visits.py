"""What tests of a site's visits share: frames as sources give them, and whole small sites."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl

from client.folder import SiteFolder, create
from client.sources.source import VISITS
from journeys.store import VISITS as STORED
from journeys.store import Store

NOW = 1_790_000_000
"""2026-09-21 13:33:20 UTC."""
DAY = 86400
HOUR = 3600

SITE = """\
name: acme
source:
  name: files
  path: export/*.csv
  columns:
    visit_id: visit
    source: source
    medium: medium
    campaign: campaign
    device: device
    country: country
    duration_s: duration
    page_views: pages
    revenue: revenue
    consent: consent
consent:
  accepted: ["yes"]
preparation:
  campaign_visitors: 3
"""

POLICY = (Path(__file__).parents[1] / "client" / "templates" / "policy.yaml").read_text()


def visits(*rows: dict[str, Any]) -> pl.DataFrame:
    """A frame as a source gives it; what a row leaves out is ordinary."""
    ordinary = {
        "visitor_id": "ada",
        "time": NOW - DAY,
        "converted": False,
        "revenue": 0.0,
        "consent": "yes",
    }
    return pl.DataFrame([ordinary | row for row in rows], schema=VISITS)


def stored(visitor: str, time: datetime, **changes: Any) -> dict[str, Any]:
    """A visit as a store holds it; what is not said is ordinary."""
    ordinary = {
        "site": "acme",
        "visitor_id": visitor,
        "time": time,
        "channel": "email",
        "device": "mobile",
        "duration_s": 5.0,
        "page_views": 2,
        "visit_number": 1,
        "converted": False,
        "revenue": 0.0,
    }
    return ordinary | changes


def store_of(folder: Path, *appended: Sequence[dict[str, Any]]) -> Path:
    """A store to which one list of visits after the other was appended; returns its folder."""
    with Store(folder) as opened:
        for rows in appended:
            opened.append(pl.DataFrame(rows, schema=STORED), None, {})
    return folder


def csv_row(number: int, **changes: Any) -> dict[str, Any]:
    """Visit `number` of an export that `SITE` reads."""
    return {
        "visitor_id": f"visitor {number % 7}",
        "time": f"2026-09-{1 + number % 20:02}T{number % 24:02}:15:00Z",
        "visit": number,
        "source": "google",
        "medium": ("cpc", "organic")[number % 2],
        "campaign": "spring",
        "device": "mobile",
        "country": "de",
        "duration": 60,
        "pages": 1 + number % 3,
        "converted": number % 5 == 0,
        "revenue": 10 * (number % 5 == 0),
        "consent": "yes",
    } | changes


def site_with(path: Path, rows: list[dict[str, Any]], site: str = SITE) -> SiteFolder:
    """A new site whose export holds `rows`."""
    folder = create(path, NOW)
    (path / "site.yaml").write_text(site)
    export(path, "1.csv", rows)
    return folder


def export(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """One more file of the site's export."""
    (path / "export").mkdir(exist_ok=True)
    pl.DataFrame(rows).write_csv(path / "export" / name)
