"""By which channel a visit came. `python -m client.channels` prints docs/channels.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from textwrap import fill

import polars as pl
from polars.exceptions import ComputeError

from client.channel_table import A_HOST, LISTS, NOTHING, RULES, Sources, Words
from conf.schema import SettingError
from conf.site import CHANNELS, ChannelRule

TEXTS = ("referrer_type", "source", "medium", "campaign", "keyword", "click_id")
"""The columns of `client.sources.source.VISITS` that rules look at."""

LONGEST = 1_000
"""So many characters of a text are looked at."""

INTRODUCTION = """# Channels

{channels}

Written by `python -m client.channels`; change `client/channel_table.py` instead of this page.

In this order:

1. The channel that the source itself tells, if it is one of these; upper and lower case, spaces,
   hyphens and underscores are alike.
2. The first of the site's own rules that fits.
3. The first rule below that fits.
4. `direct` if the visit tells no referrer type, source, medium, campaign or click id; else `other`.

A rule fits if everything that it asks for fits. Upper and lower case are alike, and so are a text
that is missing and one that is empty. The medium, campaign and keyword `(none)` or `(not set)` are
empty too; a source `(not set)` is a source of which nothing is known, hence `other`. The first
{longest:,} characters of a text count.

The site's own rules are in its `site.yaml`. Regular expressions are found anywhere in the text
unless they are anchored (`^`, `$`); look-around and back-references are not supported.

```yaml
channels:
  - channel: affiliate
    source: ^blog\\.example\\.org$
  - channel: paid social
    medium: cpc
    campaign: ^(fb|ig)_
  - channel: email
    click_id: [crm_id]
```

What may surprise:

- A medium that names a channel comes before a source that suggests another: `facebook` with the
  medium `email` is email, `criteo` with the medium `display` is display. Without such a medium
  Criteo, AdRoll and the like are retargeting, which is what most sites buy there.
- Retargeting is told by the medium or the campaign's name, whoever showed the advertisement; but
  an email that brings visitors back is email.
- An `fbclid` is on every link that leaves Facebook, so that it is paid only with a medium that says
  so. A `gclid` is on paid links only; with `display` or `gdn` in the campaign's name it is display.
- Paid listings of products (`google` with the medium `shopping`, price comparisons with `cpc`) are
  paid search; unpaid ones are organic search or referral.
- `cpc` or `ppc` from a source that no list knows is paid search; other words for paid say too
  little there, hence `other`.
- `cpc` in an AI assistant is paid search too; everything else from one is `ai assistant`.
- Google's search, images, news, maps, shopping, books, scholar and video are organic search; its
  documents, sites and the like are referral.
- Video is social (YouTube), messages by SMS, push or print are `other`.
"""

LISTS_INTRODUCTION = """## Lists

Words are found anywhere in a text, between anything but letters. In words and names a space stands
for nothing or one space, dot, underscore or hyphen, and a star for any letters. Addresses may have
a scheme before them and a path behind them; `.*` stands for any country's domain.
"""

_SPEAKING = ("referrer_type", "source", "medium", "campaign", "click_id")
"""With nothing in any of these a visit is direct. A keyword alone tells nothing of the way."""

_SPACES = r"[\s_-]+"
_PLACEHOLDER = r"(?i)^\((?:none|not set|not provided|data not available|direct|organic|referral)\)$"


def channel(rules: Sequence[ChannelRule] = ()) -> pl.Expr:
    """From the columns `channel` and `TEXTS` of a frame of visits to a channel of `CHANNELS`.

    In this order: the source's own channel, if it is one of the taxonomy; the site's rules; the
    product's. Where none fits: `direct` if the visit says nothing at all, else `other`.

    Args:
        rules: the site's own.

    Raises:
        SettingError: A rule has a regular expression that cannot be used. Names the rule.
    """
    _check(rules)
    ordered = [*rules, *RULES]

    def tell(visits: pl.Series) -> pl.Series:
        return _tell(visits.struct.unnest(), ordered)

    return pl.struct("channel", *TEXTS).map_batches(tell, return_dtype=pl.String()).alias("channel")


def _check(rules: Sequence[ChannelRule]) -> None:
    for number, rule in enumerate(rules):
        for column, pattern in _patterns(rule):
            try:
                pl.Series([""]).str.contains(pattern)
            except ComputeError:
                # Python compiled it, which knows more. Polars' message would quote it again.
                raise SettingError(
                    f"channels.{number}.{column}={getattr(rule, column)}: is too large, or has "
                    "what is not supported: look-around, back-references, \\Z"
                ) from None


def _patterns(rule: ChannelRule) -> Iterator[tuple[str, str]]:
    """Column and regular expression of each thing that `rule` asks for."""
    for column in TEXTS:
        asked = getattr(rule, column)
        if isinstance(asked, str) and asked:
            yield column, f"(?i){asked}"
        elif asked:
            yield column, f"(?i)^(?:{'|'.join(map(re.escape, asked))})$"


def _tell(visits: pl.DataFrame, rules: Sequence[ChannelRule]) -> pl.Series:
    asked = [list(_patterns(rule)) for rule in rules]
    known = {column: _known(visits[column], column, asked) for column in TEXTS}
    code = {name: pl.lit(i, pl.UInt8) for i, name in enumerate(CHANNELS)}
    told = [
        pl.when(*(pl.col(column + pattern) for column, pattern in of)).then(code[rule.channel])
        for rule, of in zip(rules, asked, strict=True)
    ]
    says = pl.any_horizontal("channel", *_SPEAKING)
    default = pl.when(says).then(code["other"]).otherwise(code["direct"])
    frame = pl.concat([_own(visits["channel"]), *known.values()], how="horizontal")
    codes = frame.select(pl.coalesce("own", *told, default)).to_series()
    return pl.Series(CHANNELS).gather(codes)


def _own(channels: pl.Series) -> pl.DataFrame:
    """`own`: code of the source's own channel, null if there is no such; `channel`: any text?"""
    text = _clean(pl.col("text")).str.to_lowercase().str.replace_all(_SPACES, " ")
    codes = {name: i for i, name in enumerate(CHANNELS)}
    own = text.replace_strict(codes, default=None, return_dtype=pl.UInt8)
    return _once_a_text(channels, own=own, channel=text != "")


