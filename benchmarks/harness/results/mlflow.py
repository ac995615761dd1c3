"""Mirror finished runs to MLflow. The mirror can be rebuilt from the files at any time."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient
from sqlalchemy import NullPool, create_engine, text

from benchmarks.harness import base as paths
from benchmarks.harness.base import RunError, first_line, hide_passwords
from benchmarks.harness.results.records import GROUP_KEYS, Record, run_keys, run_numbers

_DIGEST = "emoe.digest"  # tag with the digest of a run's metrics.json, set when the run is complete
_SQLITE = "sqlite:///"
_POSTGRESQL = "postgresql"
_LOCK_NUMBER = (
    231_010_908  # of the mirrors' lock in a PostgreSQL database; any number that nobody else locks
)
# MLflow then lists training runs on the experiment's first page
_KIND = {"mlflow.experimentKind": "custom_model_development"}
_MOST = 50_000  # stored runs that MLflow returns at once
_FILES = ("run.json", "metrics.json", paths.LOG)


def mirror(records: Sequence[Record], uri: str) -> dict[str, int]:
    """Write the runs that are new or have changed numbers; count the ``added``, ``replaced`` and ``unchanged`` ones.

    A benchmark is an experiment. Runs that differ only in their seed have the same tag ``setting``; MLflow's page
    groups by it to show means. Concurrent calls for one results folder, SQLite file or PostgreSQL database wait for
    each other.

    Raises:
        RunError: MLflow failed. The message names the store without its password.
    """
    for name in ("alembic", "mlflow"):  # they log the creation of tables, and tracebacks
        logging.getLogger(name).setLevel(logging.CRITICAL)
    is_file = uri.startswith(_SQLITE)
    store = Path(uri.removeprefix(_SQLITE)) if is_file else paths.RESULTS / "mlflow"
    store.parent.mkdir(parents=True, exist_ok=True)
    counts = Counter(added=0, replaced=0, unchanged=0)
    with FileLock(store.with_name(f".{store.name}.lock")):
        if is_file:
            store.touch()  # with the umask's permissions
        try:
            with _database_lock(uri):
                client = MlflowClient(uri)
                for benchmark in dict.fromkeys(record.run.benchmark for record in records):
                    experiment = _experiment(
                        client, benchmark, has_files=not uri.startswith("http")
                    )
                    stored = {
                        run.info.run_name: run
                        for run in client.search_runs([experiment], max_results=_MOST)
                    }
                    for record in records:
                        if record.run.benchmark == benchmark:
                            counts[
                                _write(client, experiment, record, stored.get(record.run.name))
                            ] += 1
        except Exception as error:  # MLflow passes on errors of databases, drivers and servers
            hidden = hide_passwords(uri)
            reason = hide_passwords(_problem(error).replace(uri, hidden))
            raise RunError(f"MLflow at {hidden}: {reason}") from None
    return dict(counts)


@contextmanager
def _database_lock(uri: str) -> Iterator[None]:
    """Wait until no other process mirrors into a PostgreSQL database. Other stores have no such lock."""
    if not uri.startswith(_POSTGRESQL):
        yield
        return
    # without a pool, so that the connection closes after the block, which frees the lock
    engine = create_engine(uri, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        # else MLflow fails where two processes create its tables at once, and stores runs of both folders twice
        connection.execute(text("SELECT pg_advisory_lock(:number)"), {"number": _LOCK_NUMBER})
        yield


def _problem(error: Exception) -> str:
    """Describe MLflow's error in one line."""
    # SQLAlchemy may say it in a later line
    if "database is locked" in str(error):
        return "the database is locked; end the other process that uses it, and repeat"
    return first_line(error)


def _experiment(client: MlflowClient, benchmark: str, *, has_files: bool) -> str:
    """Return the identifier of a benchmark's experiment; create it if missing. A server chooses its file location."""
    if experiment := client.get_experiment_by_name(benchmark):
        return str(experiment.experiment_id)
    location = (paths.RESULTS / "mlflow" / benchmark).resolve().as_uri() if has_files else None
    return str(client.create_experiment(benchmark, location, _KIND))


def _write(client: MlflowClient, experiment: str, record: Record, stored: Any) -> str:
    """Write a run unless the stored one has the same numbers; return ``added``, ``replaced`` or ``unchanged``."""
    if stored and stored.data.tags.get(_DIGEST) == record.digest:
        return "unchanged"
    if stored:
        client.delete_run(stored.info.run_id)
    run, metrics = record.run, record.metrics
    keys = run_keys(run)
    end = run.metrics_file.stat().st_mtime
    started = round((end - metrics.cost.job_seconds) * 1000)
    ended = round(end * 1000)
    tags = {
        "setting": " / ".join(str(keys[key]) for key in GROUP_KEYS[1:] if keys[key] != ""),
        "benchmark": run.benchmark,
        "processor": metrics.environment.processor,
        "mlflow.source.git.commit": str(metrics.environment.git_commit),
        "git_dirty": str(metrics.environment.git_dirty),
    }
    identifier = client.create_run(experiment, started, tags, run.name).info.run_id
    for file in _FILES:
        path = paths.RUNS / run.folder / file
        if path.exists():
            client.log_artifact(identifier, str(path))
    params = [Param(_plain(key), str(value)) for key, value in _flatten(run.spec).items()]
    client.log_batch(identifier, list(_numbers(record, ended)), params)
    client.set_terminated(identifier, end_time=ended)
    client.set_tag(identifier, _DIGEST, record.digest)
    return "replaced" if stored else "added"


def _numbers(record: Record, time: int) -> Iterator[Metric]:
    """Yield the numbers of a run, and its training curves with their steps."""
    metrics = record.metrics
    for part, task, metric, value in run_numbers(record.run, metrics):
        yield Metric(_plain(".".join(filter(None, (part, task, metric)))), float(value), time, 0)
    for point in metrics.records or ():
        numbers = {"epoch": point.epoch, "loss": point.loss, **point.numbers()}
        yield from _point("record", point.step, numbers, time)
    for epoch in metrics.epochs:
        yield from _point("epoch", round(epoch.epoch), epoch.numbers(), time)
    for step, loss in enumerate(metrics.curve, start=1):
        yield from _point("step", step, {"loss": loss}, time)


def _point(
    curve: str, step: int, numbers: Mapping[str, float | None], time: int
) -> Iterator[Metric]:
    """Yield the numbers of one point of a curve."""
    for key, value in numbers.items():
        if value is not None:  # the loss of a model that diverged
            yield Metric(_plain(f"{curve}.{key}"), float(value), time, step)


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to keys such as ``training.epochs``; omit empty mappings."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat


def _plain(name: str) -> str:
    """Replace the characters that MLflow rejects, as in ``+90%``, an environment of ColoredMNIST."""
    return re.sub(r"[^\w\-. :/]", "_", name)
