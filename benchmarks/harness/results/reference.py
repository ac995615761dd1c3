"""Read and write the blessed numbers and records of a suite, three files for each benchmark.

``results/reference/<suite>/`` has these files:

- ``<benchmark>.csv``: the numbers that the check compares, one per row.
- ``<benchmark>.json``: their origin.
- ``<benchmark>.jsonl.gz``: the collected records of the runs, for tables and claims. It may be
  missing.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic import BaseModel, ConfigDict

from benchmarks.harness.base import (
    REFERENCE,
    DataError,
    DefinitionError,
    atomic_write,
    check_is_file,
    first_line,
    read_bytes,
    read_json,
    write_json,
)
from benchmarks.harness.config.suite import Suite, suite_names
from benchmarks.harness.results.check import COLUMNS, Numbers, collect_numbers
from benchmarks.harness.results.records import Record, format_record, parse_records


class BlessedOrigin(BaseModel):
    """The origin of blessed numbers: their machines, and the checkout that blessed them.

    A record has the commit of its own run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    commit: str
    """The commit of the checkout that blessed the numbers."""
    machines: dict[str, dict[str, str]]
    """The fingerprints of the machines, by the names that the csv uses."""
    code: str
    """The digest of the code in this checkout. `bless` repeated runs with this code."""

    @property
    def processors(self) -> str:
        """Return the processors of the machines, separated by commas."""
        names = [machine.get("processor", "?") for machine in self.machines.values()]
        return ", ".join(sorted(set(names)))


@dataclass(frozen=True)
class BlessedRecords:
    """The blessed records of a benchmark.

    Attributes:
        records: The records of runs that the suite plans, by the folder of the run.
        num_unplanned: The number of blessed runs that the suite does not plan.
        origin: The origin of the records.
    """

    records: dict[str, Record]
    num_unplanned: int
    origin: BlessedOrigin


def reference_file(suite_name: str, benchmark: str, ending: str) -> Path:
    """Return the path of a blessed file. ``ending`` is ``csv``, ``json`` or ``jsonl.gz``."""
    return REFERENCE / suite_name / f"{benchmark}.{ending}"


def blessed_benchmarks(suite: Suite) -> list[str]:
    """Return the names of the suite's benchmarks that have blessed numbers."""
    names = suite.settings.benchmarks
    return [name for name in names if reference_file(suite.name, name, "csv").exists()]


def suites_with_records(benchmark: str) -> list[str]:
    """Return the names of the suites that have blessed records of a benchmark."""
    suites = suite_names()
    return [name for name in suites if reference_file(name, benchmark, "jsonl.gz").exists()]


def read_reference(suite_name: str, benchmark: str) -> Numbers:
    """Read the blessed numbers of a benchmark.

    Raises:
        DefinitionError: The csv is missing, damaged or of an older form.
        DataError: The json with the origin is missing, damaged or of an older form.
    """
    path = reference_file(suite_name, benchmark, "csv")
    advice = bless_advice(suite_name, benchmark)
    try:
        check_is_file(path)
        # all values stay texts, because the last digit counts
        texts = pd.read_csv(path, keep_default_na=False, dtype=str)
        rows = texts[COLUMNS].astype({"seed": int})
    except OSError as error:
        raise DefinitionError(f"{path} cannot be read: {error.strerror}; {advice}") from error
    except (KeyError, ValueError) as error:
        raise DefinitionError(
            f"{path} is damaged or of an older form: {first_line(error)}; {advice}"
        ) from error
    origin = read_origin(suite_name, benchmark)
    unknown = sorted(set(rows["machine"]) - set(origin.machines))
    if unknown:
        raise DefinitionError(
            f"{path} names the machine '{unknown[0]}', which its json does not have; {advice}"
        )
    return Numbers(rows=rows, machines=origin.machines, code=origin.code)


def read_origin(suite_name: str, benchmark: str) -> BlessedOrigin:
    """Read the origin of the blessed numbers of a benchmark.

    Raises:
        DataError: The file is missing, damaged or of an older form.
    """
    path = reference_file(suite_name, benchmark, "json")
    return read_json(path, BlessedOrigin, bless_advice(suite_name, benchmark))


def read_blessed_records(suite: Suite, benchmark: str) -> BlessedRecords | None:
    """Read the blessed records of a benchmark. Return None if it has none.

    Raises:
        DataError: The file of the records or of their origin is damaged or of an older form, or
            the origin is missing.
    """
    path = reference_file(suite.name, benchmark, "jsonl.gz")
    if not path.exists():
        return None
    advice = bless_advice(suite.name, benchmark)
    try:
        content = gzip.decompress(read_bytes(path, advice))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {first_line(error)}; {advice}") from error
    parsed = parse_records(content, suite.runs_of(benchmark), path, advice)
    origin = read_origin(suite.name, benchmark)
    return BlessedRecords(
        records=parsed.records, num_unplanned=len(parsed.unplanned), origin=origin
    )


def write_reference(
    suite_name: str, benchmark: str, records: Sequence[Record], commit: str
) -> list[Path]:
    """Write the records of a benchmark as the blessed ones, with their numbers and their origin.

    Args:
        suite_name: The name of the suite.
        benchmark: The name of the benchmark.
        records: The records of all its runs.
        commit: The commit of this checkout.

    Returns:
        The paths of the three written files.
    """
    numbers = collect_numbers(records)
    csv = reference_file(suite_name, benchmark, "csv")
    with atomic_write(csv) as temporary:
        numbers.rows.to_csv(temporary, index=False, lineterminator="\n")
    json = reference_file(suite_name, benchmark, "json")
    write_json(json, {"commit": commit, "machines": numbers.machines, "code": numbers.code})
    compressed = reference_file(suite_name, benchmark, "jsonl.gz")
    _write_compressed(compressed, [format_record(record) for record in records])
    return [csv, json, compressed]


def _write_compressed(path: Path, lines: Sequence[str]) -> None:
    """Write lines of text, compressed. The same lines give the same file."""
    content = "".join(f"{line}\n" for line in lines)
    with (
        atomic_write(path) as temporary,
        temporary.open("wb") as file,
        # without a name and a time, which would differ from file to file
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as compressed,
    ):
        compressed.write(content.encode())


def bless_advice(suite_name: str, benchmark: str) -> str:
    """Return the advice of error messages on how to renew the blessed numbers of a benchmark."""
    shipped = f"git checkout -- {reference_file(suite_name, benchmark, '*')}"
    command = f"python -m benchmarks bless --suite {suite_name} --benchmark {benchmark}"
    return f"restore it (`{shipped}`), or bless a run of the suite (`{command}`)"
