"""Names that the workflow or a command uses itself are refused, in `new` and in files that are made by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.harness import base
from benchmarks.harness.base import ROOT, DefinitionError
from benchmarks.harness.config.benchmark import benchmark_names, load_benchmark
from benchmarks.harness.config.names import check_name
from benchmarks.harness.config.suite import load_suite, suite_names
from benchmarks.harness.report.artifacts import all_artifacts
from benchmarks.harness.report.listing import LISTS
from benchmarks.harness.report.paper_items import load_paper
from benchmarks.text.new import new_benchmark
from tests.planned import edited_project


def used_names() -> Iterator[str]:
    """Yield the names of rules, folders, lists and items of the paper."""
    for file in (ROOT / "Snakefile", *(ROOT / "workflow/rules").glob("*.smk")):
        yield from re.findall(r"(?m)^rule (\w+):$", file.read_text())
    yield from ("runs", "logs", "reference", "mlflow", "harness", "text", "schemas")
    yield from ("run_glue", "run_glue_without_weights", "tables_of_glue")
    yield from ("null", "on", "yes")  # not texts in YAML
    yield from LISTS
    yield from load_paper().items


@pytest.mark.parametrize("name", sorted({*used_names()}))
def test_a_name_that_is_used_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    csv.write_text("text,label\na,b\nc,d\n")
    with pytest.raises(
        DefinitionError, match=rf"^'{name}' is not a valid name: .*; choose another name$"
    ):
        new_benchmark(name, csv)


def test_the_names_of_our_own_benchmarks_and_suites_are_valid() -> None:
    for name in benchmark_names():
        check_name(name)
    for name in suite_names():
        check_name(name)


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """Use a copy of the project."""
    with edited_project(tmp_path, "config/mini.yaml", "benchmarks:", "benchmarks:"):
        yield tmp_path


@pytest.mark.parametrize("name", ["reference", "figure_7", "Mine", "my-own"])
def test_files_made_by_hand_are_refused_too(name: str, project: Path) -> None:
    (project / "benchmarks/glue").rename(project / "benchmarks" / name)
    with pytest.raises(
        DefinitionError, match=rf"^\S+/{name}/benchmark\.yaml: '{name}' is not a valid name: "
    ):
        load_benchmark(name)
    (base.CONFIG / "mini.yaml").rename(base.CONFIG / f"{name}.yaml")
    with pytest.raises(
        DefinitionError, match=rf"^\S+/config/{name}\.yaml: '{name}' is not a valid name: "
    ):
        load_suite({"suite": name})


def test_a_benchmark_with_the_name_of_a_sets_target_is_refused(project: Path) -> None:
    (project / "benchmarks/speed").rename(project / "benchmarks/domainbed_pacs")
    with pytest.raises(
        DefinitionError,
        match="'domainbed_pacs' is also the target of the set 'pacs' of 'domainbed'",
    ):
        all_artifacts()


def test_new_refuses_the_name_of_a_sets_target(tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    csv.write_text("text,label\na,b\nc,d\n")
    with pytest.raises(DefinitionError, match="'domainbed_pacs' is the target of a set's tables"):
        new_benchmark("domainbed_pacs", csv)
