"""List the files that shape each output, so that Snakemake makes an output again after an edit.

A process that runs for long checks with :func:`file_times` whether such a file has changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import emoe.config
from benchmarks.harness.base import BENCHMARKS, CONFIG, distinct
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.methods import plugin_files

_LISTS = ("models.yaml", "metrics.yaml", "methods.yaml", "paper.yaml")
# the folders of the harness that shape tables
_TABLE_FOLDERS = ("harness/config", "harness/report", "harness/results", "harness/sources")
# files in these folders that shape only the claims
_CLAIM_FILES = (
    "harness/report/claims.py",
    "harness/report/claims_figure.py",
    "harness/report/claims_table.py",
    "harness/report/evidence.py",
)
# files that the patterns of `table_sources` match, but that shape no table
_FILES_OF_NO_TABLE = (
    "__main__.py",
    "harness/report/closing.py",
    "harness/report/listing.py",
    "harness/report/page.py",
    "harness/results/bless.py",
    "harness/results/check.py",
    "harness/results/mlflow.py",
    "harness/results/reference.py",
    "harness/results/shifts.py",
    "harness/results/suite_check.py",
    "harness/results/verify.py",
)


def table_sources(*benchmarks: str) -> list[str]:
    """List the files that shape the benchmarks' tables, besides the records of runs.

    These are:

    - the code of the harness, of the benchmarks' kinds, and of plugins
    - the definitions of the benchmarks, and the published numbers
    - the lists of models, methods, metrics and paper items
    - the library's configurations and routers, which the rows and colours of methods depend on

    Args:
        *benchmarks: The names of the benchmarks.
    """
    # folders with code or published numbers
    folders = {*_TABLE_FOLDERS, *benchmarks}
    for name in benchmarks:
        folders.update(_code_folders(name))
    patterns = [*_LISTS, "*.py", "harness/*.py", "harness/report/table.html.j2"]
    for folder in sorted(folders):
        patterns.append(f"{folder}/*.py")
        patterns.append(f"{folder}/**/*.csv")
    # the patterns also match code for other outputs, such as the page and the claims
    files_for_other_outputs = set(_files(*_CLAIM_FILES, *_FILES_OF_NO_TABLE))
    sources = [file for file in _files(*patterns) if file not in files_for_other_outputs]
    for name in benchmarks:
        sources += _definition_files(name)
    plugins = [os.path.relpath(file) for file in plugin_files()]
    library = os.path.relpath(emoe.config.__file__)
    # two benchmarks may share a file of tasks
    return [*distinct(sources), library, *plugins]


def record_sources() -> list[str]:
    """List the code that shapes the files of records."""
    return _files("harness/results/records.py", "harness/results/content.py")


def claim_sources() -> list[str]:
    """List the claims, and the code that shapes only their table and figures."""
    return _files("claims.yaml", *_CLAIM_FILES)


def page_sources() -> list[str]:
    """List the code, template, style and script of the pages, and the paper's items."""
    return _files(
        "harness/report/page.*",
        "harness/report/paper.py",
        "harness/report/paper_items.py",
        "paper.yaml",
    )


def file_times(plugins: Iterable[Path]) -> dict[Path, int]:
    """Return the time of the last change, in nanoseconds, of each code and YAML file.

    These are the files of the benchmarks, the suites and the library, and the files ``plugins``. A
    process that has read them does not notice a later change by itself.
    """
    files = list(plugins)
    for folder in (BENCHMARKS, CONFIG, Path(emoe.__file__).parent):
        for pattern in ("*.py", "*.yaml"):
            files += folder.rglob(pattern)
    times = {}
    for file in files:
        with suppress(OSError):  # it was just deleted, or is an editor's link to nothing
            times[file] = file.stat().st_mtime_ns
    return times


def _code_folders(name: str) -> set[str]:
    """Return the folders below ``benchmarks/`` with the code of a benchmark's kind.

    Their modules define the class of the benchmark and its base classes. The harness is left out.
    """
    folders = set()
    kind = type(load_benchmark(name))
    for cls in kind.__mro__:
        module_names = cls.__module__.split(".")  # such as "benchmarks", "text" and "grid"
        # base classes such as `object` are not of this package
        if module_names[0] != BENCHMARKS.name:
            continue
        folder = module_names[1]
        if folder != "harness":
            folders.add(folder)
    return folders


def _definition_files(name: str) -> list[str]:
    """List the YAML files that define a benchmark, relative to the working directory.

    Some are outside the benchmark's folder: a file of tasks that it shares with another benchmark,
    and the files of the benchmark whose runs it evaluates.
    """
    benchmark = load_benchmark(name)
    paths = sorted(benchmark.folder.glob("*.yaml"))
    tasks_file = getattr(benchmark.definition, "tasks", None)
    if tasks_file:
        paths.append((benchmark.folder / tasks_file).resolve())
    files = [os.path.relpath(path) for path in paths]
    if benchmark.evaluated_benchmark:
        files += _definition_files(benchmark.evaluated_benchmark)
    return files


def _files(*patterns: str) -> list[str]:
    """List the files below ``benchmarks/`` that match any pattern.

    The patterns are relative to ``benchmarks/``, the results to the working directory.
    """
    files = []
    for pattern in patterns:
        for file in sorted(BENCHMARKS.glob(pattern)):
            files.append(os.path.relpath(file))
    return files
