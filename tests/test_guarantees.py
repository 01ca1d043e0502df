"""docs/guarantees.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "guarantees.md").read_text()
ROWS = re.findall(r"^\| *(\d*) \|.*\| \[.*\]\(\.\./(tests/.*)\): (.*) \|$", TEXT, re.MULTILINE)


def test_every_promise_of_the_privacy_core_has_a_row() -> None:
    assert {int(number) for number, _, _ in ROWS if number} >= set(range(1, 15))


@pytest.mark.parametrize(("file", "names"), [row[1:] for row in ROWS])
def test_every_promise_has_its_test(file: str, names: str) -> None:
    source = (ROOT / file).read_text()
    tests = re.findall(r"`(\w+)`", names)
    assert tests
    for name in tests:
        assert f"\ndef {name}(" in source
