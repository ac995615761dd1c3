"""Mirror finished runs to MLflow. The files are the truth; the mirror can be made again at any time."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.entities import Metric, Param
from mlflow.entities import Run as StoredRun
from mlflow.tracking import MlflowClient

from benchmarks.harness import base as paths
from benchmarks.harness.base import RunError, atomic_write, first_line, hold, without_passwords
from benchmarks.harness.config.runs import Run, canonical_json
from benchmarks.harness.results.records import GROUP_KEYS, collect_from, read_metrics, run_keys

_SETTING, _DIGEST, _PARENT = "emoe.setting", "emoe.digest", "mlflow.parentRunId"
_SQLITE = "sqlite:///"
# the first page of such an experiment in MLflow lists training runs
_KIND = {"mlflow.experimentKind": "custom_model_development"}
_FILES = ("run.json", "metrics.json", paths.LOG)
_MOST = 50_000  # runs that MLflow returns at once

_Read = list[tuple[Run, dict[str, Any]]]


def mirror(runs: Sequence[Run], uri: str, figures: Mapping[str, Sequence[Path]] | None = None) -> dict[str, int]:
    """Write the finished runs whose settings MLflow lacks, or has with other numbers.

    A benchmark is an experiment, a setting is a parent run with the means of its seeds, and a run is a child. A second
    mirror writes nothing. Two mirrors of one results folder, or into one SQLite file, wait for each other.

    Args:
        runs: The finished runs.
        uri: The tracking store of MLflow.
        figures: The figures of each benchmark.

    Returns:
        The numbers of runs that were ``added``, ``replaced`` and ``unchanged``.

    Raises:
        RunError: The store refuses; names it without its password.
    """
    for name in ("alembic", "mlflow"):  # they report the creation of tables, and errors with tracebacks
        logging.getLogger(name).setLevel(logging.CRITICAL)
    database = Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None
    locked = database or paths.RESULTS / "mlflow"
    locked.parent.mkdir(parents=True, exist_ok=True)
    try:
        with hold(locked.with_name(f".{locked.name}.lock")):
            if database and not database.exists():
                with atomic_write(database) as temporary:  # with the permissions of the umask
                    MlflowClient(f"{_SQLITE}{temporary}").search_experiments(max_results=1)
            return _mirror(runs, uri, figures or {})
    except ModuleNotFoundError as error:
        problem = f"{error}; for PostgreSQL: pip install 'emoe[postgres]'"
    except Exception as error:  # of a database, its driver or a server: MLflow passes them on
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        problem = first_line(cause)
    raise RunError(without_passwords(f"MLflow at {uri}: {problem}"))


def _mirror(runs: Sequence[Run], uri: str, figures: Mapping[str, Sequence[Path]]) -> dict[str, int]:
    counts = Counter(added=0, replaced=0, unchanged=0)
    client = MlflowClient(uri)
    for benchmark in dict.fromkeys(run.benchmark for run in runs):
        settings = defaultdict[str, _Read](list)  # everything but the seed
        for run in runs:
            if run.benchmark == benchmark:
                keys = run_keys(run)
                name = " / ".join(str(keys[key]) for key in GROUP_KEYS[1:] if keys[key] != "")
                settings[name].append((run, read_metrics(run)))
        experiment = _Experiment(client, benchmark, keeps_files=uri.startswith("http"))
        for name, members in settings.items():
            counts[experiment.write_setting(name, members)] += len(members)
        experiment.write_figures([path for path in figures.get(benchmark, ()) if path.exists()])
    return dict(counts)


class _Experiment:
    """The experiment of a benchmark, which is created if it is missing.

    Args:
        client: The client of the store.
        benchmark: The name of the benchmark and of the experiment.
        keeps_files: True for a server, which chooses where files are.
    """

    def __init__(self, client: MlflowClient, benchmark: str, *, keeps_files: bool) -> None:
        self._client, self._benchmark = client, benchmark
        experiment = client.get_experiment_by_name(benchmark)
        location = None if keeps_files else (paths.RESULTS / "mlflow" / benchmark).resolve().as_uri()
        self._id = experiment.experiment_id if experiment else client.create_experiment(benchmark, location, _KIND)
        self._parents = defaultdict[str, list[StoredRun]](list)
        for run in self._search(f"tags.`{_SETTING}` != ''"):
            self._parents[run.data.tags[_SETTING]].append(run)

    def write_setting(self, name: str, members: _Read) -> str:
        """Write a parent with the means of its seeds, and its runs; return ``added``, ``replaced`` or ``unchanged``."""

        def write() -> str:
            records = collect_from(members)
            times = {run.id: _times(run, metrics) for run, metrics in members}
            span = (min(start for start, _ in times.values()), max(end for _, end in times.values()))
            values = records.groupby(["part", "eval_task", "metric"], sort=False)["value"]
            means = {_metric_name(*key): value for key, value in values.mean().items()}
            means |= {f"{_metric_name(*key)}.std": value for key, value in values.std().dropna().items()}
            numbers = [Metric(key, float(value), span[1], 0) for key, value in {**means, "seeds": len(members)}.items()]
            parent = self._log(name, span, {_SETTING: name}, numbers)
            for run, metrics in members:
                environment, (settings,) = metrics["environment"], pd.json_normalize(run.spec).to_dict("records")
                tags = {
                    _PARENT: parent,
                    "benchmark": run.benchmark,
                    "mlflow.source.git.commit": str(environment["git_commit"]),
                    "git_dirty": str(environment["git_dirty"]),
                    "processor": environment["processor"],
                }
                numbers = _numbers(records[records["run_id"] == run.id], metrics, times[run.id][1])
                params = [Param(_plain(str(key)), str(value)) for key, value in settings.items()]
                files = [paths.RUNS / run.folder / file for file in _FILES]
                self._log(run.id, times[run.id], tags, numbers, params, files)
            return parent

        return self._replace(name, "\n".join(canonical_json(metrics) for _, metrics in members).encode(), write)

    def write_figures(self, files: Sequence[Path]) -> None:
        """Keep the figures of the benchmark in a run of their own."""
        if files:
            name, end = f"figures of {self._benchmark}", round(max(path.stat().st_mtime for path in files) * 1000)
            content = b"".join(path.read_bytes() for path in files)
            self._replace(name, content, lambda: self._log(name, (end, end), {_SETTING: name}, files=files))

    def _replace(self, name: str, content: bytes, write: Callable[[], str]) -> str:
        """Write a parent and its runs, unless they are there with the same content; delete others of its name."""
        digest = hashlib.sha256(content).hexdigest()
        stored = self._parents[name]  # several if two folders wrote it at once
        if [run.data.tags.get(_DIGEST) for run in stored] == [digest]:
            return "unchanged"
        for parent in stored:
            for run in (*self._search(f"tags.`{_PARENT}` = '{parent.info.run_id}'"), parent):
                self._client.delete_run(run.info.run_id)
        self._client.set_tag(write(), _DIGEST, digest)  # at the end: an interrupted mirror writes the setting again
        return "replaced" if stored else "added"

    def _log(
        self,
        name: str,
        times: tuple[int, int],
        tags: dict[str, str],
        numbers: Sequence[Metric] = (),
        params: Sequence[Param] = (),
        files: Sequence[Path] = (),
    ) -> str:
        """Write a run of MLflow, and return its identifier."""
        identifier = str(self._client.create_run(self._id, times[0], tags, name).info.run_id)
        for file in files:
            if file.exists():
                self._client.log_artifact(identifier, str(file))
        self._client.log_batch(identifier, numbers, params)
        self._client.set_terminated(identifier, end_time=times[1])
        return identifier

    def _search(self, condition: str) -> Sequence[StoredRun]:
        return self._client.search_runs([self._id], condition, max_results=_MOST)


def _times(run: Run, metrics: Mapping[str, Any]) -> tuple[int, int]:
    """Return the start and the end of a run in milliseconds since 1970."""
    end = (paths.RUNS / run.folder / "metrics.json").stat().st_mtime
    return round((end - metrics["cost"]["job_seconds"]) * 1000), round(end * 1000)


def _numbers(rows: pd.DataFrame, metrics: Mapping[str, Any], time: int) -> list[Metric]:
    """List the numbers of a run, and those over its training with their steps."""
    numbers = [
        Metric(_metric_name(row.part, row.eval_task, row.metric), float(row.value), time, 0)
        for row in rows.itertuples()
    ]
    losses = [{"step": step, "loss": loss} for step, loss in enumerate(metrics.get("curve", []), start=1)]
    histories = {"record": metrics.get("records", []), "epoch": metrics.get("epochs", []), "step": losses}
    for word, entries in histories.items():
        counter = "epoch" if word == "epoch" else "step"
        numbers += [
            Metric(_plain(f"{word}.{key}"), float(value), time, round(entry[counter]))
            for entry in entries
            for key, value in entry.items()
            if key != counter and value is not None  # the loss of a model that diverged
        ]
    return numbers


def _metric_name(*parts: str) -> str:
    return _plain(".".join(filter(None, parts)))


def _plain(name: str) -> str:
    """Replace the characters that MLflow rejects, as in ``+90%``, an environment of ColoredMNIST."""
    return re.sub(r"[^\w\-. :/]", "_", name)
