"""Mirror finished runs to MLflow. The files are the truth; the mirror can be made again at any time."""

from __future__ import annotations

import hashlib
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.entities import Experiment, Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH
from sqlalchemy.exc import SQLAlchemyError

from benchmarks.harness.base import paths
from benchmarks.harness.base.errors import DefinitionError, RunError, first_line
from benchmarks.harness.base.files import share
from benchmarks.harness.base.locks import hold
from benchmarks.harness.base.secrets import without_passwords
from benchmarks.harness.config.runs import Run, canonical_json
from benchmarks.harness.results.contrast import flat
from benchmarks.harness.results.mlflow_store import FinishedRun, Store, open_store
from benchmarks.harness.results.records import GROUP_KEYS, collect_from, read_metrics

_PARENT = "mlflow.parentRunId"
_SQLITE = "sqlite:///"
# what MLflow's pages show first of an experiment: its training runs
_KIND = {"mlflow.experimentKind": "custom_model_development"}
_CUT = "… (whole in run.json, among the files)"
_ARTIFACTS = ("run.json", "metrics.json", paths.LOG)


def mirror(runs: list[Run], uri: str, figures: Mapping[str, Sequence[Path]] | None = None) -> dict[str, int]:
    """Write every finished run that MLflow does not have yet, or has with other numbers.

    One experiment a benchmark; one child a run, with when it began and ended, its numbers, settings and files; one parent
    for the seeds of a setting, with their means. Doing it twice adds nothing, nor does doing it from several processes at once
    in one results folder, which wait for each other.

    Args:
        runs: finished runs.
        uri: MLflow's tracking store.
        figures: pictures of each benchmark, which get a run of their own.

    Returns:
        How many runs were ``added``, ``replaced`` and ``unchanged``.

    Raises:
        RunError: MLflow refuses; names the store, without its password.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)  # silent about creating the store's tables
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    paths.RESULTS.mkdir(exist_ok=True)
    with hold(paths.RESULTS / ".mirror.lock"):  # SQLite does not stand parallel writers
        try:
            _create_file(uri)
            store = open_store(uri)
            counts = Counter(added=0, replaced=0, unchanged=0)
            for benchmark in dict.fromkeys(run.benchmark for run in runs):
                found = _Mirrored(store, benchmark)
                counts.update(found.write([run for run in runs if run.benchmark == benchmark]))
                found.write_figures((figures or {}).get(benchmark, ()))
        except (MlflowException, SQLAlchemyError) as error:
            said = without_passwords(first_line(error))
            raise RunError(f"MLflow at {without_passwords(uri)}: {said}") from None
    return dict(counts)


def _create_file(uri: str) -> None:
    """Create SQLite's file beside its place first: one that is half made would break every later mirror."""
    file = Path(uri.removeprefix(_SQLITE))
    if not uri.startswith(_SQLITE) or file.exists() or file.name.startswith(":"):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        MlflowClient(f"{_SQLITE}{temporary}").search_experiments(max_results=1)
        share(temporary)  # SQLite lets its owner alone write
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


class _Mirrored:
    """What MLflow has of a benchmark: by name, MLflow's own id of it and a digest of what was written last."""

    def __init__(self, store: Store, benchmark: str) -> None:
        self._store, self._experiment = store, _experiment(store, benchmark)
        self._known: dict[str, tuple[str, str | None]] = {}
        for identifier, name, content in store.known(self._experiment.experiment_id):
            if name in self._known:  # another results folder wrote it at the same time
                store.client.delete_run(identifier)
            else:
                self._known[name] = (identifier, content)

    def write(self, runs: list[Run]) -> Counter[str]:
        """Write runs and the means of their seeds; returns with how many of them what was done."""
        read = [(run, read_metrics(run)) for run in runs]
        records = collect_from(read)
        times = {run.id: _times(run, metrics) for run, metrics in read}
        parents: dict[str, str] = {}  # by run, the name of its parent
        means = []
        for names, group in records.groupby(GROUP_KEYS, sort=False):
            means.append(_parent(" / ".join(str(found) for found in names[1:] if found != ""), group, times))
            parents |= dict.fromkeys(group["run_id"], means[-1].name)
        for parent in means:
            identifier, before = self._known.get(parent.name, (None, None))
            if identifier and before != parent.content:
                self._store.update(identifier, parent)
        self._add([parent for parent in means if parent.name not in self._known])

        numbers = dict(iter(records.groupby("run_id", sort=False)))
        counts: Counter[str] = Counter()

        def new() -> Iterator[FinishedRun]:
            for run, metrics in read:
                content = hashlib.sha256(canonical_json(metrics).encode()).hexdigest()
                identifier, before = self._known.get(run.id, (None, None))
                if before == content:
                    counts["unchanged"] += 1
                    continue
                if identifier is None:
                    counts["added"] += 1
                else:
                    counts["replaced"] += 1
                    self._store.client.delete_run(identifier)
                parent_id, _ = self._known[parents[run.id]]
                yield _child(run, metrics, numbers[run.id], times[run.id], parent_id, content)

        self._add(new())
        return counts

    def write_figures(self, figures: Sequence[Path]) -> None:
        """Keep pictures of the benchmark, in a run of their own."""
        there = [path for path in figures if path.exists()]
        if not there:
            return
        name = f"figures of {there[0].parents[1].name}"
        content = hashlib.sha256(b"".join(path.read_bytes() for path in there)).hexdigest()
        ended = round(max(path.stat().st_mtime for path in there) * 1000)
        pictures = FinishedRun(name, content, (ended, ended), {}, files=there)
        identifier, before = self._known.get(name, (None, None))
        if identifier is None:
            self._add([pictures])
        elif before != content:
            self._store.keep(self._store.client.get_run(identifier).info.artifact_uri, there)
            self._store.update(identifier, pictures)

    def _add(self, runs: Iterable[FinishedRun]) -> None:
        for identifier, run in self._store.add(self._experiment, runs):
            self._known[run.name] = (identifier, run.content)


