"""Where MLflow keeps runs: a server, to which its client talks run by run, or a database, which takes many at once."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy
import sqlalchemy.orm
from mlflow.entities import Experiment, Metric, Param, RunTag
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlMetric, SqlParam, SqlRun, SqlTag
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME
from mlflow.utils.uri import append_to_uri_path

RUN_ID, CONTENT = "emoe.run_id", "emoe.content"
_TOGETHER = 500  # runs of one transaction


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, as MLflow takes it.

    Attributes:
        name: of the run, and its ``emoe.run_id``.
        content: digest of what is written, by which a later mirror sees that nothing changed.
        times: when it began and ended, in milliseconds since 1970.
        tags: further ones.
        metrics: numbers.
        params: settings.
        files: kept with it, those that exist.
    """

    name: str
    content: str
    times: tuple[int, int]
    tags: Mapping[str, str]
    metrics: Sequence[Metric] = ()
    params: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()


class Store:
    """An MLflow store of any kind, by MLflow's client.

    Args:
        uri: of the store.
    """

    def __init__(self, uri: str) -> None:
        self.uri, self.client = uri, MlflowClient(uri)

    def known(self, experiment: str) -> Iterator[tuple[str, str, str | None]]:
        """Of the mirrored runs of an experiment: MLflow's id, name, and digest unless its writing was cut short."""
        token = None
        while True:
            page = self.client.search_runs(
                [experiment], filter_string=f"tags.`{RUN_ID}` != ''", max_results=1000, page_token=token
            )
            yield from ((run.info.run_id, run.data.tags[RUN_ID], run.data.tags.get(CONTENT)) for run in page)
            token = page.token
            if not token:
                return

    def add(self, experiment: Experiment, runs: Iterable[FinishedRun]) -> Iterator[tuple[str, FinishedRun]]:
        """Write runs; yields MLflow's id of each that is there."""
        for run in runs:
            tags = {RUN_ID: run.name, **run.tags}
            info = self.client.create_run(experiment.experiment_id, run.times[0], tags, run.name).info
            self.keep(info.artifact_uri, run.files)
            self.update(info.run_id, run)
            yield info.run_id, run

    def update(self, identifier: str, run: FinishedRun) -> None:
        """Write the numbers, settings and end of a run that is there; its digest last, so that what is cut short is written again."""
        self.client.set_terminated(identifier, end_time=run.times[1])
        params = [Param(key, value) for key, value in run.params.items()]
        self.client.log_batch(identifier, run.metrics, params, [RunTag(CONTENT, run.content)])

    def keep(self, place: str, files: Sequence[Path]) -> None:
        """Copy those files that exist to a run's artifacts."""
        there = [file for file in files if file.exists()]
        if there:
            repository = get_artifact_repository(place, tracking_uri=self.uri)
            for file in there:
                repository.log_artifact(str(file))


class DatabaseStore(Store):
    """A database: new runs go into MLflow's tables many at a time, and what is known of runs comes without their numbers.

    By the client a run takes a dozen transactions.
    """

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._engine = sqlalchemy.create_engine(uri)

    def known(self, experiment: str) -> Iterator[tuple[str, str, str | None]]:
        """See :meth:`Store.known`."""
        name, content = sqlalchemy.orm.aliased(SqlTag), sqlalchemy.orm.aliased(SqlTag)
        query = (
            sqlalchemy.select(SqlRun.run_uuid, name.value, content.value)
            .join(name, (name.run_uuid == SqlRun.run_uuid) & (name.key == RUN_ID))
            .outerjoin(content, (content.run_uuid == SqlRun.run_uuid) & (content.key == CONTENT))
            .where(SqlRun.experiment_id == int(experiment), SqlRun.lifecycle_stage == "active")
            .order_by(SqlRun.start_time.desc(), SqlRun.run_uuid)
        )
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        yield from map(tuple, rows)

    def add(self, experiment: Experiment, runs: Iterable[FinishedRun]) -> Iterator[tuple[str, FinishedRun]]:
        """See :meth:`Store.add`; a run is there as a whole or not at all."""
        waiting = iter(runs)
        while together := [(uuid.uuid4().hex, run) for run in itertools.islice(waiting, _TOGETHER)]:
            rows: dict[Any, list[dict[str, Any]]] = {}
            for identifier, run in together:
                place = append_to_uri_path(experiment.artifact_location, identifier, "artifacts")
                self.keep(place, run.files)
                for table, row in _rows(int(experiment.experiment_id), place, run):
                    rows.setdefault(table, []).append({**row, "run_uuid": identifier})
            with self._engine.begin() as connection:
                for table, values in rows.items():
                    connection.execute(sqlalchemy.insert(table), values)
            yield from together


def _rows(experiment: int, place: str, run: FinishedRun) -> Iterator[tuple[Any, dict[str, Any]]]:
    """What MLflow's client would write of a finished run, by table; the run itself first, to which the others point."""
    began, ended = run.times
    yield (
        SqlRun,
        {
            "name": run.name,
            "source_type": "UNKNOWN",
            "source_name": "",
            "entry_point_name": "",
            "source_version": "",
            "user_id": "unknown",
            "status": "FINISHED",
            "start_time": began,
            "end_time": ended,
            "experiment_id": experiment,
            "artifact_uri": place,
            "lifecycle_stage": "active",
        },
    )
    tags = {MLFLOW_RUN_NAME: run.name, RUN_ID: run.name, **run.tags, CONTENT: run.content}
    for table, words in ((SqlTag, tags), (SqlParam, run.params)):
        yield from ((table, {"key": key, "value": word}) for key, word in words.items())
    points = sorted({(point.key, point.step, point.timestamp, point.value) for point in run.metrics})
    last = {point[0]: point for point in points}  # of each number, which lists of runs show
    for table, shown in ((SqlMetric, points), (SqlLatestMetric, last.values())):
        for key, step, timestamp, value in shown:  # none is infinite or not a number: metrics.json has no such
            yield table, {"key": key, "step": step, "timestamp": timestamp, "value": value, "is_nan": False}


def open_store(uri: str) -> Store:
    """The store at an address."""
    kind = uri.partition(":")[0].partition("+")[0]
    return (DatabaseStore if kind in DATABASE_ENGINES else Store)(uri)
