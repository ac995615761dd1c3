"""Write the plan of a suite, and find runs in it.

The main process of a workflow plans the runs. A job on a cluster reads them from the plan's files:

- ``plan.tsv`` has a row for each run: its folder below ``results/runs``, its readable name, ``yes``
  if it keeps its weights, its resources and its spec.
- ``partitions.tsv`` has a row for each clustering: its id and its settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import base as paths
from benchmarks.harness.base import DefinitionError, write_text
from benchmarks.harness.config.runs import PartitionJob, Run, canonical_json
from benchmarks.harness.config.suite import Suite, plain_suite, suite_names

_RUN_COLUMNS = ("folder", "name", "keeps_weights", "resources", "spec")
_PARTITION_COLUMNS = ("id", "partition")


def write_plan(suite: Suite) -> None:
    """Write the runs and partitions of a suite for people, and for jobs on a cluster."""
    run_rows = [_run_cells(run) for run in suite.runs]
    _write_rows(_plan_file(suite), [_RUN_COLUMNS, *run_rows])
    partition_rows = [(job.id, job.to_json()) for job in suite.partitions.values()]
    _write_rows(_partitions_file(suite), [_PARTITION_COLUMNS, *partition_rows])


def _run_cells(run: Run) -> tuple[str, ...]:
    """Return the values of a run in ``plan.tsv``, in the order of ``_RUN_COLUMNS``."""
    keeps_weights = "yes" if run.keeps_weights else "no"
    resources = canonical_json(run.resources)
    return (run.folder, run.name, keeps_weights, resources, run.to_json())


def is_written(suite: Suite) -> bool:
    """Return True if the files of a suite's plan exist.

    A job on another machine may not see the files that the main process has written.
    """
    return _plan_file(suite).exists() and _partitions_file(suite).exists()


def find_run(folder: str, suite: Suite) -> Run:
    """Return the suite's run with this folder below ``results/runs``.

    Raises:
        DefinitionError: The suite has no such run. The error names another suite that has it, if
            there is one.
    """
    if folder in suite.runs_by_folder:
        return suite.runs_by_folder[folder]
    # only now, because planning the other suites takes time
    for other in suite_names():
        if other == suite.name:
            continue
        if folder in plain_suite(other).runs_by_folder:
            raise DefinitionError(
                f"the suite '{suite.name}' has no run '{folder}', but '{other}' has: "
                f"add `--config suite={other}`"
            )
    raise DefinitionError(
        f"no suite has the run '{folder}'; {_plan_file(suite)} lists the runs of this suite"
    )


def find_partition(name: str, suite: Suite) -> PartitionJob:
    """Return the suite's clustering with this id.

    Raises:
        DefinitionError: The suite has no such clustering.
    """
    if name in suite.partitions:
        return suite.partitions[name]
    raise DefinitionError(
        f"the suite '{suite.name}' needs no partition '{name}'; "
        f"{_partitions_file(suite)} lists those of this suite"
    )


def read_run_of_job(folder: str, suite: Suite) -> Run:
    """Read a run from the plan, in a job on a cluster.

    Args:
        folder: The run's folder below ``results/runs``.
        suite: The suite.

    Raises:
        DefinitionError: The plan has no such run.
    """
    row = _read_row(_plan_file(suite), _RUN_COLUMNS, folder)
    _benchmark, _, run_id = folder.partition("/")
    return Run(run_id, spec=json.loads(row["spec"]), resources=json.loads(row["resources"]))


def read_partition_of_job(name: str, suite: Suite) -> PartitionJob:
    """Read a clustering from the plan, in a job on a cluster.

    Args:
        name: The id of the clustering.
        suite: The suite.

    Raises:
        DefinitionError: The plan has no such clustering.
    """
    row = _read_row(_partitions_file(suite), _PARTITION_COLUMNS, name)
    return PartitionJob(**json.loads(row["partition"]))


def weights_by_benchmark(suite: Suite, *, in_job: bool) -> dict[str, dict[str, bool]]:
    """Determine for every run of a suite whether it keeps its weights.

    Args:
        suite: The suite.
        in_job: True to read the plan, in a job on a cluster, instead of planning the suite.

    Returns:
        For each benchmark, a dictionary from the id of a run to True if it keeps its weights.
    """
    kept_by_benchmark: dict[str, dict[str, bool]] = {name: {} for name in suite.settings.benchmarks}
    if not in_job:
        for run in suite.runs:
            kept_by_benchmark[run.benchmark][run.id] = run.keeps_weights
        return kept_by_benchmark
    for row in _read_rows(_plan_file(suite), _RUN_COLUMNS):
        benchmark, _, run_id = row["folder"].partition("/")
        kept_by_benchmark[benchmark][run_id] = row["keeps_weights"] == "yes"
    return kept_by_benchmark


def _plan_file(suite: Suite) -> Path:
    """Return the path of the table of runs."""
    return paths.RESULTS / suite.name / "plan.tsv"


def _partitions_file(suite: Suite) -> Path:
    """Return the path of the table of clusterings."""
    return paths.RESULTS / suite.name / "partitions.tsv"


def _write_rows(path: Path, rows: list[tuple[str, ...]]) -> None:
    """Write rows as lines with tabs between the cells. The first row names the columns."""
    lines = ["\t".join(row) for row in rows]  # canonical JSON has no tabs
    write_text(path, "\n".join(lines) + "\n")


def _read_rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Yield each row below the first as a dictionary of cells by column."""
    with path.open(encoding="utf-8") as lines:
        next(lines)  # the names of the columns
        for line in lines:
            cells = line.rstrip("\n").split("\t")
            yield dict(zip(columns, cells, strict=True))


def _read_row(path: Path, columns: tuple[str, ...], key: str) -> dict[str, str]:
    """Return the row whose first cell is ``key``, as a dictionary of cells by column.

    Raises:
        DefinitionError: There is no such row.
    """
    key_column = columns[0]
    for row in _read_rows(path, columns):
        if row[key_column] == key:
            return row
    raise DefinitionError(f"{path} has no row '{key}'; start the workflow again")
