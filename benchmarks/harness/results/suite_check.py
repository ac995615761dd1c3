"""Compare the finished runs of a suite with its blessed numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import Suite, plain_suite
from benchmarks.harness.results.available import find_finished
from benchmarks.harness.results.check import (
    CheckResult,
    Numbers,
    collect_numbers,
    compare,
    name_without_seed,
)
from benchmarks.harness.results.records import Record
from benchmarks.harness.results.reference import blessed_benchmarks, read_reference

_MOST_GROUPS = 20  # groups of runs that are listed; more are only counted
_STALE_ADVICE = (
    "numbers that other code made do not show what this code does: "
    "`python -m benchmarks verify` runs it, and so does a new checkout"
)

# what identifies a run in files of numbers: its name without the seed, and its seed
NameAndSeed = tuple[str, int]


@dataclass(frozen=True)
class OldAndNew:
    """The blessed and the new numbers of some runs of a benchmark.

    Attributes:
        before: The blessed numbers.
        after: The new numbers.
        failures: The names of the runs that failed.
    """

    before: Numbers
    after: Numbers
    failures: Sequence[str] = ()


@dataclass(frozen=True)
class BenchmarkCheck:
    """How many runs and numbers of a benchmark were compared with the blessed ones.

    Attributes:
        num_equal: How many numbers agree.
        num_different: How many numbers do not agree.
        num_planned: How many runs the suite plans.
        missing: The planned runs that are not finished.
        unplanned: The blessed runs that the suite does not plan even with all its seeds.
        with_other_choices: The finished evaluations that choose among other trained models than the
            blessed ones. They are not compared.
    """

    num_equal: int
    num_different: int
    num_planned: int
    missing: Sequence[NameAndSeed]
    unplanned: Sequence[NameAndSeed]
    with_other_choices: Sequence[NameAndSeed]

    def __str__(self) -> str:
        num_finished = self.num_planned - len(self.missing)
        runs = f"{num_finished:,} of {self.num_planned:,} runs"
        if not num_finished - len(self.with_other_choices):
            return f"nothing to compare ({runs})"
        text = f"{self.num_equal:,} numbers agree"
        if self.num_different:
            text += f", {self.num_different:,} do not"
        return f"{text} ({runs})"


@dataclass(frozen=True)
class SuiteCheck:
    """The comparison of a suite's finished runs with its blessed numbers.

    Attributes:
        results: The comparisons of :func:`compare_benchmarks`.
        benchmarks: The counts by the name of the benchmark.
        finished: The records of the compared runs, by the name of the benchmark.
        stale: The compared runs that were made by other code than that of this checkout.
        unblessed: The names of the benchmarks without blessed numbers, which are not compared.
    """

    results: Sequence[CheckResult]
    benchmarks: Mapping[str, BenchmarkCheck]
    finished: Mapping[str, Sequence[Record]]
    stale: Sequence[NameAndSeed]
    unblessed: Sequence[str]

    @property
    def missing(self) -> list[NameAndSeed]:
        """Return the planned runs that are not finished."""
        missing: list[NameAndSeed] = []
        for counts in self.benchmarks.values():
            missing += counts.missing
        return missing

    @property
    def unplanned(self) -> list[NameAndSeed]:
        """Return the blessed runs that the suite does not plan even with all its seeds."""
        unplanned: list[NameAndSeed] = []
        for counts in self.benchmarks.values():
            unplanned += counts.unplanned
        return unplanned

    @property
    def with_other_choices(self) -> list[NameAndSeed]:
        """Return the finished evaluations that choose among other trained models."""
        runs: list[NameAndSeed] = []
        for counts in self.benchmarks.values():
            runs += counts.with_other_choices
        return runs

    @property
    def passed(self) -> bool:
        """Return True if the check shows that this checkout's code gives the blessed numbers.

        All numbers must agree. Planned, finished and blessed runs must be the same, and made by
        this checkout's code. Evaluations that choose among other trained models are ignored.
        """
        all_agree = all(result.passed for result in self.results)
        same_runs = not self.missing and not self.unplanned and not self.unblessed
        return all_agree and same_runs and not self.stale

    def __str__(self) -> str:
        results = [str(result) for result in self.results]
        missing = _group_lines("missing", self.missing)
        unplanned = _group_lines("blessed, but not planned", self.unplanned)
        not_compared = _group_lines(
            "not compared, chooses among other trained models", self.with_other_choices
        )
        stale = _group_lines("made by other code", self.stale)
        if stale:
            stale.append(_STALE_ADVICE)
        summary = [f"{name}: {counts}" for name, counts in self.benchmarks.items()]
        unblessed = [f"{name}: not blessed" for name in self.unblessed]
        return "\n".join(
            [*results, *missing, *unplanned, *not_compared, *stale, *summary, *unblessed]
        )


def check(suite: Suite, benchmarks: Sequence[str], *, elsewhere: bool = False) -> SuiteCheck:
    """Compare the finished runs of some benchmarks with their blessed numbers.

    Benchmarks without blessed numbers are only listed. The command line may limit the seeds. Then
    the suite plans fewer runs than are blessed, and an evaluation chooses among fewer trained
    models. Such an evaluation is not compared.

    Args:
        suite: The suite.
        benchmarks: The names of the benchmarks.
        elsewhere: True to apply tolerances even on the same machine.

    Raises:
        DefinitionError: No run of the benchmarks is finished or can be compared, none of the
            benchmarks is blessed, or a csv of blessed numbers is damaged.
        DataError: A ``metrics.json`` or a file of records is damaged, or a json with the origin of
            blessed numbers is missing or damaged.
    """
    runs = [run for run in suite.runs if run.benchmark in benchmarks]
    if not any(run.metrics_file.exists() for run in runs):
        raise DefinitionError(
            f"no run of {', '.join(benchmarks)} in the suite '{suite.name}' is finished: "
            f"`make run SUITE={suite.name}`; give `make check` the same SEEDS as `make run`"
        )
    all_blessed = blessed_benchmarks(suite)
    unblessed = [name for name in benchmarks if name not in all_blessed]
    if len(unblessed) == len(benchmarks):
        raise DefinitionError(
            f"no numbers of {', '.join(benchmarks)} in the suite '{suite.name}' are blessed: "
            f"`make bless SUITE={suite.name}`"
        )
    # The blessed numbers are read before the runs, which take longer. So a damaged file is reported
    # at once.
    blessed = {}
    for name in benchmarks:
        if name in all_blessed:
            blessed[name] = read_reference(suite.name, name)

    # by benchmark
    compared = {}
    with_other_choices = {}
    old_and_new = {}
    stale: list[NameAndSeed] = []
    for name, before in blessed.items():
        finished = _finished_records(suite, name)
        runs_with_other_choices = _with_other_choices(suite, name, finished)
        records = [
            record
            for record in finished
            if name_and_seed(record.run) not in runs_with_other_choices
        ]
        after = collect_numbers(records)
        # Only the blessed numbers of finished runs are compared. Those of the other runs would be
        # listed one by one as missing.
        before_of_finished = rows_of_runs(before, [record.run for record in records])
        compared[name] = records
        with_other_choices[name] = runs_with_other_choices
        old_and_new[name] = OldAndNew(before_of_finished, after)
        # `after.code` is the digest of this checkout's code
        stale += _runs_of_other_code(records, after.code)
    if any(with_other_choices.values()) and not any(compared.values()):
        raise DefinitionError(
            f"the finished runs of {', '.join(benchmarks)} choose among other trained models than "
            f"the blessed runs of the suite '{suite.name}', so they are not compared; run all seeds"
        )
    results = compare_benchmarks(suite, old_and_new.values(), elsewhere=elsewhere)

    counts = {}
    for name, before in blessed.items():
        counts[name] = _count(
            suite, name, before, old_and_new[name].after, with_other_choices[name], results
        )
    return SuiteCheck(
        results=results, benchmarks=counts, finished=compared, stale=stale, unblessed=unblessed
    )


def _with_other_choices(
    suite: Suite, benchmark: str, records: Iterable[Record]
) -> list[NameAndSeed]:
    """Return the evaluations that choose among other trained models than in the plain suite.

    The plain suite has no values of the command line. The blessed runs are its runs.
    """
    candidates_of_blessed = {}
    for run in plain_suite(suite.name).runs_of(benchmark):
        candidates_of_blessed[name_and_seed(run)] = run.candidates

    evaluations = []
    for record in records:
        key = name_and_seed(record.run)
        # a run that the plain suite lacks is new, and compare() reports it
        if key not in candidates_of_blessed:
            continue
        if record.run.candidates != candidates_of_blessed[key]:
            evaluations.append(key)
    return evaluations


def _finished_records(suite: Suite, benchmark: str) -> list[Record]:
    """Return the records of a benchmark's runs that have a ``metrics.json`` here."""
    found = find_finished(suite, benchmark)
    # a run whose metrics.json was deleted may still have a collected record
    return [record for record in found.records if record.run.metrics_file.exists()]


