"""The product's channel rules, as data: names and addresses that are known, and what they mean.

`client.channels` applies the rules and prints them (`docs/channels.md`). What a medium says in
words comes before what a source's name suggests, and a paid placement before an unpaid one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from conf.site import ChannelRule

# ---------------------------------------------------------------------------- lists


@dataclass(frozen=True)
class Words:
    """Words that may stand anywhere in a text, between anything but letters."""

    title: str
    words: str
    """Separated by commas. A space stands for nothing or one of ` ._-`, a star for any letters."""

    @property
    def pattern(self) -> str:
        """As a regular expression."""
        return rf"(?:^|[^a-z])(?:{_words(self.words)})(?:[^a-z]|$)"


@dataclass(frozen=True)
class Sources:
    """Sources of one kind, by name and by address."""

    title: str
    names: str
    """Separated by commas. The source is this, or this, a space, `_` or `-`, and more."""
    hosts: str
    """Separated by spaces. The source is this address or one beneath it, with or without a scheme
    and a path. `.*` at the end stands for any country's domain."""
    whole: str = ""
    """Names that are too common to be followed by anything. Separated by commas."""
    exact: str = ""
    """As `hosts`, but nothing beneath except www and m: for portals that have more than search."""
    labels: str = ""
    """First parts of an address, whatever follows, digits apart: `mail` for mail2.example.org."""

    @property
    def pattern(self) -> str:
        """As a regular expression."""
        start, end = r"^(?:[a-z+-]+://)?", r"(?:[:/?#]|$)"
        parts = [
            rf"^(?:{_words(self.names)})(?:[ _-]|$)",
            rf"{start}(?:[^/?#:]*\.)?(?:{_hosts(self.hosts)}){end}",
        ]
        if self.whole:
            parts.append(rf"^(?:{_words(self.whole)})$")
        if self.exact:
            parts.append(rf"{start}(?:www\.|m\.)?(?:{_hosts(self.exact)}){end}")
        if self.labels:
            parts.append(rf"{start}(?:www\.)?(?:{_hosts(self.labels)})[0-9]*\.")
        return "|".join(parts)


def _ids(names: str) -> list[str]:
    return names.split()


def _words(words: str) -> str:
    escaped = (re.escape(word) for word in words.split(", "))
    return "|".join(word.replace(r"\ ", "[ ._-]?").replace(r"\*", "[a-z]*") for word in escaped)


def _hosts(hosts: str) -> str:
    domain = r"\.(?:com?\.)?[a-z]{2,3}"
    return "|".join(re.escape(host).replace(r"\.\*", domain) for host in hosts.split())


# ---------------------------------------------------------------------------- what a text says

EMAIL = Words(
    "words for email",
    "email, emails, emailing, emailings, e mail, e mails, e mailing, mail, mails, mailing, "
    "mailings, newsletter, newsletters, edm, autoresponder",
)
ELSEWHERE = Words(
    "words for what no other channel is",
    "sms, mms, push, web push, webpush, push notification, notification, notifications, qr, "
    "qrcode, qr code, offline, print, flyer, direct mail, tv, radio, audio, "
    "podcast, ooh, dooh",
)
RETARGETING = Words(
    "words for retargeting", "rtg, rmkt, *retarget*, remarket*, re target*, re market*"
)
AFFILIATE = Words(
    "words for affiliate",
    "affiliate, affiliates, affiliation, affiliate marketing, aff, partner, partners, "
    "partnership, partnerships, partner program, cashback, coupon, coupons, rev share",
)
DISPLAY = Words(
    "words for display",
    "display, display ad, display ads, banner, banners, programmatic, rtb, dsp, interstitial, "
    "expandable, native, native ads, rich media, gdn, skyscraper, leaderboard",
)
PAID_SOCIAL = Words(
    "words for paid social",
    "paid social, paid social media, social paid, social ad, social ads, social media ads, "
    "social cpc, cpc social, social cpm, cpm social, social ppc, facebook ad, facebook ads, "
    "fb ads, instagram ads, meta ads, linkedin ads, tiktok ads, twitter ads, pinterest ads",
)
PAID_SEARCH = Words(
    "words for paid search",
    "cpc, ppc, paid search, search paid, search ad, search ads, sem, sea, adwords, google ads, "
    "bing ads, microsoft ads, pla, shopping, shopping ads, product listing ads",
)
PAID = Words(
    "words for paid",
    "paid*, cpc, ppc, cpm, vcpm, cpv, cpcv, cpa, cps, cpl, cpi, cpp, ad, ads, advert, adverts, "
    "advertising, advertisement, sponsored, promoted, boosted, sem, sea",
)
PER_ACTION = Words("words for paid per action", "cpa, cps, cpl")
PER_VIEW = Words("words for paid per view", "cpm, vcpm, cpv, cpcv, cpp")
ORGANIC = Words("words for organic search", "organic, organic search, seo, natural search")
SOCIAL = Words(
    "words for social",
    "social, social media, social network, social networks, social post, organic social, "
    "social organic, sm, smm, smo",
)
REFERRAL = Words(
    "words for referral", "referral, referrals, referrer, link, links, backlink, guest post, press"
)
DISPLAY_CAMPAIGN = Words("words for Google's display network", "gdn, display, display network")
NEWSLETTERS = Words(
    "names of newsletters", "email, emailing, e mail, e mailing, mailing, newsletter, newsletters"
)
CAMPAIGN_SEARCH = Words(
    "names of search campaigns",
    "adwords, google ads, bing ads, microsoft ads, paid search, cpc, ppc",
)
CAMPAIGN_SOCIAL = Words(
    "names of social campaigns",
    "paid social, facebook ads, fb ads, instagram ads, meta ads, linkedin ads, tiktok ads",
)
CAMPAIGN_DISPLAY = Words(
    "names of display campaigns", "banner, banners, display ads, gdn, programmatic"
)
CAMPAIGN_AFFILIATE = Words(
    "names of affiliate campaigns", "affiliate, affiliates, awin, tradedoubler"
)

