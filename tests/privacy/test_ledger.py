from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from privacy.accountant import PrivacyEvent, epsilon
from privacy.ledger import Ledger, LedgerError, Release

COUNT = Release("run", 0, "count", 20.0, 1.0, 1)
WEIGHTS = Release("run", 1, "weights", 2.0, 0.1, 10)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_release_is_on_disk_when_it_is_reserved(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.jsonl"

    Ledger(path).reserve(WEIGHTS)

    assert lines(path) == [
        {
            "run": "run",
            "round": 1,
            "name": "weights",
            "noise_multiplier": 2.0,
            "sample_rate": 0.1,
            "count": 10,
        }
    ]
    assert Ledger(path).releases() == [WEIGHTS]


def test_the_same_release_is_charged_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")

    for _ in range(3):
        ledger.reserve(WEIGHTS)

    assert ledger.releases() == [WEIGHTS]


@pytest.mark.parametrize("change", [{"run": "other"}, {"round": 2}, {"name": "count"}])
def test_another_run_round_or_name_is_charged_too(tmp_path: Path, change: dict[str, Any]) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    other = replace(WEIGHTS, **change)

    ledger.reserve(WEIGHTS)
    ledger.reserve(other)

    assert ledger.releases() == [WEIGHTS, other]


def test_two_ledgers_of_one_file_see_each_other(tmp_path: Path) -> None:
    one, two = (Ledger(tmp_path / "ledger.jsonl") for _ in range(2))

    one.reserve(COUNT)
    two.reserve(COUNT)
    two.reserve(WEIGHTS)
    one.reserve(WEIGHTS)

    assert one.releases() == two.releases() == [COUNT, WEIGHTS]
    assert one.epsilon(1e-5) == two.epsilon(1e-5) > 0


def test_epsilon_is_the_accountants(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.epsilon(1e-5) == 0.0
    ledger.reserve(COUNT)
    for round_ in range(1, 4):
        ledger.reserve(replace(WEIGHTS, round=round_))

    spent = ledger.epsilon(1e-5)

    assert spent == epsilon([PrivacyEvent(20.0), PrivacyEvent(2.0, 0.1, 30)], 1e-5)
    assert spent > epsilon([PrivacyEvent(20.0), PrivacyEvent(2.0, 0.1, 20)], 1e-5)


def test_an_unprotected_release_costs_everything(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.reserve(COUNT)
    ledger.reserve(Release("run", 1, "weights", 0.0, 0.1, 10))

    assert ledger.epsilon(1e-5) == math.inf


DAMAGED = {
    "truncated": b'{"run": "run", "round": 2, "na',
    "not JSON": b"garbage",
    "empty line": b"",
    "other JSON": b"[1, 2]",
    "missing field": b'{"run": "run", "round": 2, "name": "weights"}',
    "unknown field": json.dumps({**WEIGHTS.__dict__, "note": 1}).encode(),
    "not UTF-8": json.dumps(WEIGHTS.__dict__).encode().replace(b"weights", b"w\xe9ights"),
    "NUL bytes": b"\x00" * 40,
    "text for a number": json.dumps({**WEIGHTS.__dict__, "noise_multiplier": "2.0"}).encode(),
    "negative noise": json.dumps({**WEIGHTS.__dict__, "noise_multiplier": -2.0}).encode(),
    "no noise value": json.dumps({**WEIGHTS.__dict__, "noise_multiplier": None}).encode(),
    "sample rate above 1": json.dumps({**WEIGHTS.__dict__, "sample_rate": 8.0}).encode(),
    "negative count": json.dumps({**WEIGHTS.__dict__, "count": -10}).encode(),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_nothing_is_released_on_a_damaged_ledger(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).reserve(COUNT)
    before = path.read_bytes() + DAMAGED[kind] + b"\n"
    path.write_bytes(before)
    ledger = Ledger(path)

    for use in (lambda: ledger.reserve(WEIGHTS), lambda: ledger.epsilon(1e-5)):
        with pytest.raises(LedgerError, match=r"ledger\.jsonl, line 2: not a release"):
            use()

    assert path.read_bytes() == before
