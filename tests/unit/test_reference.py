"""The blessed files: numbers with all digits, records that give the same numbers, and damaged ones are named."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.harness.base import REFERENCE, DataError, DefinitionError
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import Suite, load_suite, plain_suite
from benchmarks.harness.results import reference
from benchmarks.harness.results.check import KEY_COLUMNS, collect_numbers
from benchmarks.harness.results.records import read_record
from benchmarks.harness.results.reference import (
    read_blessed_records,
    read_reference,
    reference_file,
    write_reference,
)
from tests import fake_runs

SHIPPED = sorted(REFERENCE.glob("*/*.csv"))
SHIPPED_RECORDS = sorted(REFERENCE.glob("*/*.jsonl.gz"))


@pytest.fixture
def suite(here: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Finish and bless two benchmarks in an empty working directory; one has several files of records."""
    monkeypatch.setattr(reference, "REFERENCE", here / "reference")
    suite = load_suite({"suite": "smoke", "benchmarks": ["glue", "domainbed"]})
    fake_runs.write_runs(suite.runs)
    fake_runs.bless(suite)
    return suite


def assert_same_numbers(suite: Suite, benchmark: str) -> None:
    """Check that the blessed records of a benchmark give exactly the numbers of its csv."""
    blessed = read_blessed_records(suite, benchmark)
    assert blessed is not None
    # the numbers of runs that are no longer planned cannot be computed
    assert blessed.num_unplanned == 0, "bless the benchmark again: the plan has changed"
    numbers = collect_numbers(blessed.records.values())
    written = read_reference(suite.name, benchmark)
    pd.testing.assert_frame_equal(numbers.rows, written.rows, check_dtype=False)
    assert numbers.machines == written.machines


@pytest.mark.parametrize(
    "path", SHIPPED_RECORDS, ids=lambda path: f"{path.parent.name} {path.name}"
)
def test_the_shipped_records_have_exactly_the_shipped_numbers(path: Path) -> None:
    """A csv that was edited by hand differs, and so do records of another blessing."""
    assert_same_numbers(plain_suite(path.parent.name), path.name.removesuffix(".jsonl.gz"))


def test_the_shipped_files_belong_to_suites_and_their_benchmarks() -> None:
    assert SHIPPED
    for csv in SHIPPED:
        assert csv.stem in plain_suite(csv.parent.name).settings.benchmarks
        assert csv.with_suffix(".json").is_file()
    for path in SHIPPED_RECORDS:
        assert path.with_name(path.name.replace(".jsonl.gz", ".csv")).is_file()
    suites = {csv.parent.name for csv in SHIPPED}
    assert {path.name for path in REFERENCE.iterdir()} == suites  # nothing of an older form
    for name in ("smoke", "mini"):  # parts of longer suites are blessed one by one
        benchmarks = set(plain_suite(name).settings.benchmarks)
        files = [path.name for path in REFERENCE.glob(f"{name}/*")]
        numbers = {file.removesuffix(".csv") for file in files if file.endswith(".csv")}
        records = {file.removesuffix(".jsonl.gz") for file in files if file.endswith(".gz")}
        assert numbers == benchmarks
        assert records == benchmarks


@pytest.mark.parametrize("benchmark", ["glue", "domainbed"])
def test_the_records_are_those_of_the_runs_and_give_the_numbers_of_the_csv(
    benchmark: str, suite: Suite
) -> None:
    assert_same_numbers(suite, benchmark)
    blessed = read_blessed_records(suite, benchmark)
    assert blessed is not None
    assert [*blessed.records.values()] == fake_runs.records(suite.runs_of(benchmark))
    assert (blessed.origin.commit[:8], blessed.origin.processors) == ("01234567", "CPU")
    names = sorted(path.name for path in reference_file("smoke", benchmark, "csv").parent.iterdir())
    assert [name for name in names if name.startswith(benchmark)] == [
        f"{benchmark}.{ending}" for ending in ("csv", "json", "jsonl.gz")
    ]


def edit_csv(suite: Suite) -> None:
    path = reference_file("smoke", "glue", "csv")
    text = path.read_text()
    assert ",0.5," in text
    path.write_text(text.replace(",0.5,", ",0.25,", 1))


def cut_records(suite: Suite) -> None:
    """Leave the last run out."""
    csv = reference_file("smoke", "glue", "csv").read_text()
    write_reference("smoke", "glue", fake_runs.records(suite.runs_of("glue")[:-1]), "0" * 40)
    reference_file("smoke", "glue", "csv").write_text(csv)


