"""Test models that are also evaluated as another method, and the routing of the rows of every set."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import emoe
from benchmarks.harness.base import RUNS
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import run_from_spec
from benchmarks.harness.models.conversion import convert_trained_
from benchmarks.text.data import load_part
from benchmarks.text.definition import RunTask
from benchmarks.text.outcomes import TextOutcomes
from benchmarks.text.training import TextEvaluator
from benchmarks.text.usage import RoutingRecorder
from emoe.errors import EMoEError
from emoe.layer import routed_layers
from tests import fake_runs, tiny_models
from tests.executed import finish, prepare, reopened
from tests.planned import plan, smoke_run

GLUE = load_benchmark("glue")


@pytest.mark.parametrize(("method", "row"), [("vanilla", "vanilla2emoe"), ("emoe", "emoe2vanilla")])
def test_trained_weights_are_evaluated_as_another_methods_which_changes_no_other_number(
    workdir: Path, method: str, row: str
) -> None:
    run = smoke_run("glue", method, epochs=1, keep_weights=True)
    metrics = finish(prepare(run, str(RUNS)))
    classifier, tokenizer = reopened(run, metrics)
    convert_trained_(classifier.model, run.spec["used_as"]["config"])
    assert bool(routed_layers(classifier.model)) == (method == "vanilla")
    task, training = RunTask.model_validate(run.spec["task"]), run.spec["training"]
    evaluator = TextEvaluator(
        classifier,
        tokenizer,
        task,
        training["eval_batch_size"],
        training["max_length"],
        "fp32",
        workdir,
    )
    other = RunTask.model_validate(run.spec["ood"][0])
    scores = metrics["transformed"][row]["scores"]
    assert set(metrics["transformed"]) == {row}
    test = load_part(task, "test", training["eval_rows"])
    assert evaluator.evaluate(test) == pytest.approx(scores["test"]["tweets"])
    ood = evaluator.evaluate(load_part(other, "test", training["eval_rows"]), other)
    assert ood == pytest.approx(scores["ood"][other.name])
    assert scores["test"] != metrics["scores"]["test"]
    alone = finish(
        prepare(
            run_from_spec({name: value for name, value in run.spec.items() if name != "used_as"})
        )
    )
    assert metrics | {"run_id": "", "transformed": {}} == alone | {"run_id": "", "transformed": {}}


@pytest.mark.usefixtures("workdir")
def test_a_layer_that_the_second_evaluation_lacks_is_named_before_the_training() -> None:
    run = smoke_run("glue", "vanilla", epochs=1)
    used_as = run.spec["used_as"]
    wrong = {**used_as, "config": {**used_as["config"], "layers": [9]}}
    text_run = prepare(run_from_spec({**run.spec, "used_as": wrong}))
    with (
        mock.patch("benchmarks.text.pipeline.TextTrainer") as trainer,
        pytest.raises(EMoEError, match=r"layers \[9\] do not exist: the model has layers 0 to 1"),
    ):
        finish(text_run)
    trainer.assert_not_called()


def test_rows_of_transformed_weights_come_from_the_runs_that_trained_them(here: Path) -> None:
    runs = [
        run for run in plan(["glue"], "smoke") if run.spec["method"]["name"] in ("vanilla", "emoe")
    ]
    fake_runs.write_runs(runs)
    records = fake_runs.records(runs)
    main = TextOutcomes(GLUE, records)
    ablated = main.ablated
    assert set(main.rows["method"]) == {"vanilla", "emoe"}
    assert set(ablated.rows["method"]) == {"vanilla", "emoe", "vanilla2emoe", "emoe2vanilla"}
    seeds = ablated.seeds[
        (ablated.seeds["method"] == "vanilla2emoe") & (ablated.seeds["domain"] == "id")
    ]
    vanilla = [record for record in records if record.run.spec["method"]["name"] == "vanilla"]
    recorded = {
        record.run.spec["seed"]: record.metrics.transformed["vanilla2emoe"].scores
        for record in vanilla
    }
    assert set(seeds["seed"]) == set(recorded)
    for seed, value in zip(seeds["seed"], seeds["value"], strict=True):
        assert value == recorded[seed]["test"]["tweets"]["balanced_accuracy"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_loads_of_each_row_are_those_of_the_row_alone(batch_size: int) -> None:
    model = tiny_models.build("bert")
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0, 1]))
    values = tiny_models.inputs("bert")
    rows = len(values["input_ids"])
    routing = RoutingRecorder(model)
    for name in ("one", "two"):
        with routing.record_set(name, np.arange(rows) % 2):
            for start in range(0, rows, batch_size):
                model(**{key: value[start : start + batch_size] for key, value in values.items()})
    information, usage = routing.routing_of_set("one")
    expected = []
    for row in range(rows):
        with emoe.record_routing(model) as record:
            model(**{key: value[row : row + 1] for key, value in values.items()})
        expected.append(record.layers[1].loads.numpy())
    shares = np.sum(expected, axis=0) / np.sum(expected)
    assert usage["tasks"]["one"]["shares"] == pytest.approx(shares.tolist())
    by_class = np.sum(expected[1::2], axis=0)
    assert usage["tasks"]["two"]["classes"]["1"] == pytest.approx(
        (by_class / by_class.sum()).tolist()
    )
    assert information["task_information"] == pytest.approx(0, abs=1e-12)  # the same rows twice
    assert information["shares"]["1"] == pytest.approx(shares.tolist())


# the experts that are used most
