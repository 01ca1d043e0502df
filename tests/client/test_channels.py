from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.channel_table import A_HOST, LISTS, NOTHING, RULES, Words
from client.channels import LONGEST, TEXTS, channel
from client.sources.source import VISITS
from conf.schema import SettingError
from conf.site import CHANNELS, ChannelRule

ROOT = Path(__file__).parents[2]
COLUMNS = ("channel", *TEXTS)


def frame(*visits: dict[str, str | None]) -> pl.DataFrame:
    rows = [{column: visit.get(column) for column in COLUMNS} for visit in visits]
    return pl.DataFrame(rows, schema={column: VISITS[column] for column in COLUMNS})


def told(*visits: dict[str, str | None], rules: tuple[ChannelRule, ...] = ()) -> list[str]:
    return frame(*visits).select(channel(rules))["channel"].to_list()


def matomo(kind: str, name: str | None = None) -> dict[str, str | None]:
    """A visit as Matomo tells it: the kind of referrer and its name, a campaign's with no more."""
    return {"referrer_type": kind, ("campaign" if kind == "campaign" else "source"): name}


def tagged(
    source: str | None, medium: str | None = None, campaign: str | None = None, **more: str
) -> dict[str, str | None]:
    """A visit as GA4, or a table of utm_source, utm_medium and utm_campaign, tells it."""
    return {"source": source, "medium": medium, "campaign": campaign, **more}


def clicked(
    click_id: str, source: str | None = None, medium: str | None = None, campaign: str | None = None
) -> dict[str, str | None]:
    """The same with a click id in the landing address."""
    return {**tagged(source, medium, campaign), "click_id": click_id}


