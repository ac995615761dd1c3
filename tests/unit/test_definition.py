"""Mistakes in YAML files are one line; runs and tables depend on what shapes them alone."""

from __future__ import annotations

import re
import shutil
import string
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from benchmarks.harness import base as paths
from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config import benchmark, suite
from benchmarks.harness.config.benchmark import AnyBenchmark, load_benchmark
from benchmarks.harness.config.catalogue import load_metrics, load_models
from benchmarks.harness.config.runs import run_from_spec
from benchmarks.harness.config.suite_file import SuiteSettings
from benchmarks.harness.config.yaml import read, read_yaml
from benchmarks.text.definition import TaskEntry
from tests.planned import edited_benchmark, edited_part, plan, specs

SAFE = set(string.ascii_letters + string.digits + "._+-")


def with_task(name: str, **changes: object) -> AnyBenchmark:
    """Load a benchmark with other keys in a task."""
    tasks = load_benchmark("glue").tasks
    task = TaskEntry.model_validate({**tasks[name].model_dump(), **changes})
    with mock.patch("benchmarks.text.grid.read", return_value=SimpleNamespace(tasks={**tasks, name: task})):
        return edited_benchmark("glue", {})


def test_every_shipped_file_is_valid() -> None:
    for name in benchmark.benchmark_names():
        load_benchmark(name)
    load_models()
    load_metrics()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("methods.emoe.num_expert", 8, r"unknown key 'methods\.emoe\.num_expert'; did you mean 'num_experts'"),
        ("methods.vanilla.tune", "block", r"'methods\.vanilla\.tune' is 'block'; did you mean 'blocks'"),
        ("methods.emoe.partition", "k-means", r"'methods\.emoe\.partition' is 'k-means'; did you mean 'kmeans'"),
        ("training.checkpoint_selection", "lst", r"did you mean 'last'"),
        ("training.epochs", "2", r"'training\.epochs' is '2': Input should be a valid number"),
        ("method_defaults.emo", {}, r"'method_defaults' is 'emo', which does not exist; did you mean 'emoe'"),
        ("methods.emo", {}, r"'methods' is 'emo', which does not exist; did you mean 'emoe'"),
        ("baseline", "vanila", r"'baseline' is 'vanila', which does not exist; did you mean 'vanilla'"),
        ("paper", "papers.csv", r"'paper' is 'papers\.csv', which does not exist; did you mean 'paper\.csv'"),
    ],
)
def test_mistakes_in_a_benchmark_are_named_with_the_nearest_valid_value(path, value, message) -> None:
    with pytest.raises(DefinitionError, match=rf"glue/benchmark\.yaml: .*{message}"):
        edited_benchmark("glue", {path: value})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("methods.emoe.layer", [1], r"unknown key 'benchmarks\.glue\.methods\.emoe\.layer'; did you mean 'layers'"),
        ("methods.emo", {}, r"'benchmarks\.glue\.methods' is 'emo', which does not exist; did you mean 'emoe'"),
        ("grid.0.seed", ["a"], r"'benchmarks\.glue\.grid\[0\]\.seed\[0\]' is 'a': Input should be a valid integer"),
        ("grid.0.sed", [0], r"unknown key 'benchmarks\.glue\.grid\[0\]\.sed'; did you mean 'seed'"),
        ("grid_defaults.sed", [0], r"unknown key 'benchmarks\.glue\.grid_defaults\.sed'; did you mean 'seed'"),
        ("grid_defaults.learning_rate", ["5e-5"], r"'benchmarks\.glue\.grid_defaults\.learning_rate\[0\]' is '5e-5'"),
        ("grid.0.learning_rate", ["5e-5"], r"YAML reads 5e-5 as text; write 5\.0e-05"),
        ("note", ["long"] * 3000, r"'benchmarks\.glue\.note' is \['long', .{80,120}…: Input should be a valid string"),
        ("training.batch_sice", 8, r"unknown key 'benchmarks\.glue\.training\.batch_sice'; did you mean 'batch_size'"),
        ("training.epochs", 0, r"'benchmarks\.glue\.training\.epochs' is 0: Input should be greater than 0"),
        (
            "training.by_model",
            {"minilm": {"precision": "fp23"}},
            r"'benchmarks\.glue\.training\.by_model\.minilm\.precision' is 'fp23'; did you mean 'fp32'",
        ),
        ("training.by_model", {"gpt2-x": {"batch_size": 8}}, "did you mean 'gpt2-xl'"),
        ("training.by_model", {"gpt2-xl": {"epoch": 8}}, r"by_model\.gpt2-xl\.epoch'; did you mean 'epochs'"),
        ("training.validation_fraction", 0, "clean runs need rows to choose by"),
        ("training.patience", 3, r"'benchmarks\.glue\.training\.patience' needs checkpoint_selection: best"),
        (
            "grid.0.task",
            ["tweet"],
            r"'benchmarks\.glue\.grid\[0\]\.task' is 'tweet', which does not exist; did you mean 'tweets'",
        ),
        (
            "methods.emoe.num_experts",
            40,
            "num_experts is 40, but the 1536 neurons of an FFN of 'minilm' cannot be split into so many equal "
            "experts; the nearest number that can is 32",
        ),
        ("grid.0.task", ["imdb"], "task' is 'imdb', which does not exist"),  # it has no training split
        ("grid.0.protocol", ["published"], "'published' is for tasks without a test split"),
        ("methods.vanilla", {"tune": "blocks"}, "sets 'tune: blocks' but no 'layers'"),
        ("methods.random_partition.also_train", ["pooler"], "sets 'also_train', which needs training.lora or 'tune'"),
    ],
)
def test_mistakes_in_a_suite_are_named_with_the_nearest_valid_value(path, value, message) -> None:
    with pytest.raises(DefinitionError, match=message) as caught:
        specs(load_benchmark("glue"), edited_part("glue", "mini", {path: value}))
    assert str(caught.value).startswith(f"{paths.CONFIG / 'mini.yaml'}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not valid YAML"),
        ("a: 1\na: 2", "the key 'a' is given twice"),
        ("[a, b]: 1", "found unhashable key"),
        ("a: " + "9" * 5000, "is not valid YAML"),
        ("a: " + "[" * 50_000, "is not valid YAML"),
        ("[]", "should be a valid dictionary"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(DefinitionError, match=message) as caught:
        read(path, SuiteSettings)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "mini.yaml").write_text("")
    with pytest.raises(DefinitionError, match=r"did you mean 'mini\.yaml'"):
        read_yaml(tmp_path / "minni.yaml")
    with pytest.raises(DefinitionError, match=f"^{re.escape(str(tmp_path))} cannot be read: Is a directory$"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        (
            "cola",
            "metric",
            "acuracy",
            r"'tasks\.cola\.metric' is 'acuracy', which does not exist; did you mean 'accuracy'",
        ),
        ("rte", "ood", ["hnas"], r"'tasks\.rte\.ood' is 'hnas', which does not exist; did you mean 'hans'"),
        ("stsb", "ood", ["hans"], r"'tasks\.stsb\.ood': 'hans' has classes as labels, the model numbers"),
        (
            "rte",
            "range",
            [0, 1],
            r"'tasks\.rte\.range' is \[0, 1\], but must be lowest and highest score of a regression",
        ),
        (
            "flipkart",
            "download_instructions",
            None,
            r"'tasks\.flipkart' is neither on the hub nor in a package, so it needs 'download_instructions'",
        ),
        (
            "flipkart",
            "label_names",
            {"neutral": "negativ"},
            r"label_names' is 'negativ', which does not exist; did you mean 'negative'",
        ),
    ],
)
def test_tasks_that_lead_nowhere_are_refused(name: str, key: str, value: object, message: str) -> None:
    with pytest.raises(DefinitionError, match=message) as caught:
        with_task(name, **{key: value})
    assert "tasks.yaml: " in str(caught.value)


