"""Read the records of finished runs, and tabulate their numbers.

A record is a finished run with the content of its ``metrics.json``. The workflow collects the records of a benchmark in
one file, so that each ``metrics.json`` is read once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from benchmarks.harness.config.runs import Run, trained_sets
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.config.yaml import Strict
from benchmarks.harness.results.content import Metrics, Scores, rerun_advice
from benchmarks.harness.results.files import records_file
from benchmarks.harness.results.statistics import information_numbers

RUN_KEYS = ["benchmark", "model", "task", "method", "protocol", "variant", "learning_rate", "seed"]
GROUP_KEYS = [key for key in RUN_KEYS if key != "seed"]
AS = " as "  # in a part: separates it from the method that the model was converted to
_MAY_DIVERGE = ("loss", "nats_per_byte")  # null if the model diverged
_ROUNDING = 1e-6  # tolerance of range checks
ROUTING = (*LOADS, *information_numbers("class", "environment", "task"))


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
    """Read and check the ``metrics.json`` of a finished run below the folder ``root``."""
    path = root / run.folder / "metrics.json"
    if not path.exists():
        raise DefinitionError(
            f"{path} does not exist: the run is not finished (`snakemake --cores all {path}`)"
        )
    content = read_bytes(path, rerun_advice(path))
    metrics = check_metrics(run, content, path)
    return Record(run, metrics, hashlib.sha256(content).hexdigest())


def collect(suite: Suite, benchmark: str, part: str | None = None) -> list[Path]:
    """Write the records of a benchmark's runs, or of the runs of one of its parts.

    Returns the paths of the files. A file has one line of JSON for each run, in the order of the grid.
    """
    parts = [part] if part else suite.record_parts(benchmark)
    files = []
    for each in parts:
        path = records_file(suite.name, benchmark, each)
        write_lines(path, (_to_line(read_record(run)) for run in suite.runs_of(benchmark, each)))
        files.append(path)
    return files


def _to_line(record: Record) -> str:
    run = record.run
    line = _Line(folder=run.folder, name=run.name, digest=record.digest, metrics=record.metrics)
    return line.model_dump_json(by_alias=True, exclude_unset=True)


def read_records(suite: Suite, benchmark: str, part: str | None = None) -> list[Record]:
    """Read the collected records of a benchmark, or of one of its parts, in the order of the grid.

    Raises:
        DataError: A file of records is missing, damaged, or has the runs of another plan; names the file.
    """
    records: dict[str, Record] = {}
    for each in [part] if part else suite.record_parts(benchmark):
        path = records_file(suite.name, benchmark, each)
        # else Snakemake leaves a file of the wrong content as it is
        advice = (
            f"`snakemake --cores all --force {path} --config suite={suite.name}` collects it again"
        )
        records |= _read_file(path, suite.runs_of(benchmark, each), advice)
    return [records[run.folder] for run in suite.runs_of(benchmark, part)]


def _read_file(path: Path, runs: Sequence[Run], advice: str) -> dict[str, Record]:
    """Read a file that has the records of these runs, by folder."""
    runs_by_folder = {run.folder: run for run in runs}
    records: dict[str, Record] = {}
    for number, text in enumerate(read_bytes(path, advice).splitlines(), start=1):
        try:
            line = _Line.model_validate_json(text)
        except ValidationError as error:
            raise DataError(
                f"{path}, line {number}, is damaged: {first_problem(error)}; {advice}"
            ) from error
        if line.folder not in runs_by_folder:
            raise DataError(
                f"{path} has the run '{line.folder}', which the suite does not plan; {advice}"
            )
        records[line.folder] = Record(runs_by_folder[line.folder], line.metrics, line.digest)
    for folder in runs_by_folder:
        if folder not in records:
            raise DataError(f"{path} lacks the run '{folder}'; {advice}")
    return records


def check_current(record: Record) -> None:
    """Check that a record is that of the present ``metrics.json``.

    Raises:
        DataError: The file has changed since its records were collected.
    """
    path = record.run.metrics_file
    digest = hashlib.sha256(read_bytes(path, rerun_advice(path))).hexdigest()
    if digest != record.digest:
        raise DataError(
            f"{path} has changed since it was collected; run the workflow again, which collects it anew"
        )


def check_finished(runs: Sequence[Run], which: str, command: str) -> None:
    """Raise an error that counts the unfinished runs, if there are any.

    The error contains ``which``, a description of the runs, and the ``command`` that finishes them.
    """
    missing = sum(not run.metrics_file.exists() for run in runs)
    if missing:
        verb, them = ("is", "it") if missing == 1 else ("are", "them")
        raise DefinitionError(
            f"{missing:,} of {len(runs):,} runs {which} {verb} missing; make {them} with `{command}`"
        )


def check_metrics(run: Run, content: bytes, path: Path) -> Metrics:
    """Check that a ``metrics.json`` has all parts of its run, and that its numbers are in range (metrics.yaml).

    Args:
        run: The run.
        content: The content of the file, as JSON.
        path: The path of the file, for messages.

    Returns:
        The content.

    Raises:
        DataError: Names the file, and the part or number.
    """
    advice = rerun_advice(path)
    try:
        metrics = Metrics.model_validate_json(content)
        _check_parts(run, metrics)
        numbers = list(run_numbers(run, metrics))
    except ValidationError as error:
        raise DataError(f"{path} is damaged: {first_problem(error)}; {advice}") from None
    except (LookupError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} lacks a part that such a run records ({error}); {advice}"
        ) from None
    known = load_metrics()
    for part, task, name, value in numbers:
        limits = known[name].range if name in known else [None, None]
        lowest, highest = limits
        low = -math.inf if lowest is None else lowest
        high = math.inf if highest is None else highest
        if not isinstance(value, (int, float)) or not low - _ROUNDING <= value <= high + _ROUNDING:
            number = " ".join(filter(None, (part, task, name)))
            raise DataError(
                f"{path}: {number} is {value!r}, not a number from {low:g} to {high:g}; {advice}"
            )
    return metrics


def _check_parts(run: Run, metrics: Metrics) -> None:
    """Raise a ValueError if a part of a benchmark's runs is missing, or if the file belongs to another run."""
    if metrics.run_id != run.id:
        raise ValueError(f"it belongs to the run '{metrics.run_id}'")
    needed = load_benchmark(run.benchmark).recorded
    missing = [part for part in needed if getattr(metrics, part, None) is None]
    if missing:
        raise ValueError(f"'{missing[0]}' is missing")
    if "scores" in needed and not any((metrics.scores or {}).values()):
        raise ValueError("'scores' has no number")