CASES: list[tuple[str, dict[str, str | None]]] = [
    # Matomo
    ("direct", matomo("direct")),
    ("organic search", matomo("search", "Google")),
    ("organic search", matomo("search", "Yahoo! Images")),
    ("organic search", matomo("search", "Google Shopping")),
    ("organic search", matomo("search", "Rakuten")),
    ("organic search", {**matomo("search", "no engine"), "medium": "something"}),
    ("paid search", {**matomo("search", "no engine"), "medium": "paid"}),
    ("paid social", {**matomo("social", "no network"), "medium": "paid"}),
    ("organic search", matomo("search", "an engine that nobody knows")),
    ("organic social", matomo("social", "Facebook")),
    ("organic social", matomo("social", "Vkontakte")),
    ("organic social", matomo("social", "a network that nobody knows")),
    ("ai assistant", matomo("ai assistant", "ChatGPT")),
    ("ai assistant", matomo("ai assistant", "You")),
    ("ai assistant", matomo("website", "chatgpt.com")),
    ("ai assistant", matomo("website", "www.perplexity.ai")),
    ("referral", matomo("website", "www.example.org")),
    ("referral", matomo("website", "forum.notgoogle.com")),
    ("email", matomo("website", "mail.google.com")),
    ("email", matomo("website", "webmail.provider.example")),
    ("organic social", matomo("website", "bsky.app")),
    ("affiliate", matomo("website", "www.awin1.com")),
    ("display", matomo("website", "googleads.g.doubleclick.net")),
    ("email", matomo("campaign", "Newsletter-2024-03")),
    ("paid search", matomo("campaign", "Google Ads - Brand")),
    ("paid social", matomo("campaign", "fb_ads_spring")),
    ("display", matomo("campaign", "banner_home")),
    ("affiliate", matomo("campaign", "awin 2024")),
    ("retargeting", matomo("campaign", "Cart Retargeting 14d")),
    ("other", matomo("campaign", "Spring sale")),
    ("paid search", {**matomo("campaign", "Brand"), "source": "google", "medium": "cpc"}),
    ("other", matomo("campaign")),
    ("paid search", {**matomo("search", "Google"), "click_id": "gclid"}),
    # GA4 and utm: search
    ("organic search", tagged("google", "organic")),
    ("organic search", tagged("google", "organic", "(organic)")),
    ("organic search", tagged("bing", "organic")),
    ("organic search", tagged("duckduckgo", "(not set)")),
    ("organic search", tagged("ecosia.org", "organic")),
    ("organic search", tagged("www.google.co.uk", "referral")),
    ("organic search", tagged("google.com.br", "referral")),
    ("organic search", tagged("news.google.co.uk", "referral")),
    ("organic search", tagged("de.search.yahoo.com", "referral")),
    ("organic search", tagged("yandex.ru", "referral")),
    ("organic search", tagged("go.mail.ru")),
    ("organic search", tagged("search.brave.com", "referral")),
    ("organic search", tagged("https://www.google.com/search?q=shoes")),
    ("organic search", tagged("android-app://com.google.android.googlequicksearchbox/")),
    ("organic search", tagged("shop-free-listings", "organic")),
    ("organic search", tagged("kagi.com")),
    ("organic search", tagged("search.naver.com", "referral")),
    ("organic search", tagged("www.baidu.com", "referral")),
    ("organic search", tagged("search.seznam.cz")),
    ("organic search", clicked("srsltid", "google", "organic")),
    ("organic search", clicked("ysclid")),
    ("paid search", tagged("google", "cpc")),
    ("paid search", tagged("Google", "CPC", "Brand | DE")),
    ("paid search", tagged("bing", "ppc")),
    ("paid search", tagged("google", "paid_search")),
    ("paid search", tagged("google", "sem")),
    ("paid search", tagged("google_ads", "brand")),
    ("paid search", tagged("adwords")),
    ("paid search", tagged("baidu", "paid")),
    ("paid search", tagged("google", "shopping")),
    ("paid search", tagged("GoogleShopping")),
    ("paid search", tagged("google", "cpc", "Shopping | All products")),
    ("paid search", tagged("google", "cpc", "cross-network")),
    ("paid search", tagged("idealo", "cpc")),
    ("paid search", tagged("kelkoo.co.uk", "paid")),
    ("paid search", tagged("somebody", "cpc")),
    ("paid search", tagged("chatgpt.com", "cpc")),
    ("paid search", clicked("gclid")),
    ("paid search", clicked("GCLID", "google", "organic")),
    ("paid search", clicked("wbraid", "(direct)", "(none)")),
    ("paid search", clicked("gbraid", "google")),
    ("paid search", clicked("msclkid", "bing")),
    ("paid search", clicked("yclid", "yandex")),
    # social
    ("organic social", tagged("facebook.com", "referral")),
    ("organic social", tagged("m.facebook.com", "referral")),
    ("organic social", tagged("l.instagram.com", "referral")),
    ("organic social", tagged("t.co", "referral")),
    ("organic social", tagged("lnkd.in")),
    ("organic social", tagged("out.reddit.com", "referral")),
    ("organic social", tagged("de.pinterest.com", "referral")),
    ("organic social", tagged("pinterest.co.uk", "referral")),
    ("organic social", tagged("youtube.com", "referral")),
    ("organic social", tagged("youtube", "video")),
    ("organic social", tagged("facebook", "organic")),
    ("organic social", tagged("ig", "story")),
    ("organic social", tagged("X", "post")),
    ("organic social", tagged("away.vk.com", "referral")),
    ("organic social", tagged("my.mail.ru")),
    ("organic social", tagged("xing", "social")),
    ("organic social", tagged("weibo.com")),
    ("organic social", tagged("l.threads.net", "referral")),
    ("organic social", tagged("mastodon.social", "referral")),
    ("organic social", tagged("android-app://com.linkedin.android/")),
    ("organic social", tagged("our page", "social-media")),
    ("organic social", tagged("hootsuite", "organic_social")),
    ("organic social", clicked("fbclid")),
    ("organic social", clicked("fbclid", "m.facebook.com", "referral")),
    ("organic social", clicked("fbclid", "spring", "story")),
    ("paid social", clicked("fbclid", "spring", "paid")),
    ("paid social", clicked("fbclid", None, "cpc")),
    ("paid social", tagged("facebook", "cpc")),
    ("paid social", tagged("fb", "paid")),
    ("paid social", tagged("facebook", "cpm")),
    ("paid social", tagged("instagram", "Paid_Social")),
    ("paid social", tagged("linkedin", "sponsored")),
    ("paid social", tagged("agency", "paidsocial")),
    ("paid social", tagged("facebook_ads")),
    ("paid social", tagged("youtube", "cpv")),
    ("paid social", tagged("meta", "ads")),
    ("paid social", clicked("ttclid")),
    ("paid social", clicked("li_fat_id", "linkedin", "social")),
    ("paid social", clicked("twclid")),
    ("paid social", clicked("ScCid")),
    # email
    ("email", tagged("newsletter", "email")),
    ("email", tagged("march", "e-mail")),
    ("email", tagged("crm", "Email_Automation")),
    ("email", tagged("mailchimp")),
    ("email", tagged("Klaviyo", "flow")),
    ("email", tagged("weekly-newsletter", "(not set)")),
    ("email", tagged("facebook", "email")),
    ("email", tagged("us-mg5.mail.yahoo.com", "referral")),
    ("email", tagged("outlook.live.com", "referral")),
    ("email", tagged("android-app://com.google.android.gm/")),
    ("email", tagged("e.mail.ru", "referral")),
    ("email", tagged("poczta.onet.pl", "referral")),
    ("email", tagged("deref-web.de", "referral")),
    ("email", tagged("crm", "email", "win-back retargeting")),
    ("email", clicked("mc_eid")),
    # display
    ("display", tagged("google", "display")),
    ("display", tagged("portal.example", "banner")),
    ("display", tagged("dv360", "cpm")),
    ("display", tagged("somebody", "cpm")),
    ("display", tagged("taboola", "cpc")),
    ("display", tagged("Outbrain", "native")),
    ("display", tagged("tpc.googlesyndication.com", "referral")),
    ("display", tagged("google", "cpc", "GDN_prospecting")),
    ("display", clicked("gclid", "google", "cpc", campaign="DE | Display | Prospecting")),
    ("display", clicked("dclid")),
    ("display", tagged("criteo", "display")),
    ("display", tagged("criteo", "cpm")),
    # retargeting
    ("retargeting", tagged("criteo", "cpc")),
    ("retargeting", tagged("criteo", "retargeting")),
    ("retargeting", tagged("AdRoll")),
    ("retargeting", clicked("cto_pld")),
    ("retargeting", tagged("facebook", "cpc", "FBRetargeting_Q3")),
    ("retargeting", tagged("google", "cpc", "Remarketing - cart")),
    ("retargeting", tagged("google", "display", "re-targeting")),
    ("retargeting", tagged("google", "cpc", keyword="remarketing_all_visitors")),
    ("organic search", tagged("google", "organic", keyword="what is remarketing")),
    ("paid search", tagged("google", "cpc", "pre-market launch")),
    # affiliate
    ("affiliate", tagged("awin", "affiliate")),
    ("affiliate", tagged("blog.example", "Affiliates")),
    ("affiliate", tagged("tradedoubler", "cpc")),
    ("affiliate", tagged("cj")),
    ("affiliate", tagged("impact", "referral")),
    ("affiliate", tagged("go.linksynergy.com", "referral")),
    ("affiliate", tagged("vouchers.example", "partner")),
    ("affiliate", tagged("somebody", "cpa")),
    ("affiliate", clicked("irclickid")),
    ("affiliate", clicked("awc", "blog.example")),
    ("affiliate", clicked("cjevent")),
    # AI assistants
    ("ai assistant", tagged("chatgpt.com")),
    ("ai assistant", tagged("chatgpt.com", "(not set)")),
    ("ai assistant", tagged("chat.openai.com", "referral")),
    ("ai assistant", tagged("gemini.google.com", "referral")),
    ("ai assistant", tagged("copilot.microsoft.com", "referral")),
    ("ai assistant", tagged("edgeservices.bing.com", "referral")),
    ("ai assistant", tagged("claude.ai", "referral")),
    ("ai assistant", tagged("chat.deepseek.com", "referral")),
    ("ai assistant", tagged("chat.mistral.ai")),
    ("ai assistant", tagged("you.com")),
    ("ai assistant", tagged("poe.com")),
    ("ai assistant", tagged("www.meta.ai")),
    ("ai assistant", tagged("perplexity", "ai")),
    # referral
    ("referral", tagged("blog.example.org", "referral")),
    ("referral", tagged("blog.example.org")),
    ("referral", tagged("https://partner.example/page?x=google.com")),
    ("referral", tagged("docs.google.com", "referral")),
    ("referral", tagged("finance.yahoo.com", "referral")),
    ("referral", tagged("notgoogle.com", "referral")),
    ("referral", tagged("google.com.evil.example", "referral")),
    ("referral", tagged("notfacebook.com")),
    ("referral", tagged("x.com.example")),
    ("referral", tagged("art.co")),
    ("referral", tagged("idealo.de", "referral")),
    ("referral", tagged("münchen.example")),
    # direct
    ("direct", {}),
    ("direct", tagged("(direct)", "(none)")),
    ("direct", tagged("(direct)", "(not set)", "(direct)")),
    ("direct", tagged(None, "(none)", "(not set)")),
    ("direct", tagged("", "", "", click_id="", referrer_type="")),
    ("direct", tagged("  ", "\t")),
    ("direct", {"keyword": "shoes"}),
    ("direct", {"referrer_type": "direct", "source": "(direct)"}),
    # other
    ("other", tagged("(not set)", "(not set)")),
    ("other", tagged("sms", "sms")),
    ("other", tagged("klaviyo", "sms")),
    ("other", tagged("crm", "web_push")),
    ("other", tagged("flyer", "qr-code")),
    ("other", tagged("catalogue", "direct mail")),
    ("other", tagged("somebody", "something")),
    ("other", tagged("somebody", "paid")),
    ("other", tagged(None, None, "spring")),
    ("other", clicked("new_click_id")),
]


