"""Read finished runs, and collect them into one tidy frame with a row for each number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from annotated_types import MinLen
from pydantic import BaseModel, ConfigDict, ValidationError

from benchmarks.harness.base import RESULTS, RUNS, DataError, DefinitionError, first_problem, read_json
from benchmarks.harness.config.benchmark import OOD_MEAN, load_benchmark
from benchmarks.harness.config.catalogue import COST, LOADS, MODEL, load_metrics
from benchmarks.harness.config.runs import Run, trained_sets
from benchmarks.harness.results.statistics import information_numbers

RUN_KEYS = ["benchmark", "model", "task", "method", "protocol", "variant", "learning_rate", "seed"]
GROUP_KEYS = [key for key in RUN_KEYS if key != "seed"]
AS = " as "  # in a part: separates it from the method that the model was converted to
_MAY_DIVERGE = ("loss", "nats_per_byte")  # null if the model diverged
_ROUNDING = 1e-6  # tolerance of range checks
ROUTING = (*LOADS, *information_numbers("class", "environment", "task"))


Scores = dict[str, dict[str, Annotated[dict[str, float | None], MinLen(1)]]]  # by part, set and metric
Curve = list[dict[str, float | None]]


class Metrics(BaseModel):
    """Define the parts of a ``metrics.json``; ``Benchmark.recorded`` lists a benchmark's required parts."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    run_id: str
    cost: dict[str, Any]  # seconds, peak memory in MB, precision
    environment: dict[str, Any]  # machine, packages, commit, and their fingerprint
    scores: Scores | None = None
    measured: dict[str, Annotated[dict[str, float], MinLen(1)]] | None = None  # by candidate
    transformed: dict[str, dict[str, Scores]] = {}  # scores after conversion to another method
    data: dict[str, dict[str, Any]] | None = None  # rows and their labels, by set
    model: dict[str, Any] | None = None
    routing: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None  # expert use by class; empty for a dense model
    matrix: dict[str, Any] | None = None  # activations by task and neuron
    tasks: dict[str, dict[str, Any]] | None = None  # questions: scores, categories, subjects, right answers
    answers: list[dict[str, str]] | None = None
    chosen: dict[str, str | float] | None = None  # evaluated run, for runs without training
    epochs: Curve = []
    dev_curve: Curve = []
    held_out_curve: Curve = []
    records: Curve | None = None  # DomainBed's records, every few steps
    curve: list[float | None] = []  # training losses
    confusion: dict[str, list[list[int]]] | None = None
    classes: list[str] | None = None


def records_file(suite: str, benchmark: str, part: str | None = None) -> Path:
    """Return the file of the records of a benchmark's runs, or of the runs of one of its parts."""
    name = f"{benchmark}_{part}" if part else benchmark
    return RESULTS / suite / "records" / f"{name}.jsonl"


def read_metrics(run: Run, root: Path = RUNS) -> dict[str, Any]:
    """Read and check the ``metrics.json`` of a finished run."""
    path = root / run.folder / "metrics.json"
    if not path.exists():
        raise DefinitionError(f"{path} does not exist: the run is not finished (`snakemake --cores all {path}`)")
    content = read_json(path, dict[str, Any], _rerun_advice(path))
    check_content(run, content, path)
    return content


def check_finished(runs: Sequence[Run], which: str, command: str) -> None:
    """Raise an error that counts the unfinished runs, if there are any.

    The error contains ``which``, a description of the runs, and the ``command`` that finishes them.
    """
    missing = sum(not (RUNS / run.folder / "metrics.json").exists() for run in runs)
    if missing:
        verb, them = ("is", "it") if missing == 1 else ("are", "them")
        raise DefinitionError(f"{missing:,} of {len(runs):,} runs {which} {verb} missing; make {them} with `{command}`")


def check_content(run: Run, content: Mapping[str, Any], path: Path) -> None:
    """Check that a ``metrics.json`` has all parts of its run, and that its numbers are in range (metrics.yaml).

    Errors name the file and the part or number.
    """
    advice = _rerun_advice(path)
    try:
        _check_parts(run, Metrics.model_validate(content))
        numbers = list(run_numbers(run, content))
    except ValidationError as error:
        raise DataError(f"{path} is damaged: {first_problem(error)}; {advice}") from None
    except (LookupError, ValueError, TypeError) as error:
        raise DataError(f"{path} lacks a part that such a run records ({error}); {advice}") from None
    metrics = load_metrics()
    for part, task, name, value in numbers:
        low, high = metrics[name].range if name in metrics else (None, None)
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        if not isinstance(value, (int, float)) or not low - _ROUNDING <= value <= high + _ROUNDING:
            number = " ".join(filter(None, (part, task, name)))
            raise DataError(f"{path}: {number} is {value!r}, not a number from {low:g} to {high:g}; {advice}")