def _experiment(store: Store, name: str) -> Experiment:
    """The experiment of a benchmark, made where it is not there."""
    found = store.client.get_experiment_by_name(name)
    if found is None:
        # a server keeps artifacts itself
        location = None if store.uri.startswith("http") else (paths.RESULTS / "mlflow" / name).resolve().as_uri()
        found = store.client.get_experiment(store.client.create_experiment(name, location, _KIND))
    if found.lifecycle_stage == "deleted":
        raise DefinitionError(
            f"MLflow's experiment '{name}' is deleted; restore it with `mlflow experiments restore` or choose another tracking_uri"
        )
    return found


def _parent(name: str, group: pd.DataFrame, times: Mapping[str, tuple[int, int]]) -> FinishedRun:
    """The means over the seeds of a setting."""
    by_number = group.groupby(["part", "eval_task", "metric"], sort=False)["value"]
    means = {_named(*names): float(value) for names, value in by_number.mean().items()}
    means |= {f"{_named(*names)}.std": float(value) for names, value in by_number.std().dropna().items()}
    members = group["run_id"].unique()
    began, ended = zip(*(times[member] for member in members), strict=True)
    whole = (min(began), max(ended))
    content = hashlib.sha256(canonical_json([means, whole, len(members)]).encode()).hexdigest()
    now = round(time.time() * 1000)  # the newest of a name is what MLflow shows
    metrics = [Metric(key, value, now, 0) for key, value in {**means, "seeds": len(members)}.items()]
    return FinishedRun(name, content, whole, {}, metrics)


def _child(
    run: Run, metrics: dict[str, Any], numbers: pd.DataFrame, times: tuple[int, int], parent: str, content: str
) -> FinishedRun:
    """A run with its numbers, settings and files."""
    environment = metrics["environment"]
    tags = {
        _PARENT: parent,
        "benchmark": run.benchmark,
        "mlflow.source.git.commit": str(environment["git_commit"]),
        "git_dirty": str(environment["git_dirty"]),
        "processor": environment["processor"],
    }
    logged = [
        Metric(_named(row.part, row.eval_task, row.metric), float(row.value), times[1], 0)
        for row in numbers.itertuples()
    ]
    logged += [
        Metric(_plain(f"{word}.{key}"), float(value), times[1], round(entry[counter]))
        for word, counter, entries in _histories(metrics)
        for entry in entries
        for key, value in entry.items()
        if key != counter and value is not None  # the loss of a model that diverged
    ]
    params = {_plain(key): _shortened(str(value)) for key, value in flat(run.spec).items() if value != {}}
    files = [paths.RUNS / run.folder / name for name in _ARTIFACTS]
    return FinishedRun(run.id, content, times, tags, logged, params, files)


def _times(run: Run, metrics: Mapping[str, Any]) -> tuple[int, int]:
    """When a run began and ended, in milliseconds since 1970; of one that was merged, when it was."""
    ended = (paths.RUNS / run.folder / "metrics.json").stat().st_mtime
    return round((ended - metrics["cost"].get("job_seconds", 0.0)) * 1000), round(ended * 1000)


def _histories(metrics: dict[str, Any]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Numbers over training: what they are called, what counts them, and one entry a time."""
    yield "record", "step", metrics.get("records", [])
    yield "epoch", "epoch", metrics.get("epochs", [])
    yield "step", "step", [{"step": step, "loss": loss} for step, loss in enumerate(metrics.get("curve", []), start=1)]


def _named(*parts: str) -> str:
    return _plain(".".join(filter(None, parts)))


def _plain(name: str) -> str:
    """A name without what MLflow does not allow (the environments of ColoredMNIST are called +90%)."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _shortened(value: str) -> str:
    """A value of a length that MLflow takes; it cuts others without a word."""
    return value if len(value) <= MAX_PARAM_VAL_LENGTH else value[: MAX_PARAM_VAL_LENGTH - len(_CUT)] + _CUT
