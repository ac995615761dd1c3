"""Planned runs of suites, and benchmarks and suites with changes.

Tests must not change the planned runs.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import base
from benchmarks.harness.base import CONFIG, read_yaml
from benchmarks.harness.config import suite as suites
from benchmarks.harness.config.benchmark import (
    KINDS,
    AnyBenchmark,
    Part,
    load_benchmark,
    parse_part,
)
from benchmarks.harness.config.runs import Run, run_from_spec
from benchmarks.harness.config.suite import plain_suite, suite_parts
from benchmarks.harness.sources import packages

Edits = Mapping[str, Any]  # values by the dotted path of their keys


def plan(benchmarks: Sequence[str], suite: str, exclude: Sequence[str] = ()) -> list[Run]:
    """Return the runs of these benchmarks in a suite, without the sets to exclude."""
    if exclude:
        loaded = suites.load_suite({"suite": suite, "exclude": [*exclude]})
    else:
        loaded = plain_suite(suite)  # which is cached
    return [run for run in loaded.runs if run.benchmark in benchmarks]


def paper_runs(*benchmarks: str) -> list[Run]:
    """Return the runs of these benchmarks in the paper's suite."""
    return plan(benchmarks, "paper")


def paper_spec(benchmark: str, **names: str) -> dict[str, Any]:
    """Return the first spec of the paper's suite with these names, such as ``task="rte"``."""
    for run in paper_runs(benchmark):
        names_of_run = {key: run.spec[key]["name"] for key in names}
        if names_of_run == names:
            return run.spec
    raise LookupError(f"the paper's suite has no run of {benchmark} with {names}")


def plan_once(patch: pytest.MonkeyPatch) -> None:
    """Plan each suite once, for tests that change no definition."""
    plan_runs = suites.plan_runs
    known: dict[str, list[Run]] = {}

    def plan_runs_once(parts: Mapping[str, Part[Any]], exclude: Sequence[str]) -> list[Run]:
        suites_of_parts = {name: part.suite for name, part in parts.items()}
        key = repr((suites_of_parts, list(exclude)))
        if key not in known:
            known[key] = plan_runs(parts, exclude)
        return known[key]

    patch.setattr(suites, "plan_runs", plan_runs_once)


def edit(content: Any, edits: Edits) -> Any:
    """Copy the content of a YAML file with other values; a number in a path is a list index."""
    edited = copy.deepcopy(content)
    for path, value in edits.items():
        *parents, last = path.split(".")
        inner = edited
        for key in parents:
            if isinstance(inner, list):
                inner = inner[int(key)]
                continue
            # some paths lead to a new section
            inner = inner.setdefault(key, {})
        if isinstance(inner, list):
            inner[int(last)] = value
        else:
            inner[last] = value
    return edited


def edited_benchmark(name: str, edits: Edits) -> AnyBenchmark:
    """Load a benchmark with other values in its benchmark.yaml."""
    file = load_benchmark(name).file
    content = edit(read_yaml(file), edits)
    return KINDS[content["kind"]].load(name, content, file)


def edited_part(benchmark: str | AnyBenchmark, suite: str, edits: Edits) -> Part[Any]:
    """Read a benchmark's part of a suite with other values."""
    if isinstance(benchmark, str):
        benchmark = load_benchmark(benchmark)
    file = CONFIG / f"{suite}.yaml"
    content = read_yaml(file)["benchmarks"][benchmark.name]
    return parse_part(benchmark, suite, file, edit(content, edits))


def specs(
    benchmark: AnyBenchmark, part: str | Part[Any], others: Sequence[Run] = ()
) -> list[dict[str, Any]]:
    """Return the specs of a benchmark's part of a suite.

    Args:
        benchmark: The benchmark.
        part: The part, or the name of the suite.
        others: The runs of the benchmark that this one evaluates.
    """
    if isinstance(part, str):
        part = suite_parts(benchmark.name)[part]
    return list(benchmark.specs(part, (), others))


def changed(
    benchmark: str | AnyBenchmark, tasks: Mapping[str, Any] | None = None, **definition: Any
) -> AnyBenchmark:
    """Copy a benchmark with other values in its definition, and perhaps with other tasks."""
    if isinstance(benchmark, str):
        benchmark = load_benchmark(benchmark)
    copied = copy.copy(benchmark)
    copied.definition = benchmark.definition.model_copy(update=definition)
    if tasks is not None:
        copied.tasks = tasks
    return copied


def smoke_run(benchmark: str, method: str, section: str = "training", **changes: Any) -> Run:
    """Return the first run of a method in the smoke suite, with changes to a section."""
    for run in plan([benchmark], "smoke"):
        if run.spec["method"]["name"] == method:
            changed_section = {**run.spec[section], **changes}
            return run_from_spec({**run.spec, section: changed_section})
    raise LookupError(f"the smoke suite has no run of {method} in {benchmark}")


def evaluations(runs: list[Run], suite: str = "smoke", **changes: Any) -> list[Run]:
    """Return glue_ood's evaluations of these runs in a suite, with another definition."""
    benchmark = changed("glue_ood", **changes)
    evaluating = []
    for spec in specs(benchmark, suite, runs):
        evaluating.append(run_from_spec({**spec, "files": {}}))
    return evaluating


@contextmanager
def edited_project(folder: Path, file: str, old: str, new: str) -> Iterator[None]:
    """Plan from a copy of the project with an edited file."""
    without_code = shutil.ignore_patterns("*.py", "__pycache__")
    for name in ("config", "benchmarks"):
        shutil.copytree(base.ROOT / name, folder / name, ignore=without_code)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    files = packages.read_packages(folder / "benchmarks/harness/sources/packages.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "CONFIG", folder / "config")
        for module in ("harness.config.benchmark", "llama.grid"):
            patch.setattr(f"benchmarks.{module}.BENCHMARKS", folder / "benchmarks")
        patch.setattr(packages, "package_files", lambda: files)
        load_benchmark.cache_clear()
        yield
    load_benchmark.cache_clear()