@pytest.fixture(scope="module")
def channels() -> list[str]:
    """Those of all cases, told at once."""
    return told(*(visit for _, visit in CASES))


@pytest.mark.parametrize(
    "number",
    range(len(CASES)),
    ids=[" / ".join(filter(None, visit.values())) or "nothing" for _, visit in CASES],
)
def test_channel_of_a_visit(number: int, channels: list[str]) -> None:
    assert channels[number] == CASES[number][0]


def test_there_are_many_cases_for_every_channel() -> None:
    counts = {name: sum(expected == name for expected, _ in CASES) for name in CHANNELS}
    assert min(counts.values()) >= 8, counts
    assert sum(counts.values()) >= 120


def test_a_visit_alone_has_the_channel_that_it_has_among_others() -> None:
    for expected, visit in CASES[::15]:
        assert told(visit) == [expected]


def test_upper_and_lower_case_are_alike() -> None:
    shouted = [{k: v and v.upper() for k, v in visit.items()} for _, visit in CASES]
    padded = [{k: v and f" {v}\n" for k, v in visit.items()} for _, visit in CASES]
    assert told(*shouted) == told(*padded) == [expected for expected, _ in CASES]


@pytest.mark.parametrize("name", CHANNELS)
def test_the_sources_own_channel_comes_first(name: str) -> None:
    rule = ChannelRule("referral", source="google")
    for spelt in (name, name.upper(), name.replace(" ", "_"), f" {name.replace(' ', '-')} "):
        visit = {**tagged("google", "cpc"), "channel": spelt}
        assert told(visit, rules=(rule,)) == [name]


