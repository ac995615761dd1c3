"""From a benchmark's grid to runs: fully resolved, named by what they are."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.files import read_json
from benchmarks.harness.config.definition import AnyBenchmark, benchmark_names, load_benchmark
from benchmarks.harness.config.kinds import kind_of
from emoe.errors import EMoEError, did_you_mean

_SLUG_LENGTH = 80


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
    kind = kind_of(spec["benchmark"])
    digest = hashlib.sha256(canonical_json(spec).encode()).hexdigest()[:8]
    parts = [spec["model"]["name"], spec["task"]["name"], spec["method"]["name"], kind.variant(spec), *kind.marks(spec)]
    if spec["learning_rate"]:  # else nothing was trained
        parts.append(f"lr{spec['learning_rate']:g}")
    if kind.has_seeds:
        parts.append(f"s{spec['seed']}")
    return Run(f"{slug('-'.join(part for part in parts if part))}-{digest}", dict(spec))


def slug(text: str) -> str:
    """The readable part of an id, of all of its parts or of the first."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", text)[: _SLUG_LENGTH - 9]


def read_run(path: Path, *, anywhere: bool = False) -> Run:
    """Read a ``run.json``.

    Args:
        path: The path of the file.
        anywhere: True to accept a folder that is not named after the content, such as a copy.

    Raises:
        DefinitionError: The file is missing, or its content is not the spec that its folder is named after.
        DataError: The file is not JSON.
    """
    if not path.exists():
        raise DefinitionError(
            f"{path} does not exist; the workflow writes it when it runs `{path.parent}/metrics.json`"
        )
    spec = read_json(path, dict[str, Any])
    name = spec.get("benchmark")
    if name not in benchmark_names():
        raise DefinitionError(f"{path} names the benchmark {name!r}{did_you_mean(name, benchmark_names())}")
    try:
        run = run_from_spec(spec)
    except EMoEError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DefinitionError(f"{path} is no run specification: {error!r}") from error
    if path.parent.name != run.id and not anywhere:
        raise DefinitionError(f"{path} was changed by hand: its content belongs into a folder named {run.id}")
    return run


def plan(benchmark_names: list[str], suite: str, exclude: Collection[str] = ()) -> list[Run]:
    """Every run of a suite, each once, in grid order.

    Args:
        benchmark_names: whose runs.
        suite: the suite.
        exclude: OOD sets, image sets and sets of instructions to leave out.

    Raises:
        DefinitionError: a name in a grid that does not exist, or a method that cannot be built.
    """
    planned: dict[str, list[Run]] = {}

    def runs_of(name: str) -> list[Run]:
        if name not in planned:  # a benchmark that evaluates another needs its runs too
            planned[name] = list(_runs(load_benchmark(name)))
        return planned[name]

    def specs_of(name: str) -> dict[str, Mapping[str, Any]]:
        return {run.folder: run.spec for run in runs_of(name)}

    def _runs(benchmark: AnyBenchmark) -> Iterator[Run]:
        suites = benchmark.definition.suites
        if suite not in suites:
            raise DefinitionError(f"{benchmark.file}: 'suites' has no suite '{suite}'{did_you_mean(suite, suites)}")
        kind = benchmark.kind  # looked up once, not for each of thousands of runs
        for spec in kind.specs(benchmark, suite, exclude, specs_of):
            yield replace(run_from_spec(spec), resources=kind.resources(suites[suite].resources, spec))

    return list({run.id: run for name in benchmark_names for run in runs_of(name)}.values())
