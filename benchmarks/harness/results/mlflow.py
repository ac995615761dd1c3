"""Mirror finished runs to MLflow. The mirror can be rebuilt from the files at any time."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock
from mlflow.entities import LifecycleStage, Metric, Param
from mlflow.tracking import MlflowClient
from sqlalchemy import NullPool, create_engine, make_url, text

from benchmarks.harness import base as paths
from benchmarks.harness.base import RunError, distinct, first_line, hide_passwords
from benchmarks.harness.config.benchmark import OOD_MEAN
from benchmarks.harness.config.runs import Run
from benchmarks.harness.results.records import (
    GROUP_KEYS,
    Record,
    run_numbers,
    settings_of_run,
    tabulate_numbers,
)

# the tag with the digest of a run's metrics.json, which is set when the run is completely written
_DIGEST = "emoe.digest"
_SQLITE = "sqlite:///"
_POSTGRESQL = "postgresql"
# Names the lock of this module in a PostgreSQL database. Any number works that no other program
# locks.
_LOCK_NUMBER = 231_010_908
# Tags of a new experiment. They say that it trains models. A server with a menu of workflows
# ignores them and opens an experiment on its traces, so `run_links` has the links to the runs.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
# The tag of an experiment with the columns of its table of runs. The address of a page chooses it
# by the name after the last full stop.
_VIEW = "scores"
_VIEW_TAG = f"mlflow.sharedViewState.{_VIEW}"
_MOST_COLUMNS = 4  # of scores, which then fit on a page
_MOST_RUNS = 50_000  # the most stored runs that MLflow returns at once
_FILES = ("run.json", "metrics.json", paths.LOG)


def mirror(records: Sequence[Record], uri: str) -> dict[str, int]:
    """Write the runs that are new or have changed numbers to an MLflow store.

    Each benchmark becomes an experiment. Runs that differ only in their seed have the same value of
    the tag ``setting``. MLflow's page can group runs by this tag, and then shows their means.

    While another process writes to the same results folder, SQLite file or PostgreSQL database,
    this function waits.

    Args:
        records: The runs to write.
        uri: The address of the store: an SQLite file, a PostgreSQL database or a server of MLflow.

    Returns:
        The counts of the ``added``, ``replaced`` and ``unchanged`` runs.

    Raises:
        RunError: MLflow failed. The message names the store without its password.
    """
    is_server = uri.startswith("http")
    # an SQLite file is locked by a file beside it, and any other store by one in the results folder
    database: Path | None = None
    lock_file = paths.RESULTS / ".mlflow.lock"
    if uri.startswith(_SQLITE):
        # make_url separates the path from options, such as "?timeout=30"
        database = Path(str(make_url(uri).database))
        lock_file = database.with_name(f".{database.name}.lock")
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock_file):
        if database is not None:
            database.touch()  # so that the file has the permissions of the umask
        with _open_store(uri) as client:
            return _write_all(records, client, is_server=is_server)


@contextmanager
def _open_store(uri: str) -> Iterator[MlflowClient]:
    """Yield a client for an MLflow store. Other processes cannot mirror into it at the same time.

    Raises:
        RunError: MLflow failed, here or in the block. The message is one line that names the store
            without its password.
    """
    # MLflow waits longer before each retry. If the server refuses connections, three retries take a
    # quarter of a minute, and MLflow's own seven take four minutes. A user's own value stays.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    # these libraries log the creation of tables, and tracebacks
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        # mirrors of other results folders may write to the same PostgreSQL database
        with _database_lock(uri):
            yield MlflowClient(uri)
    except Exception as error:  # MLflow passes on errors of databases, drivers and servers
        # MLflow's message may contain the store with its password
        hidden = hide_passwords(uri)
        reason = hide_passwords(_problem(error).replace(uri, hidden))
        raise RunError(f"MLflow at {hidden}: {reason}") from None


def _write_all(
    records: Sequence[Record], client: MlflowClient, *, is_server: bool
) -> dict[str, int]:
    """Write the runs of all benchmarks.

    Args:
        records: The runs.
        client: The store.
        is_server: True if the store is a server of MLflow, which keeps the files of the runs
            itself.

    Returns:
        The counts of the ``added``, ``replaced`` and ``unchanged`` runs.
    """
    records_by_benchmark: dict[str, list[Record]] = {}
    for record in records:
        records_by_benchmark.setdefault(record.run.benchmark, []).append(record)

    counts = Counter(added=0, replaced=0, unchanged=0)
    for benchmark, benchmark_records in records_by_benchmark.items():
        experiment_id = _experiment_id(client, benchmark, is_server=is_server)
        stored_runs = client.search_runs([experiment_id], max_results=_MOST_RUNS)
        stored_by_name = {run.info.run_name: run for run in stored_runs}
        # the tag chooses the columns of MLflow's table of runs
        client.set_experiment_tag(experiment_id, _VIEW_TAG, _view(benchmark_records))
        for record in benchmark_records:
            stored = stored_by_name.get(name_in_mlflow(record.run))
            if stored is None:
                # older versions of this module used another name; _write replaces such a run
                stored = stored_by_name.get(record.run.name)
            outcome = _write(client, experiment_id, record, stored)
            counts[outcome] += 1
    return dict(counts)


@contextmanager
def _database_lock(uri: str) -> Iterator[None]:
    """Wait until no other process mirrors into a PostgreSQL database.

    Other stores have no such lock.
    """
    if not uri.startswith(_POSTGRESQL):
        yield
        return
    # without a pool the connection closes after the block, and this frees the lock
    engine = create_engine(uri, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        # Without the lock, two processes may create MLflow's tables at once, which fails. They may
        # also store the same run twice.
        connection.execute(text("SELECT pg_advisory_lock(:number)"), {"number": _LOCK_NUMBER})
        yield


def _problem(error: Exception) -> str:
    """Describe MLflow's error in one line."""
    # SQLAlchemy's message may have these words after the first line
    if "database is locked" in str(error):
        return "the database is locked; end the other process that uses it, and repeat"
    return first_line(error).strip()