def tabulate_numbers(records: Iterable[Record]) -> pd.DataFrame:
    """Tabulate the numbers of finished runs, a row for each number.

    The columns are :data:`RUN_KEYS`, ``run_id``, ``part``, ``eval_task``, ``metric``, ``value``, and ``is_score``
    (True for the main metric of a text task). The parts are

    - ``dev``: the kept epoch on the dev split. ``dev_best``: the best epoch there, for clean runs of tasks with their
      own dev split; for other runs the reported score, or the score on held-out rows.
    - ``test``: the reported split of the training task. ``ood``: each other task.
    - ``ood_mean``: the mean of the scores over the other tasks (metric ``score``).
    - ``test as <method>``, ``ood as <method>``, ``ood_mean as <method>``: the same after converting to another method.
    - ``cost``, ``model``, ``routing``: the cost of the run, the sizes of its model and its expert loads.

    For domain generalisation, accuracies come from the record that training-domain validation selects: ``dev`` is the
    mean over the training environments' *out* splits, ``test`` each held-out environment's *in* split. A measurement
    has one part, named after its measure; ``eval_task`` is the candidate.
    """
    rows = []
    for record in records:
        run = record.run
        judging = _main_metrics(run)
        keys = run_keys(run).values()
        for part, task, metric, value in run_numbers(run, record.metrics):
            is_score = metric == judging.get((part.partition(AS)[0], task), "score")
            rows.append((*keys, run.id, part, task, metric, value, is_score))
    return pd.DataFrame(
        rows, columns=[*RUN_KEYS, "run_id", "part", "eval_task", "metric", "value", "is_score"]
    )


def _main_metrics(run: Run) -> dict[tuple[str, str], str]:
    """Map each part and set to its main metric: the task's own, or the paper's out of domain."""
    parts, sets = ("dev", "dev_best", "test"), trained_sets(run.spec)
    metrics = {(part, task["name"]): task.get("metric", "") for part in parts for task in sets}
    return metrics | {("ood", other["name"]): other["ood_metrics"][0] for other in run.spec["ood"]}


def run_keys(run: Run) -> dict[str, Any]:
    """Return a run's values of :data:`RUN_KEYS`."""
    return {key: getattr(run, key) for key in RUN_KEYS}


def run_numbers(run: Run, metrics: Metrics) -> Iterator[tuple[str, str, str, Any]]:
    """Yield part, set, metric and value of every number of a run."""
    task = run.task
    if metrics.measured is not None:
        for candidate, values in metrics.measured.items():
            for name, value in values.items():
                yield task, candidate, name, value
        return
    yield from _score_numbers(run, metrics.scores or {})
    for method, transformed in metrics.transformed.items():
        yield from _score_numbers(run, transformed.scores, AS + method)
    if metrics.epochs and run.spec["task"]["splits"]["test"] is not None:
        metric = run.spec["task"]["metric"]
        scores: list[Any] = [epoch.numbers()[metric] for epoch in metrics.epochs]
        yield "dev_best", task, metric, max(scores)
    for part, content, names in (
        ("cost", metrics.cost, COST),
        ("model", metrics.model, MODEL),
        ("routing", metrics.routing, ROUTING),
    ):
        for name in names:
            number = getattr(content, name, None)
            if number is not None:
                yield part, "", name, number


def _score_numbers(
    run: Run, scores: Scores, suffix: str = ""
) -> Iterator[tuple[str, str, str, Any]]:
    """Yield part, set, metric and value of all scores, and of the OOD mean; the suffix is appended to each part."""
    for part, by_task in scores.items():
        for name, values in by_task.items():
            for key, value in values.items():
                if value is not None or key not in _MAY_DIVERGE:
                    yield part + suffix, name, key, value
    ood: list[Any] = [
        scores["ood"][other["name"]][other["ood_metrics"][0]] for other in run.spec["ood"]
    ]
    if ood:
        yield OOD_MEAN + suffix, "", "score", sum(ood) / len(ood)


def scores_of(records: pd.DataFrame, part: str) -> pd.DataFrame:
    """Return the rows of a part that hold the main metric of each set, renamed to ``score``."""
    return records[(records["part"] == part) & records["is_score"]].assign(metric="score")
