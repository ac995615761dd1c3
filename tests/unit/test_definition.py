"""Test one-line errors for mistakes in YAML files, and the settings that change run ids."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import yaml

from benchmarks.domainbed.definition import ImageSpec
from benchmarks.glue_ood.definition import EvaluationSpec
from benchmarks.harness import base as paths
from benchmarks.harness.base import BENCHMARKS, ROOT, DefinitionError, read_yaml
from benchmarks.harness.config import methods
from benchmarks.harness.config.benchmark import KINDS, benchmark_names, load_benchmark
from benchmarks.harness.config.catalogue import ModelEntry
from benchmarks.harness.config.methods import Method, MethodFile, load_methods
from benchmarks.harness.config.runs import canonical_json, run_from_spec
from benchmarks.harness.config.yaml import Location, Strict, check_csv, parse, read
from benchmarks.harness.workflow.sources import table_sources
from benchmarks.llama.definition import InstructionSpec
from benchmarks.multitask.definition import MultitaskSpec
from benchmarks.text.definition import TaskEntry, TextSpec
from tests.planned import edited_benchmark, edited_part, plan, specs


def test_the_package_of_a_kind_has_the_modules_that_execute_and_present_its_runs() -> None:
    benchmarks = [load_benchmark(name) for name in benchmark_names()]
    assert {type(benchmark) for benchmark in benchmarks} == set(KINDS.values())
    for benchmark in benchmarks:
        assert callable(benchmark.pipeline().run)
        assert callable(benchmark.presentation().present)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "methods.emoe.num_expert",
            8,
            r"'methods\.emoe': unknown key 'num_expert'; did you mean 'num_experts'",
        ),
        (
            "methods.emoe.partition",
            "k-means",
            r"'methods\.emoe\.partition' is 'k-means'; did you mean 'kmeans'",
        ),
        ("training.epochs", "2", r"'training\.epochs' is '2': Input should be a valid number"),
        ("methods.emo", {}, r"'methods' is 'emo', which does not exist; did you mean 'emoe'"),
        (
            "paper",
            "papers.csv",
            r"'paper' is 'papers\.csv', which does not exist; did you mean 'paper\.csv'",
        ),
    ],
)
def test_mistakes_in_a_benchmark_are_named_with_the_nearest_valid_value(
    path, value, message
) -> None:
    with pytest.raises(DefinitionError, match=rf"glue/benchmark\.yaml: .*{message}"):
        edited_benchmark("glue", {path: value})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "methods.emoe.layer",
            [1],
            r"glue\.methods\.emoe': unknown key 'layer'; did you mean 'layers'",
        ),
        (
            "grid.0.seed",
            ["a"],
            r"'benchmarks\.glue\.grid\[0\]\.seed\[0\]' is 'a': Input should be a valid integer",
        ),
        (
            "grid_defaults.sed",
            [0],
            r"'benchmarks\.glue\.grid\[0\]': unknown key 'sed'; did you mean 'seed'",
        ),
        (
            "note",
            ["long"] * 3000,
            r"'benchmarks\.glue\.note' is \['long', .{20,80}\.\.\.\]: Input should be a valid",
        ),
        (
            "training.batch_sice",
            8,
            r"glue\.training': unknown key 'batch_sice'; did you mean 'batch_size'",
        ),
        (
            "training.by_model",
            {"minilm": {"precision": "fp23"}},
            r"minilm\.precision' is 'fp23'; did you mean 'fp32'",
        ),
        (
            "training.by_task",
            {"tweet": {"epochs": 1}},
            r"training\.by_task' is 'tweet', which does not exist; did you mean 'tweets'",
        ),
        (
            "training.by_task",
            {"tweets": {"epochs": 0}},
            r"'benchmarks\.glue\.training\.by_task\.tweets\.epochs' is 0: ",
        ),
        (
            "training.by_task",
            {"tweets": {"by_model": {"minilm": {"epochs": 1}}}},
            r"by_task\.tweets\.by_model' must stand beside the other settings",
        ),
        (
            "training.by_task",
            {"tweets": {"patience": 3}},
            r"'benchmarks\.glue\.training\.patience' needs checkpoint_selection: best",
        ),
        ("training.validation_fraction", 0, "clean runs need rows for selection"),
        (
            "training.patience",
            3,
            r"'benchmarks\.glue\.training\.patience' needs checkpoint_selection: best",
        ),
        (
            "grid.0.task",
            ["tweet"],
            r"grid\[0\]\.task' is 'tweet', which does not exist; did you mean 'tweets'",
        ),
        (
            "methods.emoe.num_experts",
            40,
            "is 40, but the 1536 neurons of .* 'minilm' .*; the nearest divisor is 32",
        ),
        (
            "methods.emoe.layers",
            "last-half",
            r"method 'emoe': layers 'last-half' is invalid; write a list, 'all', 'last:2', ",
        ),
        (
            "methods.emoe.title",
            "Ours",
            r"methods\.emoe\.title' has no effect in a suite; set it in .*/glue/benchmark\.yaml$",
        ),
        (
            "methods.emoe.role",
            "ablation",
            r"methods\.emoe\.role' has no effect in a suite; set it in .*/glue/benchmark\.yaml$",
        ),
        (
            "methods.emoe.method",
            "vanilla",
            r"methods\.emoe\.method' has no effect in a suite; set it in .*/glue/benchmark\.yaml$",
        ),
        (
            "method_defaults.emoe.role",
            "ablation",
            r"method_defaults\.emoe\.role' has no effect in a suite; set it in .*benchmark\.yaml$",
        ),
        ("grid.0.protocol", ["published"], "'published' is for tasks without a test split"),
        ("methods.vanilla", {"tune": "blocks"}, "sets 'tune: blocks' but no 'layers'"),
        (
            "methods.vanilla",
            {"top_k_fraction": 0.5},
            r"method 'vanilla' is dense and takes no 'top_k_fraction'",
        ),
        (
            "methods.vanilla",
            {"layers": [1]},
            r"method 'vanilla' is dense and takes no 'layers'",
        ),
        (
            "methods.vanilla",
            {"as_published": "llama"},
            r"method 'vanilla' is dense and takes no 'as_published'",
        ),
        (
            "methods.gmoe",
            {"num_experts": 6, "top_k_fraction": 0.25},
            r"top_k_fraction 0\.25 of the experts is 1\.5 experts",
        ),
        (
            "methods.random_partition.also_train",
            ["pooler"],
            "sets 'also_train', which needs training.lora or 'tune'",
        ),
    ],
)
def test_mistakes_in_a_suite_are_named_with_the_nearest_valid_value(path, value, message) -> None:
    with pytest.raises(DefinitionError, match=message) as caught:
        specs(load_benchmark("glue"), edited_part("glue", "mini", {path: value}))
    assert str(caught.value).startswith(f"{paths.CONFIG / 'mini.yaml'}: ")


def test_settings_of_a_task_override_those_of_the_suite_and_of_the_model() -> None:
    edits = {
        "training.epochs": 1,
        "training.by_model": {"minilm": {"epochs": 2, "batch_size": 8}},
        "training.by_task": {"tweets": {"epochs": 3, "train_rows": None}},
    }
    planned = specs(load_benchmark("glue"), edited_part("glue", "mini", edits))
    settings = {}
    for spec in planned:
        training = spec["training"]
        assert "by_task" not in training
        task = spec["task"]["name"]
        settings[task] = (training["epochs"], training["batch_size"], training["train_rows"])
    assert settings["tweets"] == (3, 8, None)
    del settings["tweets"]
    assert settings
    for epochs, batch_size, train_rows in settings.values():
        assert (epochs, batch_size) == (2, 8)
        assert train_rows is not None


def test_rounding_errors_do_not_refuse_a_share_of_the_experts() -> None:
    settings = {"num_experts": 25, "top_k_fraction": 0.28}  # 0.28 * 25 is 7.000000000000001
    planned = specs(load_benchmark("glue"), edited_part("glue", "mini", {"methods.gmoe": settings}))
    methods_of_runs = [spec["method"] for spec in planned]
    used = {spec["config"]["top_k"] for spec in methods_of_runs if spec["name"] == "gmoe"}
    assert used == {7}


def test_missing_file_names_its_neighbour_and_numbers_may_have_no_point(tmp_path: Path) -> None:
    (tmp_path / "mini.yaml").write_text("[5e-5, 1E3, 3e5x]")
    assert read_yaml(tmp_path / "mini.yaml") == [5e-5, 1000.0, "3e5x"]
    with pytest.raises(DefinitionError, match=r"did you mean 'mini\.yaml'"):
        read_yaml(tmp_path / "minni.yaml")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "cola",
            {"metric": "acuracy"},
            "metric' is 'acuracy', which does not exist; did you mean 'accuracy'",
        ),
        (
            "stsb",
            {"ood": ["hans"]},
            "ood': 'hans' has classes, but 'stsb' is a regression; their labels do not fit",
        ),
        ("mnli", {"ood": ["hans"], "label_map": {}}, "ood': 'mnli' has 3 classes, 'hans' 2"),
        (
            "mnli",
            {"metric": "f1"},
            "metric' is 'f1', which cannot score 3 classes; choose from accuracy, balanced_accuracy, mcc",
        ),
        (
            "stsb",
            {"metric": "accuracy"},
            "metric' is 'accuracy', which cannot score a regression; choose from pearson_spearman",
        ),
        (
            "cola",
            {"metric": "pearson_spearman"},
            "metric' is 'pearson_spearman', which cannot score 2 classes; choose from accuracy,",
        ),
        (
            "mnli",
            {"ood": ["mnli"], "ood_metrics": ["accuracy", "f1"]},
            "ood': 'ood_metrics' of 'mnli' is 'f1', which cannot score 3 classes; choose from acc",
        ),
        (
            "flipkart",
            {"download_instructions": None},
            "' is not on the hub, in a package or in a csv, so it needs 'downl",
        ),
    ],
)
def test_tasks_with_wrong_metrics_sets_or_sources_are_refused(
    name: str, changes: dict[str, object], message: str
) -> None:
    tasks = load_benchmark("glue").tasks
    task = TaskEntry.model_validate({**tasks[name].model_dump(), **changes})
    entries = SimpleNamespace(tasks={**tasks, name: task})
    with (
        mock.patch("benchmarks.text.grid.read", return_value=entries),
        pytest.raises(DefinitionError, match=rf"tasks\.yaml: 'tasks\.{name}.*{message}"),
    ):
        edited_benchmark("glue", {})


def test_a_set_that_is_merged_into_two_classes_may_have_a_metric_for_two() -> None:
    tasks = load_benchmark("glue").tasks
    changes = {"metric": "f1", "ood_metrics": ["accuracy_f1", "f1"]}
    snli = TaskEntry.model_validate({**tasks["snli"].model_dump(), **changes})
    mnli = TaskEntry.model_validate({**tasks["mnli"].model_dump(), "ood": ["hans"]})
    rte = TaskEntry.model_validate({**tasks["rte"].model_dump(), "ood": ["snli"]})
    entries = SimpleNamespace(tasks={**tasks, "snli": snli, "mnli": mnli, "rte": rte})
    with mock.patch("benchmarks.text.grid.read", return_value=entries):
        edited_benchmark("glue", {})


def test_runs_that_keep_no_weights_cannot_be_evaluated() -> None:
    with pytest.raises(
        DefinitionError, match=r"do not keep their weights; set training\.keep_weights: true there"
    ):
        specs(load_benchmark("glue_ood"), "smoke", plan(["glue"], "smoke"))


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("scope", "scopes", "the columns are ['model', 'scopes', "),
        ("x\n", "x,y\n", "line 2 has 8 cells, but must have 7"),
        ("MRPC", "MRPC\udcff", "cannot be read as a csv in UTF-8: 'utf-8' codec can't decode "),
    ],
)
def test_a_damaged_file_of_published_numbers_is_one_line_before_any_run(
    tmp_path: Path, old: str, new: str, text: str
) -> None:
    content = (
        "model,scope,method,setting,value,status,source\n"
        "bert-large,CoLA,lora,,60,published,x\n"
        "bert-large,MRPC,lora,,80,published,x\n"
    )
    file = tmp_path / "paper.csv"
    columns = ("model", "scope", "method", "setting")
    where = Location(tmp_path / "benchmark.yaml", "paper")
    file.write_text(content)
    check_csv(where, "paper.csv", tmp_path, columns)
    file.write_text(content.replace(old, new, 1), errors="surrogateescape")
    with pytest.raises(DefinitionError) as caught:
        check_csv(where, "paper.csv", tmp_path, columns)
    assert str(caught.value).startswith(f"{file}")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def ids(edits: dict[str, object], part_edits: dict[str, object]) -> set[str]:
    """Return the ids of glue's runs in mini, with other values in the benchmark's file and in the suite's."""
    glue = edited_benchmark("glue", edits)
    return {
        run_from_spec(spec | {"files": {}}).id
        for spec in specs(glue, edited_part(glue, "mini", part_edits))
    }


