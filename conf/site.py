"""Every setting of a site's own file, `site.yaml`: its source, how visits are prepared, its agent.

It belongs to the site: no coordinator reads or sets any of it, and it is not part of a run's
configuration. `conf.compose.site_from_yaml` reads it. Like `conf/schema.py`, plain dataclasses.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from conf.schema import MISSING, check, check_positive

CHANNELS = (
    "direct",
    "organic search",
    "paid search",
    "organic social",
    "paid social",
    "email",
    "referral",
    "display",
    "retargeting",
    "affiliate",
    "ai assistant",
    "other",
)
"""The channel taxonomy."""

REFERRER_TYPES = ("direct", "search", "website", "campaign", "social", "ai assistant")
"""How a visit came, as far as a source tells."""


# ---------------------------------------------------------------------------- sources


@dataclass
class SourceConfig:
    """Where a site's visits come from."""

    name: str = MISSING
    """Which source: `matomo_db`, `matomo_api`, `ga4`, `criteo`, `sql` or `files`."""
    batch: int = 200_000
    """Visits read, prepared and stored at once; memory grows with it."""
    bad_rows: float = 0.001
    """Largest share of rows that may be left out because they cannot be read; above it, ingesting
    stops."""

    def __post_init__(self) -> None:
        check_positive("source", batch=self.batch)
        check(0 <= self.bad_rows < 1, "source.bad_rows", self.bad_rows, "must be in [0, 1)")

    @property
    def tells_purposes(self) -> bool:
        """Whether visits list the purposes that were consented to."""
        return False


