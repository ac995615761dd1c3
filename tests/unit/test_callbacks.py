"""Record first losses, logits and loads of a fixed batch, and loads by window of steps, without changing the training."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.harness.training.callbacks import Probe, Stopwatch, UpdateGates
from benchmarks.harness.training.routing import window_steps
from tests import tiny_models
from tests.classifiers import METHODS, bert
from tests.executed import finish, prepare
from tests.planned import smoke_run


def test_an_evaluation_takes_no_negative_time_if_the_clock_is_set_back() -> None:
    stopwatch = Stopwatch()
    stopwatch.on_evaluate(metrics={"eval_runtime": 2.0, "eval_loss": 0.3})
    stopwatch.on_evaluate(metrics={"eval_runtime": -0.0046})
    assert stopwatch.evaluation == 2.0


def test_a_probe_restores_the_model_and_the_random_state() -> None:
    model, values = bert(METHODS["emoe, published"]).train(), tiny_models.inputs("bert")
    model.bert.eval()  # each module has its own mode
    before, state = (
        torch.get_rng_state(),
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )
    summaries = []
    for _ in range(2):
        probe = Probe()
        probe.observe(model, {**values, "labels": torch.tensor([0, 1, 0])})
        summaries.append(probe.summary())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert (model.training, model.dropout.training, model.bert.training) == (True, True, False)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert summaries[0] == summaries[1]  # in evaluation, without dropout and noise
    assert sum(summaries[0]["loads"]["2"]) == 2 * 33


@pytest.mark.parametrize("was_skipped", [False, True])
def test_a_step_that_mixed_precision_skips_updates_no_running_gate(was_skipped: bool) -> None:
    model = bert(METHODS["emoe, momentum"])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    optimizer = SimpleNamespace(step_was_skipped=was_skipped)
    UpdateGates().on_optimizer_step(model=model, optimizer=optimizer)
    after = dict(model.named_buffers())
    has_changed = any(not torch.equal(after[name], buffer) for name, buffer in before.items())
    assert has_changed != was_skipped


def test_a_run_has_twenty_to_a_hundred_windows() -> None:
    assert [window_steps(steps) for steps in (1, 80, 2_000, 10_000, 32_735, 122_720)] == [
        1,
        4,
        100,
        100,
        328,
        1228,
    ]
    for steps in (40, 999, 7_777, 1_000_000):
        assert 20 <= -(-steps // window_steps(steps)) <= 101


def test_a_run_records_the_loads_of_every_window(workdir: None) -> None:
    run = smoke_run("glue", "emoe_learn_published", train_rows=48, eval_rows=20, epochs=2)
    windows = finish(prepare(run))["routing"]["windows"]
    config = run.spec["method"]["config"]
    assert windows["ends"] == list(range(1, 13))  # two epochs of six steps
    counts = np.array(windows["loads"]["1"])
    assert counts.shape == (12, config["num_experts"])
    assert (counts.sum(1) % config["top_k"] == 0).all()  # choices, before the capacity drops any
    assert counts.sum(1).min() > 0
    assert counts[:6].sum() == counts[6:].sum()  # the same rows in both epochs
