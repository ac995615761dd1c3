"""What Snakemake's rules ask for: the plan, the files of targets, reasons, and the environment of jobs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.base import DataError, DefinitionError
from benchmarks.harness.config import suite as suites
from benchmarks.harness.config.runs import refuse_old_folders, run_from_spec
from benchmarks.harness.report.paper_items import missing_items
from benchmarks.harness.workflow import plan, targets
from benchmarks.harness.workflow.environment import job_environment, load_suite_from_environment
from tests import fake_runs
from tests.executed import prepare

SMOKE = suites.load_suite({"suite": "smoke"})


def test_jobs_see_the_command_lines_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = suites.load_suite({"suite": "smoke", "data_root": str(tmp_path)})
    for name, value in job_environment(chosen).items():
        monkeypatch.setenv(name, value)
    assert load_suite_from_environment("smoke").settings == chosen.settings
    assert load_suite_from_environment("mini").settings.data_root is None


def test_a_job_on_a_cluster_reads_what_the_main_process_planned(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan.write_plan(SMOKE)

    def refuse(*_: object) -> None:
        raise AssertionError("a job plans the suite")

    monkeypatch.setattr(suites, "plan_runs", refuse)
    job = suites.load_suite({"suite": "smoke"})
    assert [plan.read_run_of_job(run.folder, job) for run in SMOKE.runs] == SMOKE.runs
    for name, partition in SMOKE.partitions.items():
        assert plan.read_partition_of_job(name, job) == partition
    weights = plan.keeps_weights_by_run(job, in_job=True)
    assert weights == plan.keeps_weights_by_run(SMOKE, in_job=False)
    assert set(weights["llama"].values()) == {True, False}  # the untuned models keep none
    with pytest.raises(
        DefinitionError, match=r"plan.tsv has no row 'glue/000000000000'; start the workflow again"
    ):
        plan.read_run_of_job("glue/000000000000", job)


def test_workflows_of_one_suite_with_other_runs_have_their_own_plans(
    here: Path, tmp_path: Path
) -> None:
    """A user of a cluster may start them at the same time."""
    values: list[dict[str, object]] = [
        {"data_root": str(tmp_path)},  # has the plan of the whole suite
        {"benchmarks": ["glue"]},
        {"benchmarks": ["llama"]},
        {"benchmarks": ["glue"], "exclude": ["movie"]},
    ]
    loaded = [suites.load_suite({"suite": "smoke", **chosen}) for chosen in values]
    for suite in loaded:
        plan.write_plan(suite)
    for suite in loaded:
        read = [plan.read_run_of_job(run.folder, suite) for run in suite.runs]
        assert read == suite.runs
        for name, partition in suite.partitions.items():
            assert plan.read_partition_of_job(name, suite) == partition
        weights = plan.keeps_weights_by_run(suite, in_job=True)
        assert weights == plan.keeps_weights_by_run(suite, in_job=False)
    assert loaded[0].runs == SMOKE.runs
    assert plan.is_written(SMOKE)
    assert not plan.is_written(suites.load_suite({"suite": "smoke", "seeds": 1}))


RUN = SMOKE.runs[0].folder
PARTITION = next(iter(SMOKE.partitions))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (r"(?s).*", "", "line 1 must name folder, name, keeps_weights, resources, spec"),
        (r"\t", " ", "line 1 must name folder, name, keeps_weights, resources, spec"),
        (r"(\n\w+/.*?)\t", r"\1 ", "line 2 has 4 cells, not 5"),
        (r"\tyes\t", r"\tyis\t", "line .*: 'keeps_weights': Input should be 'yes' or 'no'"),
        (r"(?s).{9}\Z", "", "the last line is cut off"),
        ("\nglue/", "\nglua/", "the suite has no benchmark 'glua'"),
    ],
)
def test_a_damaged_plan_is_one_line_with_the_way_out(
    old: str, new: str, problem: str, here: Path
) -> None:
    path = write_damaged("plan.tsv", old, new)
    expected = f"^{path} is damaged: {problem}; start the workflow again$"
    with pytest.raises(DataError, match=expected) as error:
        plan.keeps_weights_by_run(SMOKE, in_job=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"seed":', '"seed":1'),
        ('"benchmark":', '"benchmarc":'),
        ('\t{"benchmark"', '\t"benchmark"'),
        ('"seed":[0-9]+', '"seed":NaN'),
    ],
)
def test_damaged_settings_of_a_run_are_one_line_with_the_way_out(
    old: str, new: str, here: Path
) -> None:
    path = write_damaged("plan.tsv", old, new)
    expected = f"^{path} is damaged: the settings of '{RUN}' are wrong; start the workflow again$"
    with pytest.raises(DataError, match=expected):
        plan.read_run_of_job(RUN, SMOKE)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (r"(?s).*", "", "line 1 must name id, partition"),
        ('"config"', '"confit"', f"the settings of '{PARTITION}' are wrong"),
        ('"num_experts"', '"numexperts"', f"the settings of '{PARTITION}' are wrong"),
        ('"model":{', '"model":', f"the settings of '{PARTITION}' are wrong"),
        ('"num_experts":', '"num_experts":1', f"the settings of '{PARTITION}' are wrong"),
    ],
)
def test_damaged_partitions_of_a_plan_are_one_line_with_the_way_out(
    old: str, new: str, problem: str, here: Path
) -> None:
    path = write_damaged("partitions.tsv", old, new)
    expected = f"^{path} is damaged: {problem}; start the workflow again$"
    with pytest.raises(DataError, match=expected):
        plan.read_partition_of_job(PARTITION, SMOKE)


def write_damaged(name: str, old: str, new: str) -> Path:
    """Write a plan, and replace the first match of a pattern in one of its files."""
    plan.write_plan(SMOKE)
    path = Path("results/smoke") / name
    text = path.read_text()
    damaged = re.sub(old, new, text, count=1)
    assert damaged != text
    path.write_text(damaged)
    return path


def test_a_plan_with_other_bytes_is_one_line(here: Path) -> None:
    plan.write_plan(SMOKE)
    path = Path("results/smoke/plan.tsv")
    path.write_bytes(path.read_bytes() + b"\xff\n")
    with pytest.raises(
        DataError, match=rf"^{path} is damaged: 'utf-8' .*; start the workflow again$"
    ):
        plan.read_run_of_job(RUN, SMOKE)


def test_the_plan_has_the_readable_name_of_each_run(here: Path) -> None:
    plan.write_plan(SMOKE)
    headings, *rows = Path("results/smoke/plan.tsv").read_text().splitlines()
    assert headings.split("\t")[:3] == ["folder", "name", "keeps_weights"]
    names = dict(row.split("\t")[:2] for row in rows)
    assert names == {run.folder: run.name for run in SMOKE.runs}


def test_a_run_of_another_suite_is_refused_with_its_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "suite_names", lambda: ["mini", "smoke"])
    mini = suites.load_suite({})
    assert plan.find_run(mini.runs[0].folder, mini) == mini.runs[0]
    with pytest.raises(
        DefinitionError,
        match=r"'mini' has no run '.*', but 'smoke' has: add `--config suite=smoke`",
    ):
        plan.find_run(SMOKE.runs[0].folder, mini)
    with pytest.raises(
        DefinitionError,
        match=r"no suite has the run 'glue/000000000000'; results/mini/plan.tsv lists",
    ):
        plan.find_run("glue/000000000000", mini)
    with pytest.raises(
        DefinitionError, match=r"needs no partition 'a'; results/mini/partitions.tsv lists"
    ):
        plan.find_partition("a", mini)


def test_a_long_name_makes_no_long_folder() -> None:
    spec = SMOKE.runs[0].spec
    run = run_from_spec({**spec, "model": {**spec["model"], "name": 300 * "m"}})
    assert run.name.startswith(f"{300 * 'm'}-tweets-")
    assert len(run.folder) < 40


def test_a_finished_run_has_its_numbers_and_the_weights_that_it_keeps(here: Path) -> None:
    run = next(run for run in SMOKE.runs if run.keeps_weights)
    assert not run.has_all_results
    run.metrics_file.parent.mkdir(parents=True)
    run.metrics_file.write_text("{}")
    assert not run.has_all_results
    run.weights_file.parent.mkdir()
    run.weights_file.write_bytes(b"")
    assert run.has_all_results


def test_a_complete_suite_has_the_spec_of_each_finished_run(here: Path) -> None:
    finished, *_ = SMOKE.runs_of("glue")
    assert str(finished.spec_file) not in targets.suite_files(
        SMOKE
    )  # it is not finished yet: its job writes it
    prepare(finished, "results/runs")
    fake_runs.write_runs([finished])
    assert targets.spec_files_to_restore(SMOKE) == []
    finished.spec_file.unlink()
    assert targets.spec_files_to_restore(SMOKE) == [str(finished.spec_file)]
    # every target that needs the run restores it, and no other one
    assert str(finished.spec_file) in targets.suite_files(SMOKE)
    assert str(finished.spec_file) in targets.benchmark_files(SMOKE, "glue")
    assert str(finished.spec_file) not in targets.benchmark_files(SMOKE, "llama")


def test_folders_of_older_versions_are_refused_in_one_line(here: Path) -> None:
    prepare(SMOKE.runs[0], "results/runs")
    refuse_old_folders()
    old = Path("results/runs/glue/minilm-tweets-vanilla-lr0.0001-s0-fd5d5140")
    old.mkdir()
    (old / "run.json").write_text("{}")
    with pytest.raises(
        DefinitionError,
        match=f"^{old} was made by an older version, .*: move results/runs to another",
    ):
        refuse_old_folders()


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("table_99", "there is no target 'table_99'; did you mean 'table_"),
        ("gleu", "there is no target 'gleu'; did you mean 'glue'"),
        ("domainbed_pac", "there is no target 'domainbed_pac'; did you mean 'domainbed_pacs'"),
        ("reprot", "there is no target 'reprot'; did you mean 'report'"),
        ("smoke", "'smoke' is a suite: `snakemake --cores all --config suite=smoke`"),
        ("multitask", "the suite 'mini' does not run multitask; suites that do: smoke, paper"),
        (
            "domainbed_pacs",
            "the suite 'mini' does not run pacs; suites that do: full, paper, domainbed_large, domainbed_sweep, paper_trial (",
        ),
        (
            "speed",
            "the suite 'mini' does not run speed; suites that do: smoke, speed (`snakemake --cores all speed --config suite=smoke`)",
        ),
    ],
)
def test_a_target_that_cannot_be_made_says_why_and_what_can(target: str, reason: str) -> None:
    text = targets.explain_missing_target(target, suites.load_suite({}))
    assert text.startswith(reason)
    assert "\n" not in text


@pytest.mark.parametrize(
    ("target", "values", "wanted"),
    [
        ("llama", {"benchmarks": ["glue"]}, "llama"),
        ("domainbed_rotated_mnist_5k", {"benchmarks": ["glue"]}, "rotated_mnist_5k"),
    ],
)
def test_a_target_that_only_the_command_line_leaves_out_is_named_as_such(
    target: str, values: dict[str, Any], wanted: str
) -> None:
    text = targets.explain_missing_target(target, suites.load_suite(values))
    assert text == (
        f"--config leaves {wanted} out of the suite 'mini': "
        f"`snakemake --cores all {target} --config suite=mini`"
    )


def test_the_advice_repeats_the_folders_of_the_command_line(tmp_path: Path) -> None:
    sets, models = tmp_path / "my sets", tmp_path / "models"
    sets.mkdir()
    models.mkdir()
    places = {
        "data_root": str(sets),
        "model_root": str(models),
        "tracking_uri": "postgresql://me:secret@host/runs",
    }
    repeated = (
        f"'data_root={sets}' model_root={models} 'tracking_uri=postgresql://me:***@host/runs'`"
    )
    suite = suites.load_suite({**places, "benchmarks": ["glue"], "seeds": 1})
    text = targets.explain_missing_target("llama", suite)
    assert text.endswith(f"`snakemake --cores all llama --config suite=mini {repeated}")
    text = targets.explain_missing_target("smoke", suite)
    assert text.endswith(f"`snakemake --cores all --config suite=smoke {repeated}")
    text = targets.explain_missing_target("multitask", suite)
    assert text.endswith(f"(`snakemake --cores all multitask --config suite=smoke {repeated})")


def test_the_advice_to_leave_out_missing_sets_keeps_those_that_are_left_out_already() -> None:
    suite = suites.load_suite({"exclude": ["movie", "amazon"]})
    text = targets.warn_of_missing_sets(["tweets"], suite)
    assert text.startswith("warning: missing data sets: tweets. ")
    assert "`--config exclude=[movie,amazon,tweets]` leaves them out." in text


def test_each_missing_item_of_the_paper_says_why() -> None:
    for name, reason in missing_items().items():
        assert targets.explain_missing_target(name, SMOKE) == f"{name}: {reason}"


def test_a_set_needs_the_records_of_its_own_runs_alone() -> None:
    files = targets.record_files(SMOKE, "domainbed", "rotated_mnist_5k")
    assert files == ["results/smoke/records/domainbed_rotated_mnist_5k.jsonl"]
    assert set(files) < set(targets.record_files(SMOKE, "domainbed"))
    assert targets.sets_by_record_file(SMOKE)["domainbed_rotated_mnist_5k"] == (
        "domainbed",
        "rotated_mnist_5k",
    )