def _runs_of_other_code(records: Iterable[Record], code: str) -> list[NameAndSeed]:
    """Return the runs that were made by other code than the code with this digest."""
    runs = []
    for record in records:
        if record.metrics.environment.code != code:
            runs.append(name_and_seed(record.run))
    return runs


def _count(
    suite: Suite,
    benchmark: str,
    blessed: Numbers,
    after: Numbers,
    with_other_choices: Sequence[NameAndSeed],
    results: Sequence[CheckResult],
) -> BenchmarkCheck:
    """Count the compared numbers and runs of a benchmark.

    Args:
        suite: The suite.
        benchmark: The name of the benchmark.
        blessed: All its blessed numbers.
        after: The numbers of its compared runs.
        with_other_choices: Its finished runs that are not compared.
        results: The comparisons of all benchmarks.
    """
    num_equal = 0
    num_different = 0
    for result in results:
        num_equal += result.equal.get(benchmark, 0)
        is_of_benchmark = result.differences["benchmark"] == benchmark
        num_different += int(is_of_benchmark.sum())

    planned = [name_and_seed(run) for run in suite.runs_of(benchmark)]
    planned_with_all_seeds = {
        name_and_seed(run) for run in plain_suite(suite.name).runs_of(benchmark)
    }
    finished = {*names_and_seeds(after), *with_other_choices}
    all_blessed = set(names_and_seeds(blessed))
    return BenchmarkCheck(
        num_equal=num_equal,
        num_different=num_different,
        num_planned=len(planned),
        missing=[run for run in planned if run not in finished],
        unplanned=sorted(all_blessed - planned_with_all_seeds),
        with_other_choices=with_other_choices,
    )