# ---------------------------------------------------------------------------- who sends visits

AFFILIATES = Sources(
    "affiliate networks",
    "affiliate, affiliates, awin, affiliate window, commission junction, tradedoubler, "
    "tradetracker, impact radius, impactradius, shareasale, rakuten advertising, "
    "rakuten marketing, rakuten linkshare, linkshare, partnerize, webgains, daisycon, belboon, "
    "admitad, flexoffers, skimlinks, viglink, clickbank, digistore24, digidip, adcell, "
    "financeads, kwanko, effiliation, timeone, pepperjam, partnerstack, topcashback, quidco, "
    "shoop, igraal, retailmenot, rewardstyle",
    "awin.com awin1.com zanox.com dwin1.com cj.com anrdoezrs.net dpbolvw.net jdoqocy.com "
    "kqzyfj.com tkqlhce.com tradedoubler.com tradetracker.net tradetracker.com impact.com "
    "impactradius.com pxf.io sjv.io shareasale.com linksynergy.com rakutenadvertising.com "
    "rakutenmarketing.com partnerize.com prf.hn webgains.com daisycon.com belboon.com "
    "admitad.com flexoffers.com skimlinks.com skimresources.com viglink.com clickbank.net "
    "digistore24.com digidip.net adcell.de financeads.net kwanko.com metaffiliation.com "
    "effiliation.com pepperjam.com partnerstack.com topcashback.com topcashback.co.uk quidco.com "
    "shoop.de shoop.fr igraal.com retailmenot.com joinhoney.com shopltk.com liketoknow.it",
    whole="cj, impact, rakuten, honey, ltk",
    exact="rakuten.com",
)
RETARGETERS = Sources(
    "retargeters",
    "criteo, adroll, rtbhouse, rtb house, retargeter, perfect audience, remerge, nextroll",
    "criteo.com criteo.net adroll.com rtbhouse.com rtbhouse.net retargeter.com nextroll.com",
)
AD_NETWORKS = Sources(
    "advertising networks",
    "doubleclick, dv360, dbm, dcm, gdn, google display, google display network, googledisplay, "
    "taboola, outbrain, teads, the trade desk, thetradedesk, ttd, xandr, appnexus, adform, "
    "amazon dsp, mgid, revcontent, zemanta, seedtag, plista, ligatus, sharethrough, stackadapt, "
    "quantcast, mediamath, smartadserver, propellerads, exoclick, yahoo dsp",
    "doubleclick.net googlesyndication.com googleadservices.com taboola.com taboolanews.com "
    "outbrain.com teads.tv teads.com adsrvr.org adnxs.com adform.net amazon-adsystem.com mgid.com "
    "revcontent.com zemanta.com seedtag.com plista.com ligatus.com sharethrough.com "
    "stackadapt.com quantserve.com mathtag.com smartadserver.com rubiconproject.com pubmatic.com "
    "openx.net casalemedia.com safeframe.googlesyndication.com propellerads.com exoclick.com "
    "an.yandex.ru",
)
SEARCH_ADS = Sources(
    "search advertising",
    "google ads, google ad, google adwords, adwords, google cpc, google ppc, google shopping, "
    "googleshopping, gshopping, bing ads, bing cpc, bing shopping, microsoft ads, "
    "microsoft advertising, apple search ads, yandex direct, baidu ads, naver ads",
    "syndicatedsearch.goog adsensecustomsearchads.com",
    exact="ads.google.com ads.microsoft.com direct.yandex.ru",
)
SOCIAL_ADS = Sources(
    "social advertising",
    "facebook ad, facebook ads, facebook cpc, facebook paid, fb ad, fb ads, fb paid, "
    "instagram ad, instagram ads, ig ad, ig ads, meta ad, meta ads, meta paid, linkedin ad, "
    "linkedin ads, twitter ads, x ads, tiktok ad, tiktok ads, snapchat ads, pinterest ads, "
    "reddit ads, quora ads, youtube ads, vk ads, xing ads",
    "ads.facebook.com adsmanager.facebook.com ads.tiktok.com ads.linkedin.com ads.twitter.com "
    "ads.pinterest.com ads.reddit.com ads.vk.com",
)
PRICE_COMPARISONS = Sources(
    "price comparisons",
    "idealo, billiger, kelkoo, pricerunner, prisjakt, pricespy, twenga, shopzilla, bizrate, "
    "pricegrabber, nextag, ceneo, heureka, geizhals, guenstiger, check24, ladenzeile, stylight, "
    "lyst, trovaprezzi, leguide, beslist, kieskeurig",
    "idealo.* billiger.de kelkoo.* pricerunner.* prisjakt.nu pricespy.* twenga.* shopzilla.* "
    "bizrate.* pricegrabber.com ceneo.pl heureka.* geizhals.* guenstiger.de check24.de "
    "ladenzeile.* stylight.* lyst.* trovaprezzi.it leguide.com beslist.* kieskeurig.nl "
    "shopping.com",
)
ASSISTANTS = Sources(
    "AI assistants",
    "chatgpt, chat gpt, openai, perplexity, perplexity ai, claude ai, anthropic, google gemini, "
    "google bard, notebooklm, microsoft copilot, bing chat, deepseek, mistral ai, le chat, "
    "meta ai, grok, qwen, doubao, ernie bot, chatglm, duck ai, phind, iask, genspark",
    "chatgpt.com openai.com perplexity.ai pplx.ai claude.ai anthropic.com gemini.google.com "
    "bard.google.com notebooklm.google.com aistudio.google.com copilot.microsoft.com copilot.com "
    "copilot.cloud.microsoft m365.cloud.microsoft edgeservices.bing.com deepseek.com mistral.ai "
    "you.com poe.com meta.ai grok.com x.ai qwen.ai qwenlm.ai tongyi.com tongyi.aliyun.com "
    "doubao.com kimi.com kimi.ai kimi.moonshot.cn yuanbao.tencent.com yiyan.baidu.com "
    "ernie.baidu.com chat.baidu.com chatglm.cn z.ai pi.ai phind.com iask.ai andisearch.com "
    "komo.ai felo.ai genspark.ai liner.com monica.im duck.ai lumo.proton.me character.ai "
    "com.openai.chatgpt ai.perplexity.app.android com.anthropic.claude "
    "com.google.android.apps.bard com.microsoft.copilot",
    whole="claude, gemini, bard, copilot, mistral, poe, kimi",
)
MAILERS = Sources(
    "email senders and webmail",
    "mailchimp, klaviyo, sendgrid, mailgun, mailjet, mailerlite, brevo, sendinblue, "
    "active campaign, campaign monitor, campaignmonitor, constant contact, get response, "
    "getresponse, aweber, convertkit, omnisend, customer io, emarsys, "
    "exacttarget, sfmc, salesforce marketing cloud, marketo, pardot, hubspot email, "
    "hs email, hs automation, dotdigital, dotmailer, cleverreach, rapidmail, inxmail, optivo, "
    "episerver campaign, moosend, beehiiv, benchmark email, responsys, gmail, google mail, "
    "hotmail, yahoo mail, proton mail",
    "list-manage.com mailchi.mp klaviyo.com klaviyomail.com createsend.com cmail19.com cmail20.com "
    "sendgrid.net mailgun.org mailjet.com mlsend.com sendinblue.com sibforms.com activehosted.com "
    "rs6.net getresponse.com aweber.com convertkit-mail.com exct.net mktoweb.com cleverreach.com "
    "mail.google.com mail.yahoo.com mail.yahoo.co.jp mail.yahoo.net mail.aol.com outlook.live.com "
    "mail.live.com outlook.office.com outlook.office365.com outlook.com hotmail.com "
    "safelinks.protection.outlook.com mail.proton.me mail.protonmail.com mail.qq.com mail.163.com "
    "e.mail.ru mail.yandex.ru mail.yandex.com mail.naver.com mail.daum.net deref-gmx.net "
    "deref-gmx.com deref-web.de navigator.gmx.net bap.navigator.gmx.net navigator.web.de "
    "email.t-online.de tutanota.com tuta.com posteo.de fastmail.com app.fastmail.com hey.com "
    "superhuman.com com.google.android.gm com.microsoft.office.outlook com.yahoo.mobile.client "
    "ch.protonmail.android com.samsung.android.email.provider",
    whole="mail, outlook, drip, iterable",
    labels="mail webmail email e-mail gmail newsletter roundcube zimbra owa poczta posta "
    "messagerie correo correio webmailcluster",
)
NETWORKS = Sources(
    "social networks",
    "facebook, fb, facebook messenger, instagram, ig, twitter, linkedin, "
    "pinterest, reddit, tiktok, tik tok, snapchat, youtube, yt, vimeo, tumblr, vk, vkontakte, "
    "odnoklassniki, xing, weibo, sina weibo, wechat, weixin, qzone, douyin, xiaohongshu, "
    "rednote, bilibili, zhihu, douban, kuaishou, renren, kakaotalk, mixi, bluesky, bsky, "
    "mastodon, telegram, whatsapp, discord, quora, hacker news, hackernews, twitch, nextdoor, "
    "flickr, myspace, livejournal, truth social, rumble, clubhouse, bereal, foursquare, plurk, "
    "viadeo, wykop, hootsuite, sprout social, linktree, link in bio",
    "facebook.com fb.com fb.me fb.watch messenger.com m.me instagram.com ig.me threads.net "
    "threads.com twitter.com x.com t.co linkedin.com lnkd.in pinterest.* pin.it reddit.com "
    "redd.it tiktok.com snapchat.com youtube.com youtu.be vimeo.com tumblr.com vk.com vk.ru "
    "vkontakte.ru vkvideo.ru ok.ru odnoklassniki.ru my.mail.ru dzen.ru xing.com weibo.com "
    "weibo.cn t.cn weixin.qq.com wechat.com qzone.qq.com douyin.com xiaohongshu.com xhslink.com "
    "bilibili.com zhihu.com douban.com kuaishou.com renren.com tieba.baidu.com line.me lin.ee "
    "story.kakao.com band.us mixi.jp bsky.app bsky.social mastodon.social mastodon.online "
    "mstdn.social mstdn.jp mas.to mastodon.world fosstodon.org hachyderm.io infosec.exchange "
    "lemmy.world lemmy.ml t.me telegram.me telegram.org whatsapp.com wa.me discord.com "
    "discordapp.com quora.com news.ycombinator.com twitch.tv nextdoor.com flickr.com myspace.com "
    "livejournal.com plurk.com truthsocial.com gettr.com gab.com parler.com mewe.com minds.com "
    "rumble.com clubhouse.com bere.al foursquare.com viadeo.com skyrock.com nk.pl wykop.pl "
    "taringa.net draugiem.lv hi5.com tagged.com meetup.com goodreads.com hootsuite.com ow.ly "
    "buff.ly sprout.link linktr.ee linkin.bio beacons.ai com.facebook.katana com.facebook.orca "
    "com.instagram.android com.linkedin.android com.twitter.android com.pinterest "
    "com.reddit.frontpage com.zhiliaoapp.musically com.snapchat.android "
    "org.telegram.messenger com.whatsapp com.google.android.youtube",
    whole="x, messenger, insta, meta, threads, line, buffer, later",
)
ENGINES = Sources(
    "search engines",
    "google, bing, yahoo, yahoo!, duckduckgo, duck duck go, ddg, ecosia, qwant, brave search, "
    "startpage, yandex, baidu, naver, daum, seznam, kagi, sogou, haosou, 360search, "
    "shenma, mojeek, swisscows, metager, aol, lycos, dogpile, coc coc, coccoc, "
    "presearch, rambler, msn, t online, suche t online, gmb",
    "bing.com duckduckgo.com ecosia.org qwant.com search.brave.com startpage.com startpage.nl "
    "search.yahoo.com search.yahoo.co.jp search.naver.com search.daum.net search.seznam.cz "
    "search.aol.* suche.aol.de recherche.aol.fr kagi.com sogou.com so.com haosou.com sm.cn "
    "so.toutiao.com mojeek.com swisscows.com swisscows.ch metager.de metager.org ask.com "
    "search.lycos.* dogpile.com webcrawler.com info.com excite.com go.mail.ru nova.rambler.ru "
    "coccoc.com presearch.com presearch.org lilo.org ekoru.org oceanhero.today givero.com "
    "gibiru.com yep.com suche.t-online.de suche.gmx.net search.gmx.com suche.web.de "
    "suche.freenet.de suche.1und1.de search.msn.com ricerca.libero.it ricerca.virgilio.it "
    "arianna.libero.it szukaj.wp.pl szukaj.onet.pl pesquisa.sapo.pt search.walla.co.il "
    "search.biglobe.ne.jp search.goo.ne.jp search.auone.jp search.smt.docomo.ne.jp "
    "search.nifty.com websearch.rakuten.co.jp search.bluewin.ch search.ch eniro.se "
    "search.orange.fr lemoteur.orange.fr search.avira.com search.norton.com "
    "search.comcast.net search.earthlink.net com.google.android.googlequicksearchbox "
    "com.duckduckgo.mobile.android",
    whole="ask, brave",
    exact="google.* images.google.* news.google.* maps.google.* shopping.google.* books.google.* "
    "scholar.google.* video.google.* cse.google.* lens.google.com encrypted.google.com "
    "yahoo.* r.search.yahoo.com yandex.* ya.ru baidu.com naver.com daum.net seznam.cz aol.com "
    "rambler.ru msn.com",
)

