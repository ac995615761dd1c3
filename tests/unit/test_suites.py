"""Suites: their promised seeds, the command line's values, and what their runs share."""

from __future__ import annotations

import pytest

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config import runs, suite


def test_suites_share_runs() -> None:
    full = {run.id for run in runs.plan(["glue"], "mini_full")}
    assert {run.id for run in runs.plan(["glue"], "mini")} < full


def test_the_default_grid_has_the_promised_seeds() -> None:
    planned = runs.plan(["glue"], "mini")
    seeds = {}
    for run in planned:
        seeds.setdefault((run.spec["method"]["name"], run.spec["task"]["name"]), set()).add(run.spec["seed"])
    assert len(planned) == 47
    main = [(method, task) for method in ("vanilla", "emoe") for task in ("tweets", "amazon")]
    assert {len(seeds[cell]) for cell in main} == {8}
    assert {len(found) for cell, found in seeds.items() if cell not in main} == {5}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"suite": "minni"}, "did you mean 'mini'"),
        ({"suit": "mini"}, "did you mean 'suite'"),
        ({"benchmarks": ["gleu"]}, "did you mean 'glue'"),
        ({"exclude": ["flipkrt"]}, "'exclude' is 'flipkrt', which does not exist; did you mean 'flipkart'"),
        ({"exclude": ["cola"]}, "'exclude' is 'cola', which does not exist"),  # not evaluated out of domain
        ({"benchmarks": ["glue_ood"]}, "'benchmarks' names 'glue_ood', which evaluates 'glue_lora'; name that too"),
        ({"data_root": "/no/such/folder"}, "'data_root' is '/no/such/folder', which is no folder"),
    ],
)
def test_wrong_configuration_is_named(overrides, message) -> None:
    with pytest.raises(DefinitionError, match=message):
        suite.load_suite(overrides)


def test_jobs_see_the_command_lines_values(monkeypatch, tmp_path) -> None:
    chosen = suite.load_suite({"suite": "smoke", "data_root": str(tmp_path)})
    for name, value in chosen.environment().items():
        monkeypatch.setenv(name, value)
    assert suite.suite_of_job("smoke").settings == chosen.settings
    assert suite.suite_of_job("mini").settings.data_root is None


def test_runs_are_found_in_any_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "suite_names", lambda: ["mini", "mini_search", "smoke"])
    mini = suite.load_suite({})
    smoke = suite.load_suite({"suite": "smoke"}).runs[0]
    found, owner = suite.find_run(smoke.folder, mini)
    assert (found.id, owner.name) == (smoke.id, "smoke")
    with pytest.raises(DefinitionError, match=r"did you mean 'glue/minilm"):
        suite.find_run(mini.runs[0].folder[:-1] + "x", mini)


def test_only_clustered_methods_wait_for_a_partition() -> None:
    planned = [*suite.load_suite({}).runs, *runs.plan(["glue_lora"], "mini_full")]
    trained = [run for run in planned if run.benchmark in ("glue", "glue_lora")]
    needs = {run.spec["method"]["name"]: bool(runs.partition_jobs(run)) for run in trained}
    assert [name for name, needed in needs.items() if not needed] == [
        *("vanilla", "gmoe", "random_partition", "lora", "lora_block", "lora_gmoe", "lora_random", "lora_part"),
        *("lora_block_published", "lora_gmoe_published", "lora_random_bottom", "lora_contiguous", "lora_coactivation"),
        *("lora_gmoe_same", "lora_long"),
    ]
    assert {"emoe", "emoe_learn", "lora_emoe", "lora_bottom", "lora_emoe_settings", "lora_noise"} < set(needs)
    # one clustering serves all methods; other settings have another N, and layer 3
    clusterings = {job.id.rpartition("-")[0] for run in trained for job in runs.partition_jobs(run)}
    assert clusterings == {"minilm-N16-L5", "minilm-N32-L5", "minilm-N64-L5", "minilm-N16-L3"}


def test_layers_are_clustered_one_by_one_and_shared() -> None:
    search = suite.plain_suite("mini_search")
    runs_of_both = [run for run in search.runs if run.spec["method"]["config"]["layers"] == [3, 5]]
    assert all(len(runs.partition_jobs(run)) == 2 for run in runs_of_both)
    assert len(search.partitions) == 3 * 2  # three numbers of experts, layers 3 and 5
