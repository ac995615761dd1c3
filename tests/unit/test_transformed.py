"""Full fine-tuning: models that are also evaluated as another method's; and how rows of every set are routed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import emoe
from benchmarks.harness.base import RUNS, DataError, DefinitionError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import run_from_spec
from benchmarks.harness.models.conversion import apply_method_, use_as_
from benchmarks.harness.models.loading import load_backbone
from benchmarks.harness.results.records import collect, read_metrics
from benchmarks.text.data import load_part
from benchmarks.text.definition import RunTask
from benchmarks.text.evaluation import TextEvaluator
from benchmarks.text.outcomes import TextOutcomes
from benchmarks.text.tokenization import calibration_batches
from benchmarks.text.usage import RowRouting
from emoe.layer import routed_layers
from tests import fake_runs, tiny_models
from tests.executed import finish, prepare, recorded, reopened
from tests.planned import edited_benchmark, plan, smoke_run

GLUE = load_benchmark("glue")


@pytest.mark.parametrize(("method", "row"), [("vanilla", "vanilla2emoe"), ("emoe", "emoe2vanilla")])
def test_trained_weights_are_evaluated_as_another_methods(workdir: Path, method: str, row: str) -> None:
    run = smoke_run("glue", method, epochs=1, keep_weights=True)
    found = recorded(run)
    classifier, tokenizer = reopened(run, found)
    use_as_(classifier.model, run.spec["used_as"]["config"], run.spec["seed"])
    assert bool(routed_layers(classifier.model)) == (method == "vanilla")
    task, training = RunTask.model_validate(run.spec["task"]), run.spec["training"]
    evaluator = TextEvaluator(
        classifier, tokenizer, task, training["eval_batch_size"], training["max_length"], "fp32", workdir
    )
    other = RunTask.model_validate(run.spec["ood"][0])
    scores = found["transformed"][row]["scores"]
    assert set(found["transformed"]) == {row}
    test = load_part(task, "test", training["eval_rows"])
    assert evaluator.evaluate(test) == pytest.approx(scores["test"]["tweets"])
    ood = evaluator.evaluate(load_part(other, "test", training["eval_rows"]), other)
    assert ood == pytest.approx(scores["ood"][other.name])
    assert scores["test"] != found["scores"]["test"]


@pytest.mark.parametrize("method", ["vanilla", "emoe"])
def test_whatever_else_is_recorded_is_of_the_model_as_it_was_trained(workdir: Path, method: str) -> None:
    run = smoke_run("glue", method, epochs=1)
    alone = run_from_spec({name: value for name, value in run.spec.items() if name != "used_as"})
    found, wanted = (finish(prepare(one, str(RUNS))) for one in (run, alone))
    for name in set(found) - {"run_id", "transformed", "cost", "environment"}:
        assert found[name] == wanted[name], name
    assert found["transformed"]


def test_a_row_that_nothing_trains_is_of_the_runs_of_another(here: Path) -> None:
    runs = [run for run in plan(["glue"], "smoke") if run.spec["method"]["name"] in ("vanilla", "emoe")]
    fake_runs.write_runs(runs)
    main, ablated = (TextOutcomes(GLUE, runs, ablated=ablated) for ablated in (False, True))
    assert set(main.rows["method"]) == {"vanilla", "emoe"}
    assert set(ablated.rows["method"]) == {"vanilla", "emoe", "vanilla2emoe", "emoe2vanilla"}
    seeds = ablated.seeds[(ablated.seeds["method"] == "vanilla2emoe") & (ablated.seeds["domain"] == "id")]
    vanilla = {run.spec["seed"]: run for run in runs if run.spec["method"]["name"] == "vanilla"}
    assert set(seeds["seed"]) == set(vanilla)
    for seed, value in zip(seeds["seed"], seeds["value"], strict=True):
        recorded = read_metrics(vanilla[seed])["transformed"]["vanilla2emoe"]
        assert value == recorded["scores"]["test"]["tweets"]["balanced_accuracy"]


def test_they_are_read_and_checked_with_the_run(here: Path) -> None:
    run = smoke_run("glue", "vanilla", epochs=1)
    fake_runs.write_runs([run])
    records = collect([run])
    parts = records.loc[records["part"].str.contains(" as "), "part"]
    assert set(parts) == {f"{part} as vanilla2emoe" for part in ("test", "ood", "ood_mean")}
    wrong = {"balanced_accuracy": 17.0}
    fake_runs.edit(
        run, lambda content: content["transformed"]["vanilla2emoe"]["scores"]["test"]["tweets"].update(wrong)
    )
    with pytest.raises(DataError, match=r"test as vanilla2emoe tweets balanced_accuracy is 17\.0"):
        collect([run])


def test_what_cannot_be_used_as_another_is_refused() -> None:
    row = {"title": "More", "trained": "vanilla", "used_as": "random_partition"}
    with pytest.raises(DefinitionError, match="'transformed' makes two things of 'vanilla'"):
        edited_benchmark("glue", {"transformed.more": row})


# how rows are routed


@pytest.mark.parametrize("batch_size", [1, 4])
def test_loads_of_each_row_are_those_of_the_row_alone(batch_size: int) -> None:
    model = tiny_models.build("bert")
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0, 1]))
    values = tiny_models.inputs("bert")
    rows = len(values["input_ids"])
    routing = RowRouting(model)
    for name in ("one", "two"):
        with routing.watching(name, np.arange(rows) % 2):
            for start in range(0, rows, batch_size):
                model(**{key: value[start : start + batch_size] for key, value in values.items()})
    told, usage = routing.described("one")
    expected = []
    for row in range(rows):
        with emoe.record_routing(model) as record:
            model(**{key: value[row : row + 1] for key, value in values.items()})
        expected.append(record.layers[1].loads.numpy())
    shares = np.sum(expected, axis=0) / np.sum(expected)
    assert usage["tasks"]["one"]["shares"] == pytest.approx(shares.tolist())
    by_class = np.sum(expected[1::2], axis=0)
    assert usage["tasks"]["two"]["classes"]["1"] == pytest.approx((by_class / by_class.sum()).tolist())
    assert told["task_information"] == pytest.approx(0, abs=1e-12)  # the same rows twice
    assert told["shares"]["1"] == pytest.approx(shares.tolist())


def test_a_dense_model_has_no_routing_and_one_set_alone_tells_nothing() -> None:
    model, values = tiny_models.build("bert"), tiny_models.inputs("bert")
    for converted in (False, True):
        if converted:
            emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1]))
        routing = RowRouting(model)
        with routing.watching("one", np.zeros(len(values["input_ids"]), dtype=np.int64)):
            tiny_models.output(model, values)
        told, usage = routing.described("one")
        assert ("load_entropy" in told, usage) == (converted, {})
        assert not [name for name in told if "information" in name]


def test_usage_is_of_all_rows_of_a_split(workdir: Path) -> None:
    metrics = finish(prepare(smoke_run("glue", "emoe", epochs=1)))
    assert set(metrics["usage"]["tasks"]) == {"tweets", "amazon", "movie", "nyt"}
    shares = metrics["routing"]["shares"]
    assert metrics["usage"]["tasks"]["tweets"]["shares"] == pytest.approx(shares[max(shares)])


# the experts that are used most


def test_the_most_used_experts_are_counted_on_training_rows_and_come_back_from_a_file(workdir: Path) -> None:
    run = smoke_run("glue_lora", "lora_most_used", epochs=1)
    spec, found = run.spec, recorded(run)
    (layer,) = found["routing"]["shares"].values()
    config = run.spec["method"]["config"]
    used = [share for share in layer if share]
    assert used == pytest.approx([1 / config["top_k"]] * config["top_k"])
    classifier, tokenizer = reopened(run, found)
    router = routed_layers(classifier.model)[0].router
    task, training = RunTask.model_validate(spec["task"]), spec["training"]
    train = load_part(task, "train", training["train_rows"])
    batches = calibration_batches(train, tokenizer, training["max_length"], training["eval_batch_size"])
    fresh = load_backbone(spec["model"]).eval()
    apply_method_(fresh, {**spec["method"], "config": {**config, "router": "avg_k"}}, spec["seed"])
    with torch.no_grad(), emoe.record_routing(fresh) as record:
        for batch in batches:
            fresh(**batch)
    assert torch.equal(router.usage, record.layers[1].loads)
