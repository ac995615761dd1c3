"""What ``python -m benchmarks check --json`` found, as Markdown for a pull request: ``differences.py check.json``.

It needs Python alone, and trusts the file no further than that its values can be printed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_LINES = 50
_LENGTH = 40
_COLUMNS = ("status", "run", "seed", "number", "blessed", "now", "difference", "tolerance")


def main() -> None:
    try:
        text = table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        sys.exit(f"error: {sys.argv[1]} is no comparison of `python -m benchmarks check --json`: {error!r}")
    sys.stdout.write(text)


def table(comparison: dict[str, Any]) -> str:
    """A sentence, then the numbers that are others, then how it was compared."""
    found = [one for one in comparison["findings"] if one["status"] != "shown"]
    counts = {status: sum(one["status"] == status for one in found) for status in ("changed", "missing", "new")}
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines = [
        f"**{'No number moved' if comparison['passed'] else 'Numbers moved'}**: {int(comparison['equal'])} as blessed, {said}."
    ]
    if found:
        lines += ["", f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
        lines += [f"| {' | '.join(map(_cell, _row(one)))} |" for one in found[:_LINES]]
    if len(found) > _LINES:
        lines += ["", f"… and {len(found) - _LINES} more."]
    lines += [
        "",
        *(f"Compared {int(tier['numbers'])} numbers, {_cell(tier['why'], 400)}." for tier in comparison["tiers"]),
    ]
    if not comparison["passed"]:
        lines += [
            "",
            "Is it meant? Then bless the numbers, and say in CHANGELOG.md, under *Benchmarks*, which moved and why.",
        ]
    return "\n".join(lines) + "\n"


def _row(finding: dict[str, Any]) -> list[Any]:
    number = " ".join(str(finding[name]) for name in ("part", "set", "metric") if finding[name])
    difference = "" if finding["difference"] is None else f"{finding['difference']:+.3g}"
    tolerance = f"{allowed:.2g}" if (allowed := float(finding["tolerance"])) else "equal"
    return [
        *(finding[name] for name in ("status", "run", "seed")),
        number,
        finding["before"],
        finding["after"],
        difference,
        tolerance,
    ]


def _cell(value: Any, length: int = _LENGTH) -> str:
    """A value as code: nothing in it is a link, a mention or the end of the cell."""
    text = " ".join(str(value).replace("`", "'").replace("|", "/").split())
    return f"`{text if len(text) <= length else text[: length - 1] + '…'}`" if text else ""


if __name__ == "__main__":
    main()
