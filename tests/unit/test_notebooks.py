"""The notebooks run, offline, and are committed with what the present code shows."""

from __future__ import annotations

import itertools
from pathlib import Path

import nbformat
import pytest

from tests import fake_runs
from tests.conftest import ROOT
from tests.notebooks import FOLDER, PICTURE, executed, pictures, shown, without_numbers

pytestmark = pytest.mark.slow
NAMES = ["convert_and_train", "read_results"]


def committed(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@pytest.fixture
def checkout(tmp_path: Path, archive: Path) -> Path:
    """A checkout in which nothing was run, with the sentences fetched; the notebooks' folder of it."""
    for name in ("Snakefile", "benchmarks", "config"):
        (tmp_path / name).symlink_to(ROOT / name)
    packages = tmp_path / "resources/packages"
    packages.mkdir(parents=True)
    (packages / archive.name).symlink_to(archive)
    folder = tmp_path / "docs/notebooks"
    folder.mkdir(parents=True)
    return folder


def test_every_notebook_is_tested() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


def test_training_shows_what_is_committed_but_for_numbers(checkout: Path) -> None:
    """With fewer rows, which change nothing but numbers, too."""
    notebook = committed(NAMES[0])
    (cell,) = (cell for cell in notebook.cells if 'rows("train", 160)' in cell.source)
    cell.source = cell.source.replace('rows("train", 160)', 'rows("train", 24)').replace(
        'rows("test", 200)', 'rows("test", 60)'
    )
    now = [[without_numbers(text) for text in texts] for texts in shown(executed(notebook, checkout))]
    assert now == [[without_numbers(text) for text in texts] for texts in shown(committed(NAMES[0]))]


def test_reading_the_blessed_numbers_shows_what_is_committed(checkout: Path) -> None:
    assert shown(executed(committed(NAMES[1]), checkout)) == shown(committed(NAMES[1]))


def test_reading_finished_runs_of_another_suite(checkout: Path) -> None:
    root = checkout.parents[1]
    fake_runs.write(root / "results/runs", "smoke", {"emoe": 0.05})
    notebook = committed(NAMES[1])
    settings = next(cell for cell in notebook.cells if cell.source.startswith("SUITE"))
    settings.source = settings.source.replace('"mini"', '"smoke"')
    said = "\n".join(text for texts in shown(executed(notebook, checkout)) for text in texts)
    assert "from results/runs/glue" in said
    assert "random weights: scores mean nothing" in said
    assert "EMoE − Vanilla" in said


@pytest.mark.parametrize("name", NAMES)
def test_committed_notebooks_are_small_and_name_no_machine(name: str) -> None:
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert len(text) < 150_000
    outputs = [output for cell in committed(name).cells for output in cell.get("outputs", ())]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert [path for path in ("/home/", "/tmp", "/root", "/Users/", "site-packages", str(ROOT)) if path in text] == []  # noqa: S108


def test_each_code_cell_has_a_sentence_before_it() -> None:
    for name in NAMES:
        kinds = [cell.cell_type for cell in committed(name).cells]
        assert all(before == "markdown" for before, kind in itertools.pairwise(kinds) if kind == "code")


def test_the_librarys_picture_is_the_notebooks() -> None:
    assert PICTURE.read_bytes() == pictures(committed(NAMES[0]))[0]
