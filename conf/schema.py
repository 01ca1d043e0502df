"""Every setting of a run: typed, checked, with its meaning beside it.

Plain dataclasses without a third-party import, so that any package may name a setting's type.
The YAML files of this folder give the values; `conf.load` joins the two. `docs/settings.md` is
written from the docstrings under the fields (`python -m conf`), and a test keeps it true.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

MISSING: Any = "???"
"""What OmegaConf calls a value that the user has to give."""


class SettingError(ValueError):
    """A setting that is unknown, of the wrong type or out of range. The message names its key."""


def check(holds: bool, key: str, value: object, rule: str) -> None:
    """Refuse a value that is not finite, or for which the rule does not hold."""
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingError(f"{key}={value}: must be a finite number")
    if not holds:
        raise SettingError(f"{key}={value}: {rule}")


def check_positive(group: str, **values: float) -> None:
    """Refuse a value of `group` that is not above 0."""
    for name, value in values.items():
        check(value > 0, f"{group}.{name}".lstrip("."), value, "must be above 0")


def check_width(group: str, **values: int) -> None:
    """Refuse a size of `group` that is not between 1 and 65,536."""
    for name, value in values.items():
        check(1 <= value <= 65_536, f"{group}.{name}", value, "must be 1 to 65,536")


def utc_seconds(value: str, key: str) -> int:
    """Seconds since 1970 of an ISO 8601 time; one without an offset is UTC."""
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        raise SettingError(f"{key}={value}: must be an ISO 8601 time") from None
    return int(time.replace(tzinfo=time.tzinfo or UTC).timestamp())


# ---------------------------------------------------------------------------- features


@dataclass
class NumericColumn:
    """A numeric column of the touchpoint table and its public range.

    The value becomes ``(f(x) - f(low)) / (f(high) - f(low))``, cut to [0, 1], with f the identity
    or log1p. A missing value becomes 0.
    """

    low: float = 0.0
    """Smallest value that is told apart; smaller ones count as this."""
    high: float = 1.0
    """Largest value that is told apart; larger ones count as this."""
    log: bool = False
    """Scale by log1p: for durations, counts and money. Needs low ≥ 0."""
    known_at_end: bool = False
    """Measured only when the touchpoint is over (time on site, page views): hidden on the
    touchpoint at which the decision falls."""

    def __post_init__(self) -> None:
        check(self.high > self.low, "data.features.numeric.*.high", self.high, "must be above low")
        check(
            not self.log or self.low >= 0,
            "data.features.numeric.*.low",
            self.low,
            "must be 0 or more where log is set",
        )


@dataclass
class FeatureConfig:
    """What a model sees of a touchpoint. Public: the same at every site, never read from data."""

    channels: list[str] = field(default_factory=list)
    """The channel taxonomy. A channel outside it counts as one further channel, `other`."""
    max_touchpoints: int = 20
    """Longest journey; of a longer one the newest touchpoints stay."""
    campaign_buckets: int = 0
    """Campaign names are hashed into this many buckets; 0 leaves campaigns out."""
    clock: bool = True
    """Use the hour of the day and the day of the week (UTC) of each touchpoint."""
    gaps: bool = True
    """Use the log seconds since the previous touchpoint and up to the decision."""
    categorical: dict[str, list[str]] = field(default_factory=dict)
    """Further columns and their public lists of values; a value outside counts as `other`."""
    numeric: dict[str, NumericColumn] = field(default_factory=dict)
    """Further numeric columns and their public ranges."""

    def __post_init__(self) -> None:
        check_positive("data.features", max_touchpoints=self.max_touchpoints)
        check(
            0 <= self.campaign_buckets < 65_000,
            "data.features.campaign_buckets",
            self.campaign_buckets,
            "must be 0 or more and below 65,000",
        )
        for name, values in [("channels", self.channels), *self.categorical.items()]:
            check(
                len(set(values)) == len(values),
                f"data.features.{name}",
                values,
                "names a value twice",
            )
            check(
                len(values) < 65_000,
                f"data.features.{name}",
                f"{len(values)} values",
                "must be fewer than 65,000",
            )
        names = ["visitor", "time", "converted", "site", "channel"]
        names += ["campaign"] if self.campaign_buckets else []
        names += ["hour", "weekday"] if self.clock else []
        names += ["gap", "age"] if self.gaps else []
        names += [*self.categorical, *self.numeric]
        twice = {name for name in names if names.count(name) > 1}
        check(
            not twice,
            "data.features",
            ", ".join(sorted(twice)),
            "names of further columns must be new (not visitor, time, converted, site, channel, "
            "nor those of campaign, clock and gaps) and either categorical or numeric",
        )


# ---------------------------------------------------------------------------- data


@dataclass
class JourneyConfig:
    """How examples are cut from journeys. Public: the same at every site."""

    features: FeatureConfig = field(default_factory=FeatureConfig)
    """What a model sees of a touchpoint."""
    lookback_days: float = 30.0
    """Only touchpoints this recent at the decision belong to the journey."""
    horizon_days: float = 7.0
    """The label: does the visitor convert within this time after the decision?"""
    contributions: int = 1
    """Most examples of one visitor; a visitor's gradients are averaged before they are clipped, so
    that the guarantee stays one for the visitor. Above 1 only with `decision: touchpoint`. Held
    out, a visitor has one."""

    def __post_init__(self) -> None:
        check_positive(
            "data",
            lookback_days=self.lookback_days,
            horizon_days=self.horizon_days,
            contributions=self.contributions,
        )


@dataclass
class DataConfig(JourneyConfig):
    """Where journeys come from, how examples are cut from them, and how they fall to sites."""

    name: str = MISSING
    """Which source: `synthetic`, `table` or `criteo`. Set by the group's file."""
    holdout: float = 0.2
    """Share of visitors kept from training, for evaluation. Chosen by a hash of the visitor id."""
    holdout_from: str | None = None
    """Temporal split: decisions from this UTC time on are for evaluation, and training sees only
    decisions whose horizon ends before it. Visitors stay disjoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.holdout < 1, "data.holdout", self.holdout, "must be between 0 and 1")
        if self.holdout_from is not None:
            utc_seconds(self.holdout_from, "data.holdout_from")


@dataclass
class SyntheticData(DataConfig):
    """Journeys from a known truth: channel effects, propensity, site differences, season."""

    name: str = "synthetic"
    """Which source. Set by the group's file."""
    sites: int = 10
    """Number of sites."""
    visitors: int = 3000
    """Visitors at each site."""
    heterogeneity: float = 0.5
    """How much sites differ in channel mix and base rate: 0 all alike, 1 strongly."""
    base_rate: float = 0.08
    """Share of decisions that are followed by a conversion, over all sites, roughly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.contributions == 1,
            "data.contributions",
            self.contributions,
            "must be 1 with data=synthetic, where each visitor has one decision",
        )
        check_positive("data", sites=self.sites, visitors=self.visitors)
        check(self.heterogeneity >= 0, "data.heterogeneity", self.heterogeneity, "must be ≥ 0")
        check(0 < self.base_rate < 1, "data.base_rate", self.base_rate, "must be in (0, 1)")


@dataclass
class ColumnNames:
    """The table's own names of the columns that the product knows. Empty: the table has none."""

    visitor_id: str = "visitor_id"
    """Who. Without it (sessions of unknown visitors) each row is a visitor of its own."""
    time: str = "time"
    """When the touchpoint began: ISO 8601 with UTC or an offset, or a Parquet timestamp."""
    channel: str = "channel"
    """By which channel."""
    campaign: str = ""
    """Which campaign, free text; used when `features.campaign_buckets` is set."""
    converted: str = "converted"
    """Did this touchpoint end in a conversion: true/false, 1/0, yes/no."""


