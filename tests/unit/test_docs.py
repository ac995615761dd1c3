"""The Python of the documentation runs, in the order of the page, and so do the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import emoe
from benchmarks.text import new
from tests.conftest import ROOT, SHIPPED
from tests.pages import python_blocks


@pytest.mark.parametrize("page", ["docs/library.md", "docs/adding.md"])
def test_every_python_block_runs(page: str, here: Path) -> None:
    names: dict[str, object] = {}
    quantizes = (
        importlib.util.find_spec("bitsandbytes") is not None
    )  # it is in the environment of `make test-oldest`
    for block in python_blocks(page):
        if quantizes or "BitsAndBytesConfig" not in block.co_names:
            exec(block, names)  # noqa: S102 -- our own page


def test_the_first_page_shows_the_output_of_its_code(
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
    assert (
        'labels: ["negative", "positive"]' in (here / "benchmarks/reviews/tasks.yaml").read_text()
    )


def test_each_registered_architecture_is_on_the_page() -> None:
    text = (ROOT / "docs/library.md").read_text()
    assert [key for key in sorted(SHIPPED) if f"`{key}`" not in text] == []


MODULES = ["emoe", *(module.name for module in pkgutil.walk_packages(emoe.__path__, "emoe."))]


def examples(module: ModuleType) -> list[doctest.DocTest]:
    given = {**vars(module), "emoe": emoe, "torch": torch}
    return [test for test in doctest.DocTestFinder().find(module, globs=given) if test.examples]


EXAMPLES = {test.name: test for name in MODULES for test in examples(importlib.import_module(name))}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_of_a_docstring_runs(name: str) -> None:
    torch.manual_seed(0)
    output: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.DocTestRunner(optionflags=flags).run(EXAMPLES[name], out=output.append)
    assert not failed, "".join(output)
