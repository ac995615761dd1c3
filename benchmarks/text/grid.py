"""Runs of text classification: one for each model, task, method, learning rate, protocol and seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.base.errors import DataError, DefinitionError, first_line
from benchmarks.harness.planning.catalogue import load_metrics, load_models
from benchmarks.harness.planning.kinds import Benchmark, Kind, SetPart
from benchmarks.harness.planning.methods import (
    VARIANT_KEYS,
    method_spec,
    suite_methods,
    training_settings,
    without_title,
)
from benchmarks.harness.planning.schema import check_names, read_checked
from benchmarks.harness.sources.local import local_folder, wanted_place
from benchmarks.harness.sources.packages import PackageFile, packaged
from benchmarks.harness.training.label_mapping import reading
from emoe.errors import EMoEError

PUBLISHED, CLEAN = "published", "clean"
# what the usual presentation makes
TABLES = ("results", "tasks", "tests", "ood", "cost", "choices", "paper")
FIGURES = ("ood",)
_OTHER_AXES = ("protocol", "learning_rate", "seed")
# of a task: for readers, or for what stands around a run
_NOT_IN_SPEC = ("title", "ood", "rows", "published_rows", "obtain")


class TextSets(Kind):
    """What all benchmarks on text sets share: which sets they read, and from where."""

    def marks(self, spec: Mapping[str, Any]) -> list[str]:
        return [CLEAN] if spec["protocol"] == CLEAN and spec["task"]["splits"]["test"] is None else []

    def package_files(self, task: Mapping[str, Any]) -> list[PackageFile]:
        return [packaged("vaderSentiment")] if "rated" in task.get("source", {}) else []

    def parts_read(self, spec: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[tuple[str, str]]:
        from benchmarks.text.datasets import part_read

        trained = ("train", "dev", "test") if "training" in spec else ()
        named = [(spec["task"]["name"], part) for part in trained] + [(other["name"], "test") for other in spec["ood"]]
        return [(name, part_read(tasks[name], part)) for name, part in named]

    def describe(
        self, spec: Mapping[str, Any], name: str, part: str, tasks: Mapping[str, Any], *, open_files: bool
    ) -> Iterator[SetPart]:
        from benchmarks.text.datasets import known_rows, label_counts, load_split

        task = {"name": name, **tasks[name]}
        expected, published = known_rows(task, part)
        try:
            found = load_split(task, part)
        except DataError as error:
            yield SetPart(name, part, None, expected=expected, advice=_advice(name, task, first_line(error)))
            return
        labels = label_counts(found, task["labels"])
        yield SetPart(name, part, len(found), found.dropped, expected, labels, found.source, published=published)


class TextKind(TextSets):
    """Classifiers of texts, fine-tuned on one task and judged on it and on other sets."""

    schema = "benchmark"
    presentation = "benchmarks.text.presentation"
    optimizer = "AdamW, linear decay, no clipping"

    def load(self, definition: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        return definition, read_checked(folder / definition["tasks"], "tasks")["tasks"]

    def check(self, definition: Mapping[str, Any], tasks: Mapping[str, Any], folder: Path) -> None:
        file = folder / "benchmark.yaml"
        if not (folder / "presentation.py").exists():
            check_names(f"{file}: '", "tables", definition["tables"], TABLES)
            check_names(f"{file}: '", "figures", definition["figures"], FIGURES)
        for suite, part in definition["suites"].items():
            training = {**definition["training"], **part.get("training", {})}
            if training["patience"] is not None and training["keep"] != "best":
                raise DefinitionError(
                    f"{file}: 'suites.{suite}.training.patience' needs keep: best; set patience: null"
                )
        for name, task in tasks.items():
            _check_task(f"{folder / definition['tasks']}: 'tasks.{name}", task, tasks)

    def specs(
        self,
        benchmark: Benchmark,
        suite: str,
        exclude: Collection[str],
        specs_of: Callable[[str], Mapping[str, Mapping[str, Any]]],
    ) -> Iterator[dict[str, Any]]:
        methods = suite_methods(benchmark, suite)
        trainable = [
            name for name, task in benchmark.tasks.items() if task["splits"]["train"] and task["splits"]["dev"]
        ]
        for number, block in enumerate(benchmark.definition["suites"][suite]["grid"]):
            where = f"{benchmark.file}: 'suites.{suite}.grid[{number}]"
            text_models = [name for name, model in load_models().items() if "modality" not in model]
            check_names(where, "model", block["model"], text_models)
            check_names(where, "task", block["task"], trainable)
            check_names(where, "method", block["method"], methods)
            axes = [key for key in ("model", "task", "method", *VARIANT_KEYS, *_OTHER_AXES) if key in block]
            for values in itertools.product(*(block[key] for key in axes)):
                yield _spec(benchmark, suite, methods, dict(zip(axes, values, strict=True)), where, exclude)


KIND = TextKind()


def task_spec(benchmark: Benchmark, name: str) -> dict[str, Any]:
    """What of a task shapes a run's numbers, with its name."""
    task = benchmark.tasks[name]
    found = {"name": name, **{key: value for key, value in task.items() if key not in _NOT_IN_SPEC}}
    return {**found, "ood_metrics": task.get("ood_metrics", [task["metric"]])}


