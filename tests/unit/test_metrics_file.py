"""Test checks of ``metrics.json``: an error is one line that names file and key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.base import RUNS, DataError, DefinitionError
from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.results.records import read_metrics
from tests import fake_runs

BENCHMARKS = ("glue", "glue_ood", "domainbed", "llama", "modularity", "speed")
GONE, SCORES = object(), ("scores", "test", "tweets")
TRANSFORMED = ("transformed", "emoe2vanilla", *SCORES)
RUN = {
    benchmark: next(run for run in load_suite({"suite": "smoke"}).runs_of(benchmark) if run.spec["method"]["config"])
    for benchmark in BENCHMARKS[:-1]
} | {"speed": load_suite({"suite": "smoke"}).runs_of("speed")[0]}


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_whole_file_is_read_as_it_is(benchmark: str, here: Path) -> None:
    run = RUN[benchmark]
    fake_runs.write_runs([run])
    assert read_metrics(run) == json.loads((RUNS / run.folder / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("benchmark", "keys", "value", "message"),
    [
        ("glue", ["run_id"], "other", "belongs to the run 'other'"),
        ("glue", ["scores", "ood"], {}, "lacks a part"),
        ("glue", [*SCORES, "balanced_accuracy"], 17.0, "is 17.0, not a number from 0 to 1"),
        ("glue", [*SCORES, "loss"], float("nan"), "is damaged"),
        ("glue", [*TRANSFORMED, "balanced_accuracy"], 17.0, "test as emoe2vanilla tweets balanced_accuracy is 17.0"),
        ("glue", ["environment"], GONE, "'environment': Field required"),
        ("glue_ood", ["chosen"], GONE, "'chosen' is missing"),
        ("llama", ["tasks"], GONE, "'tasks' is missing"),
        ("modularity", ["matrix"], GONE, "'matrix' is missing"),
        ("speed", ["measured"], GONE, "lacks a part"),
    ],
)
def test_a_damaged_file_is_named(benchmark: str, keys: Sequence[str], value: Any, message: str, here: Path) -> None:
    run = RUN[benchmark]
    fake_runs.write_runs([run])
    path = RUNS / run.folder / "metrics.json"
    content = json.loads(path.read_text())
    inner, (*above, last) = content, keys
    for key in above:
        inner = inner[key]
    inner.pop(last) if value is GONE else inner.update({last: value})
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as damaged:
        read_metrics(run)
    assert message in str(damaged.value)
    assert str(damaged.value).startswith(str(path))
    assert "\n" not in str(damaged.value)


def test_a_run_without_a_file_is_not_finished(here: Path) -> None:
    with pytest.raises(DefinitionError, match="is not finished"):
        read_metrics(RUN["glue"])
