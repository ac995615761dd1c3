"""Suites: their promised seeds, the command line's values, and what their runs share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from benchmarks.harness import base as paths
from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config import runs, suite
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.listing import suite_rows
from benchmarks.harness.sources.packages import PackageFile
from tests.planned import plan


def test_suites_share_runs() -> None:
    others = {run.id for run in plan(["modularity"], "mini")}
    assert {run.id for run in suite.load_suite({"benchmarks": ["modularity"], "seeds": 2}).runs} < others


def test_one_flag_sets_the_number_of_seeds() -> None:
    runs = suite.load_suite({"benchmarks": ["domainbed", "llama"], "seeds": 2}).runs
    assert {run.spec["seed"] for run in runs} == {0, 1}
    untuned = [run for run in runs if run.spec.get("finetuning") == "base"]
    assert {run.spec["seed"] for run in untuned} == {0}  # a block with one seed keeps it


def test_the_default_grid_has_the_promised_seeds() -> None:
    planned = plan(["glue"], "mini")
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
        ({"exclude": ["pacs"], "suite": "mini_search"}, "'exclude' is 'pacs', which does not exist"),
        ({"benchmarks": ["glue_ood"]}, "'benchmarks' has 'glue_ood', which evaluates 'glue_lora'; name that too"),
        ({"data_root": "/no/such/folder"}, "'data_root' is '/no/such/folder', which is no folder"),
    ],
)
def test_wrong_configuration_is_named(overrides, message) -> None:
    with pytest.raises(DefinitionError, match=message):
        suite.load_suite(overrides)


def test_excluded_sets_are_neither_trained_on_nor_evaluated() -> None:
    runs = suite.load_suite({"benchmarks": ["glue"], "exclude": ["amazon"]}).runs
    assert {run.spec["task"]["name"] for run in runs} == {"tweets"}
    assert {other["name"] for run in runs for other in run.spec["ood"]} == {"movie", "nyt"}
    with pytest.raises(DefinitionError, match="'exclude' leaves no run of 'domainbed'"):
        suite.load_suite({"benchmarks": ["domainbed"], "exclude": ["rotated_mnist_5k"]}).runs  # noqa: B018


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
    planned = [*suite.load_suite({}).runs, *plan(["glue_lora"], "smoke")]
    trained = [run for run in planned if run.benchmark in ("glue", "glue_lora")]
    needs = {run.spec["method"]["name"]: bool(runs.partition_jobs(run)) for run in trained}
    assert [name for name, needed in needs.items() if not needed] == [
        *("vanilla", "gmoe", "random_partition", "lora", "lora_block", "lora_gmoe", "lora_random", "lora_part"),
        *("lora_block_published", "lora_gmoe_published", "lora_random_bottom", "lora_contiguous", "lora_coactivation"),
        *("lora_gmoe_same", "lora_long"),
    ]
    assert {"emoe", "emoe_learn", "lora_emoe", "lora_bottom", "lora_emoe_settings", "lora_noise"} < set(needs)
    # one clustering serves all methods; other settings have another N
    jobs = [job for run in suite.load_suite({}).runs for job in runs.partition_jobs(run)]
    clusterings = {job.id.rpartition("-")[0] for job in jobs if job.id.startswith("minilm")}
    assert clusterings == {"minilm-N16-L5", "minilm-N32-L5", "minilm-N64-L5"}


def test_layers_are_clustered_one_by_one_and_shared() -> None:
    search = suite.plain_suite("mini_search")
    runs_of_both = [run for run in search.runs if run.spec["method"]["config"]["layers"] == [3, 5]]
    assert all(len(runs.partition_jobs(run)) == 2 for run in runs_of_both)
    assert len(search.partitions) == 3 * 2  # three numbers of experts, layers 3 and 5


def ids_with(
    file: str, old: str, new: str, benchmark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> set[str]:
    """Return the ids of a benchmark's runs in smoke, in a copy of the project with another text in a file."""
    for folder in ("config", "benchmarks"):
        ignore = shutil.ignore_patterns("*.py", "__pycache__")
        shutil.copytree(paths.ROOT / folder, tmp_path / folder, ignore=ignore, dirs_exist_ok=True)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    for module in ("harness.config.benchmark", "llama.grid"):
        monkeypatch.setattr(f"benchmarks.{module}.BENCHMARKS", tmp_path / "benchmarks")
    packages = yaml.safe_load((tmp_path / "benchmarks/harness/sources/packages.yaml").read_text())
    monkeypatch.setattr(
        "benchmarks.harness.sources.packages.package_files",
        lambda: {name: PackageFile(package=name, **fields) for name, fields in packages.items()},
    )
    load_benchmark.cache_clear()
    runs = suite.load_suite({"suite": "smoke"}).runs_of(benchmark)
    load_benchmark.cache_clear()
    return {run.id for run in runs}


@pytest.mark.parametrize(
    ("file", "old", "new", "benchmark"),
    [
        ("benchmarks/llama/templates.yaml", "### Instruction:", "### Task:", "llama"),
        ("benchmarks/glue/tasks.yaml", "metric: balanced_accuracy", "metric: accuracy", "glue"),
        ("benchmarks/harness/sources/packages.yaml", "5d7c06e027", "0d7c06e027", "glue"),
        ("benchmarks/harness/sources/packages.yaml", "71b9500d9c", "01b9500d9c", "domainbed"),
        ("benchmarks/harness/sources/packages.yaml", "1702c0bfb8", "0702c0bfb8", "llama"),
    ],
)
def test_whatever_shapes_a_number_is_part_of_a_runs_name(file, old, new, benchmark, tmp_path, monkeypatch) -> None:
    before = {run.id for run in suite.load_suite({"suite": "smoke"}).runs_of(benchmark)}
    assert not before & ids_with(file, old, new, benchmark, tmp_path, monkeypatch)


def test_rows_of_a_csv_are_part_of_a_runs_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    digests = []
    for text in ("text,label\na,b\n", "text,label\na,c\n"):
        (tmp_path / "mine.csv").write_text(text)
        suite._csv_digest.cache_clear()
        spec = {"model": {}, "task": {"source": {"csv": "mine.csv"}}, "ood": []}
        digests.append(suite._file_digests(spec))
    assert digests[0].keys() == digests[1].keys() == {"mine.csv"}
    assert digests[0] != digests[1]


def test_a_job_on_a_cluster_plans_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smoke = suite.load_suite({"suite": "smoke"})
    smoke.write_plan([run.folder for run in smoke.runs])
    (partition, *_) = smoke.partitions.values()

    def refuse(*_: object) -> None:
        raise AssertionError("a job plans the suite")

    monkeypatch.setattr(suite, "plan", refuse)
    job = suite.load_suite({"suite": "smoke"})
    assert [suite.planned_run(run.folder, job) for run in smoke.runs] == smoke.runs
    assert suite.planned_partition(partition.id, job) == partition


def test_a_suite_is_listed_by_what_it_runs() -> None:
    rows = suite_rows(suite.load_suite({}).runs)
    assert sum(row["runs"] for row in rows) == 186
    assert rows[0] == {
        "benchmark": "glue",
        "model": "minilm",
        "methods": ["vanilla", "emoe"],
        "tasks": ["tweets", "amazon"],
        "settings": ["clean"],
        "learning_rates": ["0.0001"],
        "seeds": [str(seed) for seed in range(8)],
        "runs": 32,
    }