def test_an_own_channel_outside_the_taxonomy_leaves_it_to_the_rules() -> None:
    assert told({**tagged("google", "cpc"), "channel": "SEA brand"}) == ["paid search"]
    assert told({"channel": "SEA brand"}, {"channel": ""}) == ["other", "direct"]


def test_the_sites_rules_come_first_and_in_order() -> None:
    rules = (
        ChannelRule("email", campaign="^crm_"),
        ChannelRule("affiliate", source=r"^blog\.example$", medium="CPC|ppc"),
        ChannelRule("display", click_id=["XYZ_id"]),
        ChannelRule("other", referrer_type=["website", "social"], keyword="^$"),
        ChannelRule("referral", campaign="^crm_google"),
        ChannelRule("direct", keyword="^only$"),
    )
    visits = [
        tagged("google", "cpc", "CRM_google"),
        tagged("blog.example", "ppc"),
        tagged("blog.example", "cpc"),
        tagged("blog.example"),
        tagged("shop.blog.example", "cpc"),
        tagged("google", "cpc", click_id="xyz_ID"),
        matomo("social", "Facebook"),
        {**matomo("social", "Facebook"), "keyword": "shoes"},
        {**tagged("google", "cpc"), "keyword": "only"},
    ]
    expected = ["email", "affiliate", "affiliate", "referral", "paid search", "display", "other"]
    assert told(*visits, rules=rules) == [*expected, "organic social", "direct"]


