"""Mirror finished runs to MLflow. The files are the truth; the mirror can be made again at any time."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from benchmarks.harness import base as paths
from benchmarks.harness.base import RunError, atomic_write, first_line, hold, without_passwords
from benchmarks.harness.config.runs import Run, canonical_json
from benchmarks.harness.results.records import GROUP_KEYS, collect_from, read_metrics, run_keys

_SETTING, _DIGEST, _PARENT = "emoe.setting", "emoe.digest", "mlflow.parentRunId"
_SQLITE = "sqlite:///"
# the first page of such an experiment in MLflow lists training runs
_KIND = {"mlflow.experimentKind": "custom_model_development"}
_LONGEST_PARAM = 6000  # characters; MLflow cuts longer ones silently
_CUT = "… (whole in run.json, among the files)"
_FILES = ("run.json", "metrics.json", paths.LOG)
_WAIT_SECONDS = 10.0  # before the second attempt


@dataclass(frozen=True)
class _Entry:
    """A finished run in the terms of MLflow; ``times`` are milliseconds since 1970."""

    name: str
    times: tuple[int, int]
    metrics: Sequence[Metric] = ()
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()


@dataclass(frozen=True)
class _Setting:
    """A setting, or the figures: a parent run, with a child for each of its ``size`` seeds.

    Both are described by ``entries()`` only if the digest in MLflow is another one.
    """

    name: str
    size: int
    digest: str
    entries: Callable[[], tuple[_Entry, list[_Entry]]]


def mirror(runs: list[Run], uri: str, figures: Mapping[str, Sequence[Path]] | None = None) -> dict[str, int]:
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
    file = Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else paths.RESULTS / "mlflow"
    file.parent.mkdir(parents=True, exist_ok=True)
    counts = Counter(added=0, replaced=0, unchanged=0)
    with hold(file.with_name(f".{file.name}.lock")):
        for benchmark in dict.fromkeys(run.benchmark for run in runs):
            settings = _settings([run for run in runs if run.benchmark == benchmark])
            drawn = [path for path in (figures or {}).get(benchmark, ()) if path.exists()]
            counts += _write(uri, benchmark, [*settings, *([_figures(drawn)] if drawn else [])])
    return {word: counts[word] for word in ("added", "replaced", "unchanged")}


def _write(uri: str, benchmark: str, settings: Sequence[_Setting], attempts: int = 2) -> Counter[str]:
    """Write settings; a second attempt helps two mirrors that create the tables of a new database at once."""
    try:
        if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).exists():
            with atomic_write(Path(uri.removeprefix(_SQLITE))) as temporary:  # half a file breaks later mirrors
                MlflowClient(f"{_SQLITE}{temporary}").search_experiments(max_results=1)
        return _Experiment(MlflowClient(uri), benchmark, keeps_files=uri.startswith("http")).write(settings)
    except Exception as error:  # of a database, its driver or a server: MLflow passes them on
        is_missing = isinstance(error, ModuleNotFoundError)
        if attempts == 1 or is_missing:
            driver = "; for PostgreSQL: pip install 'emoe[postgres]'" if is_missing else ""
            raise RunError(without_passwords(f"MLflow at {uri}: {first_line(_cause(error))}{driver}")) from None
    time.sleep(_WAIT_SECONDS)
    return _write(uri, benchmark, settings, attempts - 1)


def _cause(error: BaseException) -> BaseException:
    """Return the error of the database or the server below those of MLflow and SQLAlchemy."""
    return _cause(error.__cause__) if error.__cause__ else error


class _Experiment:
    """The experiment of a benchmark, which is created if it is missing.

    Args:
        client: The client of the store.
        benchmark: The name of the benchmark and of the experiment.
        keeps_files: True for a server, which chooses where files are.
    """

    def __init__(self, client: MlflowClient, benchmark: str, *, keeps_files: bool) -> None:
        self._client = client
        experiment = client.get_experiment_by_name(benchmark)
        location = None if keeps_files else (paths.RESULTS / "mlflow" / benchmark).resolve().as_uri()
        self._id = experiment.experiment_id if experiment else client.create_experiment(benchmark, location, _KIND)

    def write(self, settings: Sequence[_Setting]) -> Counter[str]:
        """Write the settings that are missing or have another digest; return the numbers of runs by what happened."""
        digests: dict[str, str | None] = {}
        identifiers: dict[str, list[str]] = {}
        for run in self._search(f"tags.`{_SETTING}` != ''"):
            name = run.data.tags[_SETTING]
            digests[name] = run.data.tags.get(_DIGEST)
            identifiers.setdefault(name, []).append(run.info.run_id)
        counts: Counter[str] = Counter()
        for setting in settings:
            known = identifiers.get(setting.name, [])
            if len(known) == 1 and digests[setting.name] == setting.digest:
                counts["unchanged"] += setting.size
                continue
            for identifier in known:  # several if two folders wrote the setting at once
                self._delete(identifier)
            counts["replaced" if known else "added"] += setting.size
            parent, children = setting.entries()
            identifier = self._create(parent, {_SETTING: setting.name})
            for child in children:
                self._log(self._create(child, {_PARENT: identifier}), child)
            # the digest comes last: an interrupted mirror writes the setting again
            self._log(identifier, parent, [RunTag(_DIGEST, setting.digest)])
        return counts

    def _create(self, entry: _Entry, tags: Mapping[str, str]) -> str:
        identifier = self._client.create_run(self._id, entry.times[0], {**entry.tags, **tags}, entry.name).info.run_id
        for file in entry.files:
            if file.exists():
                self._client.log_artifact(identifier, str(file))
        return str(identifier)

    def _log(self, identifier: str, entry: _Entry, tags: Sequence[RunTag] = ()) -> None:
        self._client.set_terminated(identifier, end_time=entry.times[1])
        params = [Param(key, value) for key, value in entry.params.items()]
        self._client.log_batch(identifier, entry.metrics, params, tags)

    def _delete(self, parent: str) -> None:
        for run in self._search(f"tags.`{_PARENT}` = '{parent}'"):
            self._client.delete_run(run.info.run_id)
        self._client.delete_run(parent)

    def _search(self, condition: str) -> Iterator[Any]:
        token = None
        while token != "":
            page = self._client.search_runs([self._id], condition, max_results=1000, page_token=token)
            yield from page
            token = page.token or ""


def _settings(runs: Sequence[Run]) -> Iterator[_Setting]:
    """Group runs by everything but their seeds."""
    groups: dict[str, list[tuple[Run, dict[str, Any]]]] = {}
    for run in runs:
        keys = run_keys(run)
        name = " / ".join(str(keys[key]) for key in GROUP_KEYS[1:] if keys[key] != "")
        groups.setdefault(name, []).append((run, read_metrics(run)))
    for name, members in groups.items():
        digest = hashlib.sha256("\n".join(canonical_json(metrics) for _, metrics in members).encode()).hexdigest()
        yield _Setting(name, len(members), digest, functools.partial(_entries, name, members))


def _entries(name: str, members: Sequence[tuple[Run, dict[str, Any]]]) -> tuple[_Entry, list[_Entry]]:
    """Describe a setting by the means of its seeds, and its runs."""
    records = collect_from(members)
    times = {run.id: _times(run, metrics) for run, metrics in members}
    span = (min(began for began, _ in times.values()), max(ended for _, ended in times.values()))
    values = records.groupby(["part", "eval_task", "metric"], sort=False)["value"]
    means = {_metric_name(*names): float(value) for names, value in values.mean().items()}
    means |= {f"{_metric_name(*names)}.std": float(value) for names, value in values.std().dropna().items()}
    numbers = [Metric(name, value, span[1], 0) for name, value in {**means, "seeds": float(len(members))}.items()]
    rows = dict(iter(records.groupby("run_id", sort=False)))
    children = [_child(run, metrics, rows[run.id].itertuples(), times[run.id]) for run, metrics in members]
    return _Entry(name, span, numbers), children


def _figures(drawn: Sequence[Path]) -> _Setting:
    """Keep the figures of a benchmark in a run of their own."""
    name = f"figures of {drawn[0].parents[1].name}"
    ended = round(max(path.stat().st_mtime for path in drawn) * 1000)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in drawn)).hexdigest()
    return _Setting(name, 0, digest, lambda: (_Entry(name, (ended, ended), files=drawn), []))


def _child(run: Run, metrics: Mapping[str, Any], rows: Iterable[Any], times: tuple[int, int]) -> _Entry:
    """Describe a run by its numbers, settings and files."""
    numbers = [Metric(_metric_name(row.part, row.eval_task, row.metric), float(row.value), times[1], 0) for row in rows]
    numbers += [
        Metric(_plain(f"{word}.{key}"), float(value), times[1], round(entry[counter]))
        for word, counter, entries in _histories(metrics)
        for entry in entries
        for key, value in entry.items()
        if key != counter and value is not None  # the loss of a model that diverged
    ]
    environment = metrics["environment"]
    tags = {
        "benchmark": run.benchmark,
        "mlflow.source.git.commit": str(environment["git_commit"]),
        "git_dirty": str(environment["git_dirty"]),
        "processor": environment["processor"],
    }
    params = {_plain(key): _shortened(str(value)) for key, value in _flat(run.spec).items() if value != {}}
    files = [paths.RUNS / run.folder / name for name in _FILES]
    return _Entry(run.id, times, numbers, params, tags, files)


def _times(run: Run, metrics: Mapping[str, Any]) -> tuple[int, int]:
    """Return the start and the end of a run in milliseconds since 1970."""
    ended = (paths.RUNS / run.folder / "metrics.json").stat().st_mtime
    return round((ended - metrics["cost"].get("job_seconds", 0.0)) * 1000), round(ended * 1000)


def _histories(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield the numbers over training: a name, the key that counts, and an entry for each count."""
    yield "record", "step", metrics.get("records", [])
    yield "epoch", "epoch", metrics.get("epochs", [])
    yield "step", "step", [{"step": step, "loss": loss} for step, loss in enumerate(metrics.get("curve", []), start=1)]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings: ``training.epochs``."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        is_nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if is_nested else {f"{prefix}{key}": value}
    return flat


def _metric_name(*parts: str) -> str:
    return _plain(".".join(filter(None, parts)))


def _plain(name: str) -> str:
    """Replace the characters that MLflow rejects, as in ``+90%``, an environment of ColoredMNIST."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _shortened(value: str) -> str:
    return value if len(value) <= _LONGEST_PARAM else value[: _LONGEST_PARAM - len(_CUT)] + _CUT
