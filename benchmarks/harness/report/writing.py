"""Write the tables, figures, section and claim numbers of a benchmark or of one of its sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from benchmarks.harness.base import RESULTS, DefinitionError, distinct, write_json
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.artifacts import numbers_file
from benchmarks.harness.report.claims import claimed_benchmarks
from benchmarks.harness.report.claims_table import write_claim_numbers
from benchmarks.harness.report.paper import write_paper_items
from benchmarks.harness.report.presentation import present
from benchmarks.harness.report.section import MixedSet, find_mixed_sets, make_section
from benchmarks.harness.results.available import find_records
from benchmarks.harness.results.records import Record


def write_tables(suite: Suite, benchmark: str, data_set: str | None = None) -> str:
    """Write the tables and figures of a benchmark, or of one data set, from available records.

    Also writes our versions of the paper's tables and figures, and two files for later steps: the
    section file, from which pages are written, and for a whole benchmark the numbers that claims
    compare. These two are written only if all runs are finished. Otherwise they are deleted,
    because older ones would not fit the new tables.

    Args:
        suite: The suite.
        benchmark: The name of the benchmark.
        data_set: The name of one of its data sets; None for all.

    Returns:
        A note on missing runs and mixed data, which the captions of the tables repeat. It is empty
        if all runs are finished and evaluated the same rows.

    Raises:
        DefinitionError: There are no records.
    """
    found = find_records(suite, benchmark, data_set)
    if not found.records:
        raise DefinitionError(found.note)
    mixed_sets = find_mixed_sets(found.records)
    note = _join_notes(benchmark, found.note, mixed_sets)

    of_benchmark = present(load_benchmark(benchmark), found.records)
    asked = of_benchmark
    if data_set:
        asked = of_benchmark.presentations_of_sets[data_set]
    presentation = replace(asked, caption_note=note)

    folder = RESULTS / suite.name
    for table in presentation.tables:
        table.write(folder / "tables")
    for name, figure in presentation.figures.items():
        figure.draw(folder / "figures" / name)
    # after the figures, because some of them are copied
    write_paper_items(suite, presentation)

    section_file = Path(presentation.artifacts.section_file(suite.name))
    # the note is empty only if all runs are finished
    is_complete = not found.note
    if is_complete:
        # also after the figures, to see which of them are placeholders
        section = make_section(presentation, found.records, mixed_sets, suite.name)
        write_json(section_file, section.model_dump())
    else:
        # an older section would not fit the new tables, and its page would not show that
        section_file.unlink(missing_ok=True)

    # claims compare numbers of all sets, so they are not written for a single set
    if data_set is None and benchmark in claimed_benchmarks(suite):
        if is_complete:
            numbers = of_benchmark.outcomes.claim_numbers()
            write_claim_numbers(suite.name, benchmark, numbers)
        else:
            # older numbers would not fit them either
            Path(numbers_file(suite.name, benchmark)).unlink(missing_ok=True)
    return note


def _join_notes(benchmark: str, note: str, mixed_sets: Sequence[MixedSet]) -> str:
    """Add to a benchmark's note that runs evaluated different rows of some data sets, if any."""
    if not mixed_sets:
        return note
    # a set is listed twice if it was evaluated in two ways
    names = distinct(mixed.name for mixed in mixed_sets)
    problem = f"the runs evaluated different rows of {', '.join(names)}, so scores do not compare"
    if not note:
        return f"{benchmark}: {problem}"
    return f"{note}; {problem}"


def claim_numbers(benchmark: str, records: Sequence[Record]) -> pd.DataFrame:
    """Compute the numbers that claims compare from the records of a benchmark.

    The columns are ``COMPARED`` of :mod:`.common`.
    """
    return present(load_benchmark(benchmark), records).outcomes.claim_numbers()


def find_claim_numbers(suite: Suite) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Compute the numbers that claims compare from the available records.

    Benchmarks without records are left out.

    Returns:
        The numbers as :func:`.read_claim_numbers` returns them, and the notes of
        :func:`.find_records`.

    Raises:
        DefinitionError: No benchmark that claims compare has records.
    """
    numbers: dict[str, pd.DataFrame] = {}
    notes: list[str] = []
    for name in claimed_benchmarks(suite):
        found = find_records(suite, name)
        if found.note:
            notes.append(found.note)
        if found.records:
            numbers[name] = claim_numbers(name, found.records)
    if not numbers and notes:
        raise DefinitionError("; ".join(notes))
    return numbers, notes