@dataclass
class TableData(DataConfig):
    """Anyone's touchpoint table, Parquet, CSV or the stores of sites, columns mapped by name."""

    name: str = "table"
    """Which source. Set by the group's file."""
    path: str = MISSING
    """The file, `.parquet` or `.csv`; or the folder of a site's store; or a pattern of these, such
    as `sites/*/store`, read as one table."""
    columns: ColumnNames = field(default_factory=ColumnNames)
    """The table's own column names."""
    decision: str = "touchpoint"
    """When a visitor is judged. `touchpoint`: at the start of one touchpoint of the visitor (or of
    up to `contributions`), drawn by a hash of the visitor id. `snapshot`: at `snapshot_at`, for
    all. `visit`: a row is a journey of its own and its label is its own conversion (session
    tables)."""
    snapshot_at: str | None = None
    """UTC time of the decision, for `decision: snapshot`."""
    site_column: str | None = None
    """Column that says which site a visitor belongs to."""
    dirichlet_sites: int = 10
    """Without a site column: so many sites, visitors dealt out at random with a skew (below)."""
    dirichlet_alpha: float = 1.0
    """Skew of channels over the dealt-out sites, by Dirichlet(alpha): small is strongly skewed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.decision in ("touchpoint", "snapshot", "visit"),
            "data.decision",
            self.decision,
            "must be touchpoint, snapshot or visit",
        )
        check(
            (self.decision == "snapshot") == (self.snapshot_at is not None),
            "data.snapshot_at",
            self.snapshot_at,
            "is needed with data.decision=snapshot, and only there",
        )
        check(
            self.contributions == 1 or self.decision == "touchpoint",
            "data.contributions",
            self.contributions,
            f"must be 1 with data.decision={self.decision}, which judges each visitor once",
        )
        if self.snapshot_at is not None:
            utc_seconds(self.snapshot_at, "data.snapshot_at")
        columns, features = self.columns, self.features
        check(
            self.decision != "visit" or not columns.visitor_id,
            "data.columns.visitor_id",
            columns.visitor_id,
            "must be empty with data.decision=visit, where each row is a visitor of its own; with "
            "ids use data.decision=touchpoint",
        )
        timeless = self.decision == "visit" and not features.clock and self.holdout_from is None
        check(
            bool(columns.time) or timeless,
            "data.columns.time",
            columns.time,
            "may be empty only with data.decision=visit, data.features.clock=false and no "
            "data.holdout_from",
        )
        for key in ("channel", "converted"):
            check(bool(getattr(columns, key)), f"data.columns.{key}", "", "must not be empty")
        check(
            bool(columns.campaign) or not features.campaign_buckets,
            "data.columns.campaign",
            columns.campaign,
            "is needed with data.features.campaign_buckets",
        )
        check_positive(
            "data", dirichlet_sites=self.dirichlet_sites, dirichlet_alpha=self.dirichlet_alpha
        )


@dataclass
class CriteoData(DataConfig):
    """The Criteo Attribution Modeling for Bidding data set, campaigns as channels."""

    name: str = "criteo"
    """Which source. Set by the group's file."""
    path: str = MISSING
    """The file: `.tsv.gz` or `.tsv`."""
    limit: int = 0
    """Read only so many impressions, the first ones. 0: all."""
    dirichlet_sites: int = 10
    """So many sites, visitors dealt out at random with a skew (below)."""
    dirichlet_alpha: float = 1.0
    """Skew of channels over the sites, by Dirichlet(alpha): small is strongly skewed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        features = self.features
        check(bool(features.channels), "data.features.channels", "", "must not be empty")
        # The others are known only after a conversion.
        known = ["click", "cost", "time_since_last_click", *(f"cat{i}" for i in range(1, 10))]
        for name in [*features.categorical, *features.numeric]:
            check(
                name in known,
                "data.features",
                name,
                f"is no column that may be a feature; there are {', '.join(known)}",
            )
        check(self.limit >= 0, "data.limit", self.limit, "must be 0 or more")
        check_positive(
            "data", dirichlet_sites=self.dirichlet_sites, dirichlet_alpha=self.dirichlet_alpha
        )


# ---------------------------------------------------------------------------- model


@dataclass
class ModelConfig:
    """The conversion model."""

    name: str = MISSING
    """Which architecture: `logistic`, `mlp`, `gru` or `attention`. Set by the group's file."""
    base_rate: float = 0.08
    """Conversion rate that the untrained model predicts (the output bias). Public: guessed, not
    read from data."""

    def __post_init__(self) -> None:
        check(0 < self.base_rate < 1, "model.base_rate", self.base_rate, "must be in (0, 1)")


