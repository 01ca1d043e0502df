"""What `python simulate.py --help` says, from the first comment of each YAML file."""

from __future__ import annotations

from pathlib import Path

from conf.schema import GROUPS

_FOLDER = Path(__file__).parent
_EXAMPLES = """\
Simulate a federation on this machine.

  python simulate.py                                    ten sites, synthetic journeys, epsilon 3
  python simulate.py model=logistic privacy.epsilon=1   choose from a group, change a setting
  python simulate.py --multirun privacy.epsilon=1,3,8   one run each, compared at the end
  python simulate.py resume=runs/2026-01-31_12-00-00    go on with an interrupted run
"""


def usage() -> str:
    """Examples, then each group and what there is to choose."""
    lines = [_EXAMPLES]
    for group in (*GROUPS, "experiment", "debug"):
        lines.append(f"{group}=")
        for path in sorted((_FOLDER / group).glob("*.yaml")):
            lines.append(f"  {path.stem:16} {_first_comment(path)}")
    lines.append("\nEvery setting, with its default and meaning: docs/settings.md")
    lines.append("Hydra's own options: python simulate.py --hydra-help")
    return "\n".join(lines)


def _first_comment(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @package"):
            text = line.removeprefix("# ")
            return text.partition(": python ")[0].rstrip(":")
    return ""
