"""From a benchmark's grid to runs: fully resolved, named by what they are."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.domainbed.grid import domain_specs, held_out_names
from benchmarks.glue_ood.grid import evaluation_specs
from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.planning.catalogue import load_models
from benchmarks.harness.planning.definition import Benchmark, load_benchmark
from benchmarks.harness.planning.methods import (
    VARIANT_KEYS,
    method_spec,
    suite_methods,
    training_settings,
    without_title,
)
from benchmarks.harness.planning.schema import check_names
from benchmarks.llama.grid import instruction_specs, run_resources
from benchmarks.speed.grid import measurement_specs
from emoe.errors import did_you_mean

_SLUG_LENGTH = 80
_OTHER_AXES = ("protocol", "learning_rate", "seed")
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
    resources: dict[str, Any] = field(default_factory=dict)

    @property
    def benchmark(self) -> str:
        return str(self.spec["benchmark"])

    @property
    def on_images(self) -> bool:
        """Whether it is a run of domain generalisation, whose data are images."""
        return "test_envs" in self.spec

    @property
    def on_instructions(self) -> bool:
        """Whether it is a run of instruction tuning."""
        return "tuning" in self.spec

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
    parts = [spec["model"]["name"], spec["task"]["name"], spec["method"]["name"], variant(spec)]
    if spec.get("protocol") == CLEAN and spec["task"]["splits"]["test"] is None:
        parts.append(CLEAN)
    if spec["learning_rate"]:  # else nothing was trained
        parts.append(f"lr{spec['learning_rate']:g}")
    if "settings" not in spec:  # a measurement has no seed
        parts.append(f"s{spec['seed']}")
    slug = re.sub(r"[^A-Za-z0-9._+-]", "_", "-".join(part for part in parts if part))
    return Run(f"{slug[: _SLUG_LENGTH - 9]}-{digest}", dict(spec))


def variant(spec: Mapping[str, Any]) -> str:
    """What of a run's method is varied, what of a language model it tunes, which environments it holds out, which hyper-parameters were drawn."""
    held_out = f"T{'+'.join(held_out_names(spec))}" if "test_envs" in spec else ""
    draw = f"h{spec['hparams_seed']}" if spec.get("hparams_seed") else ""
    return "-".join(filter(None, (spec.get("tuning", ""), spec["method"]["variant"], held_out, draw)))


def plan(benchmark_names: list[str], suite: str, without: Collection[str] = ()) -> list[Run]:
    """Every run of a suite, each once, in grid order.

    Args:
        benchmark_names: whose runs.
        suite: the suite.
        without: OOD sets, image sets and sets of instructions to leave out.

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
    elif benchmark.kind == "domains":
        specs = domain_specs(benchmark, suite, without)
    elif benchmark.kind == "instruction":
        specs = instruction_specs(benchmark, suite, without)
    else:
        others = {run.folder: run.spec for run in runs_of(benchmark.definition["evaluates"])}
        specs = evaluation_specs(benchmark, suite, others, without)
    for spec in specs:
        resources = run_resources(part["resources"], spec) if benchmark.kind == "instruction" else part["resources"]
        yield replace(run_from_spec(spec), resources=resources)


def _training_runs(benchmark: Benchmark, suite: str, without: Collection[str]) -> Iterator[Run]:
    part = benchmark.definition["suites"][suite]
    methods = suite_methods(benchmark, suite)
    trainable = [name for name, task in benchmark.tasks.items() if task["splits"]["train"] and task["splits"]["dev"]]
    for number, block in enumerate(part["grid"]):
        where = f"{benchmark.file}: 'suites.{suite}.grid[{number}]"
        text_models = [name for name, model in load_models().items() if "modality" not in model]
        check_names(where, "model", block["model"], text_models)
        check_names(where, "task", block["task"], trainable)
        check_names(where, "method", block["method"], methods)
        axes = [key for key in ("model", "task", "method", *VARIANT_KEYS, *_OTHER_AXES) if key in block]
        for values in itertools.product(*(block[key] for key in axes)):
            point = dict(zip(axes, values, strict=True))
            yield replace(_resolve(benchmark, suite, methods, point, where, without), resources=part["resources"])


def _resolve(
    benchmark: Benchmark,
    suite: str,
    methods: Mapping[str, dict[str, Any]],
    point: Mapping[str, Any],
    where: str,
    without: Collection[str],
) -> Run:
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
        "model": without_title(point["model"], load_models()[point["model"]]),
        "task": benchmark.task_spec(point["task"]),
        "ood": [benchmark.task_spec(name) for name in ood],
        "method": method_spec(methods, point, point["seed"], training["lora"], where),
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
    """The training settings of one run, those of its task included."""
    found = training_settings(benchmark, suite, point["model"])
    by_task = found.pop("epochs_by_task", {})
    check_names(f"{benchmark.file}: 'suites.{suite}.training", "epochs_by_task", by_task, benchmark.tasks)
    found["epochs"] = by_task.get(point["task"], found["epochs"])
    return found
