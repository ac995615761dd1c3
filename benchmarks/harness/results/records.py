"""Collect finished runs into one tidy frame: a row a number."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import RUNS
from benchmarks.harness.config.catalogue import load_metrics
from benchmarks.harness.config.kinds import OOD_MEAN, kind_of
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.specs import trained_sets

RUN_KEYS = ["benchmark", "model", "task", "method", "protocol", "variant", "learning_rate", "seed"]
GROUP_KEYS = [key for key in RUN_KEYS if key != "seed"]
# of the ``environment``, what reports show of a machine
MACHINE = (
    "processor",
    "cores",
    "threads",
    "gpus",
    "memory_gb",
    "platform",
    "python",
    "packages",
    "git_commit",
    "git_dirty",
)
AS = " as "  # in a part, before the method that a run's model was made for it
_MAY_DIVERGE = ("loss", "nats_per_byte")
_ROUNDING = 1e-6  # of a share that is computed
COST = ("train_seconds", "step_seconds", "evaluation_seconds", "startup_seconds", "job_seconds", "peak_memory_mb")
MODEL = ("active_neurons", "parameters", "trainable_parameters", "active_parameters", "flops_per_token")
LOADS = ("load_entropy", "load_max_over_mean", "drop_rate")


def information_numbers(*names: str) -> list[str]:
    """What the choice of an expert tells of each of these, and what it tells by chance, by the names of metrics.yaml."""
    return [f"{name}_information{chance}" for name in names for chance in ("", "_chance", "_chance_95")]


ROUTING = (*LOADS, *information_numbers("class", "environment", "task"))


def read_metrics(run: Run, root: Path = RUNS) -> dict[str, Any]:
    """The ``metrics.json`` of a run.

    Raises:
        DefinitionError: the run is not finished, or its file is damaged.
    """
    return read_metrics_file(root / run.folder / "metrics.json", run)


def check_finished(runs: Sequence[Run], which: str, command: str) -> None:
    """See that all runs that a command shows are finished, before it reads any.

    Args:
        runs: that it shows.
        which: they are, for the message.
        command: that makes them.

    Raises:
        DefinitionError: some are missing; says how many.
    """
    missing = sum(not (RUNS / run.folder / "metrics.json").exists() for run in runs)
    if missing:
        verb, them = ("is", "it") if missing == 1 else ("are", "them")
        raise DefinitionError(f"{missing:,} of {len(runs):,} runs {which} {verb} missing; make {them} with `{command}`")


def read_metrics_file(path: Path, run: Run) -> dict[str, Any]:
    """A ``metrics.json`` that may stand elsewhere than its run's.

    Raises:
        DefinitionError: it is not there, is damaged, or belongs to another run.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DefinitionError(
            f"{path} does not exist: the run is not finished (`snakemake --cores all {path}`)"
        ) from error
    return parse_metrics(content, run, str(path))


