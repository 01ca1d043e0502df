"""What happens to visits before anything is stored: from a source's batch to the store's rows.

In this order, so that nothing is done with a visit that must not be used: consent, purpose,
minimisation, pseudonyms, retention, generalisation. Retention comes before generalisation, because
a visit that is not kept must not count among the visitors of its campaign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from client.channels import channel
from client.pseudonyms import Keys
from client.regions import region
from client.sources.source import LONGEST_NAME
from conf.site import ConsentConfig, SiteConfig
from journeys.store import VISITS, Store

DAY = 86400
HOUR = 3600

RARE = "(rare)"
"""The bucket of campaigns that few visitors followed."""
MOST_VISITS = 50
"""A visit number above this counts as this: a regular would stand out."""

STEPS = ("consent", "do not track", "opted out", "purpose", "erased", "retention", "stored already")
"""Why a visit may be left out, in the order in which it is asked."""

ERASED = pl.Schema({"visitor": pl.UInt64()})
"""Table `erased` of the store: who asked to be forgotten, by the key of erasures."""
NAMED = pl.Schema({"campaign": pl.String()})
"""Table `named` of the store: campaigns that enough visitors followed."""
PENDING = pl.Schema({"number": pl.UInt64(), "visitor_id": pl.String(), "time": pl.Int64()})
"""Table `pending` of the store: a keyed hash of each other campaign, who followed it, and when."""

_MINIMUM = (
    "visitor_id",
    "visit_id",
    "time",
    "channel",
    "campaign",
    "device",
    "country",
    "duration_s",
    "page_views",
    "visit_number",
    "converted",
    "revenue",
)


@dataclass(frozen=True)
class Prepared:
    """Visits that may be stored, and what goes with them."""

    visits: pl.DataFrame
    """Shaped as `journeys.store.VISITS`."""
    removed: Mapping[str, int]
    """How many visits each of `STEPS` left out."""
    tables: dict[str, pl.DataFrame]
    """The store's tables `named` and `pending`, these visits included."""


