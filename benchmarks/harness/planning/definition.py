"""Read YAML against a JSON Schema; every error names the file, the key and the nearest valid value."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import BENCHMARKS
from benchmarks.harness.planning.catalogue import load_metrics
from benchmarks.harness.planning.method_rows import load_methods, resolve_methods
from benchmarks.harness.planning.schema import check, check_names, read_checked, read_yaml
from benchmarks.harness.training.label_mapping import reading
from emoe.errors import EMoEError, did_you_mean

# of a task: for readers, or for what stands around a run
_NOT_IN_SPEC = ("title", "ood", "rows", "published_rows", "obtain")
# by the kind of a benchmark
_SCHEMAS = {
    "training": "benchmark",
    "measurement": "measurement",
    "evaluation": "evaluation",
    "domains": "domains",
    "instruction": "instruction",
}

# modules of a benchmark's own folder, by its kind
_MODULES = {
    "training": (),
    "measurement": ("presentation",),
    "evaluation": ("presentation",),
    "domains": ("presentation", "survey"),
    "instruction": ("presentation", "instructions"),
}
# whose presentation a text benchmark without one takes, and what that makes
USUAL_PRESENTATION = "glue"
TEXT_TABLES = ("results", "tasks", "tests", "ood", "cost", "choices", "paper")
TEXT_FIGURES = ("ood",)

# of the files with the sets of a benchmark, by the kinds whose tasks are no text tasks
_SETS = {"domains": "sets", "instruction": "instructions"}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark folder: its definition, its tasks (measures of measurements, sets of images or instructions), and where it is."""

    name: str
    definition: dict[str, Any]
    tasks: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.definition["kind"])

    @property
    def has_sets(self) -> bool:
        """Whether its tasks are whole sets, which a suite may leave out, of images or instructions."""
        return self.kind in _SETS

    @property
    def schema(self) -> str:
        """The schema of its file."""
        return _SCHEMAS[self.kind]

    @property
    def folder(self) -> Path:
        return BENCHMARKS / self.name

    @property
    def file(self) -> Path:
        return self.folder / "benchmark.yaml"

    def task_spec(self, name: str) -> dict[str, Any]:
        """What of a task shapes a run's numbers, with its name."""
        task = self.tasks[name]
        found = {"name": name, **{key: value for key, value in task.items() if key not in _NOT_IN_SPEC}}
        return {**found, "ood_metrics": task.get("ood_metrics", [task["metric"]])}


def benchmark_names() -> list[str]:
    """Names of all benchmarks: the folders with a ``benchmark.yaml``."""
    return sorted(path.parent.name for path in BENCHMARKS.glob("*/benchmark.yaml"))


@functools.cache
def load_benchmark(name: str) -> Benchmark:
    """Read and check one benchmark.

    Raises:
        DefinitionError: no such benchmark, or its files are wrong.
    """
    if name not in benchmark_names():
        raise DefinitionError(f"there is no benchmark '{name}'{did_you_mean(name, benchmark_names())}")
    folder = BENCHMARKS / name
    content = read_yaml(folder / "benchmark.yaml")
    kind = _kind(content)
    if kind not in _SCHEMAS:
        raise DefinitionError(f"{folder / 'benchmark.yaml'}: 'kind' is {kind!r}{did_you_mean(kind, _SCHEMAS)}")
    methods = load_methods()  # first, because its plugins make names known
    definition = check(content, _SCHEMAS[kind], str(folder / "benchmark.yaml"))
    if "methods" in definition:
        definition = resolve_methods(definition, methods, str(folder / "benchmark.yaml"))
    if kind == "measurement":
        tasks = definition["measures"]
    elif kind == "evaluation":
        trained = [
            other
            for other in benchmark_names()
            if _kind(read_yaml(BENCHMARKS / other / "benchmark.yaml")) == "training"
        ]
        check_names(f"{folder / 'benchmark.yaml'}: '", "evaluates", [definition["evaluates"]], trained)
        other = load_benchmark(definition["evaluates"])
        tasks = other.tasks
        definition |= {key: other.definition[key] for key in ("methods", "baseline")}
    elif kind in _SETS:
        tasks = read_checked(folder / definition["sets"], _SETS[kind])["sets"]
    else:
        tasks = read_checked(folder / definition["tasks"], "tasks")["tasks"]
    check_references(definition, tasks, folder)
    return Benchmark(name, definition, tasks)


def _kind(content: Any) -> Any:
    """The kind that a benchmark's file says; training where it says none."""
    return content.get("kind", "training") if isinstance(content, dict) else "training"


def check_references(definition: Mapping[str, Any], tasks: Mapping[str, Any], folder: Path) -> None:
    """Check what a schema cannot: that names and files exist, and that settings go together.

    Raises:
        DefinitionError: names the file, the key and the nearest valid value.
    """
    file = folder / "benchmark.yaml"
    modules = [f"benchmarks.{path.parent.name}.pipeline" for path in BENCHMARKS.glob("*/pipeline.py")]
    if definition["pipeline"] not in modules:
        near = did_you_mean(definition["pipeline"], modules)
        raise DefinitionError(f"{file}: 'pipeline' is '{definition['pipeline']}', which is no module{near}")
    _check_presentation(definition, folder)
    if definition["kind"] == "measurement":
        return
    if definition["baseline"] not in definition["methods"]:
        near = did_you_mean(definition["baseline"], definition["methods"])
        raise DefinitionError(f"{file}: 'baseline' is '{definition['baseline']}', which is no method{near}")
    if definition["paper"] and not (folder / definition["paper"]).exists():
        near = did_you_mean(definition["paper"], [path.name for path in folder.glob("*.csv")])
        raise DefinitionError(f"{file}: 'paper' is '{definition['paper']}', which does not exist{near}")
    if definition["kind"] == "evaluation":
        check_names(f"{file}: '", "ranked", definition["ranked"], definition["methods"])
        return
    if definition["kind"] in _SETS:
        return
    for suite, part in definition["suites"].items():
        training = {**definition["training"], **part.get("training", {})}
        if training["patience"] is not None and training["keep"] != "best":
            raise DefinitionError(f"{file}: 'suites.{suite}.training.patience' needs keep: best; set patience: null")
    for name, task in tasks.items():
        _check_task(f"{folder / definition['tasks']}: 'tasks.{name}", task, tasks)


def _check_presentation(definition: Mapping[str, Any], folder: Path) -> None:
    """See that there is what the finished runs will be shown by; that is looked for when all of them are done."""
    there = [path.stem for path in folder.glob("*.py")]
    for name in _MODULES[definition["kind"]]:
        if name not in there:
            near = did_you_mean(name, [module for module in there if module != "__init__"])
            raise DefinitionError(f"{folder} has no module '{name}', which kind: {definition['kind']} needs{near}")
    file = f"{folder / 'benchmark.yaml'}: '"
    if "presentation" not in there:
        check_names(file, "tables", definition["tables"], TEXT_TABLES)
        check_names(file, "figures", definition["figures"], TEXT_FIGURES)
    if "paper" in definition["tables"] and not definition.get("paper"):
        raise DefinitionError(f"{file}tables' names 'paper', so it needs 'paper': a CSV with published numbers")


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
