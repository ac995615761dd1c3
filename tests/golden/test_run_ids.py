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
    """Map each benchmark to the number of its runs and a hash of their ids, in the runs' order."""
    ids_of_benchmark: dict[str, list[str]] = {}
    for run in runs:
        ids_of_benchmark.setdefault(run.benchmark, []).append(run.id)

    result = {}
    for benchmark, ids in ids_of_benchmark.items():
        text = "\n".join(ids)
        digest = hashlib.sha256(text.encode()).hexdigest()
        result[benchmark] = (len(ids), digest[:16])
    return result


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

    wanted = {}
    with FILE.open() as file:
        for row in csv.DictReader(file):
            if row["suite"] == suite:
                wanted[row["benchmark"]] = (int(row["runs"]), row["digest"])
    assert digests(runs) == wanted
