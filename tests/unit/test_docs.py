"""The Python of the documentation runs, in the order of the page."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.text import new
from tests.conftest import ROOT, SHIPPED
from tests.pages import python_blocks


@pytest.mark.parametrize(("page", "least"), [("docs/library.md", 6), ("docs/adding.md", 5)])
def test_every_python_block_runs(page: str, least: int, here: Path) -> None:
    blocks = python_blocks(page)
    assert len(blocks) >= least
    names: dict[str, object] = {}
    quantizes = importlib.util.find_spec("bitsandbytes") is not None  # it is in the environment of `make test-oldest`
    for block in blocks:
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


def test_each_module_of_the_library_is_in_the_design() -> None:
    text = (ROOT / "docs/design.md").read_text()
    modules = [path.relative_to(ROOT / "emoe").with_suffix("").as_posix() for path in (ROOT / "emoe").rglob("*.py")]
    assert [name for name in sorted(modules) if "__init__" not in name and f"`{name}`" not in text] == []


def test_the_first_page_counts_the_runs_that_were_blessed() -> None:
    blessed = pd.read_csv(ROOT / "results/reference/mini.csv", dtype=str)[["run", "seed"]].drop_duplicates()
    runs = blessed["run"].str.partition(" ")[0].value_counts()
    text = (ROOT / "README.md").read_text()
    counts = dict(re.findall(r"^\| \[`(\w+)`\].* (\d+) runs \| \d+ min \|$", text, re.MULTILINE))
    assert {name: int(count) for name, count in counts.items()} == runs.to_dict()
    assert f"Made by `make run`: {len(blessed)} runs" in text


@pytest.mark.parametrize("page", ["config/README.md"])
def test_a_table_of_suites_counts_the_runs_that_are_planned(page: str) -> None:
    runs = pd.read_csv(ROOT / "tests/golden/run_ids.csv").groupby("suite")["runs"].sum()
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in (ROOT / page).read_text().splitlines()]
    said = {
        row[1].split("`")[0]: int(cell.replace(",", ""))
        for row in rows
        if len(row) > 3 and row[1].split("`")[0] in runs.index
        for cell in row[2:]
        if re.fullmatch(r"[\d,]+", cell)
    }
    assert said == runs.to_dict()


def test_the_first_page_counts_the_papers_runs_that_are_planned() -> None:
    runs = pd.read_csv(ROOT / "tests/golden/run_ids.csv").groupby("suite")["runs"].sum()
    assert f"{runs['paper']:,} runs, planned" in (ROOT / "README.md").read_text()


def test_every_difference_has_a_consequence_and_a_choice() -> None:
    text = (ROOT / "docs/differences.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in re.findall(r"^\| \d+ \|.*$", text, re.MULTILINE)]
    assert [int(row[1]) for row in rows] == list(range(1, 35))
    for _, _, theirs, consequence, ours, _ in rows:
        assert theirs
        assert ours
        assert re.search(r"\*\*(stops|confounds|hard to repeat)\*\*", consequence)


def test_pages_agree_on_the_verdicts() -> None:
    counts = r"(\d+) tests of (?:twelve|the paper's twelve) claims\]\([\w./]+\) (\d+) are supported, (\d+) contradicted, (\d+)\s"
    said = {page: re.search(counts, (ROOT / page).read_text()) for page in ("README.md", "docs/results.md")}
    assert None not in said.values()
    assert len({match.groups() for match in said.values() if match}) == 1
