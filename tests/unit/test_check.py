"""`check`, `verify` and `bless`: equal on one machine, within tolerances on two, and what cannot be blessed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.harness.base import RUNS, DataError, DefinitionError, write_json
from benchmarks.harness.config.runs import Run
from benchmarks.harness.results import check as checking
from benchmarks.harness.results.check import (
    KEYS,
    Numbers,
    bless,
    check,
    clean_commit,
    code_digest,
    collect_numbers,
    compare,
    read_numbers,
    read_reference,
    tolerance_of,
    values_agree,
    write_reference,
)
from benchmarks.harness.results.records import read_metrics
from tests import fake_runs
from tests.executed import finish, prepare
from tests.fake_runs import edit
from tests.planned import plan
from tests.programs import call

SCORES = ("dev", "test", "ood", "ood_mean")


@pytest.fixture
def runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Write finished runs of text and measurements to an empty working directory, and their numbers as the reference."""
    monkeypatch.setattr(checking, "REFERENCE", here / "reference")
    text = [run for run in fake_runs.write(RUNS) if run.spec["method"]["name"] in ("vanilla", "emoe", "gmoe")]
    runs = [*text, *fake_runs.write(RUNS, "smoke", benchmarks=("speed",))]
    write_reference("mini", read_numbers(runs), "0" * 40)
    return runs


def changed(runs: list[Run], *, elsewhere: bool = False) -> set[tuple[str, str]]:
    differences = check(runs, "mini", elsewhere=elsewhere).differences
    return set(differences[["part", "metric"]].itertuples(index=False, name=None))


def add_to_score(run: Run, difference: float) -> tuple[str, str]:
    name, metric = run.spec["task"]["name"], run.spec["task"]["metric"]

    def change(content: dict[str, Any]) -> None:
        content["scores"]["test"][name][metric] += difference

    edit(run, change)
    return "test", metric


def swapped_methods(blessed: Numbers, parts: tuple[str, ...]) -> list[bool]:
    """Give each run of smoke the numbers of every other method; return True for each run that the tolerant check flags."""
    rows = blessed.rows[blessed.rows["part"].isin(parts) & ~blessed.rows["run"].str.startswith("speed ")]
    runs = rows[["run", "seed"]].drop_duplicates()
    names = runs.groupby([runs["run"].str.split(" ").str[0], "seed"])["run"]  # of one benchmark and seed
    flagged = []
    for shift in range(1, names.size().max()):
        pairs = runs.assign(other=names.transform(np.roll, shift))[names.transform("size") > shift]
        swapped = pairs.merge(rows.rename(columns={"run": "other"}), on=["other", "seed"])[rows.columns]
        before, after = replace(blessed, rows=rows.merge(pairs[["run", "seed"]])), replace(blessed, rows=swapped)
        exact, tolerant = (
            set(compare(before, after, "smoke", elsewhere=elsewhere).differences.groupby(["run", "seed"]).groups)
            for elsewhere in (False, True)
        )
        flagged += [key in tolerant for key in exact]
    return flagged


def test_the_tolerant_check_sees_swapped_methods_and_scores() -> None:
    blessed = read_reference("smoke")
    records, scores = swapped_methods(blessed, tuple(set(blessed.rows["part"]))), swapped_methods(blessed, SCORES)
    assert min(len(records), len(scores)) > 1000
    assert sum(records) / len(records) > 0.99
    assert sum(records + scores) / len(records + scores) >= 0.95


@pytest.mark.parametrize(
    ("metric", "before", "after", "agrees"),
    [
        ("balanced_accuracy", "0.5", "0.52", True),
        ("balanced_accuracy", "0.5", "0.54", False),
        ("loss", "10.0", "10.09", True),  # relative above 1
        ("loss_3", "nan", "nan", True),
        ("loss_3", "0.5", "nan", False),
        ("loads", "100 100", "101 99", True),
        ("loads", "10 10", "10 10 0", False),
        ("content", "rows 3", "rows 4", False),
    ],
)
def test_numbers_of_two_machines_agree_within_the_tolerance(metric: str, before: str, after: str, agrees: bool) -> None:
    assert values_agree(before, after, tolerance_of(metric)) == agrees
    assert values_agree(before, after, 0) == (before == after)