def test_a_rule_that_fits_all_leaves_nothing_to_the_product() -> None:
    assert set(
        told(*(visit for _, visit in CASES), rules=(ChannelRule("other", source=".*"),))
    ) == {"other"}


def test_alternatives_of_a_rule_are_all_without_regard_to_case() -> None:
    rules = (ChannelRule("email", source="alpha|beta"), ChannelRule("display", click_id=["a.b"]))
    visits = [tagged("ALPHA"), tagged("BETA"), tagged("alphabet"), clicked("A.B"), clicked("axb")]
    assert told(*visits, rules=rules) == ["email", "email", "email", "display", "other"]


@pytest.mark.parametrize(
    "pattern",
    [r"^(?!google)", r"(?<=a)b", r"(a)\1", r"(?P<n>a)(?P=n)", r"a\Z", "((a{1000}){1000}){9}"],
)
def test_a_pattern_that_only_python_knows_is_refused_by_name(pattern: str) -> None:
    good = ChannelRule("email", source="crm")
    with pytest.raises(SettingError, match=r"^channels\.1\.campaign=.*supported") as refusal:
        channel([good, ChannelRule("email", source="crm", campaign=pattern)])
    assert refusal.value.__cause__ is None
    assert "\n" not in str(refusal.value)


def test_there_may_be_many_rules() -> None:
    rules = tuple(ChannelRule("email", source=f"^source {i}$") for i in range(500))
    assert told(tagged("source 499"), tagged("google"), rules=rules) == ["email", "organic search"]


def test_no_visits() -> None:
    assert told() == []


def test_only_the_channel_changes() -> None:
    visits = frame(*(visit for _, visit in CASES))
    after = visits.with_columns(channel=channel())
    assert after.drop("channel").equals(visits.drop("channel"))
    assert after.schema == visits.schema
    assert after.lazy().collect().equals(visits.lazy().with_columns(channel=channel()).collect())


def test_huge_texts_do_not_hurt() -> None:
    huge = "é" * 100_000
    visits: list[dict[str, str | None]] = [
        {column: f"{column} {i} {huge}" for column in COLUMNS if column != "channel"}
        for i in range(100)
    ]
    started = time.perf_counter()
    assert set(told(*visits)) == {"other"}
    assert time.perf_counter() - started < 5
    assert told(tagged("google " + huge, "cpc " + huge)) == ["paid search"]
    assert told(tagged("x" * LONGEST + " newsletter")) == ["other"]


