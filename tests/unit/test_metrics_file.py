"""Test checks of ``metrics.json``: an error is one line that names file and key."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.base import DataError, DefinitionError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run, read_run
from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.results.content import Metrics
from benchmarks.harness.results.records import check_metrics, read_record
from benchmarks.harness.run.status import run_status, state_counts
from emoe.errors import EMoEError
from tests import fake_runs

BENCHMARKS = ("glue", "glue_ood", "domainbed", "llama", "modularity", "multitask", "speed")
GONE, SCORES = object(), ("scores", "test", "tweets")
TRANSFORMED = ("transformed", "emoe2vanilla", *SCORES)


def first_with_experts(benchmark: str) -> Run:
    """Return the first run of a benchmark in the smoke suite whose model has experts."""
    for run in load_suite({"suite": "smoke"}).runs_of(benchmark):
        evaluates_experts = run.spec.get("trained") == "lora_emoe"
        if run.spec["method"].get("config") or evaluates_experts:
            return run
    raise LookupError(benchmark)


RUN = {benchmark: first_with_experts(benchmark) for benchmark in BENCHMARKS[:-1]} | {
    "speed": load_suite({"suite": "smoke"}).runs_of("speed")[0]
}


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_whole_file_is_read_as_it_is(benchmark: str, here: Path) -> None:
    run = RUN[benchmark]
    fake_runs.write_runs([run])
    metrics = read_record(run).metrics
    assert metrics.model_dump(by_alias=True, exclude_unset=True) == json.loads(
        run.metrics_file.read_text()
    )


@pytest.mark.parametrize(
    ("benchmark", "keys", "value", "message"),
    [
        ("glue", ["run_id"], "other", "belongs to the run 'other'"),
        ("glue", ["scores", "ood"], {}, "lacks a part"),
        ("glue", [*SCORES, "balanced_accuracy"], 17.0, "is 17.0, not a number from 0 to 1"),
        ("glue", [*SCORES, "loss"], float("nan"), "is damaged"),
        (
            "glue",
            [*TRANSFORMED, "balanced_accuracy"],
            17.0,
            "test as emoe2vanilla tweets balanced_accuracy is 17.0",
        ),
        ("glue", ["environment"], GONE, "'environment': Field required"),
        ("glue_ood", ["chosen"], GONE, "'chosen' is missing"),
        ("llama", ["tasks"], GONE, "'tasks' is missing"),
        ("modularity", ["matrix"], GONE, "'matrix' is missing"),
        ("speed", ["measured"], GONE, "lacks a part"),
    ],
)
def test_a_damaged_file_is_named(
    benchmark: str, keys: Sequence[str], value: Any, message: str, here: Path
) -> None:
    run = RUN[benchmark]
    fake_runs.write_runs([run])
    path = run.metrics_file
    content = json.loads(path.read_text())
    inner, (*above, last) = content, keys
    for key in above:
        inner = inner[key]
    inner.pop(last) if value is GONE else inner.update({last: value})
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as damaged:
        read_record(run)
    assert message in str(damaged.value)
    assert str(damaged.value).startswith(str(path))
    assert "\n" not in str(damaged.value)


@pytest.mark.parametrize(
    "section", ["transformed", "epochs", "curve", "dev_curve", "held_out_curve"]
)
def test_a_section_that_is_empty_by_default_may_be_demanded(
    section: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RUN["glue"]
    fake_runs.write_runs([run])
    fake_runs.edit(run, lambda content: content.pop(section, None))
    monkeypatch.setattr(type(load_benchmark("glue")), "recorded", (section,))
    with pytest.raises(DataError, match=rf"'{section}' is missing"):
        read_record(run)


def test_a_run_without_a_file_is_not_finished(here: Path) -> None:
    with pytest.raises(DefinitionError, match="is not finished"):
        read_record(RUN["glue"])


# a value of every type, and a number that no machine holds
VALUES = (None, "text", 3, -1, 2.5, True, [], {}, [3], {"a": 3}, [[]], {"a": {}}, 10**400)
DEPTH, FIRST = 4, 2  # keys on the way to a value, and entries of a list


def values_of(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the path of keys to each value of a file, and the value; of lists only the first entries."""
    entries = content.items() if isinstance(content, dict) else enumerate(content[:FIRST])
    for key, value in entries:
        yield (*path, key), value
        if isinstance(value, dict | list) and len(path) + 1 < DEPTH:
            yield from values_of(value, (*path, key))


def changed(content: dict[str, Any], path: Sequence[Any], value: Any) -> dict[str, Any]:
    """Copy a file's content with another value, or without the key."""
    copied: dict[str, Any] = json.loads(json.dumps(content))
    inner: Any = copied
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copied


def is_refused(run: Run, content: dict[str, Any]) -> bool:
    """Return True if a content is refused, in one line that names the file."""
    message = ""
    try:
        check_metrics(run, json.dumps(content).encode(), Path("metrics.json"))
    except EMoEError as error:
        message = str(error)
    assert message.startswith("metrics.json") or not message
    assert "\n" not in message
    return message != ""


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_value_of_another_type_is_refused_in_one_line(benchmark: str) -> None:
    run = RUN[benchmark]
    content = fake_runs.metrics(run)
    assert not is_refused(run, content)
    for path, before in values_of(content):
        is_refused(run, changed(content, path, GONE))  # some keys may be missing
        for value in VALUES:
            refused = is_refused(run, changed(content, path, value))
            # text may be any text, and numbers of a range may be any of it
            same_kind = (
                isinstance(before, float | int)
                and isinstance(value, float | int)
                and value is not True
            )
            may_be_empty = isinstance(before, dict | list) and type(before) is type(value)
            is_other = (
                value is not None
                and type(before) is not type(value)
                and not same_kind
                and not may_be_empty
            )
            assert refused or not is_other, (path, value)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_values_that_changed_places_are_refused_or_of_one_type(benchmark: str) -> None:
    run = RUN[benchmark]
    content = fake_runs.metrics(run)
    keys = list(content)
    for first, second in itertools.pairwise(keys):
        swapped = {**content, first: content[second], second: content[first]}
        assert is_refused(run, swapped), (first, second)


