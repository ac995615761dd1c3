"""The files of collected records. This module imports little, because planning needs it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.base import RESULTS
from benchmarks.harness.config.names import target_name


def records_file(suite_name: str, benchmark: str, data_set: str | None = None) -> Path:
    """Return the path of the file with the records of a benchmark, or of its runs on one set."""
    return RESULTS / suite_name / "records" / f"{target_name(benchmark, data_set)}.jsonl"