@dataclass
class MatomoDbSource(SourceConfig):
    """Matomo's own database, MariaDB or MySQL, read with an account that may only read."""

    name: str = "matomo_db"
    """Which source."""
    host: str = "127.0.0.1"
    """The database server."""
    port: int = 3306
    """Its port."""
    user: str = MISSING
    """The account; it needs SELECT on two tables only."""
    password_file: str = ""
    """File with the password, mode 0600, relative to the site's folder. Empty: no password."""
    tls_ca: str = ""
    """File with the certificate authority that vouches for the server, relative to the site's
    folder; needed unless the server is on this machine."""
    database: str = "matomo"
    """Name of the database."""
    prefix: str = "matomo_"
    """Prefix of Matomo's tables."""
    site_id: int = 1
    """Matomo's `idsite`."""
    goals: list[int] = field(default_factory=list)
    """Which goals are conversions (0: orders). Empty: all of them; abandoned carts never."""
    consent_column: str = ""
    """Column of `log_visit` that says what the visitor consented to, such as
    `custom_dimension_1`. Empty: none."""
    purposes_column: str = ""
    """Column of `log_visit` that lists the purposes consented to. Empty: none."""
    settle_minutes: int = 60
    """Visits whose last action is younger than this may go on; the next ingest takes them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("database", "prefix", "consent_column", "purposes_column"):
            value = getattr(self, key)
            check(
                re.fullmatch(r"[A-Za-z0-9_]*", value) is not None,
                f"source.{key}",
                value,
                "must be of letters, digits and underscores",
            )
        for key in ("consent_column", "purposes_column"):
            value = getattr(self, key)
            check(
                not value or re.fullmatch(r"custom_(dimension|var_[kv])_?\d+", value) is not None,
                f"source.{key}",
                value,
                "must be a custom dimension or variable, such as custom_dimension_1",
            )
        check(0 < self.port < 65_536, "source.port", self.port, "must be a port")
        check(
            bool(self.tls_ca) or _on_this_machine(self.host),
            "source.tls_ca",
            self.tls_ca,
            "must name the file with the server's certificate authority, because "
            f"source.host={self.host} is not this machine; or reach the server by a tunnel",
        )
        check_positive("source", site_id=self.site_id, settle_minutes=self.settle_minutes)

    @property
    def tells_purposes(self) -> bool:
        """Whether visits list the purposes that were consented to."""
        return bool(self.purposes_column)


def _on_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass
class MatomoApiSource(SourceConfig):
    """Matomo's HTTP API (`Live.getLastVisitsDetails`), for a Matomo that somebody else hosts."""

    name: str = "matomo_api"
    """Which source."""
    url: str = MISSING
    """Address of Matomo, such as `https://matomo.example.org/`; http on this machine only."""
    token_file: str = MISSING
    """File with the `token_auth`, mode 0600, relative to the site's folder."""
    site_id: int = 1
    """Matomo's `idsite`."""
    goals: list[int] = field(default_factory=list)
    """Which goals are conversions (0: orders). Empty: all of them; abandoned carts never."""
    consent_dimension: int = 0
    """Number of the custom dimension that says what the visitor consented to. 0: none."""
    purposes_dimension: int = 0
    """Number of the custom dimension that lists the purposes consented to. 0: none."""
    start: str = ""
    """First day to read (ISO 8601 date, UTC). Empty: as far back as the site keeps visits."""
    page: int = 500
    """Visits asked for at once (`filter_limit`)."""
    timeout_s: float = 60.0
    """Longest wait for an answer, in seconds."""
    retries: int = 5
    """How often a page is asked for again, with growing pauses."""
    settle_minutes: int = 60
    """Visits whose last action is younger than this may go on; the next ingest takes them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            re.match(r"https?://[^?#]+$", self.url) is not None or self.url == MISSING,
            "source.url",
            self.url.partition("?")[0],
            "must be an http or https address without a query",
        )
        check_positive(
            "source",
            site_id=self.site_id,
            page=self.page,
            timeout_s=self.timeout_s,
            settle_minutes=self.settle_minutes,
        )
        check(self.retries >= 0, "source.retries", self.retries, "must be 0 or more")

    @property
    def tells_purposes(self) -> bool:
        """Whether visits list the purposes that were consented to."""
        return bool(self.purposes_dimension)


@dataclass
class Ga4Source(SourceConfig):
    """Google Analytics 4's BigQuery export (`events_*`), as Parquet or newline-delimited JSON."""

    name: str = "ga4"
    """Which source."""
    path: str = MISSING
    """Pattern of the files, relative to the site's folder, such as `export/events_*.parquet`."""
    key_events: list[str] = field(default_factory=lambda: ["purchase"])
    """Events that are conversions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.key_events), "source.key_events", "", "must name at least one event")


@dataclass
class CriteoSource(SourceConfig):
    """The Criteo Attribution Modeling for Bidding data set: gzipped TSV of 22 columns."""

    name: str = "criteo"
    """Which source."""
    path: str = MISSING
    """The file, `.tsv.gz` or `.tsv`, relative to the site's folder."""


@dataclass
class VisitColumns:
    """The table's own names of a visit's columns. Empty: the table has none."""

    visitor_id: str = "visitor_id"
    """Who."""
    time: str = "time"
    """When the visit began: ISO 8601, or a timestamp."""
    visit_id: str = ""
    """Which visit: the same one is stored once."""
    channel: str = ""
    """By which channel, where the table knows; else it is told from the columns below."""
    referrer_type: str = ""
    """direct, search, website, campaign, social or ai assistant."""
    source: str = ""
    """Where from: a search engine, a network, a domain, `utm_source`."""
    medium: str = ""
    """`utm_medium`."""
    campaign: str = ""
    """`utm_campaign`."""
    keyword: str = ""
    """`utm_term`."""
    click_id: str = ""
    """Name of the click id in the landing address: gclid, fbclid, ... (never its value)."""
    device: str = ""
    """Kind of device."""
    country: str = ""
    """Country, two letters."""
    duration_s: str = ""
    """Length of the visit, in seconds."""
    page_views: str = ""
    """Actions in the visit."""
    visit_number: str = ""
    """The how-many-th visit of the visitor it is."""
    converted: str = "converted"
    """Did the visit end in a conversion: true/false, 1/0, yes/no."""
    revenue: str = ""
    """Revenue of the visit."""
    consent: str = ""
    """What the visitor consented to."""
    purposes: str = ""
    """Purposes consented to, separated by commas, semicolons or spaces."""
    do_not_track: str = ""
    """Did the browser ask not to be tracked: true/false, 1/0, yes/no."""
    opted_out: str = ""
    """Did the visitor opt out: true/false, 1/0, yes/no."""

    def __post_init__(self) -> None:
        for key in ("visitor_id", "time", "converted"):
            check(bool(getattr(self, key)), f"source.columns.{key}", "", "must not be empty")


