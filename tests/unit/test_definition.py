from __future__ import annotations

import copy
import string
from pathlib import Path

import pytest
import yaml

from benchmarks.harness import definition, paths, runs, suite
from benchmarks.harness.definition import DefinitionError, check, load_benchmark, read_checked, read_yaml

SAFE = set(string.ascii_letters + string.digits + "._+-")
GLUE = yaml.safe_load((paths.BENCHMARKS / "glue" / "benchmark.yaml").read_text())


def edited(path: str, value: object) -> dict:
    """The real definition with one value changed; the path is dotted."""
    content = copy.deepcopy(GLUE)
    place = content
    *parents, last = path.split(".")
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    place[int(last) if isinstance(place, list) else last] = value
    return content


def test_every_shipped_file_is_valid() -> None:
    for name in definition.benchmark_names():
        load_benchmark(name)
    for name in suite.suite_names():
        assert suite.load_suite({"suite": name}).runs
    definition.load_models()
    definition.load_metrics()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("methods.emoe.num_expert", 8, r"unknown key 'methods\.emoe\.num_expert'; did you mean 'num_experts'"),
        ("methods.emoe.kind", "emo", r"'methods\.emoe\.kind' is 'emo'; did you mean 'emoe'"),
        ("methods.emoe.partition", "k-means", r"'methods\.emoe\.partition' is 'k-means'; did you mean 'kmeans'"),
        ("suites.mini.grid.0.seed", ["a"], r"'suites\.mini\.grid\[0\]\.seed\[0\]' is 'a', but must be integer"),
        ("suites.mini.grid.0.learning_rate", ["5e-5"], r"YAML reads 5e-5 as text; write 5\.0e-05"),
        ("suites.mini.grid.0.sed", [0], r"unknown key 'suites\.mini\.grid\[0\]\.sed'; did you mean 'seed'"),
        ("training.keep", "lst", r"did you mean 'last'"),
        ("training.batch_size", 0, r"'training\.batch_size': 0 is less than the minimum of 1"),
        ("versions", 1, r"unknown key 'versions'; did you mean 'version'"),
    ],
)
def test_wrong_keys_and_values_are_named_with_the_nearest_valid_one(path, value, message) -> None:
    with pytest.raises(DefinitionError, match=message) as caught:
        check(edited(path, value), "benchmark", "some/benchmark.yaml")
    assert str(caught.value).startswith("some/benchmark.yaml: ")


def test_missing_keys_are_named() -> None:
    content = copy.deepcopy(GLUE)
    del content["training"]["epochs"]
    with pytest.raises(DefinitionError, match="'training' needs the key 'epochs'"):
        check(content, "benchmark", "b.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "is not valid YAML"), ("a: 1\na: 2", "the key 'a' is given twice"), ("[]", "must be object")],
)
def test_broken_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(DefinitionError, match=message) as caught:
        read_checked(path, "config")
    assert str(path) in str(caught.value)


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "mini.yaml").write_text("")
    with pytest.raises(DefinitionError, match=r"did you mean 'mini\.yaml'"):
        read_yaml(tmp_path / "minni.yaml")


@pytest.fixture
def changed(monkeypatch):
    """Run a plan on the real benchmark with one value changed."""

    def use(path: str, value: object):
        content = check(edited(path, value), "benchmark", "benchmark.yaml")
        real = load_benchmark("glue")
        monkeypatch.setattr(runs, "load_benchmark", lambda name: definition.Benchmark(name, content, real.tasks))
        return runs.plan(["glue"], "mini")

    return use


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "suites.mini.grid.0.task",
            ["tweet"],
            r"'suites\.mini\.grid\[0\]\.task' is 'tweet', which does not exist; did you mean 'tweets'",
        ),
        ("suites.mini.grid.0.model", ["mini-lm"], "did you mean 'minilm'"),
        ("suites.mini.grid.0.method", ["emo"], "did you mean 'emoe'"),
        ("suites.mini.methods.emo", {"layers": [1]}, "did you mean 'emoe'"),
        (
            "suites.mini.methods.emoe.layer",
            [1],
            r"suites\.mini\.methods.*unknown key 'methods\.emoe\.layer'; did you mean 'layers'",
        ),
        ("suites.mini.methods.emoe.top_k", 4, "both top_k and top_k_fraction"),
        ("suites.mini.methods.emoe.top_k_fraction", 0.3, "of 16 experts is 4.8, not a whole number"),
        ("suites.mini.methods.vanilla", {"num_experts": 4}, "is dense and takes no 'num_experts'"),
        ("suites.mini.methods.emoe_learn.weighting", "binary", "router gets no gradient"),
        ("training.epochs_by_task", {"mlni": 3}, "did you mean 'mnli'"),
    ],
)
def test_a_plan_that_cannot_run_is_refused_before_it_starts(changed, path, value, message) -> None:
    with pytest.raises(DefinitionError, match=message):
        changed(path, value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("baseline", "vanila", "'baseline' is 'vanila', which is no method; did you mean 'vanilla'"),
        ("pipeline", "benchmarks.gleu.pipeline", r"did you mean 'benchmarks\.glue\.pipeline'"),
        ("paper", "papers.csv", r"'paper' is 'papers\.csv', which does not exist; did you mean 'paper\.csv'"),
        ("suites.mini.training.patience", 3, r"'suites\.mini\.training\.patience' needs keep: best"),
    ],
)
def test_names_that_lead_nowhere_are_refused(path, value, message) -> None:
    real = load_benchmark("glue")
    with pytest.raises(DefinitionError, match=message):
        definition.check_references(check(edited(path, value), "benchmark", "b.yaml"), real.tasks, real.folder)


