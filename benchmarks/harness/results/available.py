"""Find the records from which tables and claims are made: of finished runs, or the blessed ones."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.harness.config.suite import Suite
from benchmarks.harness.results.records import Record, is_outdated, read_record, read_records
from benchmarks.harness.results.reference import (
    BlessedRecords,
    read_blessed_records,
    suites_with_records,
)


@dataclass(frozen=True)
class FoundRecords:
    """The records of a benchmark, or of one of its data sets, that are available here.

    Attributes:
        records: The records in the order of the grid; empty if there are none.
        note: A sentence that says where the records come from, and which are missing. It is empty
            if all runs are finished here.
    """

    records: list[Record]
    note: str = ""


def find_finished(suite: Suite, benchmark: str, data_set: str | None = None) -> FoundRecords:
    """Find the records of the runs that are finished here.

    If the collected records cover all planned runs, they are returned, unless a ``metrics.json``
    here has changed since it was collected. (A job on a cluster may see no ``metrics.json``.)
    Otherwise the ``metrics.json`` of each finished run is read.

    Args:
        suite: The suite.
        benchmark: The name of the benchmark.
        data_set: The name of one of its data sets; None for all.

    Raises:
        DataError: A file of records or a ``metrics.json`` is damaged.
    """
    collected = read_records(suite, benchmark, data_set)
    if collected is not None and not any(is_outdated(record) for record in collected):
        return FoundRecords(collected)

    runs = suite.runs_of(benchmark, data_set)
    finished = [run for run in runs if run.metrics_file.exists()]
    records = [read_record(run) for run in finished]
    num_missing = len(runs) - len(finished)
    if not num_missing:
        return FoundRecords(records)
    if finished:
        note = f"{benchmark}: {missing_text(suite, num_missing, len(runs))}"
        return FoundRecords(records, note)
    planned = f"'{suite.name}'"
    if data_set:  # runs on the other data sets may be finished
        planned += f" on {data_set}"
    return FoundRecords([], note=f"{benchmark}: no run of {planned} is finished here")


def find_records(suite: Suite, benchmark: str, data_set: str | None = None) -> FoundRecords:
    """Find the records of the runs that are finished here; without any, the blessed records.

    The arguments and errors are those of :func:`find_finished`. If there are no
    records of either kind, the note says how to get some.
    """
    found = find_finished(suite, benchmark, data_set)
    if found.records:
        return found

    blessed = read_blessed_records(suite, benchmark)
    if blessed is None:
        advice = _how_to_get_records(suite, benchmark)
        note = f"{found.note}, and no records of it are blessed; {advice}"
        return FoundRecords([], note)
    runs = suite.runs_of(benchmark, data_set)
    records = []
    for run in runs:
        if run.folder in blessed.records:
            records.append(blessed.records[run.folder])
    if not records:
        advice = _how_to_get_records(suite, benchmark)
        note = f"{found.note}, and none of the planned runs is blessed; {advice}"
        return FoundRecords([], note)
    description = _describe_blessed(blessed, num_planned=len(runs), num_used=len(records))
    return FoundRecords(records, note=f"{found.note}; {description}")


def missing_text(suite: Suite, num_missing: int, num_planned: int) -> str:
    """Say how many of the planned runs are missing, and which command makes them."""
    verb = "is" if num_missing == 1 else "are"
    counts = f"{num_missing:,} of {num_planned:,} runs"
    return f"{counts} {verb} missing: make run SUITE={suite.name}"


def _describe_blessed(blessed: BlessedRecords, num_planned: int, num_used: int) -> str:
    """Describe blessed records that are used.

    Args:
        blessed: The records.
        num_planned: The number of runs that the suite plans.
        num_used: The number of these runs that have a blessed record.
    """
    origin = blessed.origin
    text = f"these are the records blessed at commit {origin.commit[:8]} ({origin.processors})"
    if num_used < num_planned:
        text += f", which lack {num_planned - num_used:,} of the {num_planned:,} planned runs"
    if blessed.num_unplanned == 1:
        text += "; 1 run that the suite does not plan is left out"
    elif blessed.num_unplanned:
        text += f"; {blessed.num_unplanned:,} runs that the suite does not plan are left out"
    return text


def _how_to_get_records(suite: Suite, benchmark: str) -> str:
    """Say how to get records of a benchmark: make the runs, or take a suite with blessed ones."""
    text = f"`make run SUITE={suite.name}` makes the runs"
    others = [name for name in suites_with_records(benchmark) if name != suite.name]
    if others:
        text += f"; suites with blessed records of it: {', '.join(others)}"
    return text