def test_a_seed_adds_runs_titles_change_none_and_the_version_all() -> None:
    before = ids({}, {})
    after = ids({}, {"grid.0.seed": [0, 1, 2, 3, 4, 5, 6, 7, 8]})
    assert before < after
    assert len(after - before) == 4
    assert ids({"methods.emoe.title": "Ours"}, {}) == before
    assert not ids({"version": 99}, {}) & before


def test_tables_depend_on_the_files_of_all_benchmarks_but_only_on_their_own_code() -> None:
    sources = {os.path.relpath(file, ROOT) for file in table_sources("glue_ood")}
    needed = {
        "benchmarks/glue/tasks.yaml",
        "benchmarks/glue_lora/benchmark.yaml",
        "benchmarks/metrics.yaml",
        "emoe/config.py",
    }
    assert {
        *needed,
        "benchmarks/glue_ood/ranks.py",
        "benchmarks/glue_ood/paper.csv",
        "benchmarks/text/data.py",
    } <= sources
    assert not any(
        file.startswith("benchmarks/llama/") and file.endswith(".py") for file in sources
    )


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (
            "kind: dense, noise: 0.15",
            "kind: dens",
            "'methods.noisy_tuning.kind' is 'dens'; did you mean 'dense'",
        ),
        ("noise: 0.15", "noise: !maybe 1", "is not valid YAML: the tag '!maybe' is not allowed"),
        ("noise: 0.15", "noise: 0.15, noise: 0.2", "the key 'noise' is given twice"),
        ("noise: 0.15}", "noise: 0.15", "is not valid YAML: while parsing"),
        ("methods:\n", "methods: 3\nrest:\n", "'the file': unknown key 'rest'"),
        (
            "noisy_tuning:",
            "Noisy Tuning:",
            "'methods.Noisy Tuning' is 'Noisy Tuning': String should match pattern",
        ),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, old: str, new: str, text: str) -> None:
    content, path = (BENCHMARKS / "methods.yaml").read_text(), tmp_path / "methods.yaml"
    path.write_text(content.replace(old, new, 1))
    with pytest.raises(DefinitionError) as caught:
        read(path, MethodFile)
    assert str(caught.value).startswith(str(path))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_method_takes_the_fields_of_a_configuration_with_their_bounds() -> None:
    method = parse({"title": "A", "kind": "emoe", "capacity_factor": None, "top_k": 2}, Method, "f")
    assert method.config_values() == {"capacity_factor": None, "top_k": 2}
    for changes, message in (
        ({"router": "cosin"}, "'router': there is no 'cosin'; did you mean 'cosine'"),
        ({"expert_dropout": 1.0}, "'expert_dropout' is 1.0: Input should be less than 1"),
    ):
        with pytest.raises(DefinitionError, match=message):
            parse({"title": "A", "kind": "emoe", **changes}, Method, "f")