@dataclass
class TableSource(SourceConfig):
    """A table of visits, columns mapped by name."""

    columns: VisitColumns = field(default_factory=VisitColumns)
    """The table's own column names."""
    timezone: str = "UTC"
    """Time zone of times without an offset."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            check(False, "source.timezone", self.timezone, "is no time zone; write Europe/Berlin")

    @property
    def tells_purposes(self) -> bool:
        """Whether visits list the purposes that were consented to."""
        return bool(self.columns.purposes)


@dataclass
class SqlSource(TableSource):
    """A query to any database that SQLAlchemy reaches: a warehouse that a pipeline fills."""

    name: str = "sql"
    """Which source."""
    url: str = MISSING
    """SQLAlchemy's address of the database, without the password."""
    password_file: str = ""
    """File with the password, mode 0600, relative to the site's folder. Empty: no password."""
    query: str = MISSING
    """A SELECT, one row a visit."""
    settle_minutes: int = 60
    """Visits that began later than this before now are left to the next ingest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("source", settle_minutes=self.settle_minutes)


@dataclass
class FilesSource(TableSource):
    """Files of visits: Parquet, CSV or newline-delimited JSON."""

    name: str = "files"
    """Which source."""
    path: str = MISSING
    """Pattern of the files, relative to the site's folder, such as `export/*.parquet`."""


# ---------------------------------------------------------------------------- preparation


@dataclass
class ChannelRule:
    """A visit that fits every given field has this channel. Upper and lower case are alike."""

    channel: str = MISSING
    """The channel: one of the taxonomy."""
    referrer_type: list[str] = field(default_factory=list)
    """Any of these: direct, search, website, campaign, social, ai assistant."""
    source: str = ""
    """Regular expression that is found in the source."""
    medium: str = ""
    """Regular expression that is found in the medium."""
    campaign: str = ""
    """Regular expression that is found in the campaign's name."""
    keyword: str = ""
    """Regular expression that is found in the keyword."""
    click_id: list[str] = field(default_factory=list)
    """Any of these click ids: gclid, fbclid, msclkid, ..."""

    def __post_init__(self) -> None:
        if self.channel == MISSING:
            return
        check(
            self.channel in CHANNELS,
            "channels.*.channel",
            self.channel,
            f"must be one of {', '.join(CHANNELS)}",
        )
        for kind in self.referrer_type:
            check(
                kind in REFERRER_TYPES,
                "channels.*.referrer_type",
                kind,
                f"must be one of {', '.join(REFERRER_TYPES)}",
            )
        for key in ("source", "medium", "campaign", "keyword"):
            pattern = getattr(self, key)
            try:
                re.compile(pattern)
            except re.error:
                check(False, f"channels.*.{key}", pattern, "is no regular expression")
        texts = (self.source, self.medium, self.campaign, self.keyword)
        given: list[Any] = [*texts, self.referrer_type, self.click_id]
        check(any(given), "channels.*", self.channel, "says nothing that a visit can fit")


@dataclass
class ConsentConfig:
    """Whose visits may be used at all."""

    upstream: bool = False
    """Visits without consent never reach the source. Else a visit that says nothing of consent is
    left out."""
    accepted: list[str] = field(default_factory=list)
    """Values of the source's consent column that are consent. Upper and lower case are alike."""


