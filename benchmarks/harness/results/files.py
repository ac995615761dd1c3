"""Name the files of collected records. Importing this module is fast, because planning needs it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.base import RESULTS
from benchmarks.harness.config.names import target_name


def records_file(suite: str, benchmark: str, part: str | None = None) -> Path:
    """Return the file of the records of a benchmark's runs, or of the runs of one of its parts."""
    return RESULTS / suite / "records" / f"{target_name(benchmark, part)}.jsonl"