def parse_metrics(content: bytes, run: Run, where: str) -> dict[str, Any]:
    """The content of a run's ``metrics.json``, wherever it stands.

    Raises:
        DefinitionError: it is damaged, or belongs to another run; names ``where``.
    """
    try:
        found: dict[str, Any] = json.loads(content.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise DefinitionError(
            f"{where} is damaged ({error}); delete it and run `snakemake --cores all {where}`"
        ) from error
    if not isinstance(found, dict) or found.get("run_id") != run.id:
        owner = found.get("run_id") if isinstance(found, dict) else None
        raise DefinitionError(f"{where} belongs to the run {owner!r}; delete it and run it again")
    check_content(run, found, where)
    return found


def repeatable(found: Mapping[str, Any]) -> dict[str, Any]:
    """What of a ``metrics.json`` is the same however often a run is repeated: neither what it took, its clustering included, nor where."""
    kept = {key: value for key, value in found.items() if key not in ("cost", "environment")}
    if layers := kept.get("model", {}).get("conversion"):
        timeless = [{key: value for key, value in layer.items() if key != "seconds"} for layer in layers]
        kept["model"] = {**kept["model"], "conversion": timeless}
    return kept


def check_content(run: Run, found: Mapping[str, Any], where: str) -> None:
    """See that the content of a ``metrics.json`` has the parts that such a run records, and no number beyond its ``range`` in metrics.yaml.

    Raises:
        DefinitionError: it has not; names the file, the number, and what it may be.
    """
    again = f"delete the file and run `snakemake --cores all {where}`"
    try:
        _check_parts(run, found)
        numbers = list(_numbers(run, found))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise DefinitionError(f"{where} lacks something that such a run records ({error!r}); {again}") from error
    metrics = load_metrics()
    for part, task, name, value in numbers:
        low, high = metrics[name].range if name in metrics else (None, None)
        least, most = (-math.inf if low is None else low), (math.inf if high is None else high)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not least - _ROUNDING <= value <= most + _ROUNDING:
            number = " ".join(filter(None, (part, task, name)))
            raise DefinitionError(
                f"{where}: {number} is {value!r}, but has to be a number from {least:g} to {most:g}; {again}"
            )


def _check_parts(run: Run, found: Mapping[str, Any]) -> None:
    is_trained = "training" in run.spec
    is_scored = is_trained or "evaluation" in run.spec
    parts = ["scores" if is_scored else "measured", "cost", "environment"]
    parts += ["data"] if is_scored else []
    parts += ["model"] if is_trained else []
    for part in parts:
        if not isinstance(found[part], dict) or not found[part]:
            raise TypeError(f"'{part}' is empty, or no object")
    if missing := [name for name in MACHINE if name not in found["environment"]]:
        raise KeyError(missing[0])
    if not all(isinstance(layer, dict) for layer in found.get("model", {}).get("conversion", ())):
        raise TypeError("a converted layer is no object")
    if not is_scored:
        return
    if not any(found["scores"].values()):
        raise ValueError("no scores")
    made = [content["scores"] for content in found.get("transformed", {}).values()]
    for part, by_task in itertools.chain.from_iterable(scores.items() for scores in (found["scores"], *made)):
        for task, scores in by_task.items():
            if nothing := [name for name, value in scores.items() if value is None and name not in _MAY_DIVERGE]:
                raise ValueError(f"{part} {task} {nothing[0]} is null")


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def collect(runs: Iterable[Run], root: Path = RUNS) -> pd.DataFrame:
    """One row a number of every run; see :func:`collect_from`."""
    return collect_from((run, read_metrics(run, root)) for run in runs)


def collect_from(read: Iterable[tuple[Run, dict[str, Any]]]) -> pd.DataFrame:
    """One row a number of every run, from their ``metrics.json`` as it was read.

    Columns: those of :data:`RUN_KEYS`, ``run_id``, ``part``, ``eval_task``, ``metric``, ``value``, and ``is_score`` for the
    one number by which a text task is judged. Parts:

    - ``dev``: the kept epoch on the split that selects; ``dev_best``: the best epoch there, of clean runs of tasks with
      a dev split of their own (of the others it is the reported score, or the score of rows held out);
    - ``test``: the reported split of the training task; ``ood``: each other task;
    - ``ood_mean``: mean of the scores over the other tasks (metric ``score``);
    - ``test as <method>``, ``ood as <method>``, ``ood_mean as <method>``: the same of its model, made another method's at the end;
    - ``cost``, ``model``, ``routing``: what the run took and what was trained.

    A run of domain generalisation has the accuracies of the record that training-domain validation chooses among its own: ``dev``, the mean of the
    training environments' *out* splits, and ``test``, each held-out environment's *in* split.

    A measurement has one part, its measure, with the candidate in the place of the evaluation task.
    """
    rows = [
        {
            **_keys(run),
            "run_id": run.id,
            "part": part,
            "eval_task": task,
            "metric": metric,
            "value": value,
            "is_score": metric == judged.get((part.partition(AS)[0], task), "score"),
        }
        for run, judged, found in ((run, _judged_by(run), found) for run, found in read)
        for part, task, metric, value in _numbers(run, found)
    ]
    return pd.DataFrame(rows, columns=[*RUN_KEYS, "run_id", "part", "eval_task", "metric", "value", "is_score"])


def _judged_by(run: Run) -> dict[tuple[str, str], str]:
    """The metric of every part and set by which it is judged: the task's own, out of domain the paper's."""
    own = {
        (part, task["name"]): task.get("metric", "")
        for task in trained_sets(run.spec)
        for part in ("dev", "dev_best", "test")
    }
    return own | {("ood", other["name"]): other["ood_metrics"][0] for other in run.spec["ood"]}


def _keys(run: Run) -> dict[str, Any]:
    spec = run.spec
    return {
        "benchmark": spec["benchmark"],
        "model": spec["model"]["name"],
        "task": spec["task"]["name"],
        "method": spec["method"]["name"],
        "protocol": spec.get("protocol", ""),
        "variant": kind_of(run.benchmark).variant(spec),
        "learning_rate": spec["learning_rate"],
        "seed": spec["seed"],
    }


def _numbers(run: Run, found: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    task = run.spec["task"]["name"]
    if "measured" in found:
        for candidate, values in found["measured"].items():
            for name, value in values.items():
                yield task, candidate, name, value
        return
    yield from _scored(run, found["scores"])
    for method, content in found.get("transformed", {}).items():
        yield from _scored(run, content["scores"], AS + method)
    if "epochs" in found and run.spec["task"]["splits"]["test"] is not None:
        metric = run.spec["task"]["metric"]
        yield "dev_best", task, metric, max(entry[metric] for entry in found["epochs"])
    for part, names in (("cost", COST), ("model", MODEL), ("routing", ROUTING)):
        for name in names:
            if name in found.get(part, ()):
                yield part, "", name, found[part][name]


def _scored(run: Run, scores: Mapping[str, Any], made: str = "") -> Iterator[tuple[str, str, str, float]]:
    """Scores by part, and the mean out of domain; ``made`` says of what."""
    for part, by_task in scores.items():
        for name, values in by_task.items():
            for key, value in values.items():
                if value is not None:  # the loss of a model that diverged
                    yield part + made, name, key, value
    ood = [scores["ood"][other["name"]][other["ood_metrics"][0]] for other in run.spec["ood"]]
    if ood:
        yield OOD_MEAN + made, "", "score", sum(ood) / len(ood)


def scores_of(records: pd.DataFrame, part: str) -> pd.DataFrame:
    """The rows of one part with the number by which its sets are judged, the metric renamed to ``score``."""
    return records[(records["part"] == part) & records["is_score"]].assign(metric="score")
