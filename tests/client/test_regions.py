from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.regions import BEYOND_ISO, COUNTRIES, REGIONS, UNKNOWN, region

COUNTRIES_OF_REGION = {
    "northern africa": 7,
    "eastern africa": 22,
    "middle africa": 9,
    "southern africa": 5,
    "western africa": 17,
    "northern america": 5,
    "central america": 8,
    "caribbean": 28,
    "south america": 16,
    "central asia": 5,
    "eastern asia": 8,
    "south-eastern asia": 11,
    "southern asia": 9,
    "western asia": 18,
    "eastern europe": 10,
    "northern europe": 16,
    "southern europe": 16,
    "western europe": 9,
    "australia and new zealand": 6,
    "melanesia": 5,
    "micronesia": 8,
    "polynesia": 10,
    "antarctica": 1,
}
"""As M49 counts them, with Taiwan."""


def told(*countries: str | None) -> list[str]:
    frame = pl.DataFrame({"country": countries}, schema={"country": pl.String()})
    return frame.select(region(pl.col("country")))["country"].to_list()


def test_every_country_has_one_region() -> None:
    counts = {name: len(codes.split()) for name, codes in COUNTRIES.items()}
    assert counts == COUNTRIES_OF_REGION
    codes = " ".join(COUNTRIES.values()).split()
    assert len(set(codes)) == len(codes) == 249
    assert all(len(code) == 2 and code.isascii() and code.islower() for code in codes)
    assert not set(codes) & set(BEYOND_ISO)
    for name, of in COUNTRIES.items():
        assert set(told(*of.split())) == {name}


@pytest.mark.parametrize(
    ("country", "expected"),
    [
        ("de", "western europe"),
        ("fr", "western europe"),
        ("gb", "northern europe"),
        ("es", "southern europe"),
        ("pl", "eastern europe"),
        ("tr", "western asia"),
        ("cy", "western asia"),
        ("us", "northern america"),
        ("mx", "central america"),
        ("br", "south america"),
        ("cu", "caribbean"),
        ("jp", "eastern asia"),
        ("tw", "eastern asia"),
        ("id", "south-eastern asia"),
        ("in", "southern asia"),
        ("ir", "southern asia"),
        ("kz", "central asia"),
        ("au", "australia and new zealand"),
        ("fj", "melanesia"),
        ("gu", "micronesia"),
        ("ws", "polynesia"),
        ("eg", "northern africa"),
        ("ke", "eastern africa"),
        ("ng", "western africa"),
        ("cm", "middle africa"),
        ("za", "southern africa"),
        ("aq", "antarctica"),
        ("xk", "southern europe"),
        ("uk", "northern europe"),
        ("DE", "western europe"),
        (" de", "western europe"),
    ],
)
def test_region_of_a_country(country: str, expected: str) -> None:
    assert told(country) == [expected]


def test_what_is_no_country_is_unknown() -> None:
    # The last six are Matomo's.
    codes = [None, "", "zz", "deu", "germany", "eu", "ap", "a1", "a2", "o1", "xx"]
    assert told(*codes) == [UNKNOWN] * len(codes)
    assert told() == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.none() | st.text(max_size=4), max_size=20))
def test_any_text_has_a_region(countries: list[str | None]) -> None:
    assert set(told(*countries)) <= set(REGIONS)
    assert len(told(*countries)) == len(countries)
