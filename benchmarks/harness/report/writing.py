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
    """Write the tables and figures of a benchmark, or of one of its sets, from collected records.

    It also writes the paper's items, the section of the pages, and the numbers of claims.
    """
    records = read_records(suite, benchmark, part)
    of_benchmark = present(load_benchmark(benchmark), records)
    presentation = of_benchmark.parts[part] if part else of_benchmark

    folder = RESULTS / suite.name
    for table in presentation.tables:
        table.write(folder / "tables")
    for name, figure in presentation.figures.items():
        figure.draw(folder / "figures" / name)
    # copies some of the figures
    write_paper_items(suite, presentation)

    # reads whether the figures are placeholders
    section = make_section(presentation, records, suite.name)
    section_file = Path(presentation.artifacts.section_file(suite.name))
    write_json(section_file, section.model_dump())

    # claims compare the numbers of all sets
    if part is None and benchmark in claimed_benchmarks(suite):
        numbers = of_benchmark.outcomes.claim_numbers()
        write_claim_numbers(suite.name, benchmark, numbers)
