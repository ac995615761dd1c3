"""The Python of the documentation runs, in the order of the page."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from benchmarks.text import new
from tests.conftest import ROOT, SHIPPED
from tests.pages import python_blocks


@pytest.mark.parametrize("page", ["docs/library.md", "docs/adding.md"])
def test_every_python_block_runs(page: str, here: Path) -> None:
    names: dict[str, object] = {}
    quantizes = importlib.util.find_spec("bitsandbytes") is not None  # it is in the environment of `make test-oldest`
    for block in python_blocks(page):
        if quantizes or "BitsAndBytesConfig" not in block.co_names:
            exec(block, names)  # noqa: S102 -- our own page


def test_the_start_shows_what_its_blocks_print(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    for block in python_blocks("docs/start.md"):
        exec(block, names)  # noqa: S102 -- our own page
    text = (ROOT / "docs/start.md").read_text()
    (converted,) = (line for line in capsys.readouterr().out.splitlines() if "converted" in line)
    assert converted in text
    assert int(names["right"].sum()) >= 36  # of 40, which it learns on any machine
    for folder in ("benchmarks", "config"):
        (here / folder).mkdir()
        monkeypatch.setattr(new, folder.upper(), here / folder)
    new.new_benchmark("reviews", Path("reviews.csv"))
    assert 'labels: ["negative", "positive"]' in (here / "benchmarks/reviews/tasks.yaml").read_text()


def test_each_registered_architecture_is_on_the_page() -> None:
    text = (ROOT / "docs/library.md").read_text()
    assert [key for key in sorted(SHIPPED) if f"`{key}`" not in text] == []
