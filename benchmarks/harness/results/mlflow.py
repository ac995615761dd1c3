"""Mirror finished runs to MLflow. The mirror can be rebuilt from the files at any time."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from benchmarks.harness import base as paths
from benchmarks.harness.base import RunError, atomic_write, first_line, hide_passwords, hold
from benchmarks.harness.config.runs import Run, canonical_json
from benchmarks.harness.results.records import GROUP_KEYS, collect_from, read_metrics, run_keys

_SETTING, _DIGEST, _PARENT = "emoe.setting", "emoe.digest", "mlflow.parentRunId"
_SQLITE = "sqlite:///"
# the first page of such an experiment in MLflow lists training runs
_KIND = {"mlflow.experimentKind": "custom_model_development"}
_FILES = ("run.json", "metrics.json", paths.LOG)
_WAIT_SECONDS = 10.0  # before the second attempt

_Read = Sequence[tuple[Run, dict[str, Any]]]


def mirror(runs: Sequence[Run], uri: str, figures: Mapping[str, Sequence[Path]] | None = None) -> dict[str, int]:
    """Write figures, and the runs of all settings that are new or have changed numbers; return counts of runs.

    A benchmark is an experiment, a setting is a parent run with the means over its seeds, and a run is a child. A
    second call writes nothing. Concurrent calls for one results folder or SQLite file wait for each other. Errors name
    the store without its password. The counts are ``added``, ``replaced`` and ``unchanged``.
    """
    for name in ("alembic", "mlflow"):  # they log the creation of tables, and tracebacks
        logging.getLogger(name).setLevel(logging.CRITICAL)
    database = Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None
    locked = database or paths.RESULTS / "mlflow"
    locked.parent.mkdir(parents=True, exist_ok=True)
    with hold(locked.with_name(f".{locked.name}.lock")):
        for seconds in (_WAIT_SECONDS, 0):  # two mirrors that create the tables of a new database disturb each other
            try:
                if database and not database.exists():
                    with atomic_write(database) as temporary:  # so that it has the permissions of the umask
                        MlflowClient(f"{_SQLITE}{temporary}").search_experiments(max_results=1)
                return _mirror(runs, uri, figures or {})
            except ModuleNotFoundError as error:
                problem = f"{error}; for PostgreSQL: pip install 'emoe[postgres]'"
                break
            except Exception as error:  # MLflow passes on errors of databases, drivers and servers
                problem = first_line(_cause(error))
                time.sleep(seconds)
    raise RunError(hide_passwords(f"MLflow at {uri}: {problem}"))


def _mirror(runs: Sequence[Run], uri: str, figures: Mapping[str, Sequence[Path]]) -> dict[str, int]:
    counts = Counter(added=0, replaced=0, unchanged=0)
    client = MlflowClient(uri)
    for benchmark in dict.fromkeys(run.benchmark for run in runs):
        experiment = _Experiment(client, benchmark, keeps_files=uri.startswith("http"))
        for name, members in _settings([run for run in runs if run.benchmark == benchmark]).items():
            counts[experiment.write_setting(name, members)] += len(members)
        experiment.write_figures([path for path in figures.get(benchmark, ()) if path.exists()])
    return dict(counts)


def _cause(error: BaseException) -> BaseException:
    """Return the root cause of an error."""
    return _cause(error.__cause__) if error.__cause__ else error


def _settings(runs: Sequence[Run]) -> dict[str, list[tuple[Run, dict[str, Any]]]]:
    """Read the metrics of runs, and group the runs by all keys except the seed."""
    groups: dict[str, list[tuple[Run, dict[str, Any]]]] = {}
    for run in runs:
        keys = run_keys(run)
        name = " / ".join(str(keys[key]) for key in GROUP_KEYS[1:] if keys[key] != "")
        groups.setdefault(name, []).append((run, read_metrics(run)))
    return groups


class _Experiment:
    """Write to the experiment of a benchmark; create it if it is missing. A server chooses its own file location."""

    def __init__(self, client: MlflowClient, benchmark: str, *, keeps_files: bool) -> None:
        self._client, self._benchmark = client, benchmark
        experiment = client.get_experiment_by_name(benchmark)
        location = None if keeps_files else (paths.RESULTS / "mlflow" / benchmark).resolve().as_uri()
        self._id = experiment.experiment_id if experiment else client.create_experiment(benchmark, location, _KIND)
        self._parents: dict[str, dict[str, str | None]] = {}  # digests by setting and identifier
        for run in self._search(f"tags.`{_SETTING}` != ''"):
            digests = self._parents.setdefault(run.data.tags[_SETTING], {})
            digests[run.info.run_id] = run.data.tags.get(_DIGEST)

    def write_setting(self, name: str, members: _Read) -> str:
        """Write a parent run with means over seeds, and its runs; return ``added``, ``replaced`` or ``unchanged``."""
        digest = _sha256("\n".join(canonical_json(metrics) for _, metrics in members).encode())
        if self._has(name, digest):
            return "unchanged"
        self._delete(name)
        records = collect_from(members)
        times = {run.id: _times(run, metrics) for run, metrics in members}
        span = (min(start for start, _ in times.values()), max(end for _, end in times.values()))
        values = records.groupby(["part", "eval_task", "metric"], sort=False)["value"]
        means = {_metric_name(*key): value for key, value in values.mean().items()}
        means |= {f"{_metric_name(*key)}.std": value for key, value in values.std().dropna().items()}
        numbers = [Metric(key, float(value), span[1], 0) for key, value in {**means, "seeds": len(members)}.items()]
        parent = self._log(name, span, {_SETTING: name}, numbers)
        rows = dict(iter(records.groupby("run_id", sort=False)))
        for run, metrics in members:
            environment = metrics["environment"]
            tags = {_PARENT: parent, "benchmark": run.benchmark, "processor": environment["processor"]}
            commit, is_dirty = str(environment["git_commit"]), str(environment["git_dirty"])
            tags |= {"mlflow.source.git.commit": commit, "git_dirty": is_dirty}
            params = [Param(_plain(key), str(value)) for key, value in _flat(run.spec).items()]
            files = [paths.RUNS / run.folder / file for file in _FILES]
            self._log(run.id, times[run.id], tags, _numbers(rows[run.id], metrics, times[run.id][1]), params, files)
        self._client.set_tag(parent, _DIGEST, digest)  # at the end: an interrupted mirror writes the setting again
        return "replaced" if name in self._parents else "added"

    def write_figures(self, files: Sequence[Path]) -> None:
        """Write the figures of the benchmark into a separate run."""
        name, digest = f"figures of {self._benchmark}", _sha256(b"".join(path.read_bytes() for path in files))
        if files and not self._has(name, digest):
            self._delete(name)
            end = round(max(path.stat().st_mtime for path in files) * 1000)
            self._log(name, (end, end), {_SETTING: name, _DIGEST: digest}, files=files)

    def _has(self, setting: str, digest: str) -> bool:
        return list(self._parents.get(setting, {}).values()) == [digest]

    def _delete(self, setting: str) -> None:
        """Delete all parents of a setting and their runs; two folders may have written it at once."""
        for parent in self._parents.get(setting, ()):
            for run in self._search(f"tags.`{_PARENT}` = '{parent}'"):
                self._client.delete_run(run.info.run_id)
            self._client.delete_run(parent)

    def _log(
        self,
        name: str,
        times: tuple[int, int],
        tags: dict[str, str],
        numbers: Sequence[Metric] = (),
        params: Sequence[Param] = (),
        files: Sequence[Path] = (),
    ) -> str:
        """Write an MLflow run, and return its identifier."""
        identifier = str(self._client.create_run(self._id, times[0], tags, name).info.run_id)
        for file in files:
            if file.exists():
                self._client.log_artifact(identifier, str(file))
        self._client.log_batch(identifier, numbers, params)
        self._client.set_terminated(identifier, end_time=times[1])
        return identifier

    def _search(self, condition: str) -> Iterator[Any]:
        token = None
        while token != "":
            page = self._client.search_runs([self._id], condition, max_results=1000, page_token=token)
            yield from page
            token = page.token or ""


def _times(run: Run, metrics: Mapping[str, Any]) -> tuple[int, int]:
    """Return the start and the end of a run in milliseconds since 1970."""
    end = (paths.RUNS / run.folder / "metrics.json").stat().st_mtime
    return round((end - metrics["cost"]["job_seconds"]) * 1000), round(end * 1000)


def _numbers(rows: Any, metrics: Mapping[str, Any], time: int) -> list[Metric]:
    """List the numbers of a run, and its training curves with their steps."""
    numbers = [
        Metric(_metric_name(row.part, row.eval_task, row.metric), float(row.value), time, 0)
        for row in rows.itertuples()
    ]
    losses = [{"step": step, "loss": loss} for step, loss in enumerate(metrics.get("curve", []), start=1)]
    histories = {"record": metrics.get("records", []), "epoch": metrics.get("epochs", []), "step": losses}
    return numbers + [
        Metric(_plain(f"{word}.{key}"), float(value), time, round(entry[counter]))
        for word, entries in histories.items()
        for counter in ["epoch" if word == "epoch" else "step"]
        for entry in entries
        for key, value in entry.items()
        if key != counter and value is not None  # the loss of a model that diverged
    ]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to keys such as ``training.epochs``; omit empty mappings."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _metric_name(*parts: str) -> str:
    return _plain(".".join(filter(None, parts)))


def _plain(name: str) -> str:
    """Replace the characters that MLflow rejects, as in ``+90%``, an environment of ColoredMNIST."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