def _check_task(where: str, task: Mapping[str, Any], tasks: Mapping[str, Any]) -> None:
    metrics = [task["metric"], *task.get("ood_metrics", ())]
    check_names(where, "metric" if task["metric"] not in load_metrics() else "ood_metrics", metrics, load_metrics())
    check_names(where, "ood", task["ood"], tasks)
    for name in task["ood"]:
        try:
            reading(task, tasks[name], name)
        except EMoEError as error:
            raise DefinitionError(f"{where}.ood': {error}") from error
    check_names(where, "label_names", task["label_names"].values(), task["labels"])
    low, high = task.get("range", (0, 1))
    if low >= high or ("range" in task and task["labels"]):
        raise DefinitionError(
            f"{where}.range' is [{low}, {high}], but must be lowest and highest score of a regression"
        )
    if not {"hub", "rated"} & set(task["source"]) and "obtain" not in task:
        raise DefinitionError(
            f"{where}' is neither on the hub nor in a package, so it needs 'obtain': from whom, which file"
        )
    for number, layout in enumerate(task.get("own", ())):
        wanted = [*task["fields"], *([] if layout["format"] == "folders" else [task["label"]])]
        if missing := [column for column in wanted if column not in layout["columns"]]:
            raise DefinitionError(f"{where}.own[{number}].columns' lacks '{missing[0]}'")
        check_names(where, f"own[{number}].label_names", layout["label_names"].values(), task["labels"])
        named = {split for part in task["splits"].values() if part for split in part.split("+")}
        check_names(where, f"own[{number}].files", layout["files"], named)


def _spec(
    benchmark: Benchmark,
    suite: str,
    methods: Mapping[str, dict[str, Any]],
    point: Mapping[str, Any],
    where: str,
    exclude: Collection[str],
) -> dict[str, Any]:
    task = benchmark.tasks[point["task"]]
    protocol = _protocol(task, point, where)
    training = _training(benchmark, suite, point)
    if protocol == PUBLISHED or task["splits"]["test"] is not None:
        training["held_out"] = 0.0
    ood = [name for name in task["ood"] if name not in exclude] if training.pop("evaluate_ood") else []
    return {
        "benchmark": benchmark.name,
        "version": benchmark.definition["version"],
        "pipeline": benchmark.definition["pipeline"],
        "protocol": protocol,
        "model": without_title(point["model"], load_models()[point["model"]]),
        "task": task_spec(benchmark, point["task"]),
        "ood": [task_spec(benchmark, name) for name in ood],
        "method": method_spec(methods, point, point["seed"], training["lora"], where),
        "training": training,
        "learning_rate": float(point["learning_rate"]),
        "seed": point["seed"],
    }


def _protocol(task: Mapping[str, Any], point: Mapping[str, Any], where: str) -> str:
    """What chooses epoch and hyper-parameters: a split that is also reported (the authors'), or one that is not."""
    usual = PUBLISHED if task["splits"]["test"] is None else CLEAN
    asked = point.get("protocol", usual)
    if asked == PUBLISHED != usual:
        raise DefinitionError(
            f"{where}.protocol': '{PUBLISHED}' is for tasks without a test split; a clean run of '{point['task']}' has its "
            "number too, as the score of the best dev epoch"
        )
    return str(asked)


def _training(benchmark: Benchmark, suite: str, point: Mapping[str, Any]) -> dict[str, Any]:
    """The training settings of one run, those of its task included."""
    found = training_settings(benchmark, suite, point["model"])
    by_task = found.pop("epochs_by_task", {})
    check_names(f"{benchmark.file}: 'suites.{suite}.training", "epochs_by_task", by_task, benchmark.tasks)
    found["epochs"] = by_task.get(point["task"], found["epochs"])
    return found


def _advice(name: str, task: Mapping[str, Any], problem: str) -> str:
    """What is wrong with a set and what to do."""
    source = task["source"]
    if "rated" in source or local_folder(task) is not None:
        return f"{name}: {problem}"
    files = dict.fromkeys(file for layout in task.get("own", ()) for file in layout["files"].values())
    columns = ", ".join([*task["fields"], task["label"]])
    folder = f"{wanted_place(source)} ({', '.join(files) or 'its files'}; hub columns {columns})"
    if "obtain" in task:
        return f"{name}: by hand. {task['obtain'].strip()}.\n    Folder: {folder}. Without it: `without: [{name}]`"
    return f"{name}: on the hub as {source['hub']} ({source['config']}); `python -m benchmarks data` or the first run downloads it.\n    Or put it into {folder}"
