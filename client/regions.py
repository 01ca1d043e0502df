"""From a visitor's country to its region of the world.

A region says less about who the visitor is, and enough of market and season. The regions are the
sub-regions of the United Nations' M49 standard, the finer ones where it has two levels.
"""

from __future__ import annotations

import polars as pl

UNKNOWN = "unknown"
"""The region of a visitor whose country is not told."""

COUNTRIES = {
    "northern africa": "dz eg eh ly ma sd tn",
    "eastern africa": "bi dj er et io ke km mg mu mw mz re rw sc so ss tf tz ug yt zm zw",
    "middle africa": "ao cd cf cg cm ga gq st td",
    "southern africa": "bw ls na sz za",
    "western africa": "bf bj ci cv gh gm gn gw lr ml mr ne ng sh sl sn tg",
    "northern america": "bm ca gl pm us",
    "central america": "bz cr gt hn mx ni pa sv",
    "caribbean": "ag ai aw bb bl bq bs cu cw dm do gd gp ht jm kn ky lc mf mq ms pr sx tc tt vc "
    "vg vi",
    "south america": "ar bo br bv cl co ec fk gf gs gy pe py sr uy ve",
    "central asia": "kg kz tj tm uz",
    "eastern asia": "cn hk jp kp kr mn mo tw",
    "south-eastern asia": "bn id kh la mm my ph sg th tl vn",
    "southern asia": "af bd bt in ir lk mv np pk",
    "western asia": "ae am az bh cy ge il iq jo kw lb om ps qa sa sy tr ye",
    "eastern europe": "bg by cz hu md pl ro ru sk ua",
    "northern europe": "ax dk ee fi fo gb gg ie im is je lt lv no se sj",
    "southern europe": "ad al ba es gi gr hr it me mk mt pt rs si sm va",
    "western europe": "at be ch de fr li lu mc nl",
    "australia and new zealand": "au cc cx hm nf nz",
    "melanesia": "fj nc pg sb vu",
    "micronesia": "fm gu ki mh mp nr pw um",
    "polynesia": "as ck nu pf pn tk to tv wf ws",
    "antarctica": "aq",
}
"""The ISO 3166 alpha-2 codes of each region. Taiwan, which M49 does not list, is with its
neighbours."""

BEYOND_ISO = {
    "xk": "southern europe",
    "uk": "northern europe",
    "el": "southern europe",
    "ic": "southern europe",
    "ea": "southern europe",
    "cs": "southern europe",
    "yu": "southern europe",
    "fx": "western europe",
    "ac": "western africa",
    "ta": "western africa",
    "dg": "eastern africa",
    "zr": "middle africa",
    "an": "caribbean",
    "tp": "south-eastern asia",
}
"""Codes that are in use and not, or no longer, a country's: Kosovo, a habit (uk, el), parts of
countries (with the country, as in M49), former countries. Matomo's `eu`, `ap`, `a1`, `a2`, `o1` and
`xx` (some address in Europe or Asia, a proxy, a satellite, anything else) name no region."""

REGIONS = (*COUNTRIES, UNKNOWN)
"""Every region that `region` gives."""

_REGION = {code: name for name, codes in COUNTRIES.items() for code in codes.split()} | BEYOND_ISO


def region(country: pl.Expr) -> pl.Expr:
    """The region of each country, an ISO 3166 alpha-2 code in upper or lower case.

    A code that is none, and null, is `UNKNOWN`.
    """
    code = country.str.strip_chars().str.to_lowercase()
    return code.replace_strict(_REGION, default=UNKNOWN, return_dtype=pl.String)
