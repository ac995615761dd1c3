"""Test the files of records: they hold what runs recorded, and a wrong one is named with the way to collect it again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.harness.base import DataError
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import Suite, load_suite
from benchmarks.harness.results.files import records_file
from benchmarks.harness.results.records import read_records, tabulate_numbers
from tests import fake_runs
from tests.programs import call

SMOKE = load_suite({"suite": "smoke"})


@pytest.fixture(scope="module")
def suite(shared_here: Path) -> Suite:
    """Finish and collect all of the smoke suite."""
    fake_runs.write_runs(SMOKE.runs)
    fake_runs.collect(SMOKE)
    return SMOKE


@pytest.mark.parametrize("benchmark", SMOKE.settings.benchmarks)
def test_collected_records_are_those_of_the_runs_in_the_order_of_the_grid(
    benchmark: str, suite: Suite
) -> None:
    runs = suite.runs_of(benchmark)
    read = read_records(suite, benchmark)
    assert read is not None
    direct = fake_runs.records(runs)
    assert [record.run for record in read] == runs
    assert read == direct
    assert [record.digest for record in read] == [digest_of(run) for run in runs]
    pd.testing.assert_frame_equal(tabulate_numbers(read), tabulate_numbers(direct))


def digest_of(run: Run) -> str:
    return hashlib.sha256(run.metrics_file.read_bytes()).hexdigest()


def test_a_set_with_its_own_tables_has_its_own_file(suite: Suite) -> None:
    for part in suite.sets_with_tables("domainbed"):
        assert records_file("smoke", "domainbed", part).is_file()
        read = read_records(suite, "domainbed", part)
        assert read is not None
        assert [record.run for record in read] == suite.runs_of("domainbed", part)
    assert not records_file("smoke", "domainbed").exists()


@pytest.fixture
def glue(here: Path) -> Suite:
    """Finish GLUE of the smoke suite."""
    suite = load_suite({"suite": "smoke", "benchmarks": ["glue"]})
    fake_runs.write_runs(suite.runs)
    return suite


def test_unusual_numbers_are_collected_to_the_last_digit(glue: Suite) -> None:
    def change(content: dict[str, Any]) -> None:
        content["scores"]["test"]["tweets"]["balanced_accuracy"] = 0.1 + 0.2
        content["scores"]["test"]["tweets"]["loss"] = None
        content["data"]["test"] = {
            "source": "made up",
            "rows": 3,
            "dropped": 0,
            "range": [0.1 + 0.2, 4.999999999999999],
        }
        content["curve"] = [5e-324, None, 1.7976931348623157e308]

    fake_runs.edit(glue.runs[0], change)
    fake_runs.collect(glue)
    read = read_records(glue, "glue")
    assert read is not None
    record = read[0]
    assert record == fake_runs.records(glue.runs)[0]
    assert record.metrics.scores is not None
    scores = record.metrics.scores["test"]["tweets"]
    assert (scores["balanced_accuracy"], scores["loss"]) == (0.1 + 0.2, None)
    assert record.metrics.data is not None
    assert record.metrics.data["test"].range == [0.1 + 0.2, 4.999999999999999]
    assert record.metrics.curve == [5e-324, None, 1.7976931348623157e308]


def test_a_number_out_of_range_is_not_collected(glue: Suite) -> None:
    run = glue.runs[1]
    fake_runs.edit(
        run, lambda content: content["scores"]["test"]["tweets"].update(balanced_accuracy=17.0)
    )
    with pytest.raises(
        DataError,
        match=rf"^{run.metrics_file}: test tweets balanced_accuracy is 17\.0, not a number",
    ):
        fake_runs.collect(glue)
    assert not records_file("smoke", "glue").exists()


def test_the_command_collects_a_benchmark(glue: Suite) -> None:
    call("collect", "--suite", "smoke", "--benchmark", "glue")
    assert read_records(glue, "glue") == fake_runs.records(glue.runs)


def cut_line(path: Path) -> None:
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:100]
    path.write_text("\n".join(lines))


def mistype_number(path: Path) -> None:
    path.write_text(path.read_text().replace('"job_seconds":2.0', '"job_seconds":"2"', 1))


def drop_last_line(path: Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]))


def rename_run(path: Path) -> None:
    folder = SMOKE.runs_of("glue")[0].folder
    path.write_text(path.read_text().replace(folder, "glue/0123456789ab", 1))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a cut line": (cut_line, ", line 2, is damaged: 'the file': Invalid JSON: EOF .*"),
    "a mistyped number": (
        mistype_number,
        ", line 1, is damaged: 'metrics.cost.job_seconds': Input .* valid number",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_is_named_with_the_way_to_collect_it_again(case: str, glue: Suite) -> None:
    damage, problem = DAMAGES[case]
    fake_runs.collect(glue)
    path = records_file("smoke", "glue")
    damage(path)
    advice = f"`snakemake --cores all --force {path} --config suite=smoke` collects it again"
    with pytest.raises(DataError, match=rf"^{path}{problem}; {advice}$") as error:
        read_records(glue, "glue")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [drop_last_line, rename_run, Path.unlink])
def test_a_file_without_all_planned_runs_is_not_taken(
    change: Callable[[Path], None], glue: Suite
) -> None:
    fake_runs.collect(glue)
    change(records_file("smoke", "glue"))
    assert read_records(glue, "glue") is None


def test_one_of_several_files_without_all_its_runs_is_not_taken(here: Path) -> None:
    suite = load_suite({"suite": "smoke", "benchmarks": ["domainbed"]})
    fake_runs.write_runs(suite.runs)
    fake_runs.collect(suite)
    first, *others = (
        records_file("smoke", "domainbed", part) for part in suite.sets_with_tables("domainbed")
    )
    assert others
    drop_last_line(first)
    assert read_records(suite, "domainbed") is None
