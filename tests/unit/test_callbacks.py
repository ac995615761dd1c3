"""Record first losses, logits and loads of a fixed batch, and loads by window of steps, without changing the training."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import emoe
from benchmarks.harness.config.runs import Run
from benchmarks.harness.training import callbacks
from benchmarks.harness.training.callbacks import FIRST_STEPS, Probe, summarise_logits, window_steps
from tests import tiny_models
from tests.executed import finish, prepare
from tests.planned import smoke_run


def probed(model: torch.nn.Module) -> dict[str, Any]:
    probe = Probe()
    probe.observe(model, {**tiny_models.inputs("bert"), "labels": torch.tensor([0, 1, 0])})
    return probe.summary()


def routed(**settings: Any) -> torch.nn.Module:
    model = tiny_models.build("bert")
    emoe.convert_(model, emoe.EMoEConfig(**{"num_experts": 8, "top_k": 2, "layers": [1], **settings}))
    return model


class Head(torch.nn.Module):
    """Return the states of a model as logits."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.dropout = inner, torch.nn.Dropout(0.5)

    def forward(self, **values: torch.Tensor) -> dict[str, torch.Tensor]:
        assert "labels" not in values
        return {"logits": self.dropout(self.inner(**values).last_hidden_state)}


def test_a_probe_restores_the_model_and_the_random_state() -> None:
    model = Head(routed(router_noise=1.0, aux_loss_coefficient=0.1))
    model.train()
    model.inner.eval()  # each module has its own mode
    before, state = torch.get_rng_state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    summary = probed(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert (model.training, model.dropout.training, model.inner.training) == (True, True, False)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert probed(model) == summary  # in evaluation, without dropout and noise
    assert sum(summary["loads"]["1"]) == 2 * 33


def test_a_probe_differs_between_methods() -> None:
    dense = probed(Head(tiny_models.build("bert")))
    assert dense["loads"] == {}
    changes: list[dict[str, Any]] = [
        {},
        {"top_k": 1},
        {"num_experts": 16},
        {"layers": [0]},
        {"selection": "bottom"},
        {"partition": "random"},
    ]
    probes = [dense, *(probed(Head(routed(**change))) for change in changes)]
    assert len({json.dumps(probe) for probe in probes}) == 7


def test_the_summary_changes_if_two_logits_are_exchanged() -> None:
    logits = torch.arange(12.0).reshape(3, 4)
    summary, exchanged = (summarise_logits(values) for values in (logits, logits.flatten()[[1, 0, *range(2, 12)]]))
    assert {name for name in summary if summary[name] != exchanged[name]} == {"projection"}


def test_first_losses_have_all_digits_and_may_be_nan() -> None:
    probe = Probe()
    for loss in (1 / 3, float("nan"), *range(20)):
        probe.add_loss(torch.tensor(float(loss)))
    losses = json.loads(json.dumps(probe.summary(), allow_nan=False))["losses"]
    assert len(losses) == FIRST_STEPS
    assert float(losses[0]) == float(torch.tensor(1 / 3))
    assert losses[1] == "nan"


def test_a_sharded_model_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "is_sharded", lambda: True)
    assert probed(Head(tiny_models.build("bert"))) == {"losses": [], "loads": {}}


def test_a_run_has_twenty_to_a_hundred_windows_or_those_of_the_authors() -> None:
    assert [window_steps(steps) for steps in (1, 80, 2_000, 10_000, 32_735, 122_720)] == [1, 4, 100, 100, 328, 1228]
    for steps in (40, 999, 7_777, 1_000_000):
        assert 20 <= -(-steps // window_steps(steps)) <= 101


def small(method: str) -> Run:
    return smoke_run("glue", method, train_rows=48, eval_rows=20, epochs=2)


@pytest.mark.parametrize("method", ["gmoe", "emoe_learn_published"])
def test_a_run_records_the_loads_of_every_window(workdir: None, method: str) -> None:
    run = small(method)
    windows = finish(prepare(run))["routing"]["windows"]
    config = run.spec["method"]["config"]
    assert windows["ends"] == list(range(1, 13))  # two epochs of six steps
    counts = np.array(windows["loads"]["1"])
    assert counts.shape == (12, config["num_experts"])
    assert (counts.sum(1) % config["top_k"] == 0).all()  # choices, before the capacity drops any
    assert (counts.sum(1) > 0).all()


def test_a_window_ends_with_its_epoch(workdir: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "window_steps", lambda steps: 4)
    windows = finish(prepare(small("emoe")))["routing"]["windows"]
    assert windows["ends"] == [4, 6, 10, 12]
    tokens = np.array(windows["loads"]["1"]).sum(1)
    assert tokens[:2].sum() == tokens[2:].sum()  # the same rows in both epochs
