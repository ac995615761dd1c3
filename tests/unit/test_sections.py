"""Test that the pages and the claims need only the files that `tables` writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import cli
from benchmarks.harness.base import OVERRIDES, RESULTS, RUNS, DataError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.suite import Suite, load_suite
from benchmarks.harness.report.artifacts import artifacts_of
from benchmarks.harness.report.claims_table import read_claim_numbers
from benchmarks.harness.report.presentation import present
from benchmarks.harness.report.section import (
    DataRow,
    find_mixed_sets,
    make_section,
    read_section,
)
from benchmarks.harness.results.records import Record, read_records
from tests import fake_runs
from tests.drawn import undraw
from tests.programs import call

SHOWN = {"suite": "mini", "benchmarks": ["glue", "domainbed"]}
MINI = Path("results/mini")


@pytest.fixture(scope="module")
def suite(shared_here: Path) -> Iterator[Suite]:
    """Finish and collect two benchmarks, one with tables for each set, and write their tables."""
    suite = load_suite(SHOWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(OVERRIDES, json.dumps(SHOWN))
        undraw(patch)
        fake_runs.write_runs(suite.runs)
        fake_runs.collect(suite)
        for name in suite.settings.benchmarks:
            call("tables", "--suite", "mini", "--benchmark", name)
            for part in suite.sets_with_tables(name):
                call("tables", "--suite", "mini", "--benchmark", name, "--part", part)
        yield suite


@pytest.mark.parametrize(
    ("benchmark", "data_set"),
    [("glue", None), ("domainbed", None), ("domainbed", "rotated_mnist_5k")],
)
def test_tables_write_the_section_of_the_pages(
    benchmark: str, data_set: str | None, suite: Suite
) -> None:
    records = read_records(suite, benchmark, data_set)
    presentation = present(load_benchmark(benchmark), records)
    shown = presentation.presentations_of_sets[data_set] if data_set else presentation
    section = read_section(artifacts_of(benchmark, data_set), "mini")
    assert section == make_section(shown, records, find_mixed_sets(records), "mini")
    assert [table.name for table in section.tables] == [table.name for table in shown.tables]
    assert [figure.name for figure in section.figures] == list(shown.figures)
    assert section.verdicts == list(shown.verdicts)
    assert section.job_seconds == [2.0] * len(records)
    assert [machine.runs for machine in section.machines] == [len(records)]


def test_a_section_has_the_rows_and_the_settings_of_the_runs(suite: Suite) -> None:
    section = read_section(artifacts_of("glue"), "mini")
    assert (
        DataRow(task="tweets", split="train", rows=10, labels="0: 4, 1: 6", dropped=1)
        in section.data
    )
    training = suite.runs_of("glue")[0].spec["training"]
    assert [setting.name for setting in section.training] == list(training)
    assert {setting.name: setting.value for setting in section.training}["epochs"] == str(
        training["epochs"]
    )
    assert section.models == ["minilm"]
    assert section.random_weights is False


def test_a_limit_that_only_some_runs_have_is_a_whole_number(suite: Suite) -> None:
    records = read_records(suite, "glue")
    presentation = present(load_benchmark("glue"), records)
    first = records[0]
    training = {**first.run.spec["training"], "train_rows": None}
    run = replace(first.run, spec={**first.run.spec, "training": training})
    section = make_section(presentation, [replace(first, run=run), *records[1:]], [], "mini")
    values = {setting.name: setting.value for setting in section.training}
    assert values["train_rows"] == "–, 640"


def test_an_unknown_fact_on_a_machine_is_a_dash(suite: Suite) -> None:
    records = read_records(suite, "glue")
    unknown = {"git_commit": None, "git_dirty": None, "code": None, "cores": None}
    changed = []
    for record in records:
        environment = record.metrics.environment.model_copy(update=unknown)
        metrics = record.metrics.model_copy(update={"environment": environment})
        changed.append(replace(record, metrics=metrics))
    section = make_section(present(load_benchmark("glue"), changed), changed, [], "mini")
    facts = section.machines[0].facts
    for name in ("git commit", "git dirty", "code", "cores"):
        assert facts[name] == "–"
    # the machine is known to have no GPU
    assert facts["gpus"] == "none"


def with_digest(record: Record, key: str, digest: str) -> Record:
    """Return the record of a run that read other rows of a split."""
    data = dict(record.metrics.data or {})
    data[key] = data[key].model_copy(update={"digest": digest})
    return replace(record, metrics=record.metrics.model_copy(update={"data": data}))


def test_only_evaluated_rows_that_should_be_the_same_are_compared(suite: Suite) -> None:
    records = read_records(suite, "glue")

    def mixed(records: list[Record]) -> list[str]:
        return [mixed.name for mixed in find_mixed_sets(records)]

    first, *others = [with_digest(record, "test", "a") for record in records]
    assert mixed([first, *others]) == []
    # training rows depend on the seed
    assert mixed([with_digest(first, "train", "b"), *others]) == []
    changed = with_digest(first, "test", "b")
    assert mixed([changed, *others]) == [first.run.task]
    # a run may evaluate fewer rows by design
    training = {**first.run.spec["training"], "eval_rows": 30}
    run = replace(first.run, spec={**first.run.spec, "training": training})
    assert mixed([replace(changed, run=run), *others]) == []
    # an OOD set of one task may be the test set of another
    ood = [with_digest(record, "ood:movie", "c") for record in records]
    assert mixed([with_digest(ood[0], "ood:movie", "d"), *ood[1:]]) == ["movie"]


def test_runs_that_evaluated_other_rows_are_named_with_the_way_out(
    suite: Suite, here: Path, shared_here: Path
) -> None:
    shutil.copytree(shared_here / "results", here / "results")
    runs = [run for run in suite.runs_of("glue") if run.task == "tweets"]
    for run in runs:
        rows = {"digest": "fedcba", "source": "/new/tweets/test.jsonl"}
        if run == runs[0]:
            rows = {"digest": "0123456789abcdef", "source": "/old/tweets/test.jsonl"}
        fake_runs.edit(run, lambda content, rows=rows: content["data"]["test"].update(rows))
    note = "glue: the runs evaluated different rows of tweets, so scores do not compare"
    done = CliRunner().invoke(cli, ["tables", "--suite", "mini", "--benchmark", "glue"], obj=0.0)
    assert done.exit_code == 0
    where = "wrote tables to results/mini/tables/, figures to results/mini/figures/"
    assert done.output == f"{note}\n{where}\n"
    assert f"{note}. " in (MINI / "tables/glue_results.md").read_text()
    call("report", "--suite", "mini", "--benchmark", "glue", "--output", "page.html")
    assert (
        "<p><b>Warning:</b> The runs evaluated different rows of tweets, so their scores do not "
        "compare: 1 run read /old/tweets/test.jsonl (digest 0123456789abcdef), "
        f"{len(runs) - 1} runs read /new/tweets/test.jsonl (digest fedcba). "
        "<code>grep -rl --include=metrics.json 0123456789abcdef results/runs/glue</code> lists the "
        "runs of one kind. Delete their folders, and start the workflow again.</p>"
    ) in Path("page.html").read_text()


def test_tables_write_the_numbers_of_the_claims(suite: Suite) -> None:
    written = read_claim_numbers(suite)
    computed = fake_runs.claim_numbers(suite)
    assert list(written) == list(computed) == ["glue", "domainbed"]
    for name, numbers in computed.items():
        assert written[name].to_dict("records") == numbers.to_dict("records")


def test_claims_and_pages_need_neither_runs_nor_records(
    suite: Suite, here: Path, shared_here: Path
) -> None:
    shutil.copytree(shared_here / "results", here / "results")
    pages = {name: MINI / f"{name}.html" for name in suite.settings.benchmarks}
    report = MINI / "report.html"

    def write_pages() -> list[str]:
        call("claims", "--suite", "mini", "--write")
        call("report", "--suite", "mini", "--output", str(report))
        for name, page in pages.items():
            call("report", "--suite", "mini", "--benchmark", name, "--output", str(page))
        files = [report, *pages.values(), *(MINI / "tables").glob("claims.*")]
        return [file.read_text() for file in files]

    with_runs = write_pages()
    shutil.rmtree(RUNS)
    shutil.rmtree(RESULTS / "mini/records")
    for file in (report, *pages.values(), *(MINI / "tables").glob("claims.*")):
        file.unlink()
    assert write_pages() == with_runs


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read: No such file or directory"),
        ('{"tables": []', "is damaged: 'the file': Invalid JSON: EOF .*"),
        ('{"tables": 3}', "is damaged: 'tables': Input should be a valid .*"),
    ],
)
def test_a_wrong_section_is_named_with_the_way_to_make_it_again(
    content: str | None, problem: str, suite: Suite, here: Path
) -> None:
    path = MINI / "sections/glue.json"
    path.parent.mkdir(parents=True)
    if content is not None:
        path.write_text(content)
    advice = f"`snakemake --cores all --force {path} --config suite=mini` makes it again"
    with pytest.raises(DataError, match=rf"^{path} {problem}; {advice}$") as error:
        call("report", "--suite", "mini", "--benchmark", "glue", "--output", "page.html")
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("claims.csv", None, "cannot be read: No such file or directory"),
        ("claims.csv", b"", "is damaged: it has no tests"),
        ("claims.csv", b"claim_title,verdict\n", "is damaged: it has no tests"),
        ("claims.csv", b"claim,claim_title\na,b\n", "is damaged: test 1 has no 'endpoint'"),
        ("claims.csv", b"claim,claim_title\na\xff,b\n", "is damaged: 'utf-8' codec .*"),
        ("claims.html", b"<table>\xff</table>", "is damaged: 'utf-8' codec .*"),
    ],
)
def test_a_damaged_table_of_claims_is_named_with_the_way_to_make_it_again(
    name: str,
    content: bytes | None,
    problem: str,
    suite: Suite,
    shared_here: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(OVERRIDES, json.dumps(SHOWN))
    undraw(monkeypatch)
    shutil.copytree(shared_here / "results", here / "results")
    call("claims", "--suite", "mini", "--write")
    path = MINI / "tables" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    advice = f"`snakemake --cores all --force {path} --config suite=mini` makes it again"
    with pytest.raises(DataError, match=rf"^{path} {problem}; {advice}$") as error:
        call("report", "--suite", "mini", "--output", "page.html")
    assert "\n" not in str(error.value)
