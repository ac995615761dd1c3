"""Mirror finished runs to MLflow. The files are the truth; the mirror can be made again at any time."""

from __future__ import annotations

import hashlib
import logging
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock
from mlflow.entities import Metric, Param, RunInfo, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH
from sqlalchemy.exc import SQLAlchemyError

from benchmarks.harness.base import paths
from benchmarks.harness.base.errors import DefinitionError, RunError, first_line
from benchmarks.harness.base.secrets import without_passwords
from benchmarks.harness.planning.runs import Run, canonical_json
from benchmarks.harness.results.records import GROUP_KEYS, collect_from, read_metrics
from emoe.permissions import share

_ID, _CONTENT, _PARENT = "emoe.run_id", "emoe.content", "mlflow.parentRunId"
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
    with FileLock(paths.RESULTS / ".mirror.lock"):  # SQLite does not stand parallel writers
        try:
            _create_file(uri)
            store = _Store(uri)
            counts = {"added": 0, "replaced": 0, "unchanged": 0}
            for benchmark in dict.fromkeys(run.benchmark for run in runs):
                found = store.experiment(benchmark)
                for word in found.write([run for run in runs if run.benchmark == benchmark]):
                    counts[word] += 1
                found.write_figures((figures or {}).get(benchmark, ()))
        except (MlflowException, SQLAlchemyError) as error:
            said = without_passwords(first_line(error))
            raise RunError(f"MLflow at {without_passwords(uri)}: {said}") from None
    return counts


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


class _Store:
    """An MLflow store."""

    def __init__(self, uri: str) -> None:
        self.uri, self.client = uri, MlflowClient(uri)

    def experiment(self, name: str) -> _Experiment:
        """The experiment of a benchmark, made where it is not there."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            # a server keeps artifacts itself
            location = None if self.uri.startswith("http") else (paths.RESULTS / "mlflow" / name).resolve().as_uri()
            return _Experiment(self, str(self.client.create_experiment(name, location, _KIND)))
        if found.lifecycle_stage == "deleted":
            raise DefinitionError(
                f"MLflow's experiment '{name}' is deleted; restore it with `mlflow experiments restore` or choose another tracking_uri"
            )
        return _Experiment(self, str(found.experiment_id))


class _Experiment:
    """What MLflow has of a benchmark: by id, MLflow's own id of it and a digest of what was written last."""

    def __init__(self, store: _Store, identifier: str) -> None:
        self._store, self._client, self._identifier = store, store.client, identifier
        self._known: dict[str, tuple[str, str | None]] = {}
        for found in self._all_runs():
            name, content = found.data.tags[_ID], found.data.tags.get(_CONTENT)
            if name in self._known:  # another results folder wrote it at the same time
                self._client.delete_run(found.info.run_id)
            else:
                self._known[name] = (found.info.run_id, content)

    def _all_runs(self) -> Iterator[Any]:
        token = None
        while True:
            page = self._client.search_runs(
                [self._identifier], filter_string=f"tags.`{_ID}` != ''", max_results=1000, page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def write(self, runs: list[Run]) -> Iterator[str]:
        """Write runs and the means of their seeds; yields what was done with each."""
        read = [(run, read_metrics(run)) for run in runs]
        records = collect_from(read)
        numbers = dict(iter(records.groupby("run_id", sort=False)))
        times = {run.id: _times(run, metrics) for run, metrics in read}
        parents: dict[str, str] = {}
        for names, group in records.groupby(GROUP_KEYS, sort=False):
            name = " / ".join(str(found) for found in names[1:] if found != "")
            members = list(dict.fromkeys(group["run_id"]))
            began, ended = zip(*(times[member] for member in members), strict=True)
            parents |= dict.fromkeys(members, self._write_parent(name, group, (min(began), max(ended)), len(members)))
        for run, metrics in read:
            content = hashlib.sha256(canonical_json(metrics).encode()).hexdigest()
            before = self._known.get(run.id)
            if before and before[1] == content:
                yield "unchanged"
                continue
            if before:
                self._client.delete_run(before[0])
            self._write_run(run, metrics, numbers[run.id], times[run.id], {_PARENT: parents[run.id], _CONTENT: content})
            yield "replaced" if before else "added"

    def _write_parent(self, name: str, group: pd.DataFrame, times: tuple[int, int], seeds: int) -> str:
        by_number = group.groupby(["part", "eval_task", "metric"], sort=False)["value"]
        means = {_named(*names): float(value) for names, value in by_number.mean().items()}
        means |= {f"{_named(*names)}.std": float(value) for names, value in by_number.std().dropna().items()}
        content = hashlib.sha256(canonical_json([means, times, seeds]).encode()).hexdigest()
        identifier, before = self._known.get(name, (None, None))
        if identifier is None:
            identifier = self._create(name, times[0], {_ID: name}).run_id
        if before != content:
            now = round(time.time() * 1000)  # the newest of a name is what MLflow shows
            self._client.set_terminated(identifier, end_time=times[1])
            self._log(
                identifier,
                [Metric(key, value, now, 0) for key, value in {**means, "seeds": seeds}.items()],
                [],
                {_CONTENT: content},
            )
            self._known[name] = (identifier, content)
        return identifier

    def _write_run(
        self, run: Run, metrics: dict[str, Any], numbers: pd.DataFrame, times: tuple[int, int], tags: dict[str, str]
    ) -> None:
        environment = metrics["environment"]
        about = {
            _ID: run.id,
            _PARENT: tags[_PARENT],
            "benchmark": run.benchmark,
            "mlflow.source.git.commit": str(environment["git_commit"]),
            "git_dirty": str(environment["git_dirty"]),
            "processor": environment["processor"],
        }
        info = self._create(run.id, times[0], about)
        identifier = info.run_id
        self._client.set_terminated(identifier, end_time=times[1])
        folder = paths.RUNS / run.folder
        self._keep(info.artifact_uri, [folder / name for name in _ARTIFACTS])
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
        parameters = [Param(_plain(key), _shortened(str(value))) for key, value in _flat(run.spec)]
        # the digest last, so that a run whose writing was cut short is written again
        self._log(identifier, logged, parameters, {_CONTENT: tags[_CONTENT]})
        self._known[run.id] = (identifier, tags[_CONTENT])

    def write_figures(self, figures: Sequence[Path]) -> None:
        """Keep pictures of the benchmark, in a run of their own."""
        there = [path for path in figures if path.exists()]
        if not there:
            return
        name = f"figures of {there[0].parents[1].name}"
        content = hashlib.sha256(b"".join(path.read_bytes() for path in there)).hexdigest()
        identifier, before = self._known.get(name, (None, None))
        if before != content:
            ended = round(max(path.stat().st_mtime for path in there) * 1000)
            info = self._client.get_run(identifier).info if identifier else self._create(name, ended, {_ID: name})
            self._client.set_terminated(info.run_id, end_time=ended)
            self._keep(info.artifact_uri, there)
            self._client.set_tag(info.run_id, _CONTENT, content)

    def _create(self, name: str, began: int, tags: dict[str, str]) -> RunInfo:
        return self._client.create_run(self._identifier, began, tags, name).info

    def _keep(self, place: str | None, files: Sequence[Path]) -> None:
        repository = get_artifact_repository(str(place), tracking_uri=self._store.uri)
        for file in files:
            if file.exists():
                repository.log_artifact(str(file))

    def _log(self, identifier: str, metrics: list[Metric], parameters: list[Param], tags: dict[str, str]) -> None:
        self._client.log_batch(identifier, metrics, parameters, [RunTag(key, value) for key, value in tags.items()])


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


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _flat(below, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
