"""From a benchmark's grid to runs: fully resolved, named by what they are."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.harness.definition import (
    Benchmark,
    DefinitionError,
    check,
    check_names,
    load_benchmark,
    load_models,
)
from benchmarks.harness.evaluations import evaluation_specs
from benchmarks.harness.measurements import measurement_specs
from emoe.config import EMoEConfig, GMoEConfig
from emoe.errors import ConfigError, did_you_mean

_SLUG_LENGTH = 80
_VARIANT_KEYS = ("num_experts", "top_k_fraction", "layers")
_OTHER_AXES = ("protocol", "learning_rate", "seed")
_NOT_CONFIG = ("title", "role", "kind", "noise", "top_k_fraction", "as_published", "tune", "also_train")
PUBLISHED, CLEAN = "published", "clean"


@dataclass(frozen=True)
class Run:
    """One fully resolved run.

    Attributes:
        id: readable slug and eight hex digits of the hash of ``spec``.
        spec: everything that shapes the numbers, plain values only. The suite is not part of it, so
            that suites share runs.
        resources: what the scheduler reserves; shapes no number and is not part of the id.
    """

    id: str
    spec: dict[str, Any]
    resources: dict[str, int] = field(default_factory=dict)

    @property
    def benchmark(self) -> str:
        return str(self.spec["benchmark"])

    @property
    def folder(self) -> str:
        """Folder below ``results/runs``."""
        return f"{self.benchmark}/{self.id}"

    def to_json(self) -> str:
        """Canonical JSON: what is hashed, written and compared."""
        return canonical_json(self.spec)


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def run_from_spec(spec: Mapping[str, Any]) -> Run:
    """Name a spec."""
    digest = hashlib.sha256(canonical_json(spec).encode()).hexdigest()[:8]
    parts = [spec["model"]["name"], spec["task"]["name"], spec["method"]["name"], spec["method"]["variant"]]
    if spec.get("protocol") == CLEAN and spec["task"]["splits"]["test"] is None:
        parts.append(CLEAN)
    if spec["learning_rate"]:  # else nothing was trained
        parts.append(f"lr{spec['learning_rate']:g}")
    if "protocol" in spec:  # else it is a measurement
        parts.append(f"s{spec['seed']}")
    slug = re.sub(r"[^A-Za-z0-9._+-]", "_", "-".join(part for part in parts if part))
    return Run(f"{slug[: _SLUG_LENGTH - 9]}-{digest}", dict(spec))


def plan(benchmark_names: list[str], suite: str, without: Collection[str] = ()) -> list[Run]:
    """Every run of a suite, each once, in grid order.

    Args:
        benchmark_names: whose runs.
        suite: the suite.
        without: OOD sets to leave out.

    Raises:
        DefinitionError: a name in a grid that does not exist, or a method that cannot be built.
    """
    planned: dict[str, list[Run]] = {}

    def runs_of(name: str) -> list[Run]:
        if name not in planned:  # a benchmark that evaluates another needs its runs too
            planned[name] = list(_benchmark_runs(load_benchmark(name), suite, without, runs_of))
        return planned[name]

    return list({run.id: run for name in benchmark_names for run in runs_of(name)}.values())


def _benchmark_runs(
    benchmark: Benchmark, suite: str, without: Collection[str], runs_of: Callable[[str], list[Run]]
) -> Iterator[Run]:
    suites = benchmark.definition["suites"]
    if suite not in suites:
        raise DefinitionError(f"{benchmark.file}: 'suites' has no suite '{suite}'{did_you_mean(suite, suites)}")
    part = suites[suite]
    if benchmark.kind == "training":
        yield from _training_runs(benchmark, suite, without)
        return
    if benchmark.kind == "measurement":
        specs = measurement_specs(benchmark, suite)
    else:
        others = {run.folder: run.spec for run in runs_of(benchmark.definition["evaluates"])}
        specs = evaluation_specs(benchmark, suite, others, without)
    for spec in specs:
        yield replace(run_from_spec(spec), resources=part["resources"])


def _training_runs(benchmark: Benchmark, suite: str, without: Collection[str]) -> Iterator[Run]:
    part = benchmark.definition["suites"][suite]
    methods = _suite_methods(benchmark, suite)
    trainable = [name for name, task in benchmark.tasks.items() if task["splits"]["train"] and task["splits"]["dev"]]
    for number, block in enumerate(part["grid"]):
        where = f"{benchmark.file}: 'suites.{suite}.grid[{number}]"
        check_names(where, "model", block["model"], load_models())
        check_names(where, "task", block["task"], trainable)
        check_names(where, "method", block["method"], methods)
        axes = [key for key in ("model", "task", "method", *_VARIANT_KEYS, *_OTHER_AXES) if key in block]
        for values in itertools.product(*(block[key] for key in axes)):
            point = dict(zip(axes, values, strict=True))
            yield replace(_resolve(benchmark, suite, methods, point, where, without), resources=part["resources"])


def _suite_methods(benchmark: Benchmark, suite: str) -> dict[str, dict[str, Any]]:
    """The benchmark's methods with the suite's own settings on top."""
    methods: dict[str, dict[str, Any]] = benchmark.definition["methods"]
    changes = benchmark.definition["suites"][suite].get("methods", {})
    where = f"{benchmark.file}: 'suites.{suite}"
    check_names(where, "methods", list(changes), methods)
    merged = {name: {**method, **changes.get(name, {})} for name, method in methods.items()}
    # checked again as a whole, because a suite's settings are written outside `methods`
    checked = check({**benchmark.definition, "methods": merged}, "benchmark", f"{where}.methods'")
    return dict(checked["methods"])


def _resolve(
    benchmark: Benchmark,
    suite: str,
    methods: Mapping[str, dict[str, Any]],
    point: Mapping[str, Any],
    where: str,
    without: Collection[str],
) -> Run:
    base = methods[point["method"]]
    # a dense model has no experts to vary: it is one run for all variants, but for the blocks that it trains
    varying = _VARIANT_KEYS if base["kind"] != "dense" else ("layers",) if "tune" in base else ()
    varied = {key: point[key] for key in varying if key in point}
    method = {**base, **varied}
    named = f"{where}': method '{point['method']}'"
    if "top_k_fraction" in method and "top_k" in method:
        raise DefinitionError(f"{named} sets both top_k and top_k_fraction; keep one")
    task = benchmark.tasks[point["task"]]
    protocol = _protocol(task, point, where)
    training = _training(benchmark, suite, point)
    if protocol == PUBLISHED or task["splits"]["test"] is not None:
        training["held_out"] = 0.0
    ood = [name for name in task["ood"] if name not in without] if training.pop("evaluate_ood") else []
    spec = {
        "benchmark": benchmark.name,
        "version": benchmark.definition["version"],
        "pipeline": benchmark.definition["pipeline"],
        "protocol": protocol,
        "model": _without_title(point["model"], load_models()[point["model"]]),
        "task": benchmark.task_spec(point["task"]),
        "ood": [benchmark.task_spec(name) for name in ood],
        "method": {
            "name": point["method"],
            "variant": _variant(varied),
            "noise": float(method["noise"]),
            "config": _method_config(method, point["seed"], named),
            "tune": _tuned(method, training["lora"], named),
        },
        "training": training,
        "learning_rate": float(point["learning_rate"]),
        "seed": point["seed"],
    }
    return run_from_spec(spec)


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
    """The training settings of one run: the benchmark's, the suite's, those of its model and of its task."""
    found = {**benchmark.definition["training"], **benchmark.definition["suites"][suite].get("training", {})}
    by_task, by_model = found.pop("epochs_by_task", {}), found.pop("by_model", {})
    where = f"{benchmark.file}: 'suites.{suite}.training"
    check_names(where, "by_model", by_model, load_models())
    check_names(where, "epochs_by_task", by_task, benchmark.tasks)
    found |= by_model.get(point["model"], {})
    found["epochs"] = by_task.get(point["task"], found["epochs"])
    return copy.deepcopy(found)


def _tuned(method: Mapping[str, Any], lora: Mapping[str, Any] | None, where: str) -> dict[str, Any] | None:
    """What is trained beside adapters and head; None where everything is trained."""
    asked = [key for key in ("tune", "also_train") if key in method]
    if lora is None:
        if asked:
            raise DefinitionError(f"{where} sets '{asked[0]}', which needs training.lora")
        return None
    if "tune" in method and "layers" not in method:
        raise DefinitionError(f"{where} sets 'tune' but no 'layers', which name the blocks")
    return {"blocks": method["layers"] if "tune" in method else [], "also": method.get("also_train", [])}


def _without_title(name: str, definition: Mapping[str, Any]) -> dict[str, Any]:
    """A definition by name; titles are for readers and do not shape numbers."""
    return {"name": name, **{key: value for key, value in definition.items() if key != "title"}}


def _variant(varied: Mapping[str, Any]) -> str:
    short = {"num_experts": "N", "top_k_fraction": "k", "layers": "L"}
    values = {
        key: "+".join(map(str, v)) if isinstance(v, list) else f"{v:g}" if isinstance(v, float) else str(v)
        for key, v in varied.items()
    }
    return "-".join(f"{short[key]}{value}" for key, value in values.items())


def _method_config(method: Mapping[str, Any], seed: int, where: str) -> dict[str, Any] | None:
    """The full configuration of an EMoE or GMoE with all its defaults, or None for a dense model."""
    if method["kind"] == "dense":
        known = {*_NOT_CONFIG, *(("layers",) if "tune" in method else ())} - {"as_published"}
        extra = sorted(set(method) - known)
        if extra:
            raise DefinitionError(f"{where} is dense and takes no '{extra[0]}'")
        return None
    values = {key: value for key, value in method.items() if key not in _NOT_CONFIG}
    if "top_k_fraction" in method:
        share = method["top_k_fraction"] * values.get("num_experts", 1)
        if share != int(share) or share < 1:
            raise DefinitionError(
                f"{where}: top_k_fraction {method['top_k_fraction']} of {values.get('num_experts')} experts is {share:g}, not a whole number"
            )
        values["top_k"] = int(share)
    if values.get("partition_seed") == "run":
        values["partition_seed"] = seed
    config: type[EMoEConfig] | type[GMoEConfig] = EMoEConfig if method["kind"] == "emoe" else GMoEConfig
    try:
        if "as_published" in method:
            return config.as_published(method["as_published"], **values).to_dict()
        return config(**values).to_dict()
    except ConfigError as error:
        raise DefinitionError(f"{where}: {error}") from error