def test_the_last_digit_counts_for_one_machine_and_code_and_the_tolerance_otherwise(runs: list[Run]) -> None:
    score = add_to_score(runs[0], 2e-16)
    assert changed(runs) == {score}
    assert changed(runs, elsewhere=True) == set()
    assert str(check(runs, "mini")).endswith(" agree, 1 changed, 0 missing, 0 new")

    reference = checking.REFERENCE / "mini.json"
    content = json.loads(reference.read_text())
    reference.write_text(json.dumps(content | {"code": "0" * 64}))
    assert "within tolerances: the reference was made by older code" in str(check(runs, "mini"))
    assert changed(runs) == set()
    reference.write_text(json.dumps(content))
    for run in runs:
        edit(run, lambda content: content["environment"]["fingerprint"].update({"threads": "2"}))
    assert "the reference was made on another machine (threads: 1 -> 2)" in str(check(runs, "mini"))
    assert changed(runs) == set()
    add_to_score(runs[0], -0.3)
    assert changed(runs) == {score}


def test_the_digest_covers_the_code_that_numbers_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "ROOT", tmp_path)
    monkeypatch.setattr(checking, "BENCHMARKS", tmp_path / "benchmarks")
    files = ("emoe/a.py", "emoe/sparse/a.cpp", "benchmarks/harness/training/a.py", "benchmarks/glue/pipeline.py")
    others = ("benchmarks/glue/presentation.py", "benchmarks/harness/report/a.py", "README.md")
    digests = [code_digest()]
    for file in (*files, *others):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1")
        digests.append(code_digest())
    assert len(set(digests)) == 1 + len(files)
    assert len(set(digests[len(files) :])) == 1


def test_the_probe_the_conversion_and_the_rows_are_compared_on_another_machine(runs: list[Run]) -> None:
    layer = {"index": 1, "name": "1", "neurons": 32, "experts": 4, "expert_size": 8, "top_k": 2}
    layer |= {"explained": None, "seconds": None}

    def change(content: dict[str, Any]) -> None:
        content["probe"].update(losses=["0.75", *content["probe"]["losses"][1:]], loads={"1": [12, 8, 10, 10]})
        content["probe"]["logits"].update(projection=0.51)
        content["model"].update(conversion=[layer])
        content["data"]["train"].update(rows=9)

    edit(next(run for run in runs if run.spec["method"].get("name") == "emoe"), change)
    numbers = {metric for _, metric in changed(runs, elsewhere=True)}
    assert numbers == {"loss_1", "loads", "logits", "conversion", "content"}


def test_times_are_not_compared_but_the_work_of_a_measurement_is(runs: list[Run]) -> None:
    run = next(run for run in runs if run.spec["task"]["name"] == "partition")
    edit(run, lambda content: content["measured"]["emoe"].update(seconds=3.0, inertia=0.8))
    assert {metric for _, metric in changed(runs)} == {"inertia"}


def test_lost_and_new_runs_fail(runs: list[Run]) -> None:
    assert set(check(runs[1:], "mini").differences["status"]) == {"missing"}
    (RUNS / runs[1].folder / "metrics.json").unlink()
    unfinished = check(runs, "mini")
    assert not unfinished.passed
    assert unfinished.unfinished == [runs[1].id]
    write_reference("mini", read_numbers(runs[3:]), "0" * 40)
    assert set(check(runs[2:], "mini").differences["status"]) == {"new"}


def test_the_reference_has_every_number_with_all_digits_and_its_machine(runs: list[Run]) -> None:
    reference, content, task = read_reference("mini"), read_metrics(runs[0]), runs[0].spec["task"]
    assert repr(content["scores"]["test"][task["name"]][task["metric"]]) in set(reference.rows["value"])
    assert list(reference.machines.values()) == [content["environment"]["fingerprint"]]
    assert set(reference.rows["machine"]) == set(reference.machines)
    assert not reference.rows.duplicated(KEYS).any()
    with pytest.raises(DefinitionError, match="two finished runs have the same number"):
        collect_numbers([(run, content) for run in (runs[0], Run("other", runs[0].spec))])


def without_key(file: Path) -> None:
    content = json.loads(file.read_text())
    del content["machines"]
    file.write_text(json.dumps(content))


