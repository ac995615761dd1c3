"""The Python of the documentation runs, in the order of the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import SHIPPED

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["docs/library.md"])
def test_every_python_block_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    names: dict[str, object] = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S))
    assert len(blocks) > 5
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], page, "exec"), names)  # noqa: S102 -- our own page


def test_each_registered_architecture_is_on_the_page() -> None:
    text = (ROOT / "docs/library.md").read_text()
    assert [key for key in sorted(SHIPPED) if f"`{key}`" not in text] == []
