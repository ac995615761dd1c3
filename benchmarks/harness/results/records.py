"""Read the records of finished runs, and tabulate their numbers.

A record is a finished run with the content of its ``metrics.json``. The workflow collects the
records of a benchmark in one file (or one for each data set with its own tables), so that each
``metrics.json`` is read once.

Each number of a run belongs to a part:

- ``dev``: the kept epoch on the split that selects epoch and hyper-parameters. This is the dev
  split. Tasks without a test split use held-out training rows or the reported split instead.
- ``dev_best``: the best epoch on the dev split, for tasks with a test split.
- ``test``: the reported split of the training task. ``ood``: each other task.
- ``ood_mean``: the mean of the scores over the other tasks (metric ``score``).
- ``test as <method>``, ``ood as <method>``, ``ood_mean as <method>``: the same numbers after the
  trained model was converted to another method.
- ``cost``, ``model``, ``routing``: the cost of the run, the sizes of its model and its expert
  loads.

For domain generalisation, accuracies come from one evaluation during the training, which
training-domain validation selects. There ``dev`` is the mean over the *out* splits of the training
environments, and ``test`` is the *in* split of each held-out environment. A measurement has one
part, named after its measure.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from pydantic import ValidationError

from benchmarks.harness.base import (
    RUNS,
    DataError,
    DefinitionError,
    first_problem,
    read_bytes,
    write_lines,
)
from benchmarks.harness.config.benchmark import OOD_MEAN, load_benchmark
from benchmarks.harness.config.catalogue import COST, LOADS, MODEL, load_metrics
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.config.yaml import Strict
from benchmarks.harness.results.content import Metrics, Recorded, Scores, rerun_advice
from benchmarks.harness.results.files import records_file
from benchmarks.harness.results.statistics import information_metrics

RUN_KEYS = ["benchmark", "model", "task", "method", "protocol", "variant", "learning_rate", "seed"]
GROUP_KEYS = [key for key in RUN_KEYS if key != "seed"]
AS = " as "  # in names of parts, it stands before the method that the model was converted to
# these metrics are null if the model diverged
MAY_DIVERGE = ("loss", "loss_calibrated", "nats_per_byte")
_ROUNDING = 1e-6  # a number may be outside its range by this much
ROUTING = (*LOADS, *information_metrics("class", "environment", "task"))


@dataclass(frozen=True)
class Record:
    """A finished run and what it recorded.

    Attributes:
        run: The run.
        metrics: The checked content of its ``metrics.json``.
        digest: The sha256 of that file.
    """

    run: Run
    metrics: Metrics
    digest: str


class ParsedRecords(NamedTuple):
    """The records of a file.

    Attributes:
        records: The records of runs that the suite plans, by the folder of the run.
        unplanned: The folders of the other runs.
    """

    records: dict[str, Record]
    unplanned: list[str]


class RunNumber(NamedTuple):
    """One number of a run.

    Attributes:
        part: The group of the number, such as ``test`` or ``cost``. The module lists them.
        data_set: The name of the data set. Measurements have the name of the candidate, which is
            one of the compared things. The text is empty for numbers of the whole run.
        metric: The name of the metric.
        value: The number.
    """

    part: str
    data_set: str
    metric: str
    value: Any


class _Line(Strict):
    """One line of a file of records."""

    folder: str
    """Folder of the run below results/runs."""
    name: str
    """Readable name of the run."""
    digest: str
    """sha256 of its metrics.json."""
    metrics: Metrics
    """Content of its metrics.json."""


def read_record(run: Run, root: Path = RUNS) -> Record:
    """Read and check the ``metrics.json`` of a finished run below the folder ``root``.

    Raises:
        DefinitionError: The run is not finished.
        DataError: The file is damaged, belongs to another run, or lacks a section that its
            benchmark must record; see :func:`check_metrics`.
    """
    path = root / run.folder / "metrics.json"
    if not path.exists():
        raise DefinitionError(
            f"{path} does not exist: the run is not finished (`snakemake --cores all {path}`)"
        )
    content = read_bytes(path, rerun_advice(path))
    metrics = check_metrics(run, content, path)
    digest = hashlib.sha256(content).hexdigest()
    return Record(run, metrics, digest)


def collect(suite: Suite, benchmark: str, data_set: str | None = None) -> list[Path]:
    """Read each run's ``metrics.json``, and write the records of a benchmark or of one data set.

    A file has one line of JSON per run, in the order of the grid.

    Args:
        suite: The suite.
        benchmark: The name of the benchmark.
        data_set: The name of one of its data sets; None for all.

    Returns:
        The paths of the written files.
    """
    files = []
    # a file has the runs on one data set, or on all data sets (None)
    for set_in_file in sets_with_files(suite, benchmark, data_set):
        path = records_file(suite.name, benchmark, set_in_file)
        runs = suite.runs_of(benchmark, set_in_file)
        # a generator, so that only one record at a time is in memory
        write_lines(path, (format_record(read_record(run)) for run in runs))
        files.append(path)
    return files


def sets_with_files(suite: Suite, benchmark: str, data_set: str | None) -> list[str | None]:
    """List the data sets whose records have their own file, or only ``data_set`` if it is given.

    The list is ``[None]`` if one file has the records of all runs.
    """
    if data_set:
        return [data_set]
    return suite.sets_with_records(benchmark)


def format_record(record: Record) -> str:
    """Format a record as a line of JSON, without a line end."""
    run = record.run
    line = _Line(folder=run.folder, name=run.name, digest=record.digest, metrics=record.metrics)
    return line.model_dump_json(by_alias=True, exclude_unset=True)


def read_records(suite: Suite, benchmark: str, data_set: str | None = None) -> list[Record] | None:
    """Read the collected records of a benchmark, or of one of its data sets.

    Args:
        suite: The suite.
        benchmark: The name of the benchmark.
        data_set: The name of one of its data sets; None for all.

    Returns:
        The records of the planned runs in the order of the grid. None if a file is missing or lacks
        a planned run.

    Raises:
        DataError: A file of records is damaged. The message names the file.
    """
    records_by_folder: dict[str, Record] = {}
    # a file has the runs on one data set, or on all data sets (None)
    for set_in_file in sets_with_files(suite, benchmark, data_set):
        path = records_file(suite.name, benchmark, set_in_file)
        if not path.exists():
            return None
        # without --force, Snakemake keeps the existing file
        advice = (
            f"`snakemake --cores all --force {path} --config suite={suite.name}` collects it again"
        )
        runs = suite.runs_of(benchmark, set_in_file)
        parsed = parse_records(read_bytes(path, advice), runs, path, advice)
        records_by_folder.update(parsed.records)

    runs = suite.runs_of(benchmark, data_set)
    if any(run.folder not in records_by_folder for run in runs):
        return None
    return [records_by_folder[run.folder] for run in runs]


def parse_records(content: bytes, runs: Sequence[Run], path: Path, advice: str) -> ParsedRecords:
    """Parse the lines of :func:`format_record`.

    Args:
        content: The lines.
        runs: The runs that the suite plans.
        path: The file with the lines, for messages.
        advice: What the user should do about a damaged file. It ends the error message.

    Raises:
        DataError: A line is damaged. The message names the file and the line.
    """
    # a record names its run by the folder, which has the run's id
    runs_by_folder = {run.folder: run for run in runs}
    records: dict[str, Record] = {}
    unplanned: list[str] = []
    for number, text in enumerate(content.splitlines(), start=1):
        try:
            line = _Line.model_validate_json(text)
        except ValidationError as error:
            raise DataError(
                f"{path}, line {number}, is damaged: {first_problem(error)}; {advice}"
            ) from error
        if line.folder in runs_by_folder:
            run = runs_by_folder[line.folder]
            records[line.folder] = Record(run, line.metrics, line.digest)
        else:
            unplanned.append(line.folder)
    return ParsedRecords(records, unplanned)


def is_outdated(record: Record) -> bool:
    """Return True if the run's ``metrics.json`` exists here, but is not that of the record.

    Raises:
        DataError: The file cannot be read.
    """
    path = record.run.metrics_file
    if not path.exists():
        return False
    digest = hashlib.sha256(read_bytes(path, rerun_advice(path))).hexdigest()
    return digest != record.digest


def check_finished(runs: Sequence[Run], which: str, command: str) -> None:
    """Check that all runs have a ``metrics.json``.

    Args:
        runs: The runs.
        which: A description of the runs, for the message.
        command: The command that finishes them, for the message.

    Raises:
        DefinitionError: Some runs are not finished. The message counts them.
    """
    missing = [run for run in runs if not run.metrics_file.exists()]
    if not missing:
        return
    counts = f"{len(missing):,} of {len(runs):,} runs {which}"
    if len(missing) == 1:
        raise DefinitionError(f"{counts} is missing; make it with `{command}`")
    raise DefinitionError(f"{counts} are missing; make them with `{command}`")


def check_metrics(run: Run, content: bytes, path: Path) -> Metrics:
    """Check the content of a ``metrics.json``.

    Args:
        run: The run.
        content: The content of the file, as JSON.
        path: The path of the file, for messages.

    Returns:
        The parsed content.

    Raises:
        DataError: The file is damaged, belongs to another run, lacks a section that its benchmark
            must record, or has a number out of the range in metrics.yaml. The message names the
            file, and the section or number.
    """
    advice = rerun_advice(path)
    try:
        metrics = Metrics.model_validate_json(content)
    except ValidationError as error:
        raise DataError(f"{path} is damaged: {first_problem(error)}; {advice}") from None
    if metrics.run_id != run.id:
        raise DataError(f"{path} belongs to the run '{metrics.run_id}'; {advice}")
    try:
        _check_sections(run, metrics)
        # `list`, because the iterator raises the errors of missing scores only when it is read
        numbers = list(run_numbers(run, metrics))
    except (LookupError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} lacks a part that such a run records ({error}); {advice}"
        ) from None
    _check_ranges(numbers, path)
    return metrics


def _check_ranges(numbers: Iterable[RunNumber], path: Path) -> None:
    """Check that the numbers of a ``metrics.json`` are in the ranges of metrics.yaml.

    Raises:
        DataError: A number is out of its range. The message names the file and the number.
    """
    for number in numbers:
        low, high = _range_of(number.metric)
        if not _is_between(number.value, low, high):
            names = [number.part, number.data_set, number.metric]
            text = " ".join(name for name in names if name)
            raise DataError(
                f"{path}: {text} is {number.value!r}, not a number from {low:g} to {high:g}; "
                f"{rerun_advice(path)}"
            )


def _range_of(metric: str) -> tuple[float, float]:
    """Return the smallest and the largest possible value of a metric.

    A value without a limit is infinite.
    """
    metrics = load_metrics()
    low: float | None = None
    high: float | None = None
    if metric in metrics:
        low, high = metrics[metric].range
    if low is None:
        low = -math.inf
    if high is None:
        high = math.inf
    return low, high


def _is_between(value: object, low: float, high: float) -> bool:
    """Return True if the value is a number from ``low`` to ``high``, up to rounding."""
    if not isinstance(value, (int, float)):
        return False
    return low - _ROUNDING <= value <= high + _ROUNDING


def _check_sections(run: Run, metrics: Metrics) -> None:
    """Check that a ``metrics.json`` has all sections that its benchmark must record.

    Raises:
        ValueError: The file lacks a section, or has no score.
    """
    needed = load_benchmark(run.benchmark).recorded
    for section in needed:
        # a missing section may have an empty default, so the value alone does not show it
        is_given = section in metrics.model_fields_set
        if not is_given or getattr(metrics, section) is None:
            raise ValueError(f"'{section}' is missing")
    if "scores" in needed:
        scores = metrics.scores or {}
        if not any(scores.values()):
            raise ValueError("'scores' has no number")


def tabulate_numbers(records: Iterable[Record]) -> pd.DataFrame:
    """Tabulate the numbers of finished runs, one row per number.

    The columns are :data:`RUN_KEYS`, ``run_id``, ``part``, ``eval_task``, ``metric``, ``value`` and
    ``is_score``. ``part`` is one of the groups that the module lists. ``eval_task`` is a data set,
    or a candidate that a measurement compares. ``value`` is nan for a loss that a run lacks because
    its model diverged. ``is_score`` is True for the main metric of a text task, and for
    ``ood_mean``.
    """
    rows = []
    for record in records:
        run = record.run
        main_metrics = _main_metrics(run)
        for number in _numbers_and_lost_losses(run, record.metrics):
            # a part such as "test as emoe" has the main metrics of "test"
            base_part, _separator, _method = number.part.partition(AS)
            # None for costs and the like, which are not scores
            main_metric = main_metrics.get((base_part, number.data_set))
            is_main = number.metric == main_metric
            # the mean over several data sets has no main metric, but it is a score
            is_ood_mean = base_part == OOD_MEAN
            row = {
                **settings_of_run(run),
                "run_id": run.id,
                "part": number.part,
                "eval_task": number.data_set,
                "metric": number.metric,
                "value": number.value,
                "is_score": is_main or is_ood_mean,
            }
            rows.append(row)
    # the columns are named, so that they exist even without rows
    columns = [*RUN_KEYS, "run_id", "part", "eval_task", "metric", "value", "is_score"]
    return pd.DataFrame(rows, columns=columns)


def _main_metrics(run: Run) -> dict[tuple[str, str], str]:
    """Map each (part, data set) to its main metric.

    It is the task's own metric in domain, and the paper's metric out of domain. It is empty for a
    task without a metric of its own.
    """
    metrics = {}
    for task in run.trained_sets:
        for part in ("dev", "dev_best", "test"):
            metrics[part, task["name"]] = task.get("metric", "")
    for other in run.ood_sets:
        metrics["ood", other["name"]] = _paper_metric(other)
    return metrics


def _paper_metric(ood_set: Mapping[str, Any]) -> str:
    """Return the metric that the paper reports for a data set out of domain."""
    first: str = ood_set["ood_metrics"][0]  # the first is the paper's
    return first


def settings_of_run(run: Run) -> dict[str, Any]:
    """Return a run's values of :data:`RUN_KEYS`."""
    return {key: getattr(run, key) for key in RUN_KEYS}


