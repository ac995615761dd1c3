"""Write the tables, figures, section and claim numbers of a benchmark or of one of its sets."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.base import RESULTS, write_json
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.claims import claimed_benchmarks
from benchmarks.harness.report.claims_table import write_claim_numbers
from benchmarks.harness.report.paper import write_paper_items
from benchmarks.harness.report.presentation import present
from benchmarks.harness.report.section import make_section
from benchmarks.harness.results.records import read_records


def write_tables(suite: Suite, benchmark: str, part: str | None = None) -> None:
    """Write the tables and figures of a benchmark, or of one data set, from collected records.

    Also writes our versions of the paper's tables and figures, the section file that pages are
    written from, and, for a whole benchmark, the numbers that claims compare. ``part`` is the set.
    """
    records = read_records(suite, benchmark, part)
    of_benchmark = present(load_benchmark(benchmark), records)
    presentation = of_benchmark.parts[part] if part else of_benchmark

    folder = RESULTS / suite.name
    for table in presentation.tables:
        table.write(folder / "tables")
    for name, figure in presentation.figures.items():
        figure.draw(folder / "figures" / name)
    # after the figures, because some of them are copied
    write_paper_items(suite, presentation)

    # also after the figures, to see which of them are placeholders
    section = make_section(presentation, records, suite.name)
    section_file = Path(presentation.artifacts.section_file(suite.name))
    write_json(section_file, section.model_dump())

    # claims compare numbers of all sets, so they are not written for a single set
    if part is None and benchmark in claimed_benchmarks(suite):
        numbers = of_benchmark.outcomes.claim_numbers()
        write_claim_numbers(suite.name, benchmark, numbers)
