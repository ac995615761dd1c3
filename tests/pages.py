"""Read the code on a page of the documentation."""

from __future__ import annotations

import re
from types import CodeType

from tests.conftest import ROOT


def python_blocks(page: str) -> list[CodeType]:
    """Compile the Python blocks of a page, such as ``docs/library.md``, with the page's line numbers."""
    text = (ROOT / page).read_text()
    blocks = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [
        compile("\n" * (text[: block.start()].count("\n") + 1) + block[1], page, "exec")
        for block in blocks
    ]


def code_blocks(page: str) -> dict[str, list[str]]:
    """Return a page's code blocks in all languages by heading (``## …``)."""
    by_heading: dict[str, list[str]] = {}
    for section in re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"^```\w+\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        by_heading[section.partition("\n")[0]] = blocks
    return by_heading