def of_another_machine(file: Path) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "machines": {"other": {}}}))


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "other columns": (
        "csv",
        lambda file: file.write_text("benchmark,mean\n"),
        "damaged or of an older form: .*None of",
    ),
    "an empty csv": ("csv", lambda file: file.write_text(""), "damaged or of an older form: No columns"),
    "a seed that is no number": (
        "csv",
        lambda file: file.write_text(file.read_text().replace(",0,", ",x,")),
        "damaged",
    ),
    "no csv": ("csv", Path.unlink, "cannot be read: No such file"),
    "cut json": ("json", lambda file: file.write_text("{"), "is damaged: 'the file': Invalid JSON"),
    "a list": ("json", lambda file: file.write_text("[]"), "is damaged: 'the file': Input should be an object"),
    "a missing key": ("json", without_key, "is damaged: 'machines': Field required"),
    "another machine": ("json", of_another_machine, "names the machine '.*', which its json does not have"),
    "no json": ("json", Path.unlink, "cannot be read: No such file"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_reference_is_named(case: str, runs: list[Run]) -> None:
    ending, damage, message = DAMAGES[case]
    damage(checking.REFERENCE / f"mini.{ending}")
    with pytest.raises(
        (DataError, DefinitionError), match=rf"^\S+/mini\.\w+ .*{message}.*; bless a run of the suite"
    ) as error:
        check(runs[:1], "mini")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_a_pipe_in_place_of_a_reference_is_not_waited_for(ending: str, runs: list[Run]) -> None:
    file = checking.REFERENCE / f"mini.{ending}"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises((DataError, DefinitionError), match=r"mini\.\w+ cannot be read: it is not a file; bless"):
        check(runs[:1], "mini")


def test_a_damaged_number_of_the_reference_is_a_difference(runs: list[Run]) -> None:
    assert not checking.values_agree("0.5", "half", 0.1)


def test_verify_runs_again_and_leaves_the_run_as_it_is(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = next(run for run in plan(["modularity"], "smoke") if run.spec["method"]["name"] == "random_partition")
    path, verify = prepare(run, str(RUNS)), ("verify", "--suite", "smoke")
    with pytest.raises(DefinitionError, match="no run of the suite 'smoke' is finished"):
        call(*verify)
    finish(path)
    edit(run, lambda content: next(iter(content["data"].values())).update(rows=7))
    before = {file: file.stat().st_mtime_ns for file in path.parent.iterdir()}
    output = call(*verify, "--runs", "5", status=1)
    assert "content" in output
    assert output.endswith(" agree, 1 changed, 0 missing, 0 new\n")
    monkeypatch.setattr(sys, "executable", "false")
    assert f"1 runs are not finished, the first is {run.id}: no output" in call(*verify, status=1)
    assert {file: file.stat().st_mtime_ns for file in path.parent.iterdir()} == before


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty checkout."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for command in ("init -q", "config user.email a@b", "config user.name a", "commit -q --allow-empty -m first"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)
    monkeypatch.setattr(checking, "ROOT", folder)
    return folder


def test_bless_refuses_a_tree_with_changes_but_for_blessed_numbers(checkout: Path) -> None:
    write_json(checkout / "results/reference/mini.json", {})
    assert len(clean_commit()) == 40
    (checkout / "code.py").write_text("x = 1")
    with pytest.raises(DefinitionError, match=r"1 files are not committed, the first is code\.py"):
        clean_commit()


@pytest.mark.usefixtures("checkout")
def test_only_numbers_that_repeat_are_blessed(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    repeated, failures = list[str](), list[str]()

    def bless_runs(change: Callable[[dict[str, Any]], None] = lambda content: None) -> Path:
        def run_again(chosen: list[Run], _say: object) -> tuple[Numbers, list[str]]:
            results = [(run, read_metrics(run)) for run in chosen]
            repeated.extend(run.id for run in chosen)
            for _, content in results:
                change(content)
            return collect_numbers(results), failures

        monkeypatch.setattr(checking, "run_again", run_again)
        return bless(runs, "mini", print)

    fastest = [next(run for run in runs if run.benchmark == name) for name in ("glue", "speed")]
    for run in fastest:
        edit(run, lambda content: content["cost"].update(job_seconds=0.5))
    bless_runs()
    assert check(runs, "mini").passed
    assert sorted(repeated) == sorted(run.id for run in fastest)
    for change in (
        lambda content: content.get("probe", {}).update(losses=["0.25"]),
        lambda content: content["environment"]["fingerprint"].update(threads="2"),
    ):
        with pytest.raises(DefinitionError, match="the runs do not repeat here exactly"):
            bless_runs(change)
    failures.append("minilm: ValueError: odd")
    with pytest.raises(DefinitionError, match="the runs do not repeat here exactly"):
        bless_runs()
    (RUNS / runs[1].folder / "metrics.json").unlink()
    with pytest.raises(DefinitionError, match=r"1 of \d+ runs .* is missing"):
        bless_runs()