def run_numbers(run: Run, metrics: Metrics) -> Iterator[RunNumber]:
    """Yield every number of a run that tables show: scores, costs, sizes of the model, and routing.

    Raises:
        LookupError: A score is missing that the run must have.
    """
    for number in _numbers_and_lost_losses(run, metrics):
        is_lost = number.metric in MAY_DIVERGE and math.isnan(number.value)
        if not is_lost:
            yield number


def _numbers_and_lost_losses(run: Run, metrics: Metrics) -> Iterator[RunNumber]:
    """Yield the numbers of :func:`run_numbers`, and nan for each loss of a model that diverged.

    Raises:
        LookupError: A score is missing that the run must have.
    """
    # a measurement has only its measured numbers
    if metrics.measured is not None:
        for candidate, values in metrics.measured.items():
            for name, value in values.items():
                yield RunNumber(run.task, candidate, name, value)
        return

    yield from _score_numbers(run, metrics.scores or {})
    for method, transformed in metrics.transformed.items():
        yield from _score_numbers(run, transformed.scores, AS + method)

    # The best score of any epoch on the dev split. A task without a test split has no such number,
    # because its scores are already those of the dev split.
    if metrics.epochs and run.task_spec["splits"]["test"] is not None:
        metric = run.task_spec["metric"]
        dev_scores: list[Any] = [epoch.numbers()[metric] for epoch in metrics.epochs]
        yield RunNumber("dev_best", run.task, metric, max(dev_scores))

    yield from _numbers_of_section("cost", metrics.cost, COST)
    yield from _numbers_of_section("model", metrics.model, MODEL)
    yield from _numbers_of_section("routing", metrics.routing, ROUTING)