@pytest.mark.parametrize(("other", "message"), [("speed", "trains no text classifiers"), ("glue_lra", "did you mean")])
def test_only_trained_benchmarks_can_be_evaluated(other: str, message: str) -> None:
    with pytest.raises(DefinitionError, match=f"'evaluates' is '{other}', which .*{message}"):
        edited_benchmark("glue_ood", {"evaluates": other})


def test_classes_without_a_fold_are_refused() -> None:
    with pytest.raises(DefinitionError, match=r"'tasks\.mnli\.ood': 'hans' has 2 classes, the model 3"):
        with_task("mnli", ood=["hans"], label_map={})


def test_runs_that_keep_no_weights_cannot_be_evaluated() -> None:
    with pytest.raises(DefinitionError, match=r"do not keep their weights; set training\.keep_weights: true there"):
        specs(load_benchmark("glue_ood"), "smoke", plan(["glue"], "smoke"))


def ids(edits: dict[str, object], part_edits: dict[str, object]) -> set[str]:
    """Return the ids of glue's runs in mini, with other values in the benchmark's file and in the suite's."""
    glue = edited_benchmark("glue", edits)
    return {run_from_spec(spec | {"files": {}}).id for spec in specs(glue, edited_part(glue, "mini", part_edits))}


def test_layers_of_any_form_make_a_safe_id() -> None:
    planned = ids({}, {"grid.0.layers": ["last-half:2", "4:6"]})
    assert all(set(run) <= SAFE for run in planned)
    assert any("Llast-half_2" in run for run in planned)