@dataclass
class LogisticConfig(ModelConfig):
    """Logistic regression on the bag of a journey's touchpoints."""

    name: str = "logistic"
    """Which architecture. Set by the group's file."""


@dataclass
class MlpConfig(ModelConfig):
    """A two-layer network on the mean of touchpoint embeddings."""

    name: str = "mlp"
    """Which architecture. Set by the group's file."""
    embedding: int = 32
    """Width of the pooled embedding."""
    hidden: int = 64
    """Width of the hidden layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width("model", embedding=self.embedding, hidden=self.hidden)


@dataclass
class GruConfig(ModelConfig):
    """A gated recurrent network over the touchpoints in order."""

    name: str = "gru"
    """Which architecture. Set by the group's file."""
    embedding: int = 16
    """Width of a touchpoint's embedding."""
    hidden: int = 32
    """Width of the recurrent state."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width("model", embedding=self.embedding, hidden=self.hidden)


@dataclass
class AttentionConfig(ModelConfig):
    """Causal self-attention over the touchpoints, read at the newest one."""

    name: str = "attention"
    """Which architecture. Set by the group's file."""
    embedding: int = 32
    """Width of a touchpoint's embedding; a multiple of `heads`."""
    heads: int = 2
    """Number of attention heads."""
    layers: int = 1
    """Number of attention blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width("model", embedding=self.embedding, heads=self.heads)
        check(1 <= self.layers <= 64, "model.layers", self.layers, "must be 1 to 64")
        check(
            self.embedding % self.heads == 0,
            "model.embedding",
            self.embedding,
            "must be a multiple of model.heads",
        )


# ---------------------------------------------------------------------------- privacy


@dataclass
class PrivacyConfig:
    """What each site guarantees its visitors while it trains."""

    name: str = MISSING
    """`visitor_dp` or `unprotected`. Set by the group's file."""


