"""Planned runs of suites, and benchmarks and suites with changes. Tests must not change the planned ones."""

from __future__ import annotations

import copy
import functools
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
    loaded = (
        suites.load_suite({"suite": suite, "exclude": [*exclude]})
        if exclude
        else plain_suite(suite)
    )
    return [run for run in loaded.runs if run.benchmark in benchmarks]


def paper_runs(*benchmarks: str) -> list[Run]:
    """Return the runs of these benchmarks in the paper's suite."""
    return plan(benchmarks, "paper")


def paper_spec(benchmark: str, **names: str) -> dict[str, Any]:
    """Return the first spec of the paper's suite with these names, such as ``task="rte"``."""
    runs = paper_runs(benchmark)
    return next(
        run.spec
        for run in runs
        if all(run.spec[key]["name"] == name for key, name in names.items())
    )


def plan_once(patch: pytest.MonkeyPatch) -> None:
    """Plan each suite once, for tests that change no definition."""
    plan = suites.plan_runs
    known: dict[str, list[Run]] = {}

    def cached(parts: Mapping[str, Part[Any]], exclude: Sequence[str]) -> list[Run]:
        key = repr([*((part.suite, name) for name, part in parts.items()), *exclude])
        if key not in known:
            known[key] = plan(parts, exclude)
        return known[key]

    patch.setattr(suites, "plan_runs", functools.wraps(plan)(cached))


def edit(content: Any, edits: Edits) -> Any:
    """Copy the content of a YAML file with other values; a number in a path is a list index."""
    content = copy.deepcopy(content)
    for path, value in edits.items():
        inner = content
        *parents, last = path.split(".")
        for key in parents:
            inner = inner[int(key)] if isinstance(inner, list) else inner.setdefault(key, {})
        inner[int(last) if isinstance(inner, list) else last] = value
    return content


def edited_benchmark(name: str, edits: Edits) -> AnyBenchmark:
    """Load a benchmark with other values in its benchmark.yaml."""
    file = load_benchmark(name).file
    content = edit(read_yaml(file), edits)
    return KINDS[content["kind"]].load(name, content, file)


def edited_part(benchmark: str | AnyBenchmark, suite: str, edits: Edits) -> Part[Any]:
    """Read a benchmark's part of a suite with other values."""
    benchmark = load_benchmark(benchmark) if isinstance(benchmark, str) else benchmark
    file = CONFIG / f"{suite}.yaml"
    return parse_part(
        benchmark, suite, file, edit(read_yaml(file)["benchmarks"][benchmark.name], edits)
    )


def specs(
    benchmark: AnyBenchmark, part: str | Part[Any], others: Sequence[Run] = ()
) -> list[dict[str, Any]]:
    """Return the specs of a benchmark's part of a suite, or of the suite of a name."""
    part = suite_parts(benchmark.name)[part] if isinstance(part, str) else part
    return list(benchmark.specs(part, (), others))


def changed(
    benchmark: str | AnyBenchmark, tasks: Mapping[str, Any] | None = None, **definition: Any
) -> AnyBenchmark:
    """Copy a benchmark with other values in its definition, and perhaps with other tasks."""
    benchmark = load_benchmark(benchmark) if isinstance(benchmark, str) else benchmark
    copied = copy.copy(benchmark)
    copied.definition = benchmark.definition.model_copy(update=definition)
    copied.tasks = benchmark.tasks if tasks is None else tasks
    return copied


def smoke_run(benchmark: str, method: str, section: str = "training", **changes: Any) -> Run:
    """Return the first run of a method in the smoke suite, with other values in a section of its spec."""
    spec = next(
        run.spec for run in plan([benchmark], "smoke") if run.spec["method"]["name"] == method
    )
    return run_from_spec({**spec, section: {**spec[section], **changes}})


def evaluations(runs: list[Run], suite: str = "smoke", **changes: Any) -> list[Run]:
    """Return glue_ood's evaluations of these runs in a suite, with another definition."""
    return [
        run_from_spec(spec | {"files": {}})
        for spec in specs(changed("glue_ood", **changes), suite, runs)
    ]


@contextmanager
def edited_project(folder: Path, file: str, old: str, new: str) -> Iterator[None]:
    """Plan from a copy of the project with an edited file."""
    for name in ("config", "benchmarks"):
        shutil.copytree(
            base.ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.py", "__pycache__")
        )
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
