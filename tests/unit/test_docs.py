"""The Python of the documentation runs, in the order of the page, and so do the examples in docstrings."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib.util
import pkgutil
import re
import subprocess
import tarfile
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import emoe
from benchmarks.text import new
from emoe.config import ROUTERS
from tests.conftest import ROOT, SHIPPED
from tests.pages import code_blocks, python_blocks


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


def field_rows() -> dict[str, tuple[str, str]]:
    """Return the cells of the tables of fields of docs/library.md: field -> (default, others)."""
    text = (ROOT / "docs/library.md").read_text()
    section = text.partition("\n## Configurations\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", section, re.MULTILINE)
    return {field: (default, others) for field, default, others in rows}


def test_the_tables_of_fields_have_the_defaults_and_choices_of_the_code() -> None:
    fields = {field.name: field for field in dataclasses.fields(emoe.EMoEConfig)}
    fields.pop("version")
    rows = field_rows()
    assert sorted(rows) == sorted(fields)
    for name, (default, others) in rows.items():
        if name in ("num_experts", "top_k"):
            assert default == "must be given"
            continue
        assert repr(fields[name].default) == repr(ast.literal_eval(default.strip("`")))
        if typing.get_origin(fields[name].type) is typing.Literal:
            choices = re.findall(r'`"(\w+)"`', f"{default} {others}")
            assert set(typing.get_args(fields[name].type)) <= set(choices)
    for name in ROUTERS:
        # only emoe.fix_experts_ sets 'fixed'
        assert name == "fixed" or f'`"{name}"`' in rows["router"][1]


def test_gmoe_has_the_defaults_of_the_page() -> None:
    text = (ROOT / "docs/library.md").read_text()
    config = emoe.GMoEConfig()
    assert f"`num_experts` (default {config.num_experts})" in text
    assert f"`top_k` (default {config.top_k})" in text
    assert f"Its `aux_loss_coefficient` is {config.aux_loss_coefficient} by default" in text


def with_ellipses(node: ast.JoinedStr) -> str:
    """Return the text of an f-string. … stands for an inserted value."""
    text = ""
    for part in node.values:
        text += str(part.value) if isinstance(part, ast.Constant) else "…"
    return text


def message_texts() -> list[str]:
    """Return every text in the code of the library and of the suite."""
    texts = []
    for folder in ("emoe", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    texts.append(with_ellipses(node))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return texts


def test_the_errors_on_the_page_are_in_the_code_and_in_order() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^## `(.+)`$", page, re.MULTILINE)
    assert messages
    assert len(messages) == len(re.findall(r"^## ", page, re.MULTILINE))
    # without the … and quotation marks at the start
    assert messages == sorted(messages, key=lambda message: re.sub(r"^\W+", "", message).lower())
    texts = message_texts()
    for message in messages:
        # the parts between two … stand in one text of the code, in this order
        parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
        pattern = re.compile(".*".join(parts))
        assert any(pattern.search(text) for text in texts), message
    sections = re.split(r"^## .*$", page, flags=re.MULTILINE)[1:]
    assert [
        text for text in sections if "**Cause:**" not in text or "**Way out:**" not in text
    ] == []


def first_cells(text: str) -> list[str]:
    """Return the first cells of a Markdown table's rows, without those of its head."""
    return re.findall(r"^\| ([^|-][^|]*?) \|", text, re.MULTILINE)[1:]


def test_the_issue_template_for_results_asks_for_the_table_of_the_page() -> None:
    template = (ROOT / ".github/ISSUE_TEMPLATE/result.md").read_text()
    (copied,) = code_blocks("docs/reporting.md")["A table to copy"]
    facts, _ = copied.split("\n\n")
    assert first_cells(template) == first_cells(facts)
    for command in code_blocks("docs/reporting.md")["Send us a result"]:
        assert command.strip().replace("mini", "SUITE") in template


def test_the_archive_of_a_result_has_no_checkpoints(here: Path) -> None:
    run = here / "results/runs/glue/0123456789ab"
    for name in ("run.json", "metrics.json", ".lock", "model/a", "checkpoints/1/b"):
        file = run / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    command = code_blocks("docs/reporting.md")["Send us a result"][-1]
    subprocess.run(command.split(), check=True)
    with tarfile.open("runs.tar.gz") as archive:
        names = [member.name for member in archive.getmembers() if member.isfile()]
    assert sorted(Path(name).name for name in names) == ["metrics.json", "run.json"]


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
