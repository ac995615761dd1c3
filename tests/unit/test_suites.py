"""Suites: their promised seeds, the command line's values, and what their runs share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import base
from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config import runs, suite
from benchmarks.harness.config.benchmark import benchmark_names, load_benchmark
from benchmarks.harness.config.catalogue import load_metrics
from benchmarks.harness.config.runs import Run
from benchmarks.harness.workflow.environment import load_suite_from_environment
from tests.planned import edited_project, plan


def test_one_flag_sets_the_number_of_seeds() -> None:
    runs = suite.load_suite({"benchmarks": ["domainbed", "llama"], "seeds": 2}).runs
    assert {run.spec["seed"] for run in runs} == {0, 1}
    untuned = [run for run in runs if run.spec.get("finetuning") == "base"]
    assert {run.spec["seed"] for run in untuned} == {0}  # a block with one seed keeps it


def test_a_seed_that_is_not_a_list_is_named_despite_the_flag(tmp_path: Path) -> None:
    edit = edited_project(
        tmp_path, "config/mini.yaml", "contiguous], seed: [0]", "contiguous], seed: 0"
    )
    with (
        edit,
        pytest.raises(
            DefinitionError, match=r"mini.yaml: 'benchmarks.modularity.grid\[0\].seed' is 0"
        ),
    ):
        suite.load_suite({"suite": "mini", "seeds": 2})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"suite": "minni"}, "did you mean 'mini'"),
        *(
            ({"suite": value}, "^there is no suite .*; choose from mini")
            for value in (3, None, "", [])
        ),
        *(
            ({key: value}, f"^--config: '{key}': .* is neither a name nor a list of names")
            for key in ("benchmarks", "exclude")
            for value in (3, 2.5, True, {}, [3], [None], [["glue"]])
        ),
        ({"benchmarks": None}, "^--config: 'benchmarks': None is neither a name nor a list"),
        (
            {"benchmarks": []},
            "^--config: 'benchmarks': it names no benchmark; .* choose from domainbed, glue",
        ),
        (
            {"benchmarks": "gleu"},
            "'benchmarks' is 'gleu', which does not exist; did you mean 'glue'",
        ),
        ({"benchmarks": ""}, "'benchmarks' is '', which does not exist; choose from"),
        ({"exclude": ""}, "'exclude' is '', which does not exist; choose from"),
        ({"exclude": ["amazon", "amazon"]}, "'exclude': 'amazon' occurs twice"),
        *(
            ({"seeds": value}, "^--config: 'seeds' is .*: Input should be")
            for value in (0, True, "3", [3], {}, 2.5)
        ),
        *(
            ({"seeds": value}, "^--config: 'seeds' is .*should be less than or equal to 10000$")
            for value in (10_001, 10**30)
        ),
        *(
            ({key: value}, f"^--config: '{key}' is .*: (Input|String) should")
            for key in ("data_root", "model_root", "tracking_uri")
            for value in (3, True, "", [], {})
        ),
        ({"suit": "mini"}, "did you mean 'suite'"),
        (
            {"exclude": ["flipkrt"]},
            "'exclude' is 'flipkrt', which does not exist; did you mean 'flipkart'",
        ),
        (
            {"benchmarks": ["glue_ood"]},
            "'benchmarks' has 'glue_ood', which evaluates 'glue_lora'; name that too",
        ),
        (
            {"data_root": "/no/such/folder"},
            "'data_root' is '/no/such/folder', which is not a folder",
        ),
    ],
)
def test_wrong_configuration_is_named(overrides, message) -> None:
    with pytest.raises(DefinitionError, match=message) as error:
        suite.load_suite(overrides)
    assert "\n" not in str(error.value)


def test_a_key_without_a_value_is_as_in_the_file_and_one_name_is_a_list_of_it() -> None:
    nothing = dict.fromkeys(("exclude", "seeds", "data_root", "model_root", "tracking_uri"))
    assert suite.load_suite(nothing).settings == suite.load_suite({}).settings
    one = suite.load_suite({"benchmarks": "glue", "exclude": "amazon"})
    assert (
        one.settings == suite.load_suite({"benchmarks": ["glue"], "exclude": ["amazon"]}).settings
    )


@pytest.mark.parametrize("text", ["{bad", "[]", "3", "null", ""])
def test_a_wrong_environment_of_a_job_is_one_line(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(base.OVERRIDES, text)
    with pytest.raises(
        DefinitionError, match=r"the environment variable EMOE_OVERRIDES must hold .*; unset it"
    ) as error:
        load_suite_from_environment("mini")
    assert "\n" not in str(error.value)


def test_excluded_sets_are_neither_trained_on_nor_evaluated() -> None:
    runs = suite.load_suite({"benchmarks": "glue", "exclude": ["amazon"]}).runs
    assert {run.spec["task"]["name"] for run in runs} == {"tweets"}
    assert {other["name"] for run in runs for other in run.spec["ood"]} == {"movie", "nyt"}
    with pytest.raises(DefinitionError, match="'exclude' leaves no run of 'domainbed'"):
        suite.load_suite({"benchmarks": ["domainbed"], "exclude": ["rotated_mnist_5k"]}).runs  # noqa: B018


def test_a_benchmark_runs_alone_although_its_suite_excludes_sets_of_others() -> None:
    alone = suite.load_suite({"suite": "full", "benchmarks": ["domainbed"]})
    assert {run.benchmark for run in alone.runs} == {"domainbed"}
    assert "flipkart" in alone.settings.exclude


def test_methods_share_the_clustering_of_each_layer_and_others_wait_for_none() -> None:
    needs = {
        run.spec["method"]["name"]: runs.partition_jobs(run)
        for run in plan(["glue", "glue_lora"], "smoke")
    }
    assert all(
        needs[name] for name in ("emoe", "emoe_learn", "lora_emoe", "lora_bottom", "lora_noise")
    )
    assert not any(
        needs[name] for name in ("vanilla", "gmoe", "random_partition", "lora", "lora_contiguous")
    )
    search = suite.plain_suite("mini_search")
    runs_of_both = [run for run in search.runs if run.spec["method"]["config"]["layers"] == [3, 5]]
    assert all(len(runs.partition_jobs(run)) == 2 for run in runs_of_both)
    assert len(search.partitions) == 3 * 2  # three numbers of experts, layers 3 and 5


@pytest.mark.parametrize("name", ["smoke", "mini", "full", "paper"])
def test_models_are_used_with_the_experts_of_a_method_that_is_trained(name: str) -> None:
    """A dense model that gets experts after training gets those of EMoE on the same task."""

    def key(run: Run, method: str) -> tuple[str, ...]:
        return (run.benchmark, run.model, run.task, run.protocol, method)

    runs = plan(["glue", "glue_lora"], name)
    trained: dict[tuple[str, ...], list[Any]] = {}
    for run in runs:
        trained.setdefault(key(run, run.method), []).append(run.spec["method"]["config"])
    for run in runs:
        if "used_as" not in run.spec:
            continue
        row = load_benchmark(run.benchmark).definition.transformed[run.spec["used_as"]["name"]]
        assert run.spec["used_as"]["config"] in trained[key(run, row.used_as)], run.id


PACKAGES_FILE = "benchmarks/harness/sources/packages.yaml"


@pytest.mark.parametrize(
    ("file", "old", "new", "benchmark"),
    [
        ("benchmarks/llama/templates.yaml", "### Instruction:", "### Task:", "llama"),
        ("benchmarks/glue/tasks.yaml", "metric: balanced_accuracy", "metric: accuracy", "glue"),
        (PACKAGES_FILE, "5d7c06e027", "0d7c06e027", "glue"),
        (PACKAGES_FILE, "71b9500d9c", "01b9500d9c", "domainbed"),
        (PACKAGES_FILE, "1702c0bfb8", "0702c0bfb8", "llama"),
    ],
)
def test_a_change_of_data_models_or_packages_changes_the_ids_of_runs(
    file, old, new, benchmark, tmp_path: Path
) -> None:
    before = {run.id for run in suite.load_suite({"suite": "smoke"}).runs_of(benchmark)}
    with edited_project(tmp_path, file, old, new):
        after = {run.id for run in suite.load_suite({"suite": "smoke"}).runs_of(benchmark)}
    assert not before & after


# what the trial of `paper` changes in a run's spec, by benchmark
_TEXT = {"training.epochs", "training.train_rows", "training.eval_rows"}
SHORTENED = {
    "glue": _TEXT,
    "glue_lora": _TEXT,
    "glue_ood": {"evaluation.rows", "candidates"},
    "multitask": {
        "training.epochs",
        "training.rows_per_epoch",
        "training.eval_rows",
        "training.dev_rows",
    },
    "modularity": {"reading.rows", "ood"},
    "domainbed": {"training.steps", "training.eval_every", "training.eval_rows", "sweep"},
    "llama": {
        "data.train_rows",
        "data.held_out_rows",
        "training.epochs",
        "training.batch_size",
        "evaluation.tasks",
        "evaluation.generations",
        "evaluation.new_tokens",
    },
}


def kept(run: runs.Run) -> tuple[str, str]:
    """Return what the trial must not change in a run: its other settings, and its resources."""
    spec = copy.deepcopy(run.spec)
    for path in SHORTENED[run.benchmark]:
        *sections, key = path.split(".")
        holder = spec
        for section in sections:
            holder = holder[section]
        holder.pop(key, None)  # untuned models have no training settings
    return runs.canonical_json(spec), runs.canonical_json(run.resources)


def test_the_trial_has_shortened_runs_of_the_paper_with_each_of_its_models() -> None:
    trial = plan([*SHORTENED], "paper_trial")
    paper = plan([*SHORTENED], "paper")
    # the trial has the first seed alone, and copying takes time
    first_seeds = [run for run in paper if run.seed == 0]
    assert {kept(run) for run in trial} <= {kept(run) for run in first_seeds}
    assert {run.model for run in trial} == {run.model for run in paper}
    assert {run.benchmark for run in trial} == {run.benchmark for run in paper}


def test_each_training_of_the_trial_takes_three_steps() -> None:
    for run in plan([*SHORTENED], "paper_trial"):
        if "training" not in run.spec:  # nothing is trained
            continue
        training = run.spec["training"]
        if run.benchmark == "domainbed":
            assert training["steps"] == 3
            continue
        assert training["epochs"] == 1
        if run.benchmark == "multitask":
            rows = training["rows_per_epoch"] * len(run.spec["task"]["tasks"])
        elif run.benchmark == "llama":
            rows = run.spec["data"]["train_rows"]
        else:
            rows = training["train_rows"]
        rows_of_step = training["batch_size"] * training.get("gradient_accumulation_steps", 1)
        assert rows == 3 * rows_of_step


def test_tolerances_name_benchmarks_that_exist() -> None:
    for metric in load_metrics().values():
        assert set(metric.tolerance_by_benchmark) <= set(benchmark_names())
