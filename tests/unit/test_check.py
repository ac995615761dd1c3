"""`check`: equal on one machine, within tolerances on two, and what is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import Suite, load_suite, plain_suite
from benchmarks.harness.results import check as checking
from benchmarks.harness.results import code, reference
from benchmarks.harness.results.check import (
    Numbers,
    compare,
    tolerance_of,
    values_agree,
)
from benchmarks.harness.results.records import collect
from benchmarks.harness.results.reference import read_reference, reference_file
from benchmarks.harness.results.suite_check import SuiteCheck
from benchmarks.harness.results.suite_check import check as check_benchmarks
from tests import fake_runs
from tests.fake_runs import edit
from tests.programs import call

SCORES = ("dev", "test", "ood", "ood_mean")
POINTS = ("balanced_accuracy", "accuracy", "accuracy_macro", "accuracy_norm", "score")
EMOE = ("emoe", "lora_emoe")
# of the differences of image scores between an AMD EPYC and an Intel Xeon
IMAGE_DEVIATION = {"dev": 0.004, "test": 0.011}


@pytest.fixture
def suite(here: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Finish text and measurements in an empty working directory; their numbers are the reference."""
    monkeypatch.setattr(reference, "REFERENCE", here / "reference")
    suite = load_suite({"suite": "smoke", "benchmarks": ["glue", "speed"]})
    fake_runs.write_runs(suite.runs)
    fake_runs.bless(suite)
    return suite


def check(suite: Suite, *, elsewhere: bool = False) -> SuiteCheck:
    """Check all benchmarks of a suite."""
    return check_benchmarks(suite, list(suite.settings.benchmarks), elsewhere=elsewhere)


def differences(checked: SuiteCheck) -> pd.DataFrame:
    """Return the numbers that do not agree."""
    return pd.concat([result.differences for result in checked.results])


def changed(suite: Suite, *, elsewhere: bool = False) -> set[tuple[str, str]]:
    """Return the part and metric of the numbers that differ from the reference."""
    rows = differences(check(suite, elsewhere=elsewhere))
    return set(rows[["part", "metric"]].itertuples(index=False, name=None))


def blessed_numbers(suite: str) -> Numbers:
    """Read the shipped numbers of all benchmarks of a suite."""
    parts = [read_reference(suite, name) for name in plain_suite(suite).settings.benchmarks]
    rows = pd.concat([part.rows for part in parts], ignore_index=True)
    machines = {name: machine for part in parts for name, machine in part.machines.items()}
    return Numbers(rows, machines, parts[0].code)


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


@pytest.mark.parametrize("points", [2.9, -2.9, 1.0, -1.0])
def test_a_shift_of_a_methods_scores_is_seen(points: float) -> None:
    blessed = blessed_numbers("mini")
    errors = rounding_errors(blessed, seed=0)
    shifted = add(blessed, errors + points / 100 * is_of_emoe(blessed))
    result = compare(blessed, shifted, "mini", elsewhere=True)
    assert not result.passed
    # one point is below the tolerance of each number, so only the means can show it
    for name in ("glue minilm tweets emoe clean 0.0001", "glue_lora, lora - lora_emoe"):
        of_group = result.shifts[result.shifts["group"] == name]
        found = of_group[of_group["part"] == "test"].iloc[0]
        shift = abs(found["after"] - found["before"])
        assert shift == pytest.approx(abs(points) / 100, abs=0.003)
        assert shift > found["limit"]


def test_a_shift_of_all_methods_is_seen() -> None:
    blessed = blessed_numbers("mini")
    errors = rounding_errors(blessed, seed=0)
    shifted = add(blessed, errors + 0.01 * is_in_domain(blessed))
    result = compare(blessed, shifted, "mini", elsewhere=True)
    assert result.differences.empty
    assert not result.passed
    assert set(result.shifts["part"]) == {"test"}
    assert "\nshifted glue_lora minilm tweets lora clean 0.004, test" in str(result)


