"""Tables, claims and the mirror take the finished runs, else the blessed records, and say which."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.__main__ import main
from benchmarks.harness.base import OVERRIDES, RESULTS, DefinitionError
from benchmarks.harness.config.suite import Suite, load_suite
from benchmarks.harness.report.artifacts import artifacts_of, numbers_file
from benchmarks.harness.report.claims_table import claims_table, judge_claims
from benchmarks.harness.results import reference
from benchmarks.harness.results.available import find_finished, find_records
from benchmarks.harness.results.files import records_file
from benchmarks.harness.results.records import collect
from benchmarks.harness.results.reference import reference_file
from tests import fake_runs
from tests.programs import call

PART = {"suite": "mini", "benchmarks": ["glue", "domainbed"]}
BLESSED = "these are the records blessed at commit 01234567 (CPU)"


@pytest.fixture
def suite(here: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> Suite:
    """Plan two benchmarks of mini in an empty working directory without finished or blessed runs."""
    (here / RESULTS).mkdir()  # else the commands would work in the checkout
    monkeypatch.setattr(reference, "REFERENCE", here / "reference")
    monkeypatch.setenv(OVERRIDES, json.dumps(PART))
    return load_suite(PART)


@pytest.fixture
def blessed(suite: Suite) -> Suite:
    """Bless the runs, and delete them."""
    fake_runs.write_runs(suite.runs)
    fake_runs.bless(suite)
    for run in suite.runs:
        run.metrics_file.unlink()
    return suite


def shown(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[str, list[str], int]:
    """Call the suite's program; return its output, the lines of its errors, and its exit status."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["emoe-bench", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        main()
    output, errors = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return output, errors.splitlines(), end.value.code


def test_without_finished_runs_the_blessed_records_are_taken(blessed: Suite) -> None:
    found = find_records(blessed, "glue")
    assert [record.run for record in found.records] == blessed.runs_of("glue")
    assert found.note == f"glue: no run of 'mini' is finished here; {BLESSED}"
    part = find_records(blessed, "domainbed", "rotated_mnist_5k")
    assert [record.run for record in part.records] == blessed.runs_of("domainbed")


@pytest.mark.usefixtures("suite")
def test_a_data_set_is_named_if_only_runs_on_other_data_sets_are_finished() -> None:
    smoke = load_suite({"suite": "smoke", "benchmarks": ["domainbed"]})
    fake_runs.write_runs(smoke.runs_of("domainbed", "rotated_mnist_5k"))
    found = find_finished(smoke, "domainbed", "colored_mnist_5k")
    assert found.note == "domainbed: no run of 'smoke' on colored_mnist_5k is finished here"


def test_one_finished_run_is_enough_to_take_only_finished_runs(blessed: Suite) -> None:
    runs = blessed.runs_of("glue")
    fake_runs.write_runs(runs[3:4])
    found = find_records(blessed, "glue")
    assert [record.run for record in found.records] == runs[3:4]
    assert (
        found.note == f"glue: {len(runs) - 1} of {len(runs)} runs are missing: make run SUITE=mini"
    )
    assert BLESSED in find_records(blessed, "domainbed").note

    fake_runs.write_runs(runs[1:])
    assert find_records(blessed, "glue").note == (
        f"glue: 1 of {len(runs)} runs is missing: make run SUITE=mini"
    )
    fake_runs.write_runs(runs)
    complete = find_records(blessed, "glue")
    assert ([record.run for record in complete.records], complete.note) == (runs, "")


def test_collected_records_are_taken_first(blessed: Suite) -> None:
    fake_runs.write_runs(blessed.runs)
    fake_runs.collect(blessed)
    for run in blessed.runs:  # a job on a cluster may not see the runs
        run.metrics_file.unlink()
    found = find_records(blessed, "glue")
    assert ([record.run for record in found.records], found.note) == (blessed.runs_of("glue"), "")


def test_runs_are_read_if_one_has_changed_since_it_was_collected(suite: Suite) -> None:
    fake_runs.write_runs(suite.runs)
    fake_runs.collect(suite)
    run, other, *_ = suite.runs_of("glue")
    other.metrics_file.unlink()
    assert find_finished(suite, "glue").note == ""  # its record is as good
    fake_runs.edit(run, lambda content: content["cost"].update(job_seconds=3.0))
    found = find_finished(suite, "glue")
    assert found.records[0].metrics.cost.job_seconds == 3.0
    assert found.note.startswith("glue: 1 of ")


def test_runs_are_read_if_other_runs_were_collected(suite: Suite) -> None:
    runs = suite.runs_of("glue")
    fake_runs.write_runs(runs)
    fewer = replace(suite)
    fewer.__dict__["runs"] = runs[1:]
    collect(fewer, "glue")
    complete = find_finished(suite, "glue")
    assert ([record.run for record in complete.records], complete.note) == (runs, "")

    # collected runs that are not planned are left out
    collect(suite, "glue")
    for run in runs:
        run.metrics_file.unlink()
    assert [record.run for record in find_finished(fewer, "glue").records] == runs[1:]


