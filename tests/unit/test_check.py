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
import pandas as pd
import pytest

from benchmarks.harness.base import RUNS, DataError, DefinitionError, write_json
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import Suite, load_suite
from benchmarks.harness.results import check as checking
from benchmarks.harness.results.check import (
    KEYS,
    Numbers,
    bless,
    check,
    check_numbers,
    clean_commit,
    code_digest,
    compare,
    read_reference,
    tolerance_of,
    values_agree,
    write_reference,
)
from benchmarks.harness.results.content import Metrics
from benchmarks.harness.results.files import records_file
from benchmarks.harness.results.records import Record, read_record
from tests import fake_runs
from tests.executed import finish, prepare
from tests.fake_runs import edit
from tests.planned import plan
from tests.programs import call

SCORES = ("dev", "test", "ood", "ood_mean")
POINTS = ("balanced_accuracy", "accuracy", "accuracy_macro", "accuracy_norm", "score")
EMOE = ("emoe", "lora_emoe")
# of the differences of image scores between an AMD EPYC and an Intel Xeon
IMAGE_DEVIATION = {"dev": 0.004, "test": 0.011}


@pytest.fixture
def suite(here: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Finish and collect text and measurements in an empty working directory; their numbers are the reference."""
    monkeypatch.setattr(checking, "REFERENCE", here / "reference")
    suite = load_suite({"suite": "smoke", "benchmarks": ["glue", "speed"]})
    fake_runs.write_runs(suite.runs)
    fake_runs.collect(suite)
    bless_all(suite.runs)
    return suite


def bless_all(runs: list[Run]) -> None:
    """Write the numbers of some runs as the reference."""
    write_reference("smoke", check_numbers(fake_runs.records(runs)), "0" * 40)


def changed(suite: Suite, *, elsewhere: bool = False) -> set[tuple[str, str]]:
    """Collect a suite, and return the part and metric of the numbers that differ from the reference."""
    fake_runs.collect(suite)
    differences = check(suite, elsewhere=elsewhere).differences
    return set(differences[["part", "metric"]].itertuples(index=False, name=None))


def add_to_score(run: Run, difference: float) -> tuple[str, str]:
    name, metric = run.spec["task"]["name"], run.spec["task"]["metric"]

    def change(content: dict[str, Any]) -> None:
        content["scores"]["test"][name][metric] += difference

    edit(run, change)
    return "test", metric


def swapped_methods(blessed: Numbers, parts: tuple[str, ...]) -> list[bool]:
    """Give each run of smoke the numbers of every other method; return True for each run that the tolerant check flags."""
    rows = blessed.rows[
        blessed.rows["part"].isin(parts) & ~blessed.rows["run"].str.startswith("speed ")
    ]
    runs = rows[["run", "seed"]].drop_duplicates()
    names = runs.groupby([runs["run"].str.split(" ").str[0], "seed"])[
        "run"
    ]  # of one benchmark and seed
    flagged = []
    for shift in range(1, names.size().max()):
        pairs = runs.assign(other=names.transform(np.roll, shift))[names.transform("size") > shift]
        swapped = pairs.merge(rows.rename(columns={"run": "other"}), on=["other", "seed"])[
            rows.columns
        ]
        before, after = (
            replace(blessed, rows=rows.merge(pairs[["run", "seed"]])),
            replace(blessed, rows=swapped),
        )
        exact, tolerant = (
            set(
                compare(before, after, "smoke", elsewhere=elsewhere)
                .differences.groupby(["run", "seed"])
                .groups
            )
            for elsewhere in (False, True)
        )
        flagged += [key in tolerant for key in exact]
    return flagged


def is_score(numbers: Numbers) -> pd.Series:
    """Return True for each number that is a score of a text or image benchmark."""
    return numbers.rows["part"].isin(SCORES) & numbers.rows["metric"].isin(POINTS)


def is_of_emoe(numbers: Numbers) -> pd.Series:
    """Return True for each score of a run whose method is EMoE."""
    return is_score(numbers) & numbers.rows["run"].str.split(" ").str[3].isin(EMOE)


def is_in_domain(numbers: Numbers) -> pd.Series:
    """Return True for each score on the test split, of all methods."""
    return is_score(numbers) & (numbers.rows["part"] == "test")


def add(numbers: Numbers, differences: np.ndarray) -> Numbers:
    """Add a difference to each number; a number with a difference of 0 keeps its text."""
    rows = numbers.rows.copy()
    for row in np.flatnonzero(differences):
        value = float(rows.at[row, "value"]) + float(differences[row])
        rows.at[row, "value"] = repr(value)
    return replace(numbers, rows=rows)


def rounding_errors(numbers: Numbers, seed: int) -> np.ndarray:
    """Draw differences as two makes of processor show them.

    One of 50 text scores has another row right, and the scores of images scatter.
    """
    generator = np.random.default_rng(seed)
    rows = numbers.rows
    of_text = generator.choice([-0.004, 0.004], len(rows)) * (generator.random(len(rows)) < 0.02)
    deviations = rows["part"].map(IMAGE_DEVIATION).fillna(0)
    of_images = generator.normal(0, deviations)
    is_of_images = rows["run"].str.startswith("domainbed ")
    return np.where(is_of_images, of_images, of_text) * is_score(numbers)


@pytest.mark.parametrize("suite_name", ["mini", "full"])
@pytest.mark.parametrize("points", [2.9, -2.9, 1.0, -1.0])
def test_a_shift_of_a_methods_scores_is_seen(suite_name: str, points: float) -> None:
    blessed = read_reference(suite_name)
    errors = rounding_errors(blessed, seed=0)
    shifted = add(blessed, errors + points / 100 * is_of_emoe(blessed))
    result = compare(blessed, shifted, suite_name, elsewhere=True)
    assert not result.passed
    # one point is below the tolerance of each number, so only the means can show it
    for name in ("glue minilm tweets emoe clean 0.0001", "glue_lora, lora - lora_emoe"):
        of_group = result.shifts[result.shifts["group"] == name]
        found = of_group[of_group["part"] == "test"].iloc[0]
        shift = abs(found["after"] - found["before"])
        assert shift == pytest.approx(abs(points) / 100, abs=0.003)
        assert shift > found["limit"]


@pytest.mark.parametrize("suite_name", ["mini", "full"])
def test_a_shift_of_all_methods_is_seen(suite_name: str) -> None:
    blessed = read_reference(suite_name)
    errors = rounding_errors(blessed, seed=0)
    shifted = add(blessed, errors + 0.01 * is_in_domain(blessed))
    result = compare(blessed, shifted, suite_name, elsewhere=True)
    assert result.differences.empty
    assert not result.passed
    assert set(result.shifts["part"]) == {"test"}
    assert "\nshifted glue_lora minilm tweets lora clean 0.004, test" in str(result)


@pytest.mark.parametrize("suite_name", ["mini", "full"])
@pytest.mark.parametrize("seed", range(5))
def test_rounding_errors_are_no_shift(suite_name: str, seed: int) -> None:
    blessed = read_reference(suite_name)
    errors = rounding_errors(blessed, seed)
    assert np.count_nonzero(errors) > 10
    result = compare(blessed, add(blessed, errors), suite_name, elsewhere=True)
    assert result.passed, str(result)


def balanced_accuracies(values: list[float], seeds: list[int]) -> Numbers:
    """Make one group of scores; if there are more scores than seeds, a run has several sets."""
    names = [("glue m t emoe 1", seed, "ood", "", "balanced_accuracy") for seed in seeds]
    rows = pd.DataFrame(names, columns=KEYS).assign(value=[repr(value) for value in values])
    rows["eval_task"] = rows.groupby("seed").cumcount().astype(str)
    return Numbers(rows.assign(machine="one"), {"one": {}}, "code")


@pytest.mark.parametrize(
    ("values", "seeds", "differences", "limit"),
    [
        # the standard error of the old mean
        ([0.80, 0.81, 0.82, 0.83], [0, 1, 2, 3], [0.007] * 4, 0.00645),
        ([0.80, 0.81, 0.82, 0.83], [0, 1, 2, 3], [0.006] * 4, None),
        # without one, a single number may differ by its tolerance, 0.02
        ([0.80] * 4, [0, 1, 2, 3], [0.006] * 4, 0.005),
        ([0.80] * 4, [0, 1, 2, 3], [0.019, 0.0, 0.0, 0.0], None),
        # the differences scatter, with a standard deviation of 0.0104: 4 errors are 0.0208
        ([0.80] * 4, [0, 1, 2, 3], [0.018, 0.0, 0.018, 0.0], None),
        # one seed has no error
        ([0.80, 0.60, 0.70], [0, 0, 0], [0.019] * 3, None),
        ([0.80, 0.60, 0.80, 0.60], [0, 0, 1, 1], [0.019] * 4, 0.005),
    ],
)
def test_a_mean_may_shift_up_to_its_limit(
    values: list[float], seeds: list[int], differences: list[float], limit: float | None
) -> None:
    before = balanced_accuracies(values, seeds)
    after = add(before, np.array(differences))
    assert compare(before, after, "full").shifts.empty  # a machine repeats every digit
    result = compare(before, after, "full", elsewhere=True)
    assert result.differences.empty
    assert result.passed == (limit is None)
    assert list(result.shifts["limit"]) == pytest.approx(
        [] if limit is None else [limit], rel=0.001
    )


def test_a_single_number_within_its_tolerance_is_no_shift() -> None:
    blessed = read_reference("mini")
    for row in np.flatnonzero(is_score(blessed))[::80]:
        difference = np.zeros(len(blessed.rows))
        difference[row] = 0.0099
        result = compare(blessed, add(blessed, difference), "mini", elsewhere=True)
        assert result.passed, str(result)


def test_the_tolerant_check_sees_swapped_methods_and_scores() -> None:
    blessed = read_reference("smoke")
    records, scores = (
        swapped_methods(blessed, tuple(set(blessed.rows["part"]))),
        swapped_methods(blessed, SCORES),
    )
    assert min(len(records), len(scores)) > 1000
    assert sum(records) / len(records) > 0.99
    assert sum(records + scores) / len(records + scores) >= 0.95


@pytest.mark.parametrize(
    ("benchmark", "metric", "before", "after", "agrees"),
    [
        ("glue", "balanced_accuracy", "0.5", "0.515", True),
        ("glue", "balanced_accuracy", "0.5", "0.525", False),
        ("llama", "accuracy", "0.5", "0.525", False),
        ("domainbed", "accuracy", "0.5", "0.55", True),  # training makes rounding errors grow
        ("domainbed", "accuracy", "0.5", "0.57", False),
        ("glue", "loss_3", "0.5", "0.5002", False),
        ("domainbed", "loss_3", "0.5", "0.504", True),
        ("glue", "loss", "10.0", "10.09", True),  # relative above 1
        ("glue", "loss_3", "nan", "nan", True),
        ("glue", "loss_3", "0.5", "nan", False),
        ("glue", "loads", "100 100", "101 99", True),
        ("glue", "loads", "10 10", "10 10 0", False),
        ("glue", "content", "rows 3", "rows 4", False),
    ],
)
def test_numbers_of_two_machines_agree_within_the_tolerance(
    benchmark: str, metric: str, before: str, after: str, agrees: bool
) -> None:
    assert values_agree(before, after, tolerance_of(metric, benchmark)) == agrees
    assert values_agree(before, after, 0) == (before == after)


def test_the_last_digit_counts_for_one_machine_and_code_and_the_tolerance_otherwise(
    suite: Suite,
) -> None:
    run = suite.runs[0]
    score = add_to_score(run, 2e-16)
    assert changed(suite) == {score}
    assert changed(suite, elsewhere=True) == set()
    assert str(check(suite)).endswith(" agree, 1 changed, 0 missing, 0 new")

    reference = checking.REFERENCE / "smoke.json"
    content = json.loads(reference.read_text())
    reference.write_text(json.dumps(content | {"code": "0" * 64}))
    assert "within tolerances: the reference was made by older code" in str(check(suite))
    assert changed(suite) == set()
    reference.write_text(json.dumps(content))
    for each in suite.runs:
        edit(each, lambda content: content["environment"]["fingerprint"].update({"threads": "2"}))
    assert changed(suite) == set()
    assert "the reference was made on another machine (threads: 1 -> 2)" in str(check(suite))
    add_to_score(run, -0.3)
    assert changed(suite) == {score}


def test_the_digest_covers_the_code_that_numbers_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "ROOT", tmp_path)
    monkeypatch.setattr(checking, "BENCHMARKS", tmp_path / "benchmarks")
    files = (
        "emoe/a.py",
        "emoe/sparse/a.cpp",
        "benchmarks/harness/training/a.py",
        "benchmarks/glue/pipeline.py",
    )
    others = ("benchmarks/glue/presentation.py", "benchmarks/harness/report/a.py", "README.md")
    digests = [code_digest()]
    for file in (*files, *others):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1")
        digests.append(code_digest())
    assert len(set(digests)) == 1 + len(files)
    assert len(set(digests[len(files) :])) == 1


def test_the_probe_the_conversion_and_the_rows_are_compared_on_another_machine(
    suite: Suite,
) -> None:
    layer = {"index": 1, "name": "1", "neurons": 32, "experts": 4, "expert_size": 8, "top_k": 2}
    layer |= {"explained": None, "seconds": None}

    def change(content: dict[str, Any]) -> None:
        content["probe"].update(
            losses=["0.75", *content["probe"]["losses"][1:]], loads={"1": [12, 8, 10, 10]}
        )
        content["probe"]["logits"].update(projection=0.51)
        content["model"].update(conversion=[layer])
        content["data"]["train"].update(rows=9)

    edit(next(run for run in suite.runs if run.spec["method"].get("name") == "emoe"), change)
    numbers = {metric for _, metric in changed(suite, elsewhere=True)}
    assert numbers == {"loss_1", "loads", "logits", "conversion", "content"}


def test_times_are_not_compared_but_the_work_of_a_measurement_is(suite: Suite) -> None:
    run = next(run for run in suite.runs if run.spec["task"]["name"] == "partition")
    edit(run, lambda content: content["measured"]["emoe"].update(seconds=3.0, inertia=0.8))
    assert {metric for _, metric in changed(suite)} == {"inertia"}


def test_lost_and_new_runs_fail(suite: Suite) -> None:
    lost = suite.runs[1]
    bless_all(suite.runs[3:])
    assert set(check(suite).differences["status"]) == {"new"}
    bless_all(suite.runs)
    without = load_suite({"suite": "smoke", "benchmarks": ["glue"]})
    assert set(check(without).differences["status"]) == {"missing"}
    lost.metrics_file.unlink()
    unfinished = check(suite)
    assert not unfinished.passed
    assert unfinished.unfinished == [lost.name]
    assert set(unfinished.differences["status"]) == {"missing"}


def test_runs_that_are_not_collected_are_unfinished(suite: Suite) -> None:
    records_file("smoke", "speed").unlink()
    result = check(suite)
    assert not result.passed
    assert result.unfinished == sorted(run.name for run in suite.runs_of("speed"))
    records_file("smoke", "glue").unlink()
    with pytest.raises(
        DefinitionError,
        match="no finished run of the suite 'smoke' is collected: `make run SUITE=smoke`",
    ):
        check(suite)


@pytest.mark.usefixtures("checkout")
def test_records_that_are_older_than_a_run_are_refused(suite: Suite) -> None:
    run = suite.runs[-1]
    edit(run, lambda content: content["cost"].update(job_seconds=3.0))
    message = f"^{run.metrics_file} has changed since it was collected; run the workflow again, which collects it anew$"
    for refuse in (lambda: check(suite), lambda: bless(suite, print)):
        with pytest.raises(DataError, match=message):
            refuse()
    fake_runs.collect(suite)
    assert check(suite).passed


def test_the_reference_has_every_number_with_all_digits_and_its_machine(suite: Suite) -> None:
    run = suite.runs[0]
    reference, record, task = read_reference("smoke"), read_record(run), run.spec["task"]
    scores = record.metrics.scores or {}
    assert repr(scores["test"][task["name"]][task["metric"]]) in set(reference.rows["value"])
    assert list(reference.machines.values()) == [record.metrics.environment.fingerprint]
    assert set(reference.rows["machine"]) == set(reference.machines)
    assert not reference.rows.duplicated(KEYS).any()
    with pytest.raises(DefinitionError, match="two finished runs have the same number"):
        check_numbers([record, replace(record, run=Run("other", run.spec))])


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
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_reference_is_named(case: str, suite: Suite) -> None:
    ending, damage, message = DAMAGES[case]
    damage(checking.REFERENCE / f"smoke.{ending}")
    with pytest.raises(
        (DataError, DefinitionError),
        match=rf"^\S+/smoke\.\w+ .*{message}.*; bless a run of the suite",
    ) as error:
        check(suite)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_a_pipe_in_place_of_a_reference_is_not_waited_for(ending: str, suite: Suite) -> None:
    file = checking.REFERENCE / f"smoke.{ending}"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(
        (DataError, DefinitionError), match=r"smoke\.\w+ cannot be read: it is not a file; bless"
    ):
        check(suite)


def test_a_damaged_number_of_the_reference_is_a_difference() -> None:
    assert not values_agree("0.5", "half", 0.1)


def test_verify_runs_again_and_leaves_the_run_as_it_is(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = next(
        run
        for run in plan(["modularity"], "smoke")
        if run.spec["method"]["name"] == "random_partition"
    )
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
    assert f"1 runs are not finished, the first is {run.name}: no output" in call(*verify, status=1)
    assert {file: file.stat().st_mtime_ns for file in path.parent.iterdir()} == before


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty checkout."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for command in (
        "init -q",
        "config user.email a@b",
        "config user.name a",
        "commit -q --allow-empty -m first",
    ):
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
def test_only_numbers_that_repeat_are_blessed(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated, failures = list[str](), list[str]()

    def bless_runs(change: Callable[[dict[str, Any]], None] = lambda content: None) -> Path:
        def run_again(chosen: list[Record], _say: object) -> tuple[Numbers, list[str]]:
            results = []
            for record in chosen:
                repeated.append(record.run.id)
                content = json.loads(record.run.metrics_file.read_text())
                change(content)
                results.append(replace(record, metrics=Metrics.model_validate(content)))
            return check_numbers(results), failures

        monkeypatch.setattr(checking, "run_again", run_again)
        return bless(suite, print)

    fastest = [suite.runs_of(name)[-1] for name in ("glue", "speed")]
    for run in fastest:
        edit(run, lambda content: content["cost"].update(job_seconds=0.5))
    fake_runs.collect(suite)
    bless_runs()
    assert check(suite).passed
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
    suite.runs[1].metrics_file.unlink()
    with pytest.raises(DefinitionError, match=r"1 of \d+ runs .* is missing"):
        bless_runs()