@dataclass
class PreparationConfig:
    """What happens to visits before anything is stored."""

    retention_days: int = 395
    """Visits older than this are not taken, and deleted."""
    rotation_days: int = 395
    """The key of the pseudonyms is a new one each so many days; at least `retention_days`."""
    campaign_visitors: int = 20
    """A campaign that fewer visitors followed goes into one bucket with all such."""

    def __post_init__(self) -> None:
        check_positive(
            "preparation",
            retention_days=self.retention_days,
            campaign_visitors=self.campaign_visitors,
        )
        check(
            self.rotation_days >= self.retention_days,
            "preparation.rotation_days",
            self.rotation_days,
            f"must be at least retention_days={self.retention_days}, so that a visitor has two "
            "pseudonyms at most",
        )


@dataclass
class AgentConfig:
    """The site agent, which answers a coordinator's requests."""

    holdout: float = 0.2
    """Share of the visitors who are kept from training, for evaluation, by a hash of the visitor.
    Leave it as it is once anything was released: with another share, visitors who trained are
    evaluated and the other way round, which the budget counts as two halves that never meet."""
    users: list[str] = field(default_factory=list)
    """Unix users that may ask besides the agent's own: the SuperNode's, where it has one of its
    own. Needs `group`."""
    group: str = ""
    """Unix group that may reach the socket, of which both users are members. Empty: the agent's
    own user alone."""
    socket: str = ""
    """The socket that the agent listens on, relative to the site's folder; at most 107 bytes long
    with it. Empty: `agent.sock` there. A user of `users` has to be able to enter its folder."""
    port: int = 0
    """Port on this machine of the agent's `/health` and `/metrics`. 0: none."""

    def __post_init__(self) -> None:
        check(0 < self.holdout < 1, "agent.holdout", self.holdout, "must be between 0 and 1")
        check(0 <= self.port < 65_536, "agent.port", self.port, "must be a port, or 0")
        check(
            bool(self.users) == bool(self.group),
            "agent.group",
            self.group,
            "is needed with agent.users, and only there: the users' way to the socket",
        )


def is_site_name(name: str) -> bool:
    """Whether a site may go by `name`: a letter or digit, then more of them, and ` .-_`."""
    return re.fullmatch(r"[\w][\w .-]{0,62}", name) is not None


@dataclass
class SiteConfig:
    """A site's `site.yaml`, whole."""

    name: str = MISSING
    """The site's name, as the federation will see it."""
    purpose: str = "conversion-model"
    """What the visits are used for. Where the source lists the purposes a visitor consented to,
    this must be among them."""
    source: SourceConfig = MISSING
    """Where visits come from."""
    consent: ConsentConfig = field(default_factory=ConsentConfig)
    """Whose visits may be used."""
    channels: list[ChannelRule] = field(default_factory=list)
    """The site's own channel rules; they come before the product's (`docs/channels.md`)."""
    preparation: PreparationConfig = field(default_factory=PreparationConfig)
    """What happens to visits before anything is stored."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    """The site agent, which answers a coordinator's requests."""

    def __post_init__(self) -> None:
        check(
            self.name == MISSING or is_site_name(self.name),
            "name",
            self.name,
            "must be a letter or digit, then up to 62 letters, digits, spaces, dots or hyphens",
        )
        check(bool(self.purpose), "purpose", "", "must not be empty")
        check(
            self.name == MISSING or self.consent.upstream or any(self.consent.accepted),
            "consent.accepted",
            self.consent.accepted,
            "must name the values that mean consent, unless consent.upstream is true",
        )


SOURCES: dict[str, type[SourceConfig]] = {
    "matomo_db": MatomoDbSource,
    "matomo_api": MatomoApiSource,
    "ga4": Ga4Source,
    "criteo": CriteoSource,
    "sql": SqlSource,
    "files": FilesSource,
}
"""The classes that `source` may be, by its `name`."""
