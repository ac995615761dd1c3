"""Mirror finished runs to MLflow. The files are the truth; the mirror can be made again at any time."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from typing import Any

from filelock import FileLock
from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from benchmarks.harness.base import paths
from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.planning.runs import Run, canonical_json
from benchmarks.harness.results.records import collect, read_metrics

_ID, _CONTENT, _PARENT = "emoe.run_id", "emoe.content", "mlflow.parentRunId"


def mirror(runs: list[Run], uri: str) -> dict[str, int]:
    """Write every finished run that MLflow does not have yet, or has with other numbers.

    One experiment a benchmark, one parent run a (model, task, method), one child a learning rate,
    variant and seed. Doing it twice adds nothing.

    Args:
        runs: finished runs.
        uri: MLflow's tracking store.

    Returns:
        How many runs were ``added``, ``replaced`` and ``unchanged``.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)  # silent about creating the store's tables
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    client = MlflowClient(uri)
    paths.RESULTS.mkdir(exist_ok=True)
    with FileLock(paths.RESULTS / ".mirror.lock"):  # SQLite does not stand parallel writers
        return _mirror(runs, client)


def _mirror(runs: list[Run], client: MlflowClient) -> dict[str, int]:
    counts = {"added": 0, "replaced": 0, "unchanged": 0}
    for benchmark in dict.fromkeys(run.benchmark for run in runs):
        experiment = _experiment(client, benchmark)
        known = {found.data.tags[_ID]: found for found in _all_runs(client, experiment)}
        for run in (run for run in runs if run.benchmark == benchmark):
            metrics = read_metrics(run)
            content = hashlib.sha256(canonical_json(metrics).encode()).hexdigest()
            present = known.get(run.id)
            if present is not None and present.data.tags.get(_CONTENT) == content:
                counts["unchanged"] += 1
                continue
            if present is not None:
                client.delete_run(present.info.run_id)
            counts["added" if present is None else "replaced"] += 1
            parent = _parent(client, experiment, run, known)
            identifier = _write(client, experiment, run, metrics, {_PARENT: parent})
            # last, so that a run whose writing was cut short is written again
            client.set_tag(identifier, _CONTENT, content)
    return counts


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name))
    if found.lifecycle_stage == "deleted":
        raise DefinitionError(
            f"MLflow's experiment '{name}' is deleted; restore it with `mlflow experiments restore` or choose another tracking_uri"
        )
    return str(found.experiment_id)


def _all_runs(client: MlflowClient, experiment: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs([experiment], filter_string=f"tags.`{_ID}` != ''", max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _parent(client: MlflowClient, experiment: str, run: Run, known: dict[str, Any]) -> str:
    spec = run.spec
    names = (spec["model"]["name"], spec["task"]["name"], spec.get("finetuning"), spec["method"]["name"])
    name = " / ".join(filter(None, names))
    if name not in known:
        known[name] = client.create_run(experiment, run_name=name, tags={_ID: name})
        client.set_terminated(known[name].info.run_id)
    return str(known[name].info.run_id)


def _write(client: MlflowClient, experiment: str, run: Run, metrics: dict[str, Any], tags: dict[str, str]) -> str:
    environment = metrics["environment"]
    tags = tags | {
        _ID: run.id,
        "mlflow.source.git.commit": str(environment["git_commit"]),
        "git_dirty": str(environment["git_dirty"]),
        "processor": environment["processor"],
    }
    identifier = client.create_run(experiment, run_name=run.id, tags=tags).info.run_id
    numbers = collect([run])
    logged = [
        Metric(_plain(".".join(filter(None, (row.part, row.eval_task, row.metric)))), float(row.value), 0, 0)
        for row in numbers.itertuples()
    ]
    logged += [
        Metric(_plain(f"{word}.{key}"), float(value), 0, round(entry[counter]))
        for word, counter, entries in _histories(metrics)
        for entry in entries
        for key, value in entry.items()
        if key != counter and value is not None  # the loss of a model that diverged
    ]
    parameters = [Param(_plain(key), str(value)) for key, value in _flat(run.spec)]
    client.log_batch(identifier, metrics=logged, params=parameters, tags=[RunTag("benchmark", run.benchmark)])
    client.set_terminated(identifier)
    return str(identifier)


def _histories(metrics: dict[str, Any]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Numbers over training: what they are called, what counts them, and one entry a time."""
    yield "record", "step", metrics.get("records", [])
    yield "epoch", "epoch", metrics.get("epochs", [])
    yield "step", "step", [{"step": step, "loss": loss} for step, loss in enumerate(metrics.get("curve", []), start=1)]


def _plain(name: str) -> str:
    """A name without what MLflow does not allow (the environments of ColoredMNIST are called +90%)."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _flat(below, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