class Preparation:
    """Prepares one batch of visits after the other, for one store."""

    def __init__(self, config: SiteConfig, keys: Keys, store: Store, now: int) -> None:
        """`now`, in UTC seconds, says which visits are within the retention window."""
        self._config = config
        self._keys = keys
        self._store = store
        self._oldest = oldest_kept(config, now)
        self._channel = channel(config.channels)
        self._erased = store.table("erased", ERASED)["visitor"]
        self._named = store.table("named", NAMED)
        self._pending = store.table("pending", PENDING).filter(pl.col("time") >= self._oldest)
        self._stored: dict[str, pl.Series] = {}

    def prepare(self, visits: pl.DataFrame) -> Prepared:
        """`visits` as a source gives them (`client.sources.source.VISITS`)."""
        removed = {}

        def keep(step: str, kept: pl.Expr | pl.Series) -> None:
            nonlocal visits
            before = visits.height
            visits = visits.filter(kept)
            removed[step] = before - visits.height

        keep("consent", _consents(self._config.consent))
        keep("do not track", ~pl.col("do_not_track").fill_null(False))
        keep("opted out", ~pl.col("opted_out").fill_null(False))
        keep("purpose", _purpose_fits(self._config))
        visits = visits.with_columns(channel=self._channel).select(_MINIMUM)
        keep("erased", ~self._is_erased(visits["visitor_id"]))
        # Before the pseudonyms, because there is no key for a time before all retention.
        keep("retention", pl.col("time") >= self._oldest)
        visits = self._with_pseudonyms(visits)
        keep("stored already", self._is_new(visits))
        visits = self._generalised(visits)
        return Prepared(visits, removed, {"named": self._named, "pending": self._pending})

    def _is_erased(self, visitor_id: pl.Series) -> pl.Series:
        if self._erased.is_empty():
            return pl.repeat(False, len(visitor_id), eager=True)
        numbers = self._keys.erasure.numbers(visitor_id.to_list())
        return pl.Series(numbers).is_in(self._erased.implode())

    def _with_pseudonyms(self, visits: pl.DataFrame) -> pl.DataFrame:
        """Pseudonyms in place of visitors' ids, keyed numbers in place of visits'."""
        visits = visits.rename({"visit_id": "visit"})
        if visits["visit"].null_count():
            campaign = pl.col("campaign").fill_null("")
            said = pl.concat_str("visitor_id", "time", "channel", campaign, separator="\t")
            visits = visits.with_columns(pl.col("visit").fill_null(said))
        parts = []
        for key in self._keys.current():
            of_key = visits.filter(pl.col("time") >= key.since, pl.col("time") < key.until)
            ids = of_key["visitor_id"].unique()
            pseudonyms = pl.DataFrame(
                {"visitor_id": ids, "pseudonym": key.pseudonyms(ids.to_list())},
                schema={"visitor_id": pl.String(), "pseudonym": pl.String()},
            )
            numbers = pl.Series("visit", key.numbers(of_key["visit"].to_list()))
            parts.append(
                of_key.with_columns(numbers)
                .join(pseudonyms, on="visitor_id", how="left", maintain_order="left")
                .drop("visitor_id")
                .rename({"pseudonym": "visitor_id"})
            )
        return pl.concat(parts)

    def _is_new(self, visits: pl.DataFrame) -> pl.Series:
        """Which visits are neither in the store nor came before in this or an earlier batch."""
        new = []
        dated = visits.select("visit", month=_utc(pl.col("time")).dt.strftime("%Y-%m"))
        for (month,), of_month in (
            dated.with_row_index().partition_by("month", as_dict=True).items()
        ):
            name = str(month)
            if name not in self._stored:
                self._stored[name] = self._store.month(name).select("visit").collect()["visit"]
            stored = self._stored[name]
            of_month = of_month.unique("visit", keep="first")
            of_month = of_month.filter(~pl.col("visit").is_in(stored.implode()))
            self._stored[name] = pl.concat([stored, of_month["visit"]])
            new.append(of_month["index"])
        rows = pl.int_range(visits.height, eager=True, dtype=pl.UInt32)
        return rows.is_in(pl.concat([pl.Series([], dtype=pl.UInt32), *new]).implode())

    def _generalised(self, visits: pl.DataFrame) -> pl.DataFrame:
        """The hour in place of the time, the region of the country, no campaign of a few."""
        name = pl.col("campaign").str.strip_chars().str.slice(0, LONGEST_NAME)
        visits = visits.sort("time", maintain_order=True).with_columns(
            time=pl.col("time") // HOUR * HOUR, campaign=pl.when(name != "").then(name)
        )
        self._count_campaigns(visits)
        frequent = pl.col("campaign").is_in(self._named["campaign"].implode())
        # Within an hour the visits of a visitor stay in order, a second apart.
        place = _places(visits).clip(0, HOUR - 1)
        return visits.select(
            site=pl.lit(self._config.name),
            visitor_id="visitor_id",
            visit="visit",
            time=_utc(pl.col("time") + place),
            channel="channel",
            campaign=pl.when(frequent | pl.col("campaign").is_null())
            .then("campaign")
            .otherwise(pl.lit(RARE)),
            device=pl.col("device").fill_null("other"),
            region=region(pl.col("country")),
            duration_s=pl.col("duration_s").cast(pl.Float32),
            page_views=pl.col("page_views").clip(0, 2**31 - 1).cast(pl.Int32),
            visit_number=pl.col("visit_number").clip(1, MOST_VISITS).cast(pl.Int32),
            bounced=pl.col("page_views") <= 1,
            converted="converted",
            revenue="revenue",
        ).match_to_schema(VISITS)

    def _count_campaigns(self, visits: pl.DataFrame) -> None:
        """Name the campaigns that now have enough visitors; remember who followed the others.

        A visit that was stored as rare stays so when its campaign is named later.
        """
        followed = visits.select("campaign", "visitor_id", "time").drop_nulls("campaign")
        others = followed.join(self._named, on="campaign", how="anti")
        names = others["campaign"].unique()
        numbers = pl.DataFrame(
            {"campaign": names, "number": self._keys.erasure.numbers(names.to_list())},
            schema={"campaign": pl.String(), "number": pl.UInt64()},
        )
        pairs = pl.concat(
            [self._pending, others.join(numbers, on="campaign").select(PENDING.names())]
        ).unique(["number", "visitor_id"], keep="last", maintain_order=True)
        least = self._config.preparation.campaign_visitors
        frequent = pairs.group_by("number").len().filter(pl.col("len") >= least)
        named = numbers.join(frequent, on="number", how="semi").select("campaign")
        self._named = pl.concat([self._named, named.sort("campaign")])
        self._pending = pairs.join(frequent, on="number", how="anti", maintain_order="left")


def oldest_kept(config: SiteConfig, now: int) -> int:
    """UTC seconds: an earlier visit is not kept. A full hour, as stored times are."""
    return (now - config.preparation.retention_days * DAY) // HOUR * HOUR


def _utc(seconds: pl.Expr) -> pl.Expr:
    return pl.from_epoch(seconds, "s").cast(pl.Datetime("us")).dt.replace_time_zone("UTC")


def _places(visits: pl.DataFrame) -> pl.Series:
    """How many visits of the same visitor at the same time come before each."""
    pairs = visits.select("visitor_id", "time").with_row_index()
    # Most have none: to number these few takes a tenth of the time that it takes to number all.
    several = pairs.filter(pl.struct("visitor_id", "time").is_duplicated())
    numbered = several.select("index", place=pl.int_range(pl.len()).over("visitor_id", "time"))
    places = pairs.select("index").join(numbered, on="index", how="left", maintain_order="left")
    return places["place"].fill_null(0)


def _consents(config: ConsentConfig) -> pl.Expr:
    said = pl.col("consent").str.strip_chars().str.to_lowercase()
    accepted = [value.strip().lower() for value in config.accepted]
    if not config.upstream:
        return said.is_in(accepted).fill_null(False)
    if not accepted:
        return pl.lit(True)
    return said.is_in(accepted).fill_null(True)


def _purpose_fits(config: SiteConfig) -> pl.Expr:
    """Where the source tells the purposes that were consented to, ours must be among them."""
    if not config.source.tells_purposes:
        return pl.lit(True)
    purposes = (
        pl.col("purposes").str.to_lowercase().str.replace_all(r"[,;|\s]+", " ").str.split(" ")
    )
    return purposes.list.contains(config.purpose.lower()).fill_null(False)
