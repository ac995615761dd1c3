"""Test that the notebooks run offline and show their committed outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.results.check import collect_numbers
from tests import fake_runs
from tests.conftest import ROOT
from tests.notebooks import FOLDER, executed, shown, without_numbers

pytestmark = pytest.mark.slow
NAMES = ["convert_and_train", "read_results"]


def committed(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@pytest.fixture
def checkout(tmp_path: Path, archive: Path) -> Path:
    """Make a checkout with the sentences and without runs, and return its folder of notebooks."""
    for name in ("Snakefile", "benchmarks", "config"):
        (tmp_path / name).symlink_to(ROOT / name)
    packages = tmp_path / "resources/packages"
    packages.mkdir(parents=True)
    (packages / archive.name).symlink_to(archive)
    folder = tmp_path / "docs/notebooks"
    folder.mkdir(parents=True)
    return folder


# smaller values, which change nothing but numbers
SMALLER = {
    'rows("train", 160)': 'rows("train", 8)',
    'rows("test", 200)': 'rows("test", 16)',
    'layers="last:2")': 'layers="last:2", partition="random")',
}


def test_the_notebook_of_training_shows_its_committed_outputs_except_numbers(
    checkout: Path,
) -> None:
    notebook = committed(NAMES[0])
    for old, new in SMALLER.items():
        (cell,) = (cell for cell in notebook.cells if old in cell.source)
        cell.source = cell.source.replace(old, new)
    now = [
        [without_numbers(text) for text in texts] for texts in shown(executed(notebook, checkout))
    ]
    assert now == [
        [without_numbers(text) for text in texts] for texts in shown(committed(NAMES[0]))
    ]


def test_colours_end_at_twice_the_mean_load_and_an_arrow_shows_that_loads_do_not() -> None:
    sources = [cell.source for cell in committed(NAMES[0]).cells if "colorbar(" in cell.source]
    assert len(sources) == 1
    assert "vmax=2" in sources[0]
    assert 'extend="max"' in sources[0]


def test_the_notebook_of_training_numbers_experts_from_1() -> None:
    (source,) = [cell.source for cell in committed(NAMES[0]).cells if "imshow(" in cell.source]
    assert "set_xticks(range(16), range(1, 17))" in source


def test_the_notebook_of_results_shows_its_committed_outputs(checkout: Path) -> None:
    assert shown(executed(committed(NAMES[1]), checkout)) == shown(committed(NAMES[1]))


def test_the_notebook_of_results_reads_collected_records(checkout: Path, here: Path) -> None:
    suite = load_suite({"suite": "mini", "benchmarks": ["glue"]})
    fake_runs.write_runs(suite.runs)
    fake_runs.collect(suite)
    outputs = shown(executed(committed(NAMES[1]), checkout))
    count = len(collect_numbers(fake_runs.records(suite.runs)).rows)
    read = f"{count} numbers of 7 kinds of runs, from results/mini/records/glue.jsonl\n"
    assert any(read in texts for texts in outputs)
