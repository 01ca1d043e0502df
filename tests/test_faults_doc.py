"""docs/faults.md has a row for each test of a fault, and a test for each row."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("test_site_faults.py", "test_hub_faults.py", "test_troubles.py")
ROWS = re.findall(
    r"^\|[^|]+\|[^|]+\|[^|]+\| \[.*\]\(\.\./(tests/[\w/.]+)\): `(\w+)` \|$",
    (ROOT / "docs" / "faults.md").read_text(),
    re.MULTILINE,
)


def found_in(path: Path) -> set[str]:
    return set(re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE))


def test_every_row_has_its_test() -> None:
    assert ROWS
    for file, name in ROWS:
        assert name in found_in(ROOT / file), (file, name)


def test_every_test_of_a_fault_has_its_row() -> None:
    told = {(Path(file).name, name) for file, name in ROWS}
    for file in FILES:
        tests = found_in(ROOT / "tests" / "deployment" / file)
        assert tests
        assert tests <= {name for of, name in told if of == file}, file
