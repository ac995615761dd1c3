from __future__ import annotations

import copy
import re
import shutil
import string
from pathlib import Path

import pytest
import yaml

from benchmarks.glue_ood.grid import KIND as EVALUATION
from benchmarks.harness import base as paths
from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config import benchmark, runs, suite
from benchmarks.harness.config.benchmark import Benchmark, load_benchmark
from benchmarks.harness.config.catalogue import load_metrics, load_models
from benchmarks.harness.config.suite import SuiteSettings
from benchmarks.harness.config.yaml import parse, read, read_yaml
from benchmarks.text.definition import TaskEntry, TextDefinition

SAFE = set(string.ascii_letters + string.digits + "._+-")
GLUE = yaml.safe_load((paths.BENCHMARKS / "glue" / "benchmark.yaml").read_text())


def edited(path: str, value: object) -> dict:
    """The real definition with one value changed; the path is dotted."""
    content = copy.deepcopy(GLUE)
    place = content
    *parents, last = path.split(".")
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    place[int(last) if isinstance(place, list) else last] = value
    return content


def changed_task(name: str, **changes: object) -> TaskEntry:
    """A real task with other keys."""
    return TaskEntry.model_validate({**load_benchmark("glue").tasks[name].model_dump(), **changes})


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
        (
            "suites.mini.methods.emoe.layer",
            [1],
            r"unknown key 'suites\.mini\.methods\.emoe\.layer'; did you mean 'layers'",
        ),
        ("methods.emoe.partition", "k-means", r"'methods\.emoe\.partition' is 'k-means'; did you mean 'kmeans'"),
        (
            "suites.mini.grid.0.seed",
            ["a"],
            r"'suites\.mini\.grid\[0\]\.seed\[0\]' is 'a': Input should be a valid integer",
        ),
        ("suites.mini.grid.0.learning_rate", ["5e-5"], r"YAML reads 5e-5 as text; write 5\.0e-05"),
        ("suites.mini.grid.0.sed", [0], r"unknown key 'suites\.mini\.grid\[0\]\.sed'; did you mean 'seed'"),
        ("training.checkpoint_selection", "lst", r"did you mean 'last'"),
        (
            "suites.mini.note",
            ["long"] * 3000,
            r"'suites\.mini\.note' is \['long', .{80,120}…: Input should be a valid string",
        ),
    ],
)
def test_wrong_keys_and_values_are_named_with_the_nearest_valid_one(path, value, message) -> None:
    with pytest.raises(DefinitionError, match=message) as caught:
        parse(edited(path, value), TextDefinition, "some/benchmark.yaml")
    assert str(caught.value).startswith("some/benchmark.yaml: ")


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


@pytest.fixture
def changed(monkeypatch):
    """Run a plan on the real benchmark with one value changed."""

    def use(path: str, value: object):
        real = load_benchmark("glue")
        content = real.kind.load(edited(path, value), real.file)[0]
        monkeypatch.setattr(runs, "load_benchmark", lambda name: Benchmark(name, content, real.tasks))
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
        ("method_defaults.emo", {}, r"'method_defaults' is 'emo', which does not exist; did you mean 'emoe'"),
        ("methods.emo", {}, r"benchmark\.yaml: 'methods' is 'emo', which does not exist; did you mean 'emoe'"),
        (
            "suites.mini.methods.emoe.num_experts",
            40,
            "num_experts is 40, but the 1536 neurons of an FFN of 'minilm' cannot be split into so many equal "
            "experts; the nearest number that can is 32",
        ),
        ("suites.mini.grid.0.task", ["imdb"], "task' is 'imdb', which does not exist"),  # it has no training split
        ("suites.mini.grid.0.protocol", ["published"], "'published' is for tasks without a test split"),
        ("suites.mini.methods.vanilla", {"tune": "blocks"}, "sets 'tune: blocks' but no 'layers'"),
        ("methods.random_partition.also_train", ["pooler"], "sets 'also_train', which needs training.lora or 'tune'"),
    ],
)
def test_a_plan_that_cannot_run_is_refused_before_it_starts(changed, path, value, message) -> None:
    with pytest.raises(DefinitionError, match=message):
        changed(path, value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("baseline", "vanila", "'baseline' is 'vanila', which is no method; did you mean 'vanilla'"),
        (
            "suites.mini.training.batch_sice",
            8,
            r"unknown key 'suites\.mini\.training\.batch_sice'; did you mean 'batch_size'",
        ),
        (
            "suites.mini.training.epochs",
            0,
            r"'suites\.mini\.training\.epochs' is 0: Input should be greater than 0",
        ),
        (
            "suites.mini.training.by_model",
            {"minilm": {"precision": "fp23"}},
            r"'suites\.mini\.training\.by_model\.minilm\.precision' is 'fp23'; did you mean 'fp32'",
        ),
        ("suites.mini.training.validation_fraction", 0, "clean runs need rows to choose by"),
        ("training.by_model", {"gpt2-x": {"batch_size": 8}}, "did you mean 'gpt2-xl'"),
        (
            "training.by_model",
            {"gpt2-xl": {"epoch": 8}},
            r"'training\.by_model\.gpt2-xl\.epoch'; did you mean 'epochs'",
        ),
        ("training.epochs", "2", r"'training\.epochs' is '2': Input should be a valid number"),
        ("pipeline", "benchmarks.gleu.pipeline", r"did you mean 'benchmarks\.glue\.pipeline'"),
        ("paper", "papers.csv", r"'paper' is 'papers\.csv', which does not exist; did you mean 'paper\.csv'"),
        ("suites.mini.training.patience", 3, r"'suites\.mini\.training\.patience' needs checkpoint_selection: best"),
    ],
)
def test_names_that_lead_nowhere_are_refused(path, value, message) -> None:
    real = load_benchmark("glue")
    with pytest.raises(DefinitionError, match=message):
        benchmark.check_references(Benchmark("glue", *real.kind.load(edited(path, value), real.file)))


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
    real = load_benchmark("glue")
    tasks = {**real.tasks, name: changed_task(name, **{key: value})}
    with pytest.raises(DefinitionError, match=message) as caught:
        benchmark.check_references(Benchmark("glue", real.definition, tasks))
    assert "tasks.yaml: " in str(caught.value)