def test_models_of_timm_are_of_images() -> None:
    entry = {"title": "A", "modality": "language", "timm": "test_vit"}
    with pytest.raises(DefinitionError, match="'timm' needs the modality 'image'"):
        parse(entry, ModelEntry, "models.yaml", "models", "a")


@pytest.mark.parametrize(
    ("benchmark", "spec"),
    [
        *(("glue", TextSpec), ("glue_lora", TextSpec), ("glue_ood", EvaluationSpec)),
        *(("domainbed", ImageSpec), ("llama", InstructionSpec), ("multitask", MultitaskSpec)),
    ],
)
def test_a_spec_is_read_back_as_it_is_hashed(benchmark: str, spec: type[Strict]) -> None:
    for run in [*plan([benchmark], "mini"), *plan([benchmark], "smoke")]:
        read_back = parse(run.spec, spec, "run.json").model_dump(exclude_unset=True)
        assert canonical_json(read_back) == run.to_json()
    with pytest.raises(
        DefinitionError, match=r"^run\.json: 'the file': unknown key 'sed'; did you mean 'seed'"
    ):
        parse({**run.spec, "sed": 0}, spec, "run.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("brokne", "No module named 'brokne'"),
        ("broken", "No module named 'no_such_package'"),
        ("no_code", "a folder without __init__.py"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_named(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = yaml.safe_load((BENCHMARKS / "methods.yaml").read_text())
    (tmp_path / "methods.yaml").write_text(yaml.safe_dump(content | {"plugins": [name]}))
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    (tmp_path / "no_code").mkdir()
    monkeypatch.setattr(methods, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(methods, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        DefinitionError, match=rf"/methods\.yaml: 'plugins' names '{name}', .*{message}"
    ):
        load_methods.__wrapped__()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"by_model": {"minilmm": {"epochs": 2}}},
            r"'training\.by_model' is 'minilmm', which does not exist; did you mean 'minilm'",
        ),
        (
            {"by_model": {"minilm": {"epochs": 0}}},
            r"'training\.by_model\.minilm\.epochs' is 0: Input should be greater than 0",
        ),
        (
            {"by_task": {"tweets": {"by_model": {}}}},
            r"'training\.by_task\.tweets\.by_model' must stand beside the other settings",
        ),
    ],
)
def test_a_mistake_of_one_model_or_task_names_the_benchmarks_file_if_it_is_there(
    changes: dict[str, Any], message: str
) -> None:
    edits = {f"training.{key}": value for key, value in changes.items()}
    benchmark = edited_benchmark("glue", edits)
    with pytest.raises(DefinitionError, match=rf"glue/benchmark\.yaml: {message}"):
        edited_part(benchmark, "mini", {})


def test_a_value_that_has_to_be_true_is_named_with_that() -> None:
    entry = {"title": "x", "modality": "image", "timm": "test_vit", "random": False}
    with pytest.raises(DefinitionError, match=r"'models\.x\.random' is False: .* should be True"):
        parse(entry, ModelEntry, "models.yaml", "models", "x")


def test_a_mistake_of_a_model_and_a_task_together_is_named_by_the_key_of_the_task() -> None:
    edits = {
        "training.by_model": {"minilm": {"lora": None}},
        # valid with the other keys of the suite's LoRA, but this model has none
        "training.by_task": {"tweets": {"lora": {"rank": 4}}},
    }
    with pytest.raises(
        DefinitionError,
        match=r"mini\.yaml: 'benchmarks\.glue_lora\.training\.by_task\.tweets\.lora\.alpha': Field required",
    ):
        specs(load_benchmark("glue_lora"), edited_part("glue_lora", "mini", edits))
