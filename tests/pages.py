"""Read the code on a page of the documentation."""

from __future__ import annotations

import re
from types import CodeType

from tests.conftest import ROOT


def python_blocks(page: str) -> list[CodeType]:
    """Compile the Python blocks of a page, such as ``docs/library.md``.

    Errors have the line numbers of the page.
    """
    text = (ROOT / page).read_text()
    compiled = []
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        code = block[1]
        num_lines_before = text[: block.start(1)].count("\n")
        compiled.append(compile("\n" * num_lines_before + code, page, "exec"))
    return compiled


def code_blocks(page: str) -> dict[str, list[str]]:
    """Return a page's code blocks in all languages by heading (``## …``)."""
    text = (ROOT / page).read_text()
    parts = re.split(r"^## ", text, flags=re.MULTILINE)
    by_heading: dict[str, list[str]] = {}
    for section in parts[1:]:  # the first part comes before all headings
        heading = section.splitlines()[0]
        blocks = re.findall(r"^```\w+\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        by_heading[heading] = blocks
    return by_heading