ANY_TEXT = st.none() | st.text(max_size=30)
LIKELY_TEXT = st.sampled_from(
    [
        None,
        "",
        "google",
        "facebook",
        "cpc",
        "paid social",
        "(none)",
        "(direct)",
        "gclid",
        "fbclid",
        "social",
        "search",
        "mail.google.com",
        "retargeting",
        "direct",
        "https://",
        "..",
        "\x00",
        "İ",
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.fixed_dictionaries(dict.fromkeys(COLUMNS, ANY_TEXT | LIKELY_TEXT)), max_size=40))
def test_any_text_gives_a_channel_of_the_taxonomy(visits: list[dict[str, str | None]]) -> None:
    channels = told(*visits)
    assert len(channels) == len(visits)
    assert set(channels) <= set(CHANNELS)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["google.com", "facebook.com", "awin.com"]), st.text("abcxyz09-", min_size=1)
)
def test_an_address_ends_at_a_dot(host: str, more: str) -> None:
    beside = [f"{more}{host}", f"{host}{more}", f"{host}.{more}.example"]
    assert set(told(*(tagged(source, "referral") for source in beside))) == {"referral"}


# ---------------------------------------------------------------------------- the table


def test_every_channel_has_a_rule_and_every_rule_a_case() -> None:
    assert {rule.channel for rule in RULES} == set(CHANNELS)
    visits = [visit for _, visit in CASES]
    all_others = ChannelRule("other", source="^")
    unused = []
    for number, rule in enumerate(RULES, start=1):
        before = [replace(earlier, channel="other") for earlier in RULES[: number - 1]]
        rules = (*before, replace(rule, channel="direct"), all_others)
        if "direct" not in told(*visits, rules=rules):
            unused.append(number)
    assert unused == []


def test_names_and_addresses_are_listed_once() -> None:
    for of in LISTS:
        if isinstance(of, Words):
            listed = [of.words.split(", ")]
        else:
            listed = [
                of.names.split(", ") + of.whole.split(", "),
                of.hosts.split() + of.exact.split(),
                of.labels.split(),
            ]
        for names in listed:
            assert len(set(names)) == len(names), of.title
            assert all(name == name.strip().lower() for name in names), of.title


def test_every_name_and_address_is_found() -> None:
    for of in LISTS:
        if isinstance(of, Words):
            names = of.words.replace("*", "").split(", ")
        else:
            hosts = [host.replace(".*", ".co.uk") for host in of.hosts.split()]
            exact = [host.replace(".*", ".com.br") for host in of.exact.split()]
            names = [*of.names.split(", "), *hosts, *(f"https://a.b.{host}/" for host in hosts)]
            names += [*exact, *(f"www.{host}" for host in exact)]
            names += [f"{label}2.example" for label in of.labels.split()]
        found = pl.Series(names).str.contains(f"(?i){of.pattern}")
        assert [name for name, there in zip(names, found, strict=True) if not there] == []


def test_the_page_is_what_python_m_client_channels_prints() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "client.channels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert (ROOT / "docs" / "channels.md").read_text() == printed, (
        "write it anew: python -m client.channels > docs/channels.md"
    )


def test_the_page_has_every_rule_and_every_list() -> None:
    page = (ROOT / "docs" / "channels.md").read_text()
    for number, rule in enumerate(RULES, start=1):
        assert f"| {number} | {rule.channel} |" in page
    patterns = {of.pattern for of in LISTS} | {"", NOTHING, A_HOST, r"^\(?direct\)?$"}
    assert {getattr(rule, name) for rule in RULES for name in TEXTS[1:5]} <= patterns
    for of in LISTS:
        names = of.words if isinstance(of, Words) else f"{of.names}, {of.hosts.replace(' ', ', ')}"
        assert all(f"`{name}`" in page for name in names.split(", "))
    headings = {
        re.sub(r"[^a-z -]", "", line[4:].lower()).replace(" ", "-")
        for line in page.splitlines()
        if line.startswith("### ")
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", page)) <= headings