@dataclass
class VisitorDP(PrivacyConfig):
    """(epsilon, delta)-differential privacy for each visitor, over the whole run (DP-SGD)."""

    name: str = "visitor_dp"
    """Kind of protection. Set by the group's file."""
    epsilon: float = 3.0
    """Privacy loss of a visitor over the whole run, all rounds together; small is private."""
    delta: float = 1e-5
    """Probability with which epsilon may be exceeded; below 1 / visitors of a site."""
    clipping_norm: float = 3.0
    """L2 bound on what one visitor adds to a gradient."""
    count_noise: float = 20.0
    """Standard deviation, in visitors, of the Gaussian noise on a site's visitor count."""
    clipping_engine: str = "bookkeeping"
    """How each visitor's gradient is made: `bookkeeping`, or `opacus` for models with layers that
    it does not know. The same but for rounding and time."""

    def __post_init__(self) -> None:
        check_positive(
            "privacy",
            epsilon=self.epsilon,
            clipping_norm=self.clipping_norm,
            count_noise=self.count_noise,
        )
        check(0 < self.delta < 1, "privacy.delta", self.delta, "must be between 0 and 1")
        check(
            self.clipping_engine in ("bookkeeping", "opacus"),
            "privacy.clipping_engine",
            self.clipping_engine,
            "must be bookkeeping or opacus",
        )


@dataclass
class Unprotected(PrivacyConfig):
    """No protection: for comparison on data that may be seen."""

    name: str = "unprotected"
    """Kind of protection. Set by the group's file."""


# ---------------------------------------------------------------------------- training


@dataclass
class OptimizerConfig:
    """How a site trains within a round."""

    name: str = "sgd"
    """`sgd` or `adam`."""
    learning_rate: float = 0.5
    """Step size."""
    momentum: float = 0.9
    """Momentum of sgd, started anew each round."""
    weight_decay: float = 0.0
    """L2 penalty."""
    batch_size: int = 256
    """Expected number of visitors in a step: each is drawn with probability batch_size / visitors
    (Poisson sampling)."""
    local_epochs: float = 1.0
    """Passes over the site's visitors in a round, in expectation; at least one step."""
    microbatch: int = 512
    """Most visitors in memory at once; has no influence on the result beyond rounding."""

    def __post_init__(self) -> None:
        check(self.name in ("sgd", "adam"), "optimizer.name", self.name, "must be sgd or adam")
        check_positive(
            "optimizer",
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            local_epochs=self.local_epochs,
            microbatch=self.microbatch,
        )
        check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "must be in [0, 1)")
        check(
            self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "must be 0 or more"
        )


STRATEGIES = (
    "fedavg",
    "fedprox",
    "fedadam",
    "fedyogi",
    "fedadagrad",
    "fedmedian",
    "fedtrimmedavg",
)