def _rerun_advice(path: Path) -> str:
    return f"delete it and run `snakemake --cores all {path}`"


def _check_parts(run: Run, metrics: Metrics) -> None:
    """Raise a ValueError if a part of a benchmark's runs is missing, or if the file belongs to another run."""
    if metrics.run_id != run.id:
        raise ValueError(f"it belongs to the run '{metrics.run_id}'")
    needed = load_benchmark(run.benchmark).recorded
    if missing := [part for part in needed if getattr(metrics, part) is None]:
        raise ValueError(f"'{missing[0]}' is missing")
    if "scores" in needed and not any((metrics.scores or {}).values()):
        raise ValueError("'scores' has no number")


def collect(runs: Iterable[Run], root: Path = RUNS) -> pd.DataFrame:
    """Read runs and collect their numbers; see :func:`collect_from`."""
    return collect_from((run, read_metrics(run, root)) for run in runs)


def collect_from(read: Iterable[tuple[Run, dict[str, Any]]]) -> pd.DataFrame:
    """Collect the numbers of runs from their ``metrics.json``, a row for each number.

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
    for run, metrics in read:
        judging, keys = _main_metrics(run), run_keys(run).values()
        for part, task, metric, value in run_numbers(run, metrics):
            is_score = metric == judging.get((part.partition(AS)[0], task), "score")
            rows.append((*keys, run.id, part, task, metric, value, is_score))
    return pd.DataFrame(rows, columns=[*RUN_KEYS, "run_id", "part", "eval_task", "metric", "value", "is_score"])


def _main_metrics(run: Run) -> dict[tuple[str, str], str]:
    """Map each part and set to its main metric: the task's own, or the paper's out of domain."""
    parts, sets = ("dev", "dev_best", "test"), trained_sets(run.spec)
    metrics = {(part, task["name"]): task.get("metric", "") for part in parts for task in sets}
    return metrics | {("ood", other["name"]): other["ood_metrics"][0] for other in run.spec["ood"]}


def run_keys(run: Run) -> dict[str, Any]:
    """Return a run's values of :data:`RUN_KEYS`."""
    spec = run.spec
    names = [spec[key]["name"] for key in ("model", "task", "method")]
    values = (run.benchmark, *names, spec.get("protocol", ""), spec["variant"], spec["learning_rate"], spec["seed"])
    return dict(zip(RUN_KEYS, values, strict=True))


def run_numbers(run: Run, metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """Yield part, set, metric and value of every number of a run."""
    task = run.spec["task"]["name"]
    if "measured" in metrics:
        for candidate, values in metrics["measured"].items():
            for name, value in values.items():
                yield task, candidate, name, value
        return
    yield from _score_numbers(run, metrics["scores"])
    for method, content in metrics.get("transformed", {}).items():
        yield from _score_numbers(run, content["scores"], AS + method)
    if "epochs" in metrics and run.spec["task"]["splits"]["test"] is not None:
        metric = run.spec["task"]["metric"]
        yield "dev_best", task, metric, max(entry[metric] for entry in metrics["epochs"])
    for part, names in (("cost", COST), ("model", MODEL), ("routing", ROUTING)):
        for name in names:
            if name in metrics.get(part, ()):
                yield part, "", name, metrics[part][name]


def _score_numbers(run: Run, scores: Mapping[str, Any], suffix: str = "") -> Iterator[tuple[str, str, str, float]]:
    """Yield part, set, metric and value of all scores, and of the OOD mean; the suffix is appended to each part."""
    for part, by_task in scores.items():
        for name, values in by_task.items():
            for key, value in values.items():
                if value is not None or key not in _MAY_DIVERGE:
                    yield part + suffix, name, key, value
    ood = [scores["ood"][other["name"]][other["ood_metrics"][0]] for other in run.spec["ood"]]
    if ood:
        yield OOD_MEAN + suffix, "", "score", sum(ood) / len(ood)


def scores_of(records: pd.DataFrame, part: str) -> pd.DataFrame:
    """Return the rows of a part that hold the main metric of each set, renamed to ``score``."""
    return records[(records["part"] == part) & records["is_score"]].assign(metric="score")