@pytest.mark.parametrize("change", [edit_csv, cut_records])
def test_an_edited_csv_and_other_records_do_not_fit(
    change: Callable[[Suite], None], suite: Suite
) -> None:
    change(suite)
    with pytest.raises(AssertionError):
        assert_same_numbers(suite, "glue")


def test_the_same_records_give_the_same_bytes_whatever_the_time(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = reference_file("smoke", "glue", "jsonl.gz")
    before = path.read_bytes()
    path.unlink()
    monkeypatch.setattr("time.time", lambda: 4e9)
    fake_runs.bless(suite)
    assert path.read_bytes() == before
    assert b"glue" not in before[:20]  # no name of a file


def test_runs_that_are_not_planned_are_counted_and_left_out(suite: Suite) -> None:
    fewer = replace(suite)
    fewer.__dict__["runs"] = suite.runs[1:]
    blessed = read_blessed_records(fewer, "glue")
    assert blessed is not None
    assert blessed.num_unplanned == 1
    assert suite.runs[0].folder not in blessed.records


def test_the_reference_has_every_number_with_all_digits_and_its_machine(suite: Suite) -> None:
    run = suite.runs[0]
    numbers, record, task = read_reference("smoke", "glue"), read_record(run), run.spec["task"]
    scores = record.metrics.scores or {}
    assert repr(scores["test"][task["name"]][task["metric"]]) in set(numbers.rows["value"])
    assert list(numbers.machines.values()) == [record.metrics.environment.fingerprint]
    assert set(numbers.rows["machine"]) == set(numbers.machines)
    assert not numbers.rows.duplicated(KEY_COLUMNS).any()
    with pytest.raises(DefinitionError, match="two finished runs have the same number"):
        collect_numbers([record, replace(record, run=Run("other", run.spec))])


def without_key(file: Path) -> None:
    content = json.loads(file.read_text())
    del content["machines"]
    file.write_text(json.dumps(content))


def of_another_machine(file: Path) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "machines": {"other": {}}}))


def cut_in_half(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def cut_line(file: Path) -> None:
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-100]))


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "other columns": (
        "csv",
        lambda file: file.write_text("benchmark,mean\n"),
        "damaged or of an older form: .*None of",
    ),
    "an empty csv": (
        "csv",
        lambda file: file.write_text(""),
        "damaged or of an older form: No columns",
    ),
    "a seed that is no number": (
        "csv",
        lambda file: file.write_text(file.read_text().replace(",0,", ",x,")),
        "damaged",
    ),
    "no csv": ("csv", Path.unlink, "cannot be read: No such file"),
    "cut json": ("json", lambda file: file.write_text("{"), "is damaged: 'the file': Invalid JSON"),
    "a list": (
        "json",
        lambda file: file.write_text("[]"),
        "is damaged: 'the file': Input should be an object",
    ),
    "a missing key": ("json", without_key, "is damaged: 'machines': Field required"),
    "another machine": (
        "json",
        of_another_machine,
        "names the machine '.*', which its json does not have",
    ),
    "no json": ("json", Path.unlink, "cannot be read: No such file"),
    "not compressed": ("jsonl.gz", lambda file: file.write_text("{}"), "is damaged: Not a gzipped"),
    "a cut file": ("jsonl.gz", cut_in_half, "is damaged: Compressed file ended"),
    "a flipped byte": ("jsonl.gz", flip_byte, "is damaged: "),
    "a cut line": ("jsonl.gz", cut_line, r"line 15, is damaged: 'the file': Invalid JSON"),
}


def read_all(suite: Suite) -> None:
    read_reference(suite.name, "glue")
    read_blessed_records(suite, "glue")


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_reference_is_named(case: str, suite: Suite) -> None:
    ending, damage, message = DAMAGES[case]
    damage(reference_file("smoke", "glue", ending))
    with pytest.raises(
        (DataError, DefinitionError),
        match=rf"^\S+/smoke/glue\.[\w.]+,? .*{message}.*; restore it .*, or bless a run of the suite "
        r"\(`python -m benchmarks bless --suite smoke --benchmark glue`\)$",
    ) as error:
        read_all(suite)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl.gz"])
def test_a_pipe_in_place_of_a_reference_is_not_waited_for(ending: str, suite: Suite) -> None:
    file = reference_file("smoke", "glue", ending)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(
        (DataError, DefinitionError),
        match=r"glue\.[\w.]+ cannot be read: it is not a file; restore it ",
    ):
        read_all(suite)