@dataclass
class StrategyConfig:
    """How the coordinator combines the sites' updates."""

    name: str = "fedavg"
    """Which of Flower's strategies: fedavg, fedprox, fedadam, fedyogi, fedadagrad, fedmedian,
    fedtrimmedavg."""
    weights: str = "visitors"
    """`visitors`: by the noised visitor count, capped. `uniform`: all alike. The median and the
    trimmed mean do not weigh."""
    weight_cap: float = 4.0
    """A site weighs at most this many times the median site."""
    quorum: float = 0.5
    """Share of the sites whose sound updates a round needs; below it the model stays as it is."""
    round_timeout_s: float = 600.0
    """Longest wait for the sites' replies, in seconds."""
    join_timeout_s: float = 120.0
    """Longest wait for sites to appear at the start, in seconds."""
    max_update_norm: float = 100.0
    """Largest L2 distance of a site's model from the round's model; a farther one is dropped."""
    proximal_mu: float = 0.0
    """Weight of FedProx's proximal term."""
    server_learning_rate: float = 0.05
    """Step size of the adaptive strategies (fedadam, fedyogi, fedadagrad)."""
    trim: float = 0.2
    """Share that fedtrimmedavg cuts from each end."""

    def __post_init__(self) -> None:
        check(
            self.name in STRATEGIES,
            "strategy.name",
            self.name,
            f"must be one of {', '.join(STRATEGIES)}",
        )
        check(
            self.weights in ("visitors", "uniform"),
            "strategy.weights",
            self.weights,
            "must be visitors or uniform",
        )
        check(self.weight_cap >= 1, "strategy.weight_cap", self.weight_cap, "must be 1 or more")
        check(0 < self.quorum <= 1, "strategy.quorum", self.quorum, "must be in (0, 1]")
        check(self.proximal_mu >= 0, "strategy.proximal_mu", self.proximal_mu, "must be ≥ 0")
        check(0 <= self.trim < 0.5, "strategy.trim", self.trim, "must be in [0, 0.5)")
        check_positive(
            "strategy",
            round_timeout_s=self.round_timeout_s,
            join_timeout_s=self.join_timeout_s,
            max_update_norm=self.max_update_norm,
            server_learning_rate=self.server_learning_rate,
        )


@dataclass
class RuntimeConfig:
    """What carries the messages."""

    name: str = "local"
    """`local`: worker processes of this machine. `ray`: Flower's simulation runtime on Ray.
    `deployment`: a hub, to sites with visitors of their own (`python -m server run`)."""
    workers: int = 2
    """Worker processes of a simulation; each keeps its sites' journeys. 0 runs the sites in this
    process, for a debugger. The result does not depend on it."""

    def __post_init__(self) -> None:
        check(
            self.name in ("local", "ray", "deployment"),
            "runtime.name",
            self.name,
            "must be local, ray or deployment",
        )
        check(self.workers >= 0, "runtime.workers", self.workers, "must be 0 or more")


# ---------------------------------------------------------------------------- the run


@dataclass
class Config:
    """One run, whole."""

    job: str = "train"
    """What to do: `train`, or `worth_joining` or `audit` (set by the experiment of that name)."""
    seed: int = 0
    """Seeds everything that is random in a simulation, the privacy noise included."""
    rounds: int = 10
    """Training rounds."""
    evaluations: int = 5
    """How often the model is evaluated on visitors held out, spread over the rounds; the last time
    after the last round. They share one privacy budget: fewer are each more exact."""
    federation: str = "simulation"
    """Name of the federation. A site's policy names those that may ask it."""
    purpose: str = "conversion-model"
    """What the model will be used for. A site's policy names the purposes that it allows."""
    data: DataConfig = MISSING
    """Where journeys come from."""
    model: ModelConfig = MISSING
    """The conversion model."""
    privacy: PrivacyConfig = MISSING
    """What each site guarantees its visitors."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How a site trains within a round."""
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    """How updates are combined."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """What carries the messages."""

    def __post_init__(self) -> None:
        check(
            self.job in ("train", "worth_joining", "audit"),
            "job",
            self.job,
            "must be train, worth_joining or audit",
        )
        check(self.seed >= 0, "seed", self.seed, "must be 0 or more")
        check_positive("", rounds=self.rounds, evaluations=self.evaluations)
        for key in ("federation", "purpose"):
            check(bool(getattr(self, key)), key, "", "must not be empty")


GROUPS: dict[str, dict[str, type]] = {
    "data": {"synthetic": SyntheticData, "table": TableData, "criteo": CriteoData},
    "model": {
        "logistic": LogisticConfig,
        "mlp": MlpConfig,
        "gru": GruConfig,
        "attention": AttentionConfig,
    },
    "privacy": {"visitor_dp": VisitorDP, "unprotected": Unprotected},
    "optimizer": {"optimizer": OptimizerConfig},
    "strategy": {"strategy": StrategyConfig},
    "runtime": {"runtime": RuntimeConfig},
}
"""The settings' classes that a group's YAML file may choose from, by their `name`."""
