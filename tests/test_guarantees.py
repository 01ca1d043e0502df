"""docs/guarantees.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conf.compose import load
from server.statement import privacy_statement

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "guarantees.md").read_text()
ROWS = re.findall(r"^\| *(\d*) \|.*\| \[.*\]\(\.\./(tests/.*)\): (.*) \|$", TEXT, re.MULTILINE)


def test_every_promise_has_a_row() -> None:
    assert {int(number) for number, _, _ in ROWS if number} >= set(range(1, 21))


@pytest.mark.parametrize(("file", "names"), [row[1:] for row in ROWS])
def test_every_promise_has_its_test(file: str, names: str) -> None:
    source = (ROOT / file).read_text()
    tests = re.findall(r"`(\w+)`", names)
    assert tests
    for name in tests:
        assert f"\ndef {name}(" in source


@pytest.mark.parametrize(
    "words",
    [
        "whatever anyone concludes from the model, they would have concluded almost as likely had "
        "the visitor never been there",
        "The odds of any conclusion about a visitor change by at most a factor of",
        "the losses of the sites add up",
    ],
)
def test_the_report_says_what_the_guarantees_say(words: str) -> None:
    statement = " ".join(privacy_statement(load([]), 3.0))
    assert words in statement
    assert words in " ".join(TEXT.split()).replace("**A visitor of several sites** is", "is")