def test_blessed_runs_that_are_not_planned_are_left_out_and_counted(blessed: Suite) -> None:
    """The plan has another run in the place of a blessed one, and one run less."""
    runs = blessed.runs_of("glue")
    other = replace(runs[0], id="0123456789ab")
    changed = replace(blessed)
    changed.__dict__["runs"] = [other, *runs[1:-1]]
    found = find_records(changed, "glue")
    assert [record.run for record in found.records] == runs[1:-1]
    assert found.note.endswith(
        f"{BLESSED}, which lack 1 of the {len(runs) - 1} planned runs; "
        "2 runs that the suite does not plan are left out"
    )
    changed.__dict__["runs"] = runs[1:]
    assert find_records(changed, "glue").note.endswith(
        f"{BLESSED}; 1 run that the suite does not plan is left out"
    )
    changed.__dict__["runs"] = [other]
    nothing = find_records(changed, "glue")
    assert not nothing.records
    assert nothing.note == (
        "glue: no run of 'mini' is finished here, and none of the planned runs is blessed; "
        "`make run SUITE=mini` makes the runs"
    )


def test_without_any_records_the_error_gives_both_ways(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    smoke = load_suite({"suite": "smoke", "benchmarks": ["glue"]})
    fake_runs.write_runs(smoke.runs)
    fake_runs.bless(smoke)
    line = (
        "error: glue: no run of 'mini' is finished here, and no records of it are blessed; "
        "`make run SUITE=mini` makes the runs; suites with blessed records of it: smoke"
    )
    other = (
        "domainbed: no run of 'mini' is finished here, and no records of it are blessed; "
        "`make run SUITE=mini` makes the runs"
    )
    for command, error in (("tables --benchmark glue", line), ("claims", f"{line}; {other}")):
        assert shown(f"{command} --suite mini", monkeypatch, capsys) == ("", [error], 1)
    line = f"error: {len(suite.runs)} of {len(suite.runs)} runs are missing: make run SUITE=mini"
    assert shown("mirror --suite mini", monkeypatch, capsys) == ("", [line], 1)


def test_claims_are_tested_on_blessed_records(
    blessed: Suite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, errors, status = shown("claims --suite mini", monkeypatch, capsys)
    assert status == 0
    assert errors == [
        f"{name}: no run of 'mini' is finished here; {BLESSED}" for name in ("glue", "domainbed")
    ]
    fake_runs.write_runs(blessed.runs)
    numbers = fake_runs.claim_numbers(blessed)
    assert output == f"{claims_table(blessed, judge_claims(blessed, numbers)).markdown()}\n"


def test_claims_leave_out_a_benchmark_without_records(
    blessed: Suite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference_file("mini", "glue", "jsonl.gz").unlink()
    output, errors, status = shown("claims --suite mini", monkeypatch, capsys)
    assert status == 0
    assert errors[0].startswith("glue: no run of 'mini' is finished here, and no records of it are")
    assert errors[1] == f"domainbed: no run of 'mini' is finished here; {BLESSED}"
    assert "trial" in output


@pytest.mark.slow
def test_claims_are_tested_on_the_present_runs_although_older_numbers_are_written(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_runs.write_runs(suite.runs)
    for name in ("glue", "domainbed"):
        assert shown(f"tables --suite mini --benchmark {name}", monkeypatch, capsys)[2] == 0
    fake_runs.write_runs(suite.runs, {"emoe": 0.1})
    before, _, _ = shown("claims --suite mini", monkeypatch, capsys)
    numbers = fake_runs.claim_numbers(suite)
    assert before == f"{claims_table(suite, judge_claims(suite, numbers)).markdown()}\n"


@pytest.mark.slow
def test_tables_of_some_runs_delete_the_section_and_the_numbers_of_all(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_runs.write_runs(suite.runs)
    words = "tables --suite mini --benchmark"
    for name in ("glue", "domainbed"):
        shown(f"{words} {name}", monkeypatch, capsys)
    sections = {name: Path(artifacts_of(name).section_file("mini")) for name in PART["benchmarks"]}
    numbers = {name: Path(numbers_file("mini", name)) for name in PART["benchmarks"]}
    assert all(file.exists() for file in (*sections.values(), *numbers.values()))

    suite.runs_of("glue")[0].metrics_file.unlink()
    shown(f"{words} glue", monkeypatch, capsys)
    assert not sections["glue"].exists()
    assert not numbers["glue"].exists()
    assert sections["domainbed"].exists()
    assert numbers["domainbed"].exists()

    # the numbers are those of all sets, whose tables are not written here
    suite.runs_of("domainbed")[0].metrics_file.unlink()
    shown(f"{words} domainbed --part rotated_mnist_5k", monkeypatch, capsys)
    assert sections["domainbed"].exists()
    assert numbers["domainbed"].exists()


def test_claims_that_are_written_need_the_numbers_of_tables(
    blessed: Suite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, errors, status = shown("claims --suite mini --write", monkeypatch, capsys)
    assert status == 1
    assert errors[0].startswith(f"error: {numbers_file('mini', 'glue')} cannot be read")


@pytest.mark.slow
def test_tables_of_blessed_records_say_so_and_write_no_numbers_or_section(
    blessed: Suite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "tables --suite mini --benchmark"
    note = f"glue: no run of 'mini' is finished here; {BLESSED}"
    written = "wrote tables to results/mini/tables/, figures to results/mini/figures/"
    assert shown(f"{words} glue", monkeypatch, capsys) == ("", [note, written], 0)
    of_blessed = tables()
    assert {name.split("_")[0] for name in of_blessed} == {"glue"}
    assert all(note in text for text in captions().values())
    assert not Path("results/mini/sections").exists()
    assert not Path("results/mini/numbers").exists()

    # the same runs, finished here, have the same numbers
    fake_runs.write_runs(blessed.runs)
    assert shown(f"{words} glue", monkeypatch, capsys) == ("", [written], 0)
    finished = tables()
    for name, frame in of_blessed.items():
        pd.testing.assert_frame_equal(finished[name], frame)
    assert not any(BLESSED in text for text in captions().values())
    assert Path(numbers_file("mini", "glue")).exists()
    # only now, because it writes tables of the paper too
    assert shown(f"{words} domainbed --part rotated_mnist_5k", monkeypatch, capsys)[2] == 0
    assert list(Path("results/mini/tables").glob("domainbed_rotated_mnist_5k_*.md"))


SMOKE = load_suite({"suite": "smoke"})


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", SMOKE.settings.benchmarks)
@pytest.mark.parametrize("place", [0, -1])
def test_one_finished_run_has_tables_and_figures(
    benchmark: str,
    place: int,
    suite: Suite,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first run of a benchmark is mostly of a dense model, and the last one of an ablation."""
    runs = SMOKE.runs_of(benchmark)
    fake_runs.write_runs([runs[place]])
    note = f"{benchmark}: {len(runs) - 1} of {len(runs)} runs are missing: make run SUITE=smoke"
    command = f"tables --suite smoke --benchmark {benchmark}"
    output, lines, status = shown(command, monkeypatch, capsys)
    assert (output, lines[0], status) == ("", note, 0)
    for name in artifacts_of(benchmark).table_files("smoke"):
        assert Path(name).exists()
    for name in artifacts_of(benchmark).figure_files("smoke"):
        assert Path(name).exists()


def tables() -> dict[str, pd.DataFrame]:
    """Read the written tables of GLUE by name."""
    files = sorted(Path("results/mini/tables").glob("glue_*.csv"))
    assert files
    return {file.stem: pd.read_csv(file) for file in files}


def captions() -> dict[str, str]:
    """Read the written Markdown of GLUE, also of the paper's items, by path."""
    files = [
        *Path("results/mini/tables").glob("glue_*.md"),
        *Path("results/mini/paper").glob("*.md"),
    ]
    assert len(files) > 3
    return {str(file): file.read_text() for file in files}


def test_the_mirror_has_only_finished_runs_and_counts_the_missing(
    blessed: Suite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mirrored: list[str] = []

    def mirror(records: list[object], uri: str) -> dict[str, int]:
        mirrored.extend(record.run.folder for record in records)  # type: ignore[attr-defined]
        return {"added": len(records)}

    monkeypatch.setattr("benchmarks.harness.results.mlflow.mirror", mirror)
    some = blessed.runs[:2]
    fake_runs.write_runs(some)
    count = len(blessed.runs)
    line = f"{count - 2} of {count} runs are missing: make run SUITE=mini"
    assert shown("mirror --suite mini", monkeypatch, capsys) == ("MLflow: 2 added\n", [line], 0)
    assert mirrored == [run.folder for run in some]

    # the store also gets the files of a run, so its collected record is not enough
    fake_runs.write_runs(blessed.runs)
    fake_runs.collect(blessed)
    for run in blessed.runs[2:]:
        run.metrics_file.unlink()
    mirrored.clear()
    assert shown("mirror --suite mini", monkeypatch, capsys) == ("MLflow: 2 added\n", [line], 0)
    assert mirrored == [run.folder for run in some]


def test_collecting_still_refuses_a_benchmark_with_missing_runs(blessed: Suite) -> None:
    fake_runs.write_runs(blessed.runs[1:])
    with pytest.raises(DefinitionError, match=r"^1 of \d+ runs of the suite mini is missing"):
        call("collect", "--suite", "mini", "--benchmark", "glue")
    assert not records_file("mini", "glue").exists()
    assert len(find_finished(blessed, "glue").records) == len(blessed.runs_of("glue")) - 1