def test_unknown_metrics_are_refused() -> None:
    real = load_benchmark("glue")
    tasks = {"cola": {**real.tasks["cola"], "metric": "acuracy"}}
    with pytest.raises(
        DefinitionError, match=r"tasks\.yaml: 'tasks\.cola\.metric' is 'acuracy'; did you mean 'accuracy'"
    ):
        definition.check_references(real.definition, tasks, real.folder)


def test_layers_of_any_form_make_a_safe_id(changed) -> None:
    planned = changed("suites.mini.grid.0.layers", ["last-half:2", "4:6"])
    assert all(set(run.id) <= SAFE for run in planned)
    assert any("Llast-half_2" in run.id for run in planned)


def test_adding_a_seed_adds_runs_and_keeps_the_others(changed) -> None:
    before = {run.id for run in runs.plan(["glue"], "mini")}
    after = {run.id for run in changed("suites.mini.grid.0.seed", [0, 1, 2, 3])}
    assert before < after
    assert len(after - before) == 4


def test_titles_change_no_run_and_the_version_changes_all(changed) -> None:
    before = {run.id for run in runs.plan(["glue"], "mini")}
    assert {run.id for run in changed("methods.emoe.title", "Ours")} == before
    assert not {run.id for run in changed("version", 99)} & before


def test_suites_share_runs() -> None:
    full = {run.id for run in runs.plan(["glue"], "mini_full")}
    assert {run.id for run in runs.plan(["glue"], "mini")} < full


def test_ids_are_short_readable_and_safe() -> None:
    for name in suite.suite_names():
        for run in suite.plain_suite(name).runs:
            assert len(run.id) <= 80
            assert run.id.startswith(run.spec["model"]["name"])
            assert set(run.id) <= SAFE


def test_the_default_grid_has_the_promised_seeds() -> None:
    planned = runs.plan(["glue"], "mini")
    seeds = {}
    for run in planned:
        seeds.setdefault((run.spec["method"]["name"], run.spec["task"]["name"]), set()).add(run.spec["seed"])
    assert len(planned) == 26
    assert len(seeds["vanilla", "tweets"]) == len(seeds["emoe", "amazon"]) == 3
    assert min(map(len, seeds.values())) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"suite": "minni"}, "did you mean 'mini'"),
        ({"suit": "mini"}, "did you mean 'suite'"),
        ({"benchmarks": ["gleu"]}, "did you mean 'glue'"),
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
    assert suite.suite_of_job("mini").settings["data_root"] is None


def test_runs_are_found_in_any_suite() -> None:
    mini = suite.load_suite({})
    smoke = suite.load_suite({"suite": "smoke"}).runs[0]
    found, owner = suite.find_run(smoke.folder, mini)
    assert (found.id, owner.name) == (smoke.id, "smoke")
    with pytest.raises(DefinitionError, match=r"did you mean 'glue/minilm"):
        suite.find_run(mini.runs[0].folder[:-1] + "x", mini)


def test_only_clustered_methods_wait_for_a_partition() -> None:
    mini = suite.load_suite({})
    needs = {run.spec["method"]["name"]: bool(suite.partition_jobs(run)) for run in mini.runs}
    assert [name for name, needed in needs.items() if needed] == ["emoe", "emoe_learn", "emoe_published", "all_experts"]
    assert len(mini.partitions) == 1  # one clustering serves all four


def test_layers_are_clustered_one_by_one_and_shared() -> None:
    search = suite.plain_suite("mini_search")
    runs_of_both = [run for run in search.runs if run.spec["method"]["config"]["layers"] == [3, 5]]
    assert all(len(suite.partition_jobs(run)) == 2 for run in runs_of_both)
    assert len(search.partitions) == 3 * 2  # three numbers of experts, layers 3 and 5
