"""Read the origin of a suite's blessed numbers, ``results/reference/<suite>.json``."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from benchmarks.harness.base import read_json


class Origin(BaseModel):
    """The origin of blessed numbers: the commit, the machines and the code that made them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    commit: str
    """The commit of the checkout that made the numbers."""
    machines: dict[str, dict[str, str]]
    """The fingerprints of the machines, by the names that the csv uses."""
    code: str
    """The digest of the code that numbers depend on."""


def bless_advice(suite: str) -> str:
    """Return the advice of error messages on how to renew a suite's blessed numbers."""
    return f"bless a run of the suite (`python -m benchmarks bless --suite {suite}`)"


def read_origin(path: Path) -> Origin:
    """Read the origin of a suite's blessed numbers from ``<suite>.json``.

    Raises:
        DataError: The file is missing, damaged or of an older form.
    """
    return read_json(path, Origin, bless_advice(path.stem))
