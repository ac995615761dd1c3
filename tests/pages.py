"""The code on a page of the documentation, to be run in the order of the page."""

from __future__ import annotations

import re
from types import CodeType

from tests.conftest import ROOT


def python_blocks(page: str) -> list[CodeType]:
    """The blocks of a page, such as ``docs/library.md``, with the page's line numbers."""
    text = (ROOT / page).read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [compile("\n" * (text[: block.start()].count("\n") + 1) + block[1], page, "exec") for block in found]


def code_blocks(page: str) -> dict[str, list[str]]:
    """The blocks of a page in any language, by the heading (``## …``) that they are below."""
    found: dict[str, list[str]] = {}
    for section in re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"^```\w+\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        found[section.partition("\n")[0]] = blocks
    return found
