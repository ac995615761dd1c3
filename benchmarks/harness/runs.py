"""From a benchmark's grid to runs: fully resolved, named by what they are."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
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
from benchmarks.harness.measurements import measurement_specs
from emoe.config import EMoEConfig, GMoEConfig
from emoe.errors import ConfigError, did_you_mean

_SLUG_LENGTH = 80
_VARIANT_KEYS = ("num_experts", "top_k_fraction", "layers")
_NOT_CONFIG = ("title", "role", "kind", "noise", "top_k_fraction", "as_published")


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
    if spec["learning_rate"]:  # else nothing was trained
        parts += [f"lr{spec['learning_rate']:g}", f"s{spec['seed']}"]
    slug = re.sub(r"[^A-Za-z0-9._+-]", "_", "-".join(part for part in parts if part))
    return Run(f"{slug[: _SLUG_LENGTH - 9]}-{digest}", dict(spec))


def plan(benchmark_names: list[str], suite: str) -> list[Run]:
    """Every run of a suite, each once, in grid order.

    Raises:
        DefinitionError: a name in a grid that does not exist, or a method that cannot be built.
    """
    runs = [run for name in benchmark_names for run in _benchmark_runs(load_benchmark(name), suite)]
    return list({run.id: run for run in runs}.values())


def _benchmark_runs(benchmark: Benchmark, suite: str) -> Iterator[Run]:
    suites = benchmark.definition["suites"]
    if suite not in suites:
        raise DefinitionError(f"{benchmark.file}: 'suites' has no suite '{suite}'{did_you_mean(suite, suites)}")
    part = suites[suite]
    if benchmark.kind == "measurement":
        for spec in measurement_specs(benchmark, suite):
            yield replace(run_from_spec(spec), resources=part["resources"])
        return
    methods = _suite_methods(benchmark, suite)
    for number, block in enumerate(part["grid"]):
        where = f"{benchmark.file}: 'suites.{suite}.grid[{number}]"
        check_names(where, "model", block["model"], load_models())
        check_names(where, "task", block["task"], benchmark.tasks)
        check_names(where, "method", block["method"], methods)
        axes = [key for key in ("model", "task", "method", *_VARIANT_KEYS, "learning_rate", "seed") if key in block]
        for values in itertools.product(*(block[key] for key in axes)):
            point = dict(zip(axes, values, strict=True))
            yield replace(_resolve(benchmark, suite, methods, point, where), resources=part["resources"])


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
    benchmark: Benchmark, suite: str, methods: Mapping[str, dict[str, Any]], point: Mapping[str, Any], where: str
) -> Run:
    base = methods[point["method"]]
    # a dense model has no experts to vary: it is one run for all variants
    varied = {key: point[key] for key in _VARIANT_KEYS if key in point and base["kind"] != "dense"}
    method = {**base, **varied}
    if "top_k_fraction" in method and "top_k" in method:
        raise DefinitionError(f"{where}': method '{point['method']}' sets both top_k and top_k_fraction; keep one")
    training = {**benchmark.definition["training"], **benchmark.definition["suites"][suite].get("training", {})}
    by_task = training.pop("epochs_by_task", {})
    check_names(f"{benchmark.file}: 'training", "epochs_by_task", list(by_task), benchmark.tasks)
    training["epochs"] = by_task.get(point["task"], training["epochs"])
    task = benchmark.tasks[point["task"]]
    check_names(
        f"{benchmark.folder / benchmark.definition['tasks']}: 'tasks.{point['task']}",
        "ood",
        task["ood"],
        benchmark.tasks,
    )
    spec = {
        "benchmark": benchmark.name,
        "version": benchmark.definition["version"],
        "pipeline": benchmark.definition["pipeline"],
        "model": _without_title(point["model"], load_models()[point["model"]]),
        "task": _without_title(point["task"], task),
        "ood": [_without_title(name, benchmark.tasks[name]) for name in task["ood"]],
        "method": {
            "name": point["method"],
            "variant": _variant(varied),
            "noise": float(method["noise"]),
            "config": _method_config(method, point["seed"], f"{where}': method '{point['method']}'"),
        },
        "training": training,
        "learning_rate": float(point["learning_rate"]),
        "seed": point["seed"],
    }
    return run_from_spec(spec)


def _without_title(name: str, definition: Mapping[str, Any]) -> dict[str, Any]:
    """A definition by name; titles are for readers and do not shape numbers."""
    return {"name": name, **{key: value for key, value in definition.items() if key not in ("title", "ood")}}


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
        extra = sorted(set(method) - set(_NOT_CONFIG) | ({"as_published"} & set(method)))
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
