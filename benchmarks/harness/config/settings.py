"""What ``config/<suite>.yaml`` and the command line say."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from benchmarks.harness.config.schema import UNIQUE, Strict


class SuiteSettings(Strict):
    """What to run. Every key can also be given on the command line (`--config key=value`)."""

    suite: str
    """The suite, like the file's name. Its grids stand in benchmarks/<name>/benchmark.yaml under `suites`."""
    benchmarks: Annotated[list[str], Field(min_length=1), UNIQUE]
    """Which benchmarks to run, in the order of the report."""
    exclude: Annotated[list[str], UNIQUE] = Field([])
    """OOD sets to leave out, by their name in tasks.yaml, for those that you could not obtain. Tables say which sets they cover."""
    data_root: str | None = None
    """Folder with data sets, one subfolder each (`source.folder` in tasks.yaml). A set that is not there comes from the hub."""
    model_root: str | None = None
    """Folder with models, one subfolder each (the model's name). A model that is not there comes from the hub or its package."""
    tracking_uri: str | None = None
    """MLflow's store. Null: the variable MLFLOW_TRACKING_URI, else sqlite:///results/mlflow.db."""
