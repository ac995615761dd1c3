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
    """Write the tables and figures of a benchmark, or of one of its parts, from its collected records.

    Beside them it writes the paper's items, the section of the pages, and the numbers of claims.
    """
    records = read_records(suite, benchmark, part)
    presentation = present(load_benchmark(benchmark), records)
    shown = presentation.parts[part] if part else presentation
    for table in shown.tables:
        table.write(RESULTS / suite.name / "tables")
    for name, figure in shown.figures.items():
        figure.draw(RESULTS / suite.name / "figures" / name)
    write_paper_items(suite, shown)
    section = make_section(shown, records, suite.name)
    write_json(Path(shown.artifacts.section_file(suite.name)), section.model_dump())
    if part is None and benchmark in claimed_benchmarks(suite):
        write_claim_numbers(suite.name, benchmark, presentation.outcomes.claim_numbers())