def compare_benchmarks(
    suite: Suite, numbers: Iterable[OldAndNew], *, elsewhere: bool = False
) -> list[CheckResult]:
    """Compare the new numbers of several benchmarks with the blessed ones.

    Benchmarks may be blessed one by one. Those that were blessed with the same code are compared
    together, so that the result describes each pair of machines once.

    Args:
        suite: The suite.
        numbers: The old and new numbers of each benchmark.
        elsewhere: True to apply tolerances even on the same machine.
    """
    # by the digest of the code that the blessed numbers have
    numbers_by_code: dict[str, list[OldAndNew]] = {}
    for old_and_new in numbers:
        numbers_by_code.setdefault(old_and_new.before.code, []).append(old_and_new)

    results = []
    for numbers_of_code in numbers_by_code.values():
        before = _join([old_and_new.before for old_and_new in numbers_of_code])
        after = _join([old_and_new.after for old_and_new in numbers_of_code])
        failures: list[str] = []
        for old_and_new in numbers_of_code:
            failures += old_and_new.failures
        result = compare(before, after, suite.name, elsewhere=elsewhere, failures=failures)
        results.append(result)
    return results


def _join(numbers: Sequence[Numbers]) -> Numbers:
    """Join the numbers of several benchmarks that the same code made."""
    rows = pd.concat([of_benchmark.rows for of_benchmark in numbers], ignore_index=True)
    machines: dict[str, Mapping[str, str]] = {}
    for of_benchmark in numbers:
        machines.update(of_benchmark.machines)
    return Numbers(rows, machines, numbers[0].code)


def name_and_seed(run: Run) -> NameAndSeed:
    """Return the name of a run without its seed, and the seed."""
    return name_without_seed(run), run.seed


def names_and_seeds(numbers: Numbers) -> list[NameAndSeed]:
    """Return the name and the seed of the run of each row."""
    return list(zip(numbers.rows["run"], numbers.rows["seed"], strict=True))


def rows_of_runs(numbers: Numbers, runs: Iterable[Run]) -> Numbers:
    """Return only the numbers of some runs."""
    wanted = {name_and_seed(run) for run in runs}
    is_wanted = [run_of_row in wanted for run_of_row in names_and_seeds(numbers)]
    # with a type, because pandas would take an empty list for a list of columns
    mask = pd.Series(is_wanted, numbers.rows.index, dtype=bool)
    return replace(numbers, rows=numbers.rows[mask])


def _group_lines(what: str, runs: Sequence[NameAndSeed]) -> list[str]:
    """Write a line for each group of runs that differ only in their seed.

    The lines begin with ``what``, such as ``missing``.
    """
    seeds_by_name: dict[str, list[int]] = {}
    for name, seed in runs:
        seeds_by_name.setdefault(name, []).append(seed)

    lines = []
    for name, seeds in seeds_by_name.items():
        noun = "run" if len(seeds) == 1 else "runs"
        lines.append(f"{what}: {len(seeds):,} {noun} of {name} ({_seeds_text(seeds)})")
    if len(lines) > _MOST_GROUPS:
        num_more = len(lines) - _MOST_GROUPS
        noun = "group" if num_more == 1 else "groups"
        return [*lines[:_MOST_GROUPS], f"{what}: and {num_more:,} more {noun}"]
    return lines


def _seeds_text(seeds: Sequence[int]) -> str:
    """Format seeds, such as ``seed 3``, ``seeds 0 to 15`` or ``seeds 0, 2, 5``."""
    ordered = sorted(seeds)
    first = ordered[0]
    last = ordered[-1]
    if first == last:
        return f"seed {first}"
    if ordered == list(range(first, last + 1)):
        return f"seeds {first} to {last}"
    return "seeds " + ", ".join(str(seed) for seed in ordered)