def test_a_seed_adds_runs_titles_change_none_and_the_version_all() -> None:
    before = ids({}, {})
    after = ids({}, {"grid.0.seed": [0, 1, 2, 3, 4, 5, 6, 7, 8]})
    assert before < after
    assert len(after - before) == 4
    assert ids({"methods.emoe.title": "Ours"}, {}) == before
    assert not ids({"version": 99}, {}) & before


@pytest.mark.parametrize(
    ("file", "line", "made_again"),
    [
        ("config/mini.yaml", ("seed: [0, 1, 2, 3, 4, 5, 6, 7]", "seed: [0, 1]"), {"glue"}),
        ("config/mini.yaml", ("  glue:\n    note: >-\n      A small", "  glue:\n    note: >-\n      A tiny"), {"glue"}),
        ("config/smoke.yaml", ("seed: [0, 1]", "seed: [0]"), set()),
        ("benchmarks/glue/benchmark.yaml", ("EMoE, N, k and layers searched", "EMoE, searched"), {"glue"}),
        ("benchmarks/glue/benchmark.yaml", ("# names", "# other names"), set()),
    ],
)
def test_tables_are_made_again_for_their_benchmarks_own_runs(file, line, made_again, tmp_path, monkeypatch) -> None:
    def digests() -> dict[str, str]:
        loaded = suite.load_suite({"suite": "mini"})
        return {name: loaded.digest(name) for name in loaded.settings.benchmarks}

    before = digests()
    for folder in ("config", "benchmarks"):
        shutil.copytree(paths.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    text = (tmp_path / file).read_text()
    (tmp_path / file).write_text(text.replace(*line))
    monkeypatch.setattr(paths, "CONFIG", tmp_path / "config")
    monkeypatch.setattr(benchmark, "BENCHMARKS", tmp_path / "benchmarks")
    load_benchmark.cache_clear()
    after = digests()
    load_benchmark.cache_clear()
    assert {name for name in before if before[name] != after[name]} == made_again


@pytest.mark.parametrize(
    ("model", "made_again"),
    [("another", False), ("llama-30b", False), ("minilm", True), ("bert-large-cased", True)],
)
def test_tables_are_made_again_for_titles_of_the_models_that_they_show(
    model: str, made_again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the suite runs, and those of published numbers."""
    found, models = suite.load_suite({"suite": "mini"}), load_models()
    before = found.digest("glue")
    entry = models.get(model, models["minilm"]).model_copy(update={"title": "Another title"})
    monkeypatch.setattr(suite, "load_models", lambda: {**models, model: entry})
    assert (found.digest("glue") != before) == made_again