def test_rounding_errors_are_rarely_a_shift() -> None:
    """With three seeds of images, one simulation in a hundred or so has a shift by chance."""
    blessed = blessed_numbers("mini")
    alarms = []
    for seed in range(6):
        errors = rounding_errors(blessed, seed)
        assert np.count_nonzero(errors) > 10
        result = compare(blessed, add(blessed, errors), "mini", elsewhere=True)
        if not result.passed:
            alarms.append(str(result))
    assert len(alarms) <= 1, alarms


def balanced_accuracies(values: list[float], seeds: list[int]) -> Numbers:
    """Make one group of scores; if there are more scores than seeds, a run has several sets."""
    names = [("glue m t emoe 1", seed, "ood", "", "balanced_accuracy") for seed in seeds]
    rows = pd.DataFrame(names, columns=checking.KEY_COLUMNS).assign(
        value=[repr(value) for value in values]
    )
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


def test_runs_with_one_seed_each_do_not_show_how_much_differences_scatter() -> None:
    """`verify` may repeat two runs of a method that differ in their settings and seeds."""
    several = balanced_accuracies([0.8] * 4, [0, 1, 0, 1])
    runs = [f"glue m t emoe {number}" for number in (1, 1, 2, 2)]
    with_runs = several.rows.assign(run=runs, eval_task="")
    before = replace(several, rows=with_runs)
    after = add(before, np.full(4, 0.012))
    shifts = compare(before, after, "full", elsewhere=True).shifts
    assert "glue, all runs of emoe" in set(shifts["group"])

    # the first run with seed 0 and the second with seed 1
    few_before = replace(before, rows=before.rows.iloc[[0, 3]])
    few_after = replace(after, rows=after.rows.iloc[[0, 3]])
    assert compare(few_before, few_after, "full", elsewhere=True).passed


def test_a_single_number_within_its_tolerance_is_no_shift() -> None:
    blessed = blessed_numbers("mini")
    for row in np.flatnonzero(is_score(blessed))[::80]:
        difference = np.zeros(len(blessed.rows))
        difference[row] = 0.0099
        result = compare(blessed, add(blessed, difference), "mini", elsewhere=True)
        assert result.passed, str(result)


@pytest.mark.slow
def test_the_tolerant_check_sees_swapped_methods_and_scores() -> None:
    blessed = blessed_numbers("smoke")
    records, scores = (
        swapped_methods(blessed, tuple(set(blessed.rows["part"]))),
        swapped_methods(blessed, SCORES),
    )
    assert min(len(records), len(scores)) > 1000
    assert sum(records) / len(records) > 0.99
    assert sum(records + scores) / len(records + scores) >= 0.95


@pytest.mark.parametrize("suite", ["smoke", "mini", "full"])
def test_every_blessed_number_is_compared_except_times_and_their_ratios(suite: str) -> None:
    blessed = blessed_numbers(suite)
    changed = replace(blessed, rows=blessed.rows.assign(value="-1"))
    compared = compare(blessed, changed, suite, elsewhere=True).differences
    metrics = set(blessed.rows["metric"])
    assert metrics - set(compared["metric"]) <= {"ratio", "seconds"}