@pytest.mark.parametrize("other", ["speed", "glue_lra"])
def test_only_trained_benchmarks_can_be_evaluated(other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("glue", "glue_lora", "glue_ood", "speed"):
        shutil.copytree(paths.BENCHMARKS / name, tmp_path / name)
    file = tmp_path / "glue_ood" / "benchmark.yaml"
    file.write_text(file.read_text().replace("evaluates: glue_lora", f"evaluates: {other}"))
    monkeypatch.setattr(benchmark, "BENCHMARKS", tmp_path)
    with pytest.raises(
        DefinitionError, match=f"'evaluates' is '{other}', which does not exist; (did you mean|choose from)"
    ):
        load_benchmark.__wrapped__("glue_ood")


def test_classes_without_a_fold_are_refused() -> None:
    real = load_benchmark("glue")
    tasks = {**real.tasks, "mnli": changed_task("mnli", ood=["hans"], label_map={})}
    with pytest.raises(DefinitionError, match=r"'tasks\.mnli\.ood': 'hans' has 2 classes, the model 3"):
        benchmark.check_references(Benchmark("glue", real.definition, tasks))


def test_runs_that_keep_no_weights_cannot_be_evaluated() -> None:
    others = {run.folder: run.spec for run in runs.plan(["glue"], "smoke")}
    with pytest.raises(DefinitionError, match=r"do not keep their weights; set training\.keep_weights: true there"):
        list(EVALUATION.specs(load_benchmark("glue_ood"), "smoke", (), lambda name: others))


def test_layers_of_any_form_make_a_safe_id(changed) -> None:
    planned = changed("suites.mini.grid.0.layers", ["last-half:2", "4:6"])
    assert all(set(run.id) <= SAFE for run in planned)
    assert any("Llast-half_2" in run.id for run in planned)


def test_adding_a_seed_adds_runs_and_keeps_the_others(changed) -> None:
    before = {run.id for run in runs.plan(["glue"], "mini")}
    after = {run.id for run in changed("suites.mini.grid.0.seed", [0, 1, 2, 3, 4, 5, 6, 7, 8])}
    assert before < after
    assert len(after - before) == 4


@pytest.mark.parametrize(
    ("path", "value", "made_again"),
    [
        ("suites.mini.grid.0.seed", [0, 1], {"glue"}),
        ("suites.mini.note", "Small.", {"glue"}),
        ("methods.emoe.title", "Ours", {"glue"}),
        ("suites.smoke.grid.0.seed", [0], set()),
        ("suites.smoke.note", "Tiny.", set()),
    ],
)
def test_tables_are_made_again_for_their_benchmarks_own_runs(path, value, made_again, monkeypatch) -> None:
    def digests() -> dict[str, str]:
        found = suite.load_suite({"suite": "mini"})
        return {name: found.digest(name) for name in found.settings.benchmarks}

    before, real = digests(), load_benchmark("glue")
    content = real.kind.load(edited(path, value), real.file)[0]
    edited_glue = Benchmark("glue", content, real.tasks)
    for module in (runs, suite):
        monkeypatch.setattr(
            module, "load_benchmark", lambda name: edited_glue if name == "glue" else load_benchmark(name)
        )
    after = digests()
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


def test_titles_change_no_run_and_the_version_changes_all(changed) -> None:
    before = {run.id for run in runs.plan(["glue"], "mini")}
    assert {run.id for run in changed("methods.emoe.title", "Ours")} == before
    assert not {run.id for run in changed("version", 99)} & before
