"""Write the plan of a suite, and find runs in it.

The main process of a workflow plans the runs. A job on a cluster reads them from the plan's files:

- ``plan.tsv`` has a row for each run: its folder below ``results/runs``, its readable name, ``yes``
  if it keeps its weights, its resources and its spec.
- ``partitions.tsv`` has a row for each partition: its id and its settings.

If the command line chooses other runs, such as with ``seeds=1``, the names of both files end with a
digest of these values. Several workflows of a suite may run at once, each with its own runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from benchmarks.harness import base as paths
from benchmarks.harness.base import (
    DataError,
    DefinitionError,
    first_problem,
    read_text,
    short_digest,
    write_text,
)
from benchmarks.harness.config.runs import PartitionJob, Run, canonical_json, run_from_spec
from benchmarks.harness.config.suite import PLACE_KEYS, Suite, plain_suite, suite_names
from benchmarks.harness.config.yaml import Strict

_ADVICE = "start the workflow again"  # which writes both files


class _RunRow(Strict):
    """A row of ``plan.tsv``. The fields are its columns, in their order."""

    folder: str
    name: str
    keeps_weights: Literal["yes", "no"]
    resources: str
    """JSON, which is parsed only for a run that is needed."""
    spec: str
    """JSON, like the resources."""


class _PartitionRow(Strict):
    """A row of ``partitions.tsv``. The fields are its columns, in their order."""

    id: str
    partition: str
    """JSON."""


_SETTINGS = TypeAdapter(dict[str, Any])
_PARTITION = TypeAdapter(PartitionJob)
_Row = TypeVar("_Row", _RunRow, _PartitionRow)


def write_plan(suite: Suite) -> None:
    """Write the runs and partitions of a suite for people, and for jobs on a cluster."""
    run_rows = [_run_row(run) for run in suite.runs]
    _write_rows(_plan_file(suite), _RunRow, run_rows)
    jobs = suite.partitions.values()
    partition_rows = [_PartitionRow(id=job.id, partition=job.to_json()) for job in jobs]
    _write_rows(_partitions_file(suite), _PartitionRow, partition_rows)


def _run_row(run: Run) -> _RunRow:
    """Make the row of a run in ``plan.tsv``."""
    return _RunRow(
        folder=run.folder,
        name=run.name,
        keeps_weights="yes" if run.keeps_weights else "no",
        resources=canonical_json(run.resources),
        spec=run.to_json(),
    )


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
    # the other suites are planned only for the error message, because planning takes time
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


def find_partition(partition_id: str, suite: Suite) -> PartitionJob:
    """Return the suite's partition with this id.

    Raises:
        DefinitionError: The suite has no such partition.
    """
    if partition_id in suite.partitions:
        return suite.partitions[partition_id]
    raise DefinitionError(
        f"the suite '{suite.name}' needs no partition '{partition_id}'; "
        f"{_partitions_file(suite)} lists those of this suite"
    )


def read_run_of_job(folder: str, suite: Suite) -> Run:
    """Read a run from the plan, in a job on a cluster.

    Args:
        folder: The run's folder below ``results/runs``.
        suite: The suite.

    Raises:
        DataError: The plan is damaged.
        DefinitionError: The plan has no such run.
    """
    file = _plan_file(suite)
    row = _read_row(file, _RunRow, folder)
    try:
        return _parse_run(row)
    except (KeyError, ValueError):  # not JSON, lacks the benchmark, or contains NaN
        raise _wrong_settings(file, folder) from None


def _parse_run(row: _RunRow) -> Run:
    """Make the run of a row.

    Raises:
        KeyError: The spec lacks the benchmark.
        ValueError: The row has no JSON, or the spec of another run.
    """
    resources = _SETTINGS.validate_json(row.resources)
    run = run_from_spec(_SETTINGS.validate_json(row.spec))
    if run.folder != row.folder:
        raise ValueError(f"the spec belongs to {run.folder}")
    return replace(run, resources=resources)


def read_partition_of_job(partition_id: str, suite: Suite) -> PartitionJob:
    """Read a partition's model and settings from the plan, in a job on a cluster.

    Args:
        partition_id: The id of the partition.
        suite: The suite.

    Raises:
        DataError: The plan is damaged.
        DefinitionError: The plan has no such partition.
    """
    file = _partitions_file(suite)
    row = _read_row(file, _PartitionRow, partition_id)
    try:
        return _parse_partition(row)
    except (KeyError, ValueError):  # not JSON, lacks a setting, or contains NaN
        raise _wrong_settings(file, partition_id) from None


def _parse_partition(row: _PartitionRow) -> PartitionJob:
    """Make the partition of a row.

    Raises:
        KeyError: A setting is missing.
        ValueError: The row has no JSON, or the settings of another partition.
    """
    partition = _PARTITION.validate_json(row.partition)
    if partition.id != row.id:
        raise ValueError(f"the settings belong to {partition.id}")
    return partition


def keeps_weights_by_run(suite: Suite, *, in_job: bool) -> dict[str, dict[str, bool]]:
    """Determine for every run of a suite whether it keeps its weights.

    Args:
        suite: The suite.
        in_job: True to read the plan, in a job on a cluster, instead of planning the suite.

    Returns:
        For each benchmark, a dictionary from the id of a run to True if it keeps its weights.

    Raises:
        DataError: The plan is damaged.
    """
    keeps_weights: dict[str, dict[str, bool]] = {name: {} for name in suite.settings.benchmarks}
    if not in_job:
        for run in suite.runs:
            keeps_weights[run.benchmark][run.id] = run.keeps_weights
        return keeps_weights

    file = _plan_file(suite)
    for row in _read_rows(file, _RunRow):
        benchmark, _, run_id = row.folder.partition("/")
        if benchmark not in keeps_weights:
            raise DataError(
                f"{file} is damaged: the suite has no benchmark '{benchmark}'; {_ADVICE}"
            )
        keeps_weights[benchmark][run_id] = row.keeps_weights == "yes"
    return keeps_weights


def _plan_file(suite: Suite) -> Path:
    """Return the path of the table of runs."""
    return _file(suite, "plan")


def _partitions_file(suite: Suite) -> Path:
    """Return the path of the table of partitions."""
    return _file(suite, "partitions")


def _file(suite: Suite, name: str) -> Path:
    """Return the path of a file of the plan, such as ``plan.tsv`` or ``plan-1a2b3c4d.tsv``.

    The digits are a digest of the command line's values that change runs, if it has some.
    """
    folder = paths.RESULTS / suite.name
    change_no_run = ("suite", *PLACE_KEYS)
    changes = {key: value for key, value in suite.overrides.items() if key not in change_no_run}
    if not changes:
        return folder / f"{name}.tsv"
    digest = short_digest(canonical_json(changes), 8)
    return folder / f"{name}-{digest}.tsv"


def _write_rows(path: Path, row_model: type[_Row], rows: Sequence[_Row]) -> None:
    """Write rows as lines with tabs between the cells. The first line names the columns.

    Args:
        path: The file.
        row_model: The model whose fields are the columns.
        rows: The rows.
    """
    columns = list(row_model.model_fields)
    lines = ["\t".join(columns)]
    for row in rows:
        cells = [getattr(row, column) for column in columns]
        lines.append("\t".join(cells))  # canonical JSON has no tabs
    write_text(path, "\n".join(lines) + "\n")


def _read_rows(path: Path, row_model: type[_Row]) -> Iterator[_Row]:
    """Yield the rows of a tab-separated file. Its first line must name the columns of the model.

    Raises:
        DataError: The file cannot be read, or a line is damaged. The error names the line.
    """
    columns = list(row_model.model_fields)
    text = read_text(path, _ADVICE)
    if text and not text.endswith("\n"):
        raise DataError(f"{path} is damaged: the last line is cut off; {_ADVICE}")
    # not splitlines(), which also splits at other signs
    lines = text.removesuffix("\n").split("\n")
    if lines[0].split("\t") != columns:
        raise DataError(f"{path} is damaged: line 1 must name {', '.join(columns)}; {_ADVICE}")
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split("\t")
        where = f"{path} is damaged: line {number}"
        if len(cells) != len(columns):
            raise DataError(f"{where} has {len(cells)} cells, not {len(columns)}; {_ADVICE}")
        try:
            yield row_model.model_validate(dict(zip(columns, cells, strict=True)))
        except ValidationError as error:
            raise DataError(f"{where}: {first_problem(error)}; {_ADVICE}") from None


def _read_row(path: Path, row_model: type[_Row], key: str) -> _Row:
    """Return the row whose first cell is ``key``.

    Raises:
        DataError: The file is damaged.
        DefinitionError: There is no such row.
    """
    first_column = next(iter(row_model.model_fields))
    for row in _read_rows(path, row_model):
        if getattr(row, first_column) == key:
            return row
    raise DefinitionError(f"{path} has no row '{key}'; {_ADVICE}")


def _wrong_settings(path: Path, key: str) -> DataError:
    """Return the error for a row whose settings are damaged, or do not belong to its key."""
    return DataError(f"{path} is damaged: the settings of '{key}' are wrong; {_ADVICE}")
