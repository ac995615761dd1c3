"""Read YAML against a JSON Schema; every error names the file, the key and the nearest valid value."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from benchmarks.harness.classes import reading
from benchmarks.harness.paths import BENCHMARKS, SCHEMAS
from emoe.config import EMoEConfig, GMoEConfig
from emoe.errors import EMoEError, did_you_mean
from emoe.schema import config_schema


class DefinitionError(EMoEError):
    """A configuration or benchmark file that does not say what it must."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Parse one YAML file.

    Raises:
        DefinitionError: the file is missing or is not valid YAML; names the line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  (a SafeLoader)
    except FileNotFoundError as error:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise DefinitionError(f"{path} does not exist{did_you_mean(path.name, near)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DefinitionError(f"{path} is not valid YAML: {error}") from error


@functools.cache
def schema(name: str) -> dict[str, Any]:
    """The JSON Schema ``benchmarks/schemas/<name>.schema.yaml``, with the definitions that schemas share."""
    found: dict[str, Any] = read_yaml(SCHEMAS / f"{name}.schema.yaml")
    shared: dict[str, Any] = read_yaml(SCHEMAS / "shared.schema.yaml")["$defs"]
    method = shared["method"]["properties"]
    fields = config_schema(GMoEConfig) | config_schema(EMoEConfig)
    # what the file says of a field of a configuration goes before what the configuration says
    shared["method"]["properties"] = {name: fields[name] for name in fields if name != "version"} | method
    found["$defs"] = shared | found.get("$defs", {})
    Draft202012Validator.check_schema(found)
    return found


def read_checked(path: Path, schema_name: str) -> dict[str, Any]:
    """Read a YAML file, check it against a schema and fill the schema's defaults.

    Raises:
        DefinitionError: names the file, the key and the nearest valid value.
    """
    return check(read_yaml(path), schema_name, str(path))


def check(content: Any, schema_name: str, where: str) -> dict[str, Any]:
    """Check ``content`` against a schema and return it with the defaults filled in."""
    validator = Draft202012Validator(schema(schema_name))
    errors = sorted(validator.iter_errors(content), key=lambda error: (len(error.absolute_path), str(error.path)))
    if errors:
        raise DefinitionError(f"{where}: " + "; ".join(dict.fromkeys(_explain(error) for error in errors[:5])))
    filled = _with_defaults(content, schema(schema_name), schema(schema_name))
    assert isinstance(filled, dict)  # noqa: S101  every schema here describes an object
    return filled


def _explain(error: ValidationError) -> str:
    rule: Any = error.validator_value
    instance: Any = error.instance
    key = _dotted(list(error.absolute_path)) or "the file"
    if error.validator == "additionalProperties" and isinstance(instance, Mapping):
        known = list(cast(Mapping[str, Any], error.schema).get("properties", {}))
        unknown = [name for name in instance if name not in known]
        at = f"{key}." if error.absolute_path else ""
        return "; ".join(f"unknown key '{at}{name}'{did_you_mean(name, known)}" for name in unknown)
    if error.validator == "enum":
        return f"'{key}' is {instance!r}{did_you_mean(instance, rule)}"
    if error.validator == "required":
        missing = [name for name in rule if name not in instance]
        return f"'{key}' needs the key '{missing[0]}'"
    if error.validator == "propertyNames":
        return f"'{key}': {error.message}"
    if error.validator == "type":
        return f"'{key}' is {instance!r}, but must be {_a(rule)}{_float_hint(instance)}"
    if error.validator in ("anyOf", "oneOf") and error.context:
        deepest = max(error.context, key=lambda inner: len(inner.absolute_path))
        if len(deepest.absolute_path) > len(error.absolute_path):
            return _explain(deepest)
        wanted = " or ".join(
            str(inner.validator_value) for inner in error.context if inner.validator in ("type", "enum")
        )
        return f"'{key}' is {instance!r}, but must be {wanted}{_float_hint(instance)}"
    return f"'{key}': {error.message}"


def _a(kinds: Any) -> str:
    return " or ".join(kinds) if isinstance(kinds, list) else str(kinds)


def _float_hint(value: object) -> str:
    """YAML 1.1 reads ``2e-5`` as text: say how to write it."""
    try:
        return f" (YAML reads {value} as text; write {float(value):.1e})" if isinstance(value, str) else ""
    except ValueError:
        return ""


def _dotted(path: list[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _with_defaults(content: Any, part: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    if "$ref" in part:
        part = root["$defs"][part["$ref"].removeprefix("#/$defs/")]
    if isinstance(content, dict) and "properties" not in part:
        # null or an object: the object's defaults
        for below in part.get("anyOf", ()):
            if "$ref" in below or "properties" in below:
                return _with_defaults(content, below, root)
    if isinstance(content, dict):
        filled = {}
        properties = part.get("properties", {})
        other = part.get("additionalProperties")
        for name, value in content.items():
            below = properties.get(name, other if isinstance(other, dict) else {})
            filled[name] = _with_defaults(value, below, root)
        for name, below in properties.items():
            if name not in filled and "default" in below:
                filled[name] = _with_defaults(copy.deepcopy(below["default"]), below, root)
        return filled
    if isinstance(content, list) and isinstance(part.get("items"), dict):
        return [_with_defaults(item, part["items"], root) for item in content]
    return content


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
    definition = check(content, _SCHEMAS[kind], str(folder / "benchmark.yaml"))
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


def check_names(where: str, key: str, names: Iterable[str], known: Collection[str]) -> None:
    """Check the names that a file gives under a key.

    Args:
        where: the file, a quotation mark, and what stands before the key.
        key: the key.
        names: what it names.
        known: what exists.

    Raises:
        DefinitionError: names the nearest that exists.
    """
    for name in names:
        if name not in known:
            at = f"{where}.{key}" if not where.endswith("'") else f"{where}{key}"
            raise DefinitionError(f"{at}' is '{name}', which does not exist{did_you_mean(name, known)}")


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


@functools.cache
def load_models() -> dict[str, Any]:
    """The models that benchmarks may name: ``benchmarks/models.yaml``."""
    models: dict[str, Any] = read_checked(BENCHMARKS / "models.yaml", "models")["models"]
    return models


@functools.cache
def load_metrics() -> dict[str, dict[str, Any]]:
    """Label, unit, direction, decimals and tolerances of every metric: ``benchmarks/metrics.yaml``."""
    metrics: dict[str, dict[str, Any]] = read_checked(BENCHMARKS / "metrics.yaml", "metrics")["metrics"]
    return metrics