PAID_SEARCH_IDS = _ids("gclid gbraid wbraid gclsrc msclkid yclid bd_vid qhclickid s_kwcid")
GOOGLE_ADS_IDS = _ids("gclid gbraid wbraid")
PAID_SOCIAL_IDS = _ids("ttclid li_fat_id twclid sccid rdt_cid epik qclid rb_clickid")
DISPLAY_IDS = _ids("dclid dicbo tblci auctid")
RETARGETING_IDS = _ids("cto_pld")
AFFILIATE_IDS = _ids(
    "irclickid irgwc awc cjevent cjdata tduid zanpid sscid ranmid ransiteid raneaid clickref "
    "admitad_uid wgu affid aff_id affiliate_id"
)
EMAIL_IDS = _ids("mc_eid mc_cid _kx _ke _hsenc _hsmi mkt_tok vero_id dm_i ml_subscriber")
SOCIAL_IDS = _ids("fbclid igshid igsh")
SEARCH_IDS = _ids("ysclid srsltid")

# ---------------------------------------------------------------------------- rules

NOTHING = "^$"
A_HOST = r"^(?:[a-z+-]+://)?(?:[\w-]+\.)+[a-z]{2,}(?:[:/?#]|$)"

RULES = (
    # What a medium or a click id says is not argued with. An fbclid is on unpaid links too.
    ChannelRule("other", medium=ELSEWHERE.pattern),
    ChannelRule("email", medium=EMAIL.pattern),
    ChannelRule("retargeting", campaign=RETARGETING.pattern),
    ChannelRule("retargeting", medium=RETARGETING.pattern),
    ChannelRule("retargeting", medium=PAID.pattern, keyword=RETARGETING.pattern),
    ChannelRule("affiliate", medium=AFFILIATE.pattern),
    ChannelRule("display", medium=DISPLAY.pattern),
    ChannelRule("paid social", medium=PAID_SOCIAL.pattern),
    ChannelRule("retargeting", click_id=RETARGETING_IDS),
    ChannelRule("affiliate", click_id=AFFILIATE_IDS),
    ChannelRule("display", click_id=DISPLAY_IDS),
    ChannelRule("paid social", click_id=PAID_SOCIAL_IDS),
    ChannelRule("paid social", medium=PAID.pattern, click_id=SOCIAL_IDS),
    ChannelRule("display", campaign=DISPLAY_CAMPAIGN.pattern, click_id=GOOGLE_ADS_IDS),
    ChannelRule("paid search", click_id=PAID_SEARCH_IDS),
    # Search engines may be called like something else below: Rakuten, Google Shopping.
    ChannelRule("organic search", referrer_type=["search"], medium=NOTHING),
    # Who was paid. Retargeters also sell to strangers; a site that buys that says so in the medium.
    ChannelRule("affiliate", source=AFFILIATES.pattern),
    ChannelRule("display", source=RETARGETERS.pattern, medium=PER_VIEW.pattern),
    ChannelRule("retargeting", source=RETARGETERS.pattern),
    ChannelRule("paid social", source=SOCIAL_ADS.pattern),
    ChannelRule("paid social", source=NETWORKS.pattern, medium=PAID.pattern),
    ChannelRule("paid social", referrer_type=["social"], medium=PAID.pattern),
    ChannelRule(
        "display",
        source=ENGINES.pattern,
        medium=PAID.pattern,
        campaign=DISPLAY_CAMPAIGN.pattern,
    ),
    ChannelRule("organic search", source=ENGINES.pattern, medium=ORGANIC.pattern),
    ChannelRule("paid search", source=SEARCH_ADS.pattern),
    ChannelRule("paid search", source=ENGINES.pattern, medium=PAID.pattern),
    ChannelRule("paid search", referrer_type=["search"], medium=PAID.pattern),
    ChannelRule("display", source=AD_NETWORKS.pattern),
    ChannelRule("paid search", source=PRICE_COMPARISONS.pattern, medium=PAID.pattern),
    ChannelRule("paid search", medium=PAID_SEARCH.pattern),
    ChannelRule("affiliate", medium=PER_ACTION.pattern),
    ChannelRule("display", medium=PER_VIEW.pattern),
    # Unpaid. Assistants and webmail come first: gemini.google.com and mail.google.com are Google's.
    ChannelRule("ai assistant", referrer_type=["ai assistant"]),
    ChannelRule("ai assistant", source=ASSISTANTS.pattern),
    ChannelRule("email", source=MAILERS.pattern),
    ChannelRule("email", source=NEWSLETTERS.pattern),
    ChannelRule("email", click_id=EMAIL_IDS),
    ChannelRule("organic social", source=NETWORKS.pattern),
    ChannelRule("organic social", medium=SOCIAL.pattern),
    ChannelRule("organic social", referrer_type=["social"]),
    ChannelRule("organic social", click_id=SOCIAL_IDS),
    ChannelRule("organic search", source=ENGINES.pattern),
    ChannelRule("organic search", medium=ORGANIC.pattern),
    ChannelRule("organic search", referrer_type=["search"]),
    ChannelRule("organic search", click_id=SEARCH_IDS),
    # A campaign that only has a name, as in a Matomo without a plugin for campaigns.
    ChannelRule("email", source=NOTHING, medium=NOTHING, campaign=NEWSLETTERS.pattern),
    ChannelRule("paid social", source=NOTHING, medium=NOTHING, campaign=CAMPAIGN_SOCIAL.pattern),
    ChannelRule("paid search", source=NOTHING, medium=NOTHING, campaign=CAMPAIGN_SEARCH.pattern),
    ChannelRule("display", source=NOTHING, medium=NOTHING, campaign=CAMPAIGN_DISPLAY.pattern),
    ChannelRule("affiliate", source=NOTHING, medium=NOTHING, campaign=CAMPAIGN_AFFILIATE.pattern),
    # The rest.
    ChannelRule("referral", referrer_type=["website"]),
    ChannelRule("referral", medium=REFERRAL.pattern),
    ChannelRule("referral", source=A_HOST, medium=NOTHING),
    ChannelRule("direct", source=r"^\(?direct\)?$"),
    ChannelRule("direct", referrer_type=["direct"]),
)
"""The first that fits tells the channel. A text that is not there is empty."""

LISTS = (
    EMAIL,
    ELSEWHERE,
    RETARGETING,
    AFFILIATE,
    DISPLAY,
    PAID_SOCIAL,
    PAID_SEARCH,
    PAID,
    PER_ACTION,
    PER_VIEW,
    ORGANIC,
    SOCIAL,
    REFERRAL,
    DISPLAY_CAMPAIGN,
    NEWSLETTERS,
    CAMPAIGN_SOCIAL,
    CAMPAIGN_SEARCH,
    CAMPAIGN_DISPLAY,
    CAMPAIGN_AFFILIATE,
    AFFILIATES,
    RETARGETERS,
    AD_NETWORKS,
    SEARCH_ADS,
    SOCIAL_ADS,
    PRICE_COMPARISONS,
    ASSISTANTS,
    MAILERS,
    NETWORKS,
    ENGINES,
)
"""What the rules name, for the page."""
