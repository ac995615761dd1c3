"""List the files of a workflow's targets, and explain why a target cannot be made."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from benchmarks.harness import base as paths
from benchmarks.harness.base import hide_passwords, short_digest
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import PLACE_KEYS, Suite, plain_suite, suite_names
from benchmarks.harness.report.artifacts import (
    Artifacts,
    all_artifacts,
    artifacts_of,
    claim_artifacts,
    numbers_file,
    suite_artifacts,
)
from benchmarks.harness.report.claims import claimed_benchmarks
from benchmarks.harness.report.paper_items import (
    item_benchmarks,
    load_paper,
    missing_items,
    paper_files,
)
from benchmarks.harness.results.files import records_file
from emoe.errors import did_you_mean


def suite_files(suite: Suite) -> list[str]:
    """Return the files that a complete suite has.

    Intermediate files are included, so that a deleted one is made again.
    """
    return [
        str(paths.RESULTS / suite.name / "report.html"),
        str(paths.RESULTS / suite.name / "mlflow.txt"),
        *made_files(suite),
        *number_files(suite),
        *page_files(suite),
        *paper_files(suite),
    ]


def intermediate_files(
    suite: Suite, benchmark: str | None = None, data_set: str | None = None
) -> list[str]:
    """Return the files between runs and tables: of all benchmarks, of one, or of one data set.

    These are the numbers and the kept weights of runs, the lost ``run.json`` of finished runs, the
    collected runs, and the sections of the report. A target that has them as inputs makes a deleted
    one again. Snakemake does not, if the tables that were made from it exist.
    """
    return [
        *metric_files(suite, benchmark, data_set),
        *weight_files(suite, benchmark, data_set),
        *spec_files_to_restore(suite, benchmark, data_set),
        *record_files(suite, benchmark, data_set),
        *section_files(suite, benchmark, data_set),
    ]


def metric_files(
    suite: Suite, benchmark: str | None = None, data_set: str | None = None
) -> list[str]:
    """Return the ``metrics.json`` of all runs, or of the runs of one benchmark or data set."""
    return [str(run.metrics_file) for run in _runs(suite, benchmark, data_set)]


def weight_files(
    suite: Suite, benchmark: str | None = None, data_set: str | None = None
) -> list[str]:
    """Return the weights that runs keep: all runs, or the runs of one benchmark or data set."""
    runs = _runs(suite, benchmark, data_set)
    return [str(run.weights_file) for run in runs if run.keeps_weights]


def _runs(suite: Suite, benchmark: str | None, data_set: str | None) -> Sequence[Run]:
    """Return all runs of a suite, or the runs of one benchmark or data set."""
    if benchmark is None:
        return suite.runs
    return suite.runs_of(benchmark, data_set)


def spec_files_to_restore(
    suite: Suite, benchmark: str | None = None, data_set: str | None = None
) -> list[str]:
    """Return the ``run.json`` files that finished runs of a suite, or of a part of it, have lost.

    An unfinished run writes this file itself.
    """
    runs = _runs(suite, benchmark, data_set)
    finished = [run for run in runs if run.has_all_results]
    return [str(run.spec_file) for run in finished if not run.spec_file.exists()]


def sets_by_record_file(suite: Suite) -> dict[str, tuple[str, str | None]]:
    """Map the name of each file of collected runs to the benchmark and the data set in it.

    The data set is None if the file has the runs of all data sets. A benchmark with separate tables
    for each data set has a file for each data set. The tables of a data set then need no runs of
    other data sets.
    """
    sets_by_file: dict[str, tuple[str, str | None]] = {}
    for benchmark in suite.settings.benchmarks:
        for data_set in suite.sets_with_records(benchmark):
            file_name = artifacts_of(benchmark, data_set).name
            sets_by_file[file_name] = (benchmark, data_set)
    return sets_by_file


def record_files(
    suite: Suite, benchmark: str | None = None, data_set: str | None = None
) -> list[str]:
    """Return the files of collected runs: of all benchmarks, of one, or of one data set."""
    files = []
    for recorded_benchmark, recorded_set in sets_by_record_file(suite).values():
        if _is_wanted(recorded_benchmark, benchmark) and _is_wanted(recorded_set, data_set):
            file = records_file(suite.name, recorded_benchmark, recorded_set)
            files.append(str(file))
    return files


def _is_wanted(name: str | None, wanted: str | None) -> bool:
    """Return True if a name is the wanted one, or if all names are wanted (None)."""
    return wanted is None or name == wanted


def section_files(
    suite: Suite, benchmark: str | None = None, data_set: str | None = None
) -> list[str]:
    """Return the files with sections of the report: of all benchmarks, of one, or of one data set.

    The files of a benchmark include those of its data sets that have their own tables.
    """
    matching = _matching_artifacts(suite, benchmark, data_set)
    return [artifacts.section_file(suite.name) for artifacts in matching]


def _matching_artifacts(
    suite: Suite, benchmark: str | None, data_set: str | None = None
) -> list[Artifacts]:
    """List the tables and figures of all benchmarks, of one, or of one data set.

    The result for a benchmark includes the tables and figures of its data sets.
    """
    matching = []
    for artifacts in suite_artifacts(suite):
        if _is_wanted(artifacts.benchmark, benchmark) and _is_wanted(artifacts.data_set, data_set):
            matching.append(artifacts)
    return matching


def digest_of_runs(suite: Suite, benchmark: str, data_set: str | None) -> str:
    """Return 12 hex digits of a hash over the runs of a benchmark or data set.

    The hash covers the folders of these runs, in the order of the suite's grid.
    """
    folders = [run.folder for run in suite.runs_of(benchmark, data_set)]
    return short_digest("\n".join(folders), 12)


def number_files(suite: Suite) -> list[str]:
    """Return the files of the numbers that claims compare."""
    return [numbers_file(suite.name, name) for name in claimed_benchmarks(suite)]


def output_files(
    suite: Suite, benchmark: str | None = None, data_set: str | None = None
) -> list[str]:
    """Return the files of tables and figures: of all benchmarks, of one, or of one data set.

    The files of all benchmarks include the table and figures of the paper's claims.
    """
    wanted = []
    if benchmark is None and claimed_benchmarks(suite):
        wanted.append(claim_artifacts(suite))
    wanted += _matching_artifacts(suite, benchmark, data_set)
    files = []
    for artifacts in wanted:
        files += artifacts.table_files(suite.name)
        files += artifacts.figure_files(suite.name)
    return files


def page_files(suite: Suite, benchmark: str | None = None) -> list[str]:
    """Return the HTML pages of all benchmarks, or of one."""
    names = [name for name in suite.settings.benchmarks if _is_wanted(name, benchmark)]
    return [str(paths.RESULTS / suite.name / f"{name}.html") for name in names]


def benchmark_files(suite: Suite, benchmark: str) -> list[str]:
    """Return the files of a benchmark that a suite makes; the first is its page."""
    return [*page_files(suite, benchmark), *made_files(suite, benchmark)]


def made_files(
    suite: Suite, benchmark: str | None = None, data_set: str | None = None
) -> list[str]:
    """Return tables, figures and intermediate files: of all benchmarks, of one or of a data set."""
    return [
        *output_files(suite, benchmark, data_set),
        *intermediate_files(suite, benchmark, data_set),
    ]


def item_files(suite: Suite, item: str) -> list[str]:
    """Return the files of a table or figure of the paper; the first ones show it."""
    files = paper_files(suite, item)
    for benchmark in item_benchmarks(load_paper().items[item]):
        if benchmark in suite.settings.benchmarks:
            files += intermediate_files(suite, benchmark)
    return files


def explain_missing_target(target: str, suite: Suite) -> str:
    """Explain in one line why a suite does not make a target, and which suites make it.

    Args:
        target: The name of the target.
        suite: The suite.
    """
    # the tables and figures of the paper that no suite can make, with the reasons
    reasons_by_item = missing_items()
    if target in reasons_by_item:
        return f"{target}: {reasons_by_item[target]}"
    # the paper's other tables and figures
    items = load_paper().items
    if target in items:
        return _explain_not_run(target, item_benchmarks(items[target]), suite)
    # the benchmarks, and their data sets with tables of their own
    for artifacts in all_artifacts():
        if target == artifacts.name:
            return _explain_not_run(
                target, [artifacts.benchmark], suite, data_set=artifacts.data_set
            )
    if target in suite_names():
        return f"'{target}' is a suite: `{_command('', target, suite)}`"
    artifact_names = [artifacts.name for artifacts in all_artifacts()]
    known = ["all", "tables", "report", *artifact_names, *items, *suite_names()]
    return f"there is no target '{target}'{did_you_mean(target, known)}"


def explain_file_of_other_suite(other: str, file: str, suite: Suite) -> str:
    """Explain in one line why a suite does not make a file of another suite."""
    path = paths.RESULTS / other / file
    return (
        f"{path} belongs to the suite '{other}', not to '{suite.name}': "
        f"add `--config suite={other}`"
    )


def _explain_not_run(
    target: str, benchmarks: list[str], suite: Suite, data_set: str | None = None
) -> str:
    """Explain that a suite does not run what a target needs, and name suites that do.

    The command line may have left it out of a suite that otherwise runs it. Then the advice is to
    use this suite without the values that choose runs.

    Args:
        target: The name of the target.
        benchmarks: The benchmarks of which the target needs at least one.
        suite: The suite.
        data_set: The data set that the target needs; None if it is not for a single data set.
    """
    wanted = data_set or " or ".join(benchmarks)
    # the same suite without the values of the command line
    if _makes_any(plain_suite(suite.name), benchmarks, data_set):
        return (
            f"--config leaves {wanted} out of the suite '{suite.name}': "
            f"`{_command(target, suite.name, suite)}`"
        )
    others = [name for name in suite_names() if _makes_any(plain_suite(name), benchmarks, data_set)]
    problem = f"the suite '{suite.name}' does not run {wanted}"
    if not others:
        return f"{problem}; no suite does"
    command = _command(target, others[0], suite)
    return f"{problem}; suites that do: {', '.join(others)} (`{command}`)"


def _command(target: str, suite_name: str, suite: Suite) -> str:
    """Write the command that makes a target with a suite.

    It repeats the folders and the store that the user gave on the command line. A password in the
    store's address is hidden.

    Args:
        target: The name of the target; empty for the whole suite.
        suite_name: The name of the suite that makes the target.
        suite: The suite that the user gave, with the values of the command line.
    """
    words = ["snakemake", "--cores", "all"]
    if target:
        words.append(target)
    words += ["--config", f"suite={suite_name}"]
    for key in PLACE_KEYS:
        if key in suite.overrides:
            value = hide_passwords(str(suite.overrides[key]))
            words.append(shlex.quote(f"{key}={value}"))
    return " ".join(words)


def warn_of_missing_sets(missing: Sequence[str], suite: Suite) -> str:
    """Write a warning, in one line, that runs will fail because data sets are missing.

    Args:
        missing: The names of the missing data sets.
        suite: The suite.
    """
    names = ", ".join(missing)
    # The option replaces the suite's own list, so it repeats that list. A blank would end it.
    excluded = ",".join([*suite.settings.exclude, *missing])
    return (
        f"warning: missing data sets: {names}. Runs that need them will fail. "
        f"`python -m benchmarks data --check --suite {suite.name}` prints their sources. "
        f"`--config exclude=[{excluded}]` leaves them out."
    )


def _makes_any(suite: Suite, benchmarks: list[str], data_set: str | None) -> bool:
    """Return True if a suite makes tables or figures of any of the benchmarks.

    Args:
        suite: The suite.
        benchmarks: The names of the benchmarks.
        data_set: The name of a data set, if only its tables and figures count.
    """
    return any(output_files(suite, benchmark, data_set) for benchmark in benchmarks)
