"""Test that run ids stay the same, so that finished runs are found: an id is a hash of the run's spec."""

from __future__ import annotations

import csv
import hashlib
import re
from pathlib import Path

import pytest

from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import load_suite, suite_names

FILE = Path(__file__).with_name("run_ids.csv")


def digests(runs: list[Run]) -> dict[str, tuple[int, str]]:
    """Return the number of runs by benchmark, and a digest of their ids in the order of the grid."""
    ids_of: dict[str, list[str]] = {}
    for run in runs:
        ids_of.setdefault(run.benchmark, []).append(run.id)
    return {
        name: (len(ids), hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16])
        for name, ids in ids_of.items()
    }


@pytest.mark.parametrize("suite", suite_names())
def test_every_run_of_a_suite_keeps_its_id(suite: str) -> None:
    """A run's name is readable, begins with the model and ends with the id."""
    runs = load_suite({"suite": suite}).runs
    for run in runs:
        assert re.fullmatch(r"[0-9a-f]{12}", run.id)
        assert run.name.startswith(f"{run.spec['model']['name']}-")
        assert run.name.endswith(f"-{run.id}")
        assert re.fullmatch(r"\S+", run.name)
    assert len({run.folder for run in runs}) == len(runs)
    with FILE.open() as file:
        wanted = {
            row["benchmark"]: (int(row["runs"]), row["digest"])
            for row in csv.DictReader(file)
            if row["suite"] == suite
        }
    assert digests(runs) == wanted