@pytest.mark.parametrize(
    ("benchmark", "path", "value", "key"),
    [
        ("glue", ("cost", "job_seconds"), "1", "cost.job_seconds"),
        ("glue", ("environment", "threads"), 2.5, "environment.threads"),
        ("glue", ("environment", "fingerprint"), [], "environment.fingerprint"),
        ("glue", ("probe",), None, "'probe' is null"),
        ("glue", ("probe", "losses"), [0.7], "probe.losses.0"),
        ("glue", ("probe", "losses"), ["half"], "probe.losses.0': 'half' is not a number"),
        ("glue", ("probe", "loads"), {"first": [1]}, "probe.loads.first"),
        ("glue", ("model", "trained"), {"head": 3}, "model.trained.head"),
        ("modularity", ("model", "conversion", 0, "top_k"), "2", "model.conversion.0.top_k"),
        ("glue", ("data", "test", "labels"), None, "data.test.labels"),
        ("glue", ("data", "test", "labels"), {"0": 2.5}, "data.test.labels.0"),
        ("glue", ("data", "test", "labels"), GONE, "'data.test': 'labels' is missing"),
        ("glue", ("routing", "windows", "ends"), [1], "has 20 windows, but 'ends' has 1"),
        ("glue", ("usage", "shared"), GONE, "'usage': 'shared' is missing"),
        ("glue", ("epochs",), [{"loss": 0.5}], "epochs.0.epoch"),
        ("glue_ood", ("chosen", "run"), 3, "chosen.run"),
        ("modularity", ("matrix", "places"), [], "'matrix': its lists have different lengths"),
        ("domainbed", ("records", 0, "env0_in_acc"), "0.5", "records.0.env0_in_acc"),
        ("domainbed", ("records", 0, "env0_out_acc"), None, "records.0.env0_out_acc"),
        (
            "domainbed",
            ("records", 0, "env0_in_acc"),
            GONE,
            "'records': its records have different accuracies",
        ),
        ("domainbed", ("records",), [], "'records': List should have at least 1 item"),
        ("domainbed", ("routing", "chance"), {}, "'loads' and 'chance' have different layers"),
        ("llama", ("data", "train", "tokens"), GONE, "'data.train': 'tokens' is missing"),
        ("llama", ("answers", 0, "answer"), 3, "answers.0.answer"),
        ("multitask", ("dev_curve", 0, "mean_score"), "0.9", "dev_curve.0.mean_score"),
    ],
)
def test_the_key_of_a_damaged_value_is_named(
    benchmark: str, path: Sequence[Any], value: Any, key: str, here: Path
) -> None:
    run = RUN[benchmark]
    file = run.metrics_file
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(changed(fake_runs.metrics(run), path, value)))
    with pytest.raises(DataError) as error:
        read_record(run)
    assert key in str(error.value)


def test_the_right_answers_of_a_task_are_digits() -> None:
    run = RUN["llama"]
    content = fake_runs.metrics(run)
    for correct in (3, ["0"], {"anatomy": [0, 1]}, {"anatomy": "01x"}, {"anatomy": None}):
        for task in content["tasks"]:
            assert is_refused(run, changed(content, ("tasks", task, "correct"), correct))


def test_parts_of_a_file_are_attributes() -> None:
    content = Metrics.model_validate(fake_runs.metrics(RUN["modularity"]))
    assert content.cost.job_seconds == 1.0
    assert content.model is not None
    assert content.model.conversion[0].top_k == 2
    assert content.model.source.origin == "random weights"
    epochs = Metrics.model_validate(fake_runs.metrics(RUN["glue"])).epochs
    assert set(epochs[0].numbers()) == {"balanced_accuracy", "loss"}


def test_a_pipe_in_place_of_the_numbers_is_not_waited_for(here: Path) -> None:
    run = RUN["glue"]
    path = run.metrics_file
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(DataError, match="is not a file"):
        read_record(run)


def test_status_names_the_damaged_file_of_a_run(here: Path) -> None:
    run = RUN["glue"]
    path = run.metrics_file
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(changed(fake_runs.metrics(run), ("cost",), {})))
    with pytest.raises(
        DataError, match=rf"^{path} is damaged: 'cost.job_seconds': Field required; delete it"
    ):
        state_counts(run.benchmark, [run_status(run)])


def test_a_run_file_of_another_form_is_one_line(here: Path) -> None:
    run = RUN["glue"]
    path = run.spec_file
    path.parent.mkdir(parents=True)
    for key in run.spec:
        for value in (GONE, *VALUES):
            path.write_text(json.dumps(changed(run.spec, (key,), value)))
            with pytest.raises((DataError, DefinitionError), match=rf"^{path} (is|was) ") as error:
                read_run(path)
            assert "\n" not in str(error.value)