def _numbers_of_section(
    part: str, section: Recorded | None, names: Sequence[str]
) -> Iterator[RunNumber]:
    """Yield the named numbers of a section of metrics.json. A missing number is skipped."""
    for name in names:
        value = getattr(section, name, None)
        if value is not None:
            yield RunNumber(part, "", name, value)


def _score_numbers(run: Run, scores: Scores, suffix: str = "") -> Iterator[RunNumber]:
    """Yield all scores, and the mean of the paper's metric over the data sets out of domain.

    A loss of a model that diverged is nan.

    Args:
        run: The run.
        scores: Its scores by part, data set and metric.
        suffix: A text that is appended to the name of each part.
    """
    for part, scores_of_part in scores.items():
        for data_set, scores_of_set in scores_of_part.items():
            for metric, value in scores_of_set.items():
                has_diverged = value is None and metric in MAY_DIVERGE
                # any other None is an error: it is yielded, and `check_metrics` refuses it
                number = math.nan if has_diverged else value
                yield RunNumber(part + suffix, data_set, metric, number)

    ood_scores: list[Any] = []
    for ood_set in run.ood_sets:
        scores_of_set = scores["ood"][ood_set["name"]]
        ood_scores.append(scores_of_set[_paper_metric(ood_set)])
    if ood_scores:
        mean = sum(ood_scores) / len(ood_scores)
        yield RunNumber(OOD_MEAN + suffix, "", "score", mean)


def scores_of(numbers: pd.DataFrame, part: str) -> pd.DataFrame:
    """Select the main score of each data set in a part such as ``test``.

    ``numbers`` are rows of :func:`tabulate_numbers`. The metric of the selected rows is renamed to
    ``score``.
    """
    is_of_part = numbers["part"] == part
    scores = numbers[is_of_part & numbers["is_score"]]
    return scores.assign(metric="score")