def _known(texts: pl.Series, column: str, asked: Sequence[list[tuple[str, str]]]) -> pl.DataFrame:
    """`column`: any text?, and which of the column's patterns are found in it, named by both."""
    text = _clean(pl.col("text"))
    if column in ("medium", "campaign", "keyword"):
        text = text.str.replace(_PLACEHOLDER, "")
    patterns = {pattern for of in asked for name, pattern in of if name == column}
    found = {column + pattern: text.str.contains(pattern) for pattern in patterns}
    return _once_a_text(texts, **{column: text != ""}, **found)


def _clean(text: pl.Expr) -> pl.Expr:
    return text.fill_null("").str.slice(0, LONGEST).str.strip_chars()


def _once_a_text(texts: pl.Series, **wanted: pl.Expr) -> pl.DataFrame:
    """`wanted` of each text, found out once for those that are alike: there are few of them."""
    texts = texts.rename("text")
    distinct = texts.unique().to_frame()
    table = distinct.select("text", **wanted)
    joined = texts.to_frame().join(
        table, on="text", how="left", nulls_equal=True, maintain_order="left"
    )
    return joined.drop("text")


# ---------------------------------------------------------------------------- the page


def page() -> str:
    """docs/channels.md, whole."""
    titles = {of.pattern: f"[{of.title}](#{_anchor(of.title)})" for of in LISTS}
    channels = fill(f"How a visit gets one of the channels {_coded(CHANNELS)}.", 100)
    parts = [INTRODUCTION.format(channels=channels, longest=LONGEST), "## Rules\n"]
    rows = [("", "Channel", *(name.replace("_", " ").capitalize() for name in TEXTS))]
    rows.append(("---",) * len(rows[0]))
    for number, rule in enumerate(RULES, start=1):
        asked = (_asked(getattr(rule, column), titles) for column in TEXTS)
        rows.append((str(number), rule.channel, *asked))
    parts.append("".join(f"| {' | '.join(row)} |\n" for row in rows))
    parts.append(LISTS_INTRODUCTION)
    parts += (_listed(of) for of in LISTS)
    return "\n".join(parts)


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-")


def _asked(asked: str | list[str], titles: dict[str, str]) -> str:
    """What a rule asks of one column, in words."""
    if isinstance(asked, list):
        return _coded(asked)
    return titles.get(asked) or {"": "", NOTHING: "nothing", A_HOST: "any address"}.get(
        asked, f"`{asked}`"
    )


def _listed(of: Words | Sources) -> str:
    if isinstance(of, Words):
        return f"{_heading(of.title)}\n{_coded(of.words.split(', '))}.\n"
    lines = [f"- Names, alone or followed by a space, `_` or `-`: {_coded(of.names.split(', '))}."]
    if of.whole:
        lines.append(f"- Names, alone: {_coded(of.whole.split(', '))}.")
    lines.append(f"- Addresses and all beneath them: {_coded(of.hosts.split())}.")
    if of.exact:
        lines.append(f"- Addresses, alone or with `www.` or `m.`: {_coded(of.exact.split())}.")
    if of.labels:
        lines.append(f"- Addresses whose first part is: {_coded(of.labels.split())}.")
    return "\n".join([_heading(of.title), *lines, ""])


def _heading(title: str) -> str:
    return f"### {title[0].upper()}{title[1:]}\n"


def _coded(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    print(page(), end="")