def _experiment_id(client: MlflowClient, benchmark: str, *, is_server: bool) -> str:
    """Return the identifier of a benchmark's experiment.

    The experiment is created if it is missing, and restored if someone deleted it in MLflow.

    A server (``is_server``) chooses where it keeps the files of runs. For any other store, they are
    below ``results/mlflow`` on this machine.
    """
    experiment = client.get_experiment_by_name(benchmark)
    if experiment:
        experiment_id = str(experiment.experiment_id)
        if experiment.lifecycle_stage == LifecycleStage.DELETED:
            _restore(client, experiment_id)
        return experiment_id
    location = None
    if not is_server:
        location = (paths.RESULTS / "mlflow" / benchmark).resolve().as_uri()
    return str(client.create_experiment(benchmark, location, _EXPERIMENT_TAGS))


def _restore(client: MlflowClient, experiment_id: str) -> None:
    """Restore a deleted experiment. Of several runs with the same name, keep only the newest."""
    # MLflow also restores runs that were replaced earlier. Such a run has the same name as the run
    # that replaced it, so it is deleted again below.
    client.restore_experiment(experiment_id)
    newest_first = client.search_runs(
        [experiment_id], max_results=_MOST_RUNS, order_by=["attributes.end_time DESC"]
    )
    names: set[str] = set()
    for run in newest_first:
        name = run.info.run_name
        if name in names:
            client.delete_run(run.info.run_id)
        names.add(name)


def name_in_mlflow(run: Run) -> str:
    """Return the name of a run in MLflow: its id, method, settings, seed, model and task.

    MLflow cuts names after about 30 letters. The id comes first, so that these letters differ.
    """
    # the readable name begins with the model and the task, which most runs share
    beginning = f"{run.model}-{run.task}-"
    settings = run.name.removeprefix(beginning).removesuffix(run.id).rstrip("-")
    words = [run.id, settings, run.model, run.task]
    return " ".join(word for word in words if word)


def _view(records: Sequence[Record]) -> str:
    """Return the state of MLflow's table of runs, as JSON: it shows the scores of the runs."""
    columns = [f"metrics.`{name}`" for name in _score_names(records)]
    return json.dumps({"selectedColumns": columns})


def _score_names(records: Sequence[Record]) -> list[str]:
    """Choose at most ``_MOST_COLUMNS`` numbers for MLflow's table.

    If there are main scores on test sets, choose those. Otherwise, choose all numbers on test sets.
    If nothing is tested, choose all numbers except costs and parameter counts.
    """
    numbers = tabulate_numbers(records)
    is_tested = numbers["part"].isin(["test", OOD_MEAN])
    is_main_score = is_tested & numbers["is_score"]
    if is_main_score.any():  # only text tasks have a main metric
        shown = numbers[is_main_score]
    elif is_tested.any():
        shown = numbers[is_tested]
    else:  # a measurement tests nothing
        shown = numbers[~numbers["part"].isin(["cost", "model"])]
    names = []
    for row in shown.itertuples():
        name = _number_name(str(row.part), str(row.eval_task), str(row.metric))
        names.append(name)
    # many runs have the same numbers
    return distinct(names)[:_MOST_COLUMNS]


def page_of_server(uri: str) -> str:
    """Return the address of an MLflow server's page: without a user's name and password.

    >>> page_of_server("https://lab:secret@mlflow.org/team")
    'https://mlflow.org/team'
    """
    parts = urlsplit(uri)
    _user, _at, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=host))


