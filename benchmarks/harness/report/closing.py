"""Say at the end of a run what to open next, and list the verdicts on the paper's claims."""

from __future__ import annotations

import textwrap
from pathlib import Path

from benchmarks.harness import base as paths
from benchmarks.harness.base import distinct
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.artifacts import CLAIMS
from benchmarks.harness.report.claim_rows import read_claim_rows
from benchmarks.harness.report.claims import claimed_benchmarks

_COLUMNS = ("claim_title", "endpoint", "verdict")  # of the table of the claims
_WIDTH = 100  # letters of a line
# Cells of the column `verdict` that are not verdicts. `evidence.Verdict` is not imported, because
# its module imports pandas, which takes long.
_NO_VERDICTS = ("missing", "–")


def closing_lines(suite: Suite) -> list[str]:
    """Say what to open next, and list the verdicts. Empty if the suite has no report yet."""
    folder = paths.RESULTS / suite.name
    if not (folder / "report.html").exists():
        return []
    return [
        f"Open next: {folder}/report.html (a page for each benchmark is beside it)",
        f"Tables:    {folder}/tables/ (csv, md, tex, html)",
        f"Figures:   {folder}/figures/",
        f"MLflow:    make ui SUITE={suite.name}",
        *_verdict_lines(suite, folder / "tables" / f"{CLAIMS.name}.csv"),
    ]


def _verdict_lines(suite: Suite, file: Path) -> list[str]:
    """Write a line for each verdict: the number of its main tests, and the claims.

    The list is empty if no main test has a verdict, as in a suite without claims or with random
    weights.
    """
    # without claims, the file may be left from an earlier run of the suite with other benchmarks
    if not claimed_benchmarks(suite) or not file.exists():
        return []
    claims_by_verdict: dict[str, list[str]] = {}
    for row in read_claim_rows(suite.name, _COLUMNS):
        if row["endpoint"] == "main" and row["verdict"] not in _NO_VERDICTS:
            claims_by_verdict.setdefault(row["verdict"], []).append(row["claim_title"])
    if not claims_by_verdict:
        return []

    lines = ["Verdicts on the paper's claims, by test:"]
    for verdict in sorted(claims_by_verdict):
        claims = claims_by_verdict[verdict]
        text = f"{len(claims)} {verdict}: {'; '.join(distinct(claims))}"
        lines.append("  " + textwrap.shorten(text, _WIDTH - 2, placeholder=" …"))
    return lines
