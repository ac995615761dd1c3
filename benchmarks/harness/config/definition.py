"""Read a benchmark's folder: its file and its tasks, checked against each other."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import BENCHMARKS
from benchmarks.harness.config.kinds import Benchmark, find_kind, kind_name, usual_kind
from benchmarks.harness.config.method_rows import check_rows, load_methods, resolve_methods
from benchmarks.harness.config.schema import check_file, read_yaml
from benchmarks.harness.config.shared import ABLATION, Definition, Entry, MethodsDefinition
from emoe.errors import did_you_mean

# as it is loaded by name, whatever its kind
AnyBenchmark = Benchmark[Any, Any]


def benchmark_names() -> list[str]:
    """Names of all benchmarks: the folders with a ``benchmark.yaml``."""
    return sorted(path.parent.name for path in BENCHMARKS.glob("*/benchmark.yaml"))


@functools.cache
def load_benchmark(name: str) -> AnyBenchmark:
    """Read and check one benchmark.

    Raises:
        DefinitionError: no such benchmark, or its files are wrong.
    """
    if name not in benchmark_names():
        raise DefinitionError(f"there is no benchmark '{name}'{did_you_mean(name, benchmark_names())}")
    folder = BENCHMARKS / name
    file = folder / "benchmark.yaml"
    content = read_yaml(file)
    try:
        kind = find_kind(kind_name(name, content))
    except DefinitionError as error:
        raise DefinitionError(f"{file}: {error}") from error
    load_methods()  # first, because its plugins make names known
    definition, tasks = kind.load(content, file)
    check_references(definition, tasks, folder)
    return Benchmark(name, definition, tasks)


def check_references(definition: Definition, tasks: Mapping[str, Entry], folder: Path) -> None:
    """Check what is not to be seen in one key: that names and files exist, and that settings go together.

    Raises:
        DefinitionError: names the file, the key and the nearest valid value.
    """
    file, name = folder / "benchmark.yaml", definition.kind or usual_kind(folder.name)
    kind = find_kind(name)
    modules = [f"benchmarks.{path.parent.name}.pipeline" for path in BENCHMARKS.glob("*/pipeline.py")]
    if definition.pipeline not in modules:
        near = did_you_mean(definition.pipeline, modules)
        raise DefinitionError(f"{file}: 'pipeline' is '{definition.pipeline}', which is no module{near}")
    if isinstance(definition, MethodsDefinition):
        check_rows(definition, str(file))
        ablations = [row for row, method in resolve_methods(definition).items() if method.role == ABLATION]
        if ablations and not hasattr(definition, "ablations"):
            raise DefinitionError(
                f"{file}: 'methods.{ablations[0]}' has role: {ABLATION}, which kind: {name} does not know"
            )
        if definition.baseline not in definition.methods:
            near = did_you_mean(definition.baseline, definition.methods)
            raise DefinitionError(f"{file}: 'baseline' is '{definition.baseline}', which is no method{near}")
    if definition.paper:
        check_file(f"{file}: '", "paper", definition.paper, folder, kind.paper_columns)
    if "paper" in definition.tables and not definition.paper:
        raise DefinitionError(f"{file}: 'tables' names 'paper', so it needs 'paper': a CSV with published numbers")
    kind.check(definition, tasks, folder)
