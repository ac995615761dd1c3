"""Bless the present numbers of a suite, so that later numbers are compared with them."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import base as paths
from benchmarks.harness.base import ROOT, DefinitionError, git
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.results.check import collect_numbers, compare
from benchmarks.harness.results.records import Record, check_finished, read_record
from benchmarks.harness.results.reference import write_reference
from benchmarks.harness.results.verify import Rerun, Say, make_inputs, run_again


def bless(suite: Suite, benchmarks: Sequence[str], say: Say) -> list[Path]:
    """Write the present records of benchmarks as the blessed ones, if reruns repeat them exactly.

    Runs of a benchmark may have been made by different versions of the code. For each benchmark and
    version, the fastest run is repeated with the code of this checkout. Its partitions are made
    again.

    Args:
        suite: The suite.
        benchmarks: The names of the benchmarks.
        say: Prints a line about each rerun and each file that is made, and the differences if there
            are any.

    Returns:
        The paths of the written files.

    Raises:
        DefinitionError: The folder is not a clean checkout, a run is not finished, or a rerun fails
            or has other numbers.
        DataError: A ``metrics.json`` is damaged, or a package could not be downloaded.
        RunError: A model could not be rebuilt, or its neurons could not be clustered.
    """
    commit = clean_commit()
    runs = [run for run in suite.runs if run.benchmark in benchmarks]
    check_finished(runs, f"of the suite '{suite.name}'", f"make run SUITE={suite.name}")

    records: dict[str, list[Record]] = {}
    to_repeat: list[Record] = []
    for name in benchmarks:
        records[name] = [read_record(run) for run in suite.runs_of(name)]
        to_repeat += _fastest_of_each_code(records[name])
    _check_repeatable(suite, to_repeat, say)

    files: list[Path] = []
    for name in benchmarks:
        files += write_reference(suite.name, name, records[name], commit)
    return files


def _fastest_of_each_code(records: Sequence[Record]) -> list[Record]:
    """Return the fastest run of each version of the code that made some of the runs."""
    fastest: dict[str | None, Record] = {}
    for record in records:
        environment = record.metrics.environment
        # older versions recorded no digest, so their runs are told apart by the commit
        code = environment.code or environment.git_commit
        seconds = record.metrics.cost.job_seconds
        fastest_so_far = fastest.get(code)
        if fastest_so_far is None or seconds < fastest_so_far.metrics.cost.job_seconds:
            fastest[code] = record
    return list(fastest.values())


def _check_repeatable(suite: Suite, records: Sequence[Record], say: Say) -> None:
    """Rerun finished runs, and check that their numbers are the same to the last digit.

    Raises:
        DefinitionError: A run fails or has other numbers.
        DataError: A package could not be downloaded.
        RunError: A model could not be rebuilt, or its neurons could not be clustered.
    """
    reruns = []
    for record in records:
        threads = str(record.metrics.environment.threads)
        reruns.append(Rerun(record.run, threads))
    with tempfile.TemporaryDirectory(prefix="again-") as temporary:
        folder = Path(temporary)
        make_inputs(reruns, folder, say)
        # an evaluation reads the trained runs of this working directory
        trained_runs = folder / paths.RUNS
        trained_runs.parent.mkdir(parents=True, exist_ok=True)
        trained_runs.symlink_to(paths.RUNS.resolve())
        repeated, failed_runs = run_again(reruns, folder / "again", folder, say)
    before = collect_numbers(records)
    after = collect_numbers(repeated)
    failures = [run.name for run in failed_runs]
    result = compare(before, after, suite.name, failures=failures)
    # a comparison within tolerances may pass too, but it proves less
    if not result.passed or not result.is_exact:
        say(str(result))
        raise DefinitionError(
            "the repeated runs failed, were made on another machine, or have other numbers, so the "
            "numbers cannot be blessed"
        )


def clean_commit() -> str:
    """Return the commit of the checkout, which must have no uncommitted changes.

    Changes to blessed numbers are allowed.

    Raises:
        DefinitionError: Another file has changes that are not committed, or the folder is not a
            checkout.
    """
    try:
        status = git(ROOT, "status", "--porcelain", "--", ".", ":(exclude)results/reference")
    except subprocess.CalledProcessError as error:
        raise DefinitionError(f"{ROOT} is not a checkout: {error.stderr}") from error
    # one line per file: letters for the kind of change, a blank, and the path
    changed = status.splitlines()
    if changed:
        _letters, first = changed[0].split(maxsplit=1)
        if len(changed) == 1:
            raise DefinitionError(f"1 file is not committed: {first}")
        raise DefinitionError(f"{len(changed):,} files are not committed, the first is {first}")
    return git(ROOT, "rev-parse", "HEAD")
