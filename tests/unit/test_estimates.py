"""Devices, the correction of the cost model by finished runs, and how far it is said to be off."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import RUNS
from benchmarks.harness.config import devices
from benchmarks.harness.config.definition import load_benchmark
from benchmarks.harness.config.devices import USUAL_GPU, device_of, find_device, load_devices
from benchmarks.harness.config.kinds import kind_of
from benchmarks.harness.config.runs import Run, plan
from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.config.workload import Passes, Workload
from benchmarks.harness.results.estimates import Estimator, Point, Recorded, errors, factors, recorded
from benchmarks.harness.run.outlook import look_ahead
from tests.planned import paper_runs, plan_once

CPU = find_device("cpu")


@pytest.fixture(autouse=True)
def workdir(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_once(monkeypatch)


def points(pairs: dict[str, list[tuple[str, float, float]]]) -> list[Point]:
    return [Point(name, like, said, was) for name, rows in pairs.items() for like, said, was in rows]


def test_an_estimate_is_never_corrected_by_itself_or_by_another_seed() -> None:
    # every other setting takes as long as it is said to; of one all seeds take ten times as long
    found = points({"a": [("x", 1, 10), ("x", 1, 10), ("x", 1, 10), ("y", 1, 1), ("z", 2, 2)]})
    (row, total) = errors(found)
    assert (row.name, row.runs, row.worst) == ("a", 5, pytest.approx(9))  # y, by x; x itself by y and z: 0.9
    assert row.median == pytest.approx(0.9)
    assert total.total == pytest.approx((3 * 1 + 10 * 1 + 10 * 2) / 33)
    assert factors(found) == {"a": 10}


def test_a_benchmark_may_be_estimated_from_the_others() -> None:
    found = points({"a": [("x", 1, 2), ("y", 1, 2)], "b": [("x", 1, 3), ("y", 1, 3)], "alone": []})
    rows = {row.name: row for row in errors(found, over_benchmarks=True)}
    assert rows["a"].median == pytest.approx(0.5)
    assert rows["b"].median == pytest.approx(1 / 3)
    assert errors(points({"a": [("x", 1, 2)]})) == []  # nothing to estimate it from


def size_of(run: Run) -> Workload:
    found = kind_of(run.benchmark).workload(run.spec, load_benchmark(run.benchmark).tasks, {})
    assert found is not None
    return found


def miscounted(work: Workload, share: float) -> Workload:
    """As if a part of the tokens had been forgotten."""

    def less(passes: Passes) -> Passes:
        return dataclasses.replace(passes, tokens=passes.tokens * share)

    return dataclasses.replace(work, training=less(work.training), reading=tuple(map(less, work.reading)))


def test_tokens_that_are_miscounted_are_seen_in_the_error() -> None:
    """Runs of several tasks and lengths, as a machine takes them that does what is stated: counted well the error is that of the noise, else it is not."""
    runs = [run for run in paper_runs("glue") if run.spec["seed"] == 0 and run.spec["method"]["name"] == "vanilla"]
    draw = random.Random(0)
    truth = {run.folder: CPU.seconds(size_of(run)) * 1.7 * draw.uniform(0.97, 1.03) for run in runs}
    resources = {run.folder: {"threads": 1, "gpu": 0} for run in runs}
    there = [dataclasses.replace(run, resources=resources[run.folder]) for run in runs]
    finished = [Recorded(folder, "cpu", 1, seconds, None, None) for folder, seconds in truth.items()]

    def off(work: dict[str, Workload | None]) -> float:
        estimator = Estimator("cpu", CPU, work, there, finished, {}, {})
        return errors(estimator.times)[-1].worst

    right = {run.folder: size_of(run) for run in runs}
    assert off(dict(right)) < 0.08
    # pairs of sentences counted as single ones
    pairs = {run.folder for run in runs if len(run.spec["task"]["fields"]) == 2}
    assert off({folder: miscounted(work, 0.5 if folder in pairs else 1.0) for folder, work in right.items()}) > 0.5
    # epochs of the large tasks counted as those of the small
    large = {run.folder for run in runs if run.spec["training"]["epochs"] == 3}
    assert off({folder: miscounted(work, 10 / 3 if folder in large else 1.0) for folder, work in right.items()}) > 0.5


def write_metrics(folder: Path, **cost: Any) -> None:
    folder.mkdir(parents=True)
    content = {"cost": {"job_seconds": 2.0, **cost}, "environment": {"gpus": [], "threads": 1}}
    (folder / "metrics.json").write_text(json.dumps(content))


def test_a_run_that_stopped_early_is_compared_with_what_it_did() -> None:
    run = next(run for run in paper_runs("glue") if run.spec["task"]["name"] == "cola")
    run = dataclasses.replace(run, resources={"threads": 1, "gpu": 0})
    work = size_of(run)
    write_metrics(RUNS / run.folder, steps=work.updates // 2, peak_memory_mb=800.0)
    (point,) = Estimator("cpu", CPU, {run.folder: work}, [run], [recorded(run.folder)], {}, {}).times
    reading = CPU.seconds(dataclasses.replace(work, training=Passes(0, 0, 0, 0), updates=0))
    assert point.said - reading == pytest.approx((CPU.seconds(work) - reading) / 2, rel=0.01)


def test_times_rest_on_what_is_nearest() -> None:
    suite = load_suite({"suite": "mini"})
    total = look_ahead(suite).total
    assert total.by_basis == {"blessed": total.missing}
    blessed = suite.blessed_seconds
    counts = {name: len(suite.runs_of(name)) for name in blessed}
    assert total.seconds == pytest.approx(sum(blessed[name] * counts[name] for name in blessed), rel=1e-6)
    first = next(run for run in suite.runs if run.benchmark == "glue" and run.spec["seed"] == 0)
    write_metrics(RUNS / first.folder, peak_memory_mb=1234.0)
    found = look_ahead(suite, "glue").total
    assert (found.done, found.by_basis["seed"]) == (1, 7)  # the other seeds of that row
    assert found.by_basis == {"seed": 7, "finished": found.missing - 7}
    assert found.seconds < look_ahead(load_suite({"suite": "mini"}), "glue", device="v100").total.seconds
    # what ran on a CPU says nothing of a GPU
    other = look_ahead(suite, device="h100")
    assert other.total.by_basis == {"stated": other.total.missing}
    assert other.total.gpu_seconds == other.total.seconds
    assert other.errors["time"] == []


def test_a_faster_device_takes_less_and_a_stated_speed_is_taken() -> None:
    suite = load_suite({"suite": "paper", "benchmarks": ["modularity"]})
    hours = {name: look_ahead(suite, "modularity", device=name).total.gpu_seconds for name in ("v100", "a100", "h100")}
    assert hours["v100"] > hours["a100"] > hours["h100"]
    work = size_of(paper_runs("glue")[0])
    passes = [
        find_device("a100").model_copy(update={"tflops": {"fp32": speed}, "share": {"fp32": 1.0}}) for speed in (5, 10)
    ]
    start = passes[0].start_seconds
    assert (passes[0].seconds(work) - start) / (passes[1].seconds(work) - start) == pytest.approx(2, rel=0.05)


def test_tiny_work_takes_as_long_as_it_takes_to_start_it() -> None:
    device = find_device("a100")
    work = size_of(next(run for run in plan(["glue"], "smoke") if run.spec["method"]["name"] == "vanilla"))
    least = work.training.count * work.training.layers * device.layer_microseconds * 1e-6
    assert device.seconds(work) > device.start_seconds + least
    assert work.operations / device.speed("fp32") < least / 10


def test_runs_that_a_gpu_does_not_hold_are_counted() -> None:
    suite = load_suite({"suite": "paper", "benchmarks": ["llama"]})
    assert look_ahead(suite, "llama", device="a100").total.too_large == 0
    small = look_ahead(suite, "llama", device="rtx4090").total
    assert 0 < small.too_large < small.runs
    assert small.memory_bytes is not None
    assert small.memory_bytes > 60e9  # one process evaluates the whole Llama-30B


def test_recorded_gpus_are_known_by_their_names() -> None:
    known = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "Tesla V100-SXM2-32GB": "v100",
        "NVIDIA A10": "a10",
    }
    known |= {"NVIDIA RTX A1000 Laptop": USUAL_GPU, "NVIDIA A10G": "a10"}
    known |= {"NVIDIA A100-PCIE-40GB": "a100", "NVIDIA GeForce RTX 4090": "rtx4090", "NVIDIA L40S": "l40s"}
    for name, device in known.items():
        assert device_of([name]) == device
    assert device_of([]) == "cpu"
    assert device_of(["NVIDIA GB10"]) == USUAL_GPU  # finished runs correct it


def test_a_wrong_device_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DefinitionError, match="did you mean 'a100'"):
        find_device("a1000")
    content = yaml.safe_load((devices.BENCHMARKS / "devices.yaml").read_text())

    def refused(match: str, **changes: Any) -> None:
        load_devices.cache_clear()
        changed = {**content, "devices": {**content["devices"], "cpu": {**content["devices"]["cpu"], **changes}}}
        (tmp_path / "devices.yaml").write_text(yaml.safe_dump(changed))
        with pytest.raises(DefinitionError, match=match):
            load_devices()

    monkeypatch.setattr(devices, "BENCHMARKS", tmp_path)
    try:
        refused(r"devices\.cpu\.tflops\.fp32", tflops={"fp32": 0.0})
        refused(r"devices\.cpu.*lacks 'fp32'", tflops={"bf16": 1.0})
        refused(r"devices\.cpu.*lacks 'bf16'", tflops={"fp32": 1.0, "bf16": 1.0})
        refused("did you mean 'bandwidth_gb'", bandwith_gb=3.0)
    finally:
        load_devices.cache_clear()
