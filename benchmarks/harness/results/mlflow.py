"""Mirror finished runs to MLflow. The files are the truth; the mirror can be made again at any time."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.entities import Metric, Param
from mlflow.entities import Run as StoredRun
from mlflow.tracking import MlflowClient

from benchmarks.harness import base as paths
from benchmarks.harness.base import RunError, atomic_write, first_line, hold, without_passwords
from benchmarks.harness.config.runs import Run, canonical_json
from benchmarks.harness.results.records import GROUP_KEYS, read_metrics, run_keys, run_numbers

_SETTING, _DIGEST = "emoe.setting", "emoe.digest"
_SQLITE = "sqlite:///"
# the first page of such an experiment in MLflow lists training runs
_KIND = {"mlflow.experimentKind": "custom_model_development"}
_FILES = ("run.json", "metrics.json", paths.LOG)
_MOST = 50_000  # runs that MLflow returns at once


def mirror(runs: Sequence[Run], uri: str, figures: Mapping[str, Sequence[Path]] | None = None) -> dict[str, int]:
    """Write the finished runs that MLflow lacks, or has with other numbers.

    A benchmark is an experiment. Seeds have the tag ``emoe.setting`` in common, by which MLflow's page can group them
    and show their mean. A second mirror writes nothing. Two mirrors of one results folder, or into one SQLite file,
    wait for each other.

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
    client = MlflowClient(uri)
    experiments = {
        name: _Experiment(client, name, keeps_files=uri.startswith("http"))
        for name in dict.fromkeys(run.benchmark for run in runs)
    }
    counts = Counter(added=0, replaced=0, unchanged=0)
    counts.update(experiments[run.benchmark].write_run(run) for run in runs)
    for name, experiment in experiments.items():
        experiment.write_figures([path for path in figures.get(name, ()) if path.exists()])
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
        self._stored = defaultdict[str, list[StoredRun]](list)  # by name
        for run in client.search_runs([self._id], max_results=_MOST):
            self._stored[run.info.run_name].append(run)

    def write_run(self, run: Run) -> str:
        """Write a run unless it is there; return ``added``, ``replaced`` or ``unchanged``."""
        metrics, keys = read_metrics(run), run_keys(run)
        environment, (settings,) = metrics["environment"], pd.json_normalize(run.spec).to_dict("records")
        tags = {
            _SETTING: " / ".join(str(keys[key]) for key in GROUP_KEYS[1:] if keys[key] != ""),
            "mlflow.source.git.commit": str(environment["git_commit"]),
            "git_dirty": str(environment["git_dirty"]),
            "processor": environment["processor"],
        }
        end = (paths.RUNS / run.folder / "metrics.json").stat().st_mtime
        return self._write(
            run.id,
            canonical_json(metrics).encode(),
            (end - metrics["cost"]["job_seconds"], end),
            [paths.RUNS / run.folder / file for file in _FILES],
            tags,
            _numbers(run, metrics, round(end * 1000)),
            [Param(_plain(str(key)), str(value)) for key, value in settings.items()],
        )

    def write_figures(self, files: Sequence[Path]) -> None:
        """Keep the figures of the benchmark in a run of their own."""
        if files:
            end = max(path.stat().st_mtime for path in files)
            content = b"".join(path.read_bytes() for path in files)
            self._write(f"figures of {self._benchmark}", content, (end, end), files)

    def _write(
        self,
        name: str,
        content: bytes,
        times: tuple[float, float],
        files: Sequence[Path],
        tags: Mapping[str, str] | None = None,
        numbers: Sequence[Metric] = (),
        params: Sequence[Param] = (),
    ) -> str:
        """Write a run of MLflow unless it is there with the same content; delete others of its name."""
        digest = hashlib.sha256(content).hexdigest()
        stored = self._stored[name]  # several if two folders wrote it at once
        if [run.data.tags.get(_DIGEST) for run in stored] == [digest]:
            return "unchanged"
        for run in stored:
            self._client.delete_run(run.info.run_id)
        start, end = (round(seconds * 1000) for seconds in times)  # in milliseconds since 1970
        identifier = self._client.create_run(self._id, start, dict(tags or {}), name).info.run_id
        for file in files:
            if file.exists():
                self._client.log_artifact(identifier, str(file))
        self._client.log_batch(identifier, numbers, params)
        self._client.set_terminated(identifier, end_time=end)
        self._client.set_tag(identifier, _DIGEST, digest)  # at the end: an interrupted mirror writes the run again
        return "replaced" if stored else "added"


def _numbers(run: Run, metrics: Mapping[str, Any], time: int) -> list[Metric]:
    """List the numbers of a run, and those over its training with their steps."""
    numbers = [
        Metric(_plain(".".join(filter(None, names))), float(value), time, 0)
        for *names, value in run_numbers(run, metrics)
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


def _plain(name: str) -> str:
    """Replace the characters that MLflow rejects, as in ``+90%``, an environment of ColoredMNIST."""
    return re.sub(r"[^\w\-. :/]", "_", name)