@pytest.mark.parametrize(
    "metric", ["active_parameters", "flops_per_token", "shared_experts", "specialised_experts"]
)
def test_another_count_is_seen_on_another_machine(metric: str) -> None:
    blessed = blessed_numbers("mini")
    is_count = blessed.rows["metric"] == metric
    counts = blessed.rows["value"].where(is_count, "0").astype(float)
    changed = add(blessed, np.where(is_count, counts + 1, 0))  # 2 n + 1 for n
    found = compare(blessed, changed, "mini", elsewhere=True).differences
    assert set(found["metric"]) == {metric}
    assert len(found) == is_count.sum()


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
        ("glue", "flops_per_token", "30404.0", "30405.0", False),
        ("modularity", "specialised_experts", "40.0", "44.0", True),
        ("modularity", "specialised_experts", "40.0", "45.0", False),
        ("modularity", "shared_experts", "4.0", "5.0", False),
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
    assert " agree, 1 changed, 0 missing, 0 new\n" in str(check(suite))

    origin = reference_file("smoke", "glue", "json")
    content = json.loads(origin.read_text())
    origin.write_text(json.dumps(content | {"code": "0" * 64}))
    text = str(check(suite))
    assert "within tolerances: other code than that of this checkout made the reference" in text
    assert " numbers exactly" in text  # the other benchmark
    assert changed(suite) == set()
    origin.write_text(json.dumps(content))
    for each in suite.runs:
        edit(each, lambda content: content["environment"]["fingerprint"].update({"threads": "2"}))
    assert changed(suite) == set()
    assert "the reference was made on another machine (threads: 1 -> 2)" in str(check(suite))
    add_to_score(run, -0.3)
    assert changed(suite) == {score}


def test_the_digest_covers_the_code_that_numbers_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "ROOT", tmp_path)
    monkeypatch.setattr(code, "BENCHMARKS", tmp_path / "benchmarks")
    single_files = (
        "benchmarks/harness/base.py",
        "benchmarks/harness/config/methods.py",
        "benchmarks/harness/config/method_specs.py",
        "benchmarks/harness/results/records.py",
        "benchmarks/harness/results/statistics.py",
        "benchmarks/harness/run/execution.py",
    )
    for file in single_files:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    files = (
        *single_files,
        "emoe/a.py",
        "emoe/sparse/a.cpp",
        "benchmarks/harness/training/a.py",
        "benchmarks/glue/pipeline.py",
    )
    others = (
        "benchmarks/glue/presentation.py",
        "benchmarks/text/selection_gain.py",
        "benchmarks/harness/report/a.py",
        "README.md",
    )
    digests = [code.code_digest()]
    for file in (*files, *others):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1")
        digests.append(code.code_digest())
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


def test_a_finished_part_agrees_while_the_rest_is_missing(suite: Suite) -> None:
    for run in suite.runs_of("speed"):
        run.metrics_file.unlink()
    whole = check(suite)
    assert not whole.passed
    assert differences(whole).empty  # the numbers of missing runs are not listed one by one
    lines = str(whole).splitlines()
    count = compared_numbers("glue")
    assert lines[-2] == f"glue: {count:,} numbers agree (15 of 15 runs)"
    assert lines[-1] == "speed: nothing to compare (0 of 4 runs)"
    assert [line for line in lines if line.startswith("missing: ")] == [
        f"missing: 1 run of {name} (seed 0)" for name in names_of("speed")
    ]
    words = ("check", "--suite", "smoke", "--benchmark")
    assert call(*words, "glue").splitlines()[-1] == lines[-2]
    assert call(*words, "glue", "--benchmark", "speed", status=1).splitlines() == lines
    with pytest.raises(DefinitionError, match=r"^no run of speed in the suite 'smoke' is finished"):
        call(*words, "speed")


def test_a_run_whose_numbers_were_deleted_is_missing_although_it_was_collected(
    suite: Suite,
) -> None:
    collect(suite, "glue")
    assert check(suite).passed
    first, *_ = suite.runs_of("glue")
    first.metrics_file.unlink()
    checked = check(suite)
    assert not checked.passed
    assert str(checked).splitlines()[-2].endswith("numbers agree (14 of 15 runs)")


def test_runs_that_other_code_made_fail_the_check_although_their_numbers_agree(
    suite: Suite,
) -> None:
    first, second, *_ = suite.runs_of("glue")  # two seeds
    edit(first, lambda content: content["environment"].update(code="0" * 64))
    edit(second, lambda content: content["environment"].pop("code"))  # an older version's
    checked = check(suite)
    assert not checked.passed
    assert differences(checked).empty
    lines = str(checked).splitlines()
    group = checking.name_without_seed(first)
    assert f"made by other code: 2 runs of {group} (seeds 0 to 1)" in lines
    assert "`python -m benchmarks verify` runs it" in str(checked)
    call("check", "--suite", "smoke", "--benchmark", "speed")


