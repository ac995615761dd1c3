"""What shows finished runs is checked before they start: presentations, the names that they know, and published numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.config import definition
from benchmarks.harness.config.definition import AnyBenchmark, load_benchmark


def copied(name: str, folder: Path) -> tuple[AnyBenchmark, Path]:
    """A benchmark, and a copy of its folder."""
    real = load_benchmark(name)
    return real, Path(shutil.copytree(real.folder, folder / name, ignore=shutil.ignore_patterns("__pycache__")))


@pytest.mark.parametrize("name", ["llama", "domainbed", "speed", "glue_ood"])
def test_what_shows_finished_runs_is_there_before_they_start(name: str, tmp_path: Path) -> None:
    real, folder = copied(name, tmp_path)
    definition.check_references(real.definition, real.tasks, folder)
    (folder / "presentation.py").rename(folder / "presentations.py")
    message = rf"has no module 'presentation', which kind: {name} needs; did you mean 'presentations'"
    with pytest.raises(DefinitionError, match=message):
        definition.check_references(real.definition, real.tasks, folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tables", ["results", "test"], "tables' is 'test', which does not exist; did you mean 'tests'"),
        ("figures", {"odd": "…"}, "figures' is 'odd', which does not exist; did you mean 'ood'"),
        ("paper", None, "tables' names 'paper', so it needs 'paper'"),
    ],
)
def test_what_the_usual_presentation_cannot_make_is_refused_before_runs_start(key, value, message) -> None:
    real = load_benchmark("glue")
    assert not (real.folder / "presentation.py").exists()
    with pytest.raises(DefinitionError, match=message):
        definition.check_references(real.definition.model_copy(update={key: value}), real.tasks, real.folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def present(benchmark", r"presentation\.py, line 1: '\(' was never closed$"),
        ("import nothing_of_the_kind\ndef present(b, r): ...", r"line 1: there is no module 'nothing_of_the_kind'$"),
        (
            "from benchmarks.text.tabels import TABLES\ndef present(b, r): ...",
            r"presentation\.py, line 1: there is no module 'benchmarks\.text\.tabels'$",
        ),
        ("x = 1", r"presentation\.py has no function 'present'$"),
        ("def presents(b, r): ...", r"has no function 'present'; did you mean 'presents'"),
        ("def present(b, r):\n    return 1\n\0", r"presentation\.py"),
    ],
)
def test_a_presentation_that_cannot_be_imported_is_refused_before_runs_start(text, message, tmp_path) -> None:
    real, folder = copied("glue", tmp_path)
    (folder / "presentation.py").write_text(text)
    with pytest.raises(DefinitionError, match=message) as caught:
        definition.check_references(real.definition, real.tasks, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *((name, key) for name in definition.benchmark_names() for key in ("tables", "figures")),
        ("domainbed", "set_tables"),
        ("domainbed", "set_figures"),
    ],
)
def test_a_misspelt_table_or_figure_is_refused_before_runs_start(name: str, key: str) -> None:
    real = load_benchmark(name)
    named = getattr(real.definition, key)
    first = next(iter(named), "scores")
    wrong = [*named, f"{first}z"] if isinstance(named, list) else {**named, f"{first}z": "…"}
    with pytest.raises(DefinitionError, match=f"{key}' is '{first}z', which does not exist"):
        definition.check_references(real.definition.model_copy(update={key: wrong}), real.tasks, real.folder)


def test_a_presentation_may_make_its_tables_in_ways_that_nobody_can_read(tmp_path: Path) -> None:
    real, folder = copied("glue", tmp_path)
    (folder / "presentation.py").write_text(
        "from benchmarks.harness.report.presentation import make\n"
        "def present(benchmark, runs):\n"
        "    tables = {}\n"
        "    tables['own'] = runs\n"
        "    return make(benchmark, tables, dict(own=runs), runs)\n"
    )
    other = real.definition.model_copy(update={"tables": ["own"], "figures": {"own": "…"}})
    definition.check_references(other, real.tasks, folder)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("glue", "paper.csv"),
        ("glue", "settings.csv"),
        ("glue_ood", "paper.csv"),
        ("domainbed", "paper.csv"),
        ("domainbed", "costs.csv"),
        ("modularity", "paper.csv"),
        ("multitask", "paper.csv"),
    ],
)
def test_other_columns_of_published_numbers_are_refused_before_runs_start(name: str, file: str, tmp_path: Path) -> None:
    real, folder = copied(name, tmp_path)
    (folder / file).write_text("model,b\n")
    message = rf"{file}: the columns are \['model', 'b'\], but must be \[.*'value', 'status', 'source'\]$"
    with pytest.raises(DefinitionError, match=message):
        definition.check_references(real.definition, real.tasks, folder)