def run_links(uri: str, server: str) -> list[str]:
    """Return a line for each experiment in a store: its name and the link to its table of runs.

    Without such a link, MLflow opens an experiment on its traces, and these runs have none.

    Args:
        uri: The store.
        server: The address of MLflow's page, such as ``http://127.0.0.1:5000``.

    Raises:
        RunError: MLflow failed. The message names the store without its password.
    """
    with _open_store(uri) as client:
        experiments = client.search_experiments(order_by=["experiment_id ASC"])
    lines = []
    for experiment in experiments:
        # other experiments of the store are not from this module
        if _VIEW_TAG not in experiment.tags:
            continue
        page = f"{server.rstrip('/')}/#/experiments/{experiment.experiment_id}/runs"
        options = f"workflowType=machine_learning&viewStateShareKey={_VIEW}"
        lines.append(f"{experiment.name}: {page}?{options}")
    return lines


def _write(client: MlflowClient, experiment_id: str, record: Record, stored: Any) -> str:
    """Write a run. It is left as it is if the stored run has the same name and numbers.

    Args:
        client: The store.
        experiment_id: The identifier of the benchmark's experiment.
        record: The run.
        stored: The same run in the store, or None. It may have a name that an older version of this
            module gave it.

    Returns:
        ``added``, ``replaced`` or ``unchanged``.
    """
    if stored:
        has_same_name = stored.info.run_name == name_in_mlflow(record.run)
        has_same_numbers = stored.data.tags.get(_DIGEST) == record.digest
        if has_same_name and has_same_numbers:
            return "unchanged"
        client.delete_run(stored.info.run_id)
    _create(client, experiment_id, record)
    return "replaced" if stored else "added"


def _create(client: MlflowClient, experiment_id: str, record: Record) -> None:
    """Write a run that the store does not have, with its files, settings and numbers."""
    run = record.run
    end_seconds = run.metrics_file.stat().st_mtime
    # MLflow's times are in milliseconds
    started = round((end_seconds - record.metrics.cost.job_seconds) * 1000)
    ended = round(end_seconds * 1000)

    created = client.create_run(
        experiment_id, started, tags=_tags(record), run_name=name_in_mlflow(run)
    )
    stored_id = created.info.run_id
    for file in _FILES:
        path = paths.RUNS / run.folder / file
        # a folder is not a file, and MLflow would wait forever for the content of a named pipe
        if path.is_file():
            client.log_artifact(stored_id, str(path))
    params = []
    for key, value in _flatten(run.spec).items():
        params.append(Param(_plain(key), str(value)))
    client.log_batch(stored_id, metrics=list(_numbers(record, ended)), params=params)
    client.set_terminated(stored_id, end_time=ended)
    # The tag comes last. Without it, the next call replaces this run, which may be incomplete.
    client.set_tag(stored_id, _DIGEST, record.digest)


def _tags(record: Record) -> dict[str, str]:
    """Return the tags of a run: its settings without the seed, and its machine and commit."""
    environment = record.metrics.environment
    settings = settings_of_run(record.run)
    texts = []
    for key in GROUP_KEYS:
        # the benchmark is left out, because it is the experiment
        if key != "benchmark" and settings[key] != "":
            texts.append(str(settings[key]))
    return {
        "setting": " / ".join(texts),
        "benchmark": record.run.benchmark,
        "processor": environment.processor,
        "mlflow.source.git.commit": str(environment.git_commit),
        "git_dirty": str(environment.git_dirty),
    }


def _numbers(record: Record, time: int) -> Iterator[Metric]:
    """Yield the numbers of a run, and its curves over epochs or steps of the training.

    All of them have the same ``time``, the run's end in milliseconds. Runs record no times of
    single steps.
    """
    metrics = record.metrics
    for number in run_numbers(record.run, metrics):
        name = _number_name(number.part, number.data_set, number.metric)
        yield Metric(name, float(number.value), time, step=0)
    for point in metrics.records or ():
        numbers = {"epoch": point.epoch, "loss": point.loss, **point.numbers()}
        yield from _point("record", point.step, numbers, time)
    # text classifiers record `epochs`, and models of several tasks a `dev_curve`
    for epoch in (*metrics.epochs, *metrics.dev_curve):
        yield from _point("epoch", round(epoch.epoch), epoch.numbers(), time)
    for held_out in metrics.held_out_curve:
        yield from _point("held_out", held_out.step, {"loss": held_out.loss}, time)
    for step, loss in enumerate(metrics.curve, start=1):
        yield from _point("step", step, {"loss": loss}, time)


def _number_name(part: str, data_set: str, metric: str) -> str:
    """Return the name of a number in MLflow, such as ``test.tweets.accuracy``."""
    words = [part, data_set, metric]
    given_words = [word for word in words if word]  # costs have no data set
    return _plain(".".join(given_words))


def _point(
    curve: str, step: int, numbers: Mapping[str, float | None], time: int
) -> Iterator[Metric]:
    """Yield the numbers of one point of a curve, without missing ones."""
    for key, value in numbers.items():
        if value is not None:  # None is the loss of a model that diverged
            yield Metric(_plain(f"{curve}.{key}"), float(value), time, step)


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to keys such as ``training.epochs``; omit empty mappings."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(name: str) -> str:
    """Replace each character that MLflow rejects in names, such as ``%``, by ``_``."""
    return re.sub(r"[^\w\-. :/]", "_", name)