def test_a_benchmark_that_is_not_blessed_is_listed_while_the_others_are_compared(
    suite: Suite,
) -> None:
    for ending in ("csv", "json", "jsonl.gz"):
        reference_file("smoke", "glue", ending).unlink()
    result = check(suite)
    assert not result.passed
    lines = str(result).splitlines()
    count = compared_numbers("speed")
    assert lines[-2:] == [f"speed: {count} numbers agree (4 of 4 runs)", "glue: not blessed"]
    words = ("check", "--suite", "smoke", "--benchmark")
    assert call(*words, "glue", "--benchmark", "speed", status=1).splitlines() == lines
    assert call(*words, "speed").splitlines()[-1] == lines[-2]
    with pytest.raises(
        DefinitionError, match=r"^no numbers of glue in the suite 'smoke' are blessed: `make bless "
    ):
        call(*words, "glue")


def test_all_numbers_are_new_if_the_csv_has_only_its_heading(suite: Suite) -> None:
    csv = reference_file("smoke", "glue", "csv")
    count = compared_numbers("glue")
    heading = csv.read_text().splitlines()[0]
    csv.write_text(f"{heading}\n")
    checked = check_benchmarks(suite, ["glue"])
    assert not checked.passed
    assert set(differences(checked)["status"]) == {"new"}
    assert len(differences(checked)) == count


def compared_numbers(benchmark: str) -> int:
    """Count the blessed numbers of a benchmark that have a tolerance."""
    metrics = read_reference("smoke", benchmark).rows["metric"]
    return sum(tolerance_of(metric, benchmark) is not None for metric in metrics)


def names_of(benchmark: str) -> list[str]:
    """Return the names of the blessed runs of a benchmark, in the order of the grid."""
    names = set(read_reference("smoke", benchmark).rows["run"])
    order = [checking.name_without_seed(run) for run in plain_suite("smoke").runs_of(benchmark)]
    return sorted(names, key=order.index)


def test_a_number_that_differs_is_counted_for_its_benchmark(suite: Suite) -> None:
    add_to_score(suite.runs[0], -0.25)
    glue, speed = str(check(suite)).splitlines()[-2:]
    count = compared_numbers("glue") - 1
    assert glue == f"glue: {count:,} numbers agree, 1 do not (15 of 15 runs)"
    assert speed == f"speed: {compared_numbers('speed')} numbers agree (4 of 4 runs)"


def test_missing_runs_are_grouped_by_their_settings(suite: Suite) -> None:
    """Seven seeds of two settings are missing, and later whole settings."""
    several = load_suite({"suite": "mini", "benchmarks": ["glue"]})
    fake_runs.write_runs(several.runs)
    fake_runs.bless(several)
    groups: dict[str, list[Run]] = {}
    for run in several.runs:
        groups.setdefault(checking.name_without_seed(run), []).append(run)
    (first, runs), (second, others) = list(groups.items())[:2]
    for run in [*runs[:3], others[0], others[2]]:
        run.metrics_file.unlink()
    result = check(several)
    assert not result.passed
    assert [line for line in str(result).splitlines() if line.startswith("missing")] == [
        f"missing: 3 runs of {first} (seeds 0 to 2)",
        f"missing: 2 runs of {second} (seeds 0, 2)",
    ]
    num_runs = len(several.runs)
    assert str(result).endswith(f" numbers agree ({num_runs - 5} of {num_runs} runs)")


def test_a_long_list_of_missing_runs_ends_with_a_count(here: Path, suite: Suite) -> None:
    lora = load_suite({"suite": "smoke", "benchmarks": ["glue_lora"]})
    fake_runs.write_runs(lora.runs)
    fake_runs.bless(lora)
    names = [checking.name_without_seed(run) for run in lora.runs]
    for run in lora.runs[1:]:
        run.metrics_file.unlink()
    num_missing = len(set(names) - {names[0]})
    assert num_missing > 20
    lines = [line for line in str(check(lora)).splitlines() if line.startswith("missing")]
    assert len(lines) == 21
    assert lines[-1] == f"missing: and {num_missing - 20} more groups"


def test_new_runs_and_runs_that_are_no_longer_planned_fail(suite: Suite) -> None:
    fake_runs.bless(suite, leave_out=suite.runs[:1])
    checked = check(suite)
    assert not checked.passed
    assert set(differences(checked)["status"]) == {"new"}
    fake_runs.bless(suite)

    csv = reference_file("smoke", "speed", "csv")
    name = checking.name_without_seed(suite.runs_of("speed")[-1])
    rows = pd.read_csv(csv, dtype=str, keep_default_na=False)
    old_run = rows[rows["run"] == name].assign(run="speed of an earlier grid")
    pd.concat([rows, old_run]).to_csv(csv, index=False, lineterminator="\n")
    checked = check(suite)
    assert not checked.passed
    assert differences(checked).empty
    line = "blessed, but not planned: 1 run of speed of an earlier grid (seed 0)"
    assert line in str(checked).splitlines()


def test_a_suite_with_fewer_seeds_is_compared_with_the_blessed_numbers_of_these_seeds(
    suite: Suite,
) -> None:
    fewer = load_suite({"suite": "smoke", "benchmarks": ["glue"], "seeds": 1})
    left_out = {run.id for run in suite.runs_of("glue")} - {run.id for run in fewer.runs}
    assert len(left_out) == 2
    for run in suite.runs_of("glue"):
        if run.id in left_out:
            run.metrics_file.unlink()
    assert not check_benchmarks(suite, ["glue"]).passed
    checked = check(fewer)
    assert checked.passed, str(checked)
    assert "(13 of 13 runs)" in str(checked)

    fewer.runs[0].metrics_file.unlink()
    assert not check(fewer).passed
    fake_runs.write_runs(fewer.runs)
    more = load_suite({"suite": "smoke", "benchmarks": ["glue"], "seeds": 3})
    fake_runs.write_runs(more.runs)
    assert set(differences(check(more))["status"]) == {"new"}


def test_evaluations_that_choose_among_fewer_models_are_not_compared(suite: Suite) -> None:
    names = ["glue_lora", "glue_ood"]
    every_seed = load_suite({"suite": "mini", "benchmarks": names})
    fake_runs.write_runs(every_seed.runs)
    fake_runs.bless(every_seed)
    fewer = load_suite({"suite": "mini", "benchmarks": names, "seeds": 1})
    fake_runs.write_runs(fewer.runs)
    checked = check(fewer)
    assert checked.passed, str(checked)
    lines = str(checked).splitlines()
    assert lines[-1] == "glue_ood: nothing to compare (8 of 8 runs)"
    group = checking.name_without_seed(fewer.runs_of("glue_ood")[0])
    assert f"not compared, chooses among other trained models: 1 run of {group} (seed 0)" in lines

    message = (
        "^the finished runs of glue_ood choose among other trained models than the blessed runs of "
        "the suite 'mini', so they are not compared; run all seeds$"
    )
    with pytest.raises(DefinitionError, match=message):
        check_benchmarks(fewer, ["glue_ood"])


def test_a_number_that_a_finished_run_lacks_or_has_in_addition_is_listed(suite: Suite) -> None:
    run = suite.runs[0]
    edit(run, lambda content: content["probe"]["losses"].pop())
    assert set(differences(check(suite))["status"]) == {"missing"}
    fake_runs.write_runs(suite.runs)
    edit(run, lambda content: content["data"].update(extra=next(iter(content["data"].values()))))
    assert set(differences(check(suite))["status"]) == {"new"}


def test_a_damaged_number_of_the_reference_is_a_difference() -> None:
    assert not values_agree("0.5", "half", 0.1)
