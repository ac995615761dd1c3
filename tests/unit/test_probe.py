"""What a run says of itself: first losses, logits of a fixed batch, loads at conversion; and that looking changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

import emoe
from benchmarks.harness.training.probe import FIRST_STEPS, LogitsSummary, Probe
from tests import tiny_models


def looked(model: torch.nn.Module) -> dict[str, Any]:
    probe = Probe()
    probe.look(model, {**tiny_models.inputs("bert"), "labels": torch.tensor([0, 1, 0])})
    return probe.summary()


def routed(**settings: Any) -> torch.nn.Module:
    model = tiny_models.build("bert")
    emoe.convert_(model, emoe.EMoEConfig(**{"num_experts": 8, "top_k": 2, "layers": [1], **settings}))
    return model


class Head(torch.nn.Module):
    """A model whose output has logits."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.dropout = inner, torch.nn.Dropout(0.5)

    def forward(self, **values: torch.Tensor) -> dict[str, torch.Tensor]:
        assert "labels" not in values
        return {"logits": self.dropout(self.inner(**values).last_hidden_state)}


def test_looking_changes_neither_the_model_nor_randomness() -> None:
    model = Head(routed(router_noise=1.0, aux_loss_coefficient=0.1))
    model.train()
    model.inner.eval()  # modes are given back one by one
    before, state = torch.get_rng_state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = looked(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert (model.training, model.dropout.training, model.inner.training) == (True, True, False)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert looked(model) == found  # in evaluation, without dropout and noise
    assert sum(found["loads"]["1"]) == 2 * 33


def test_a_probe_tells_methods_apart() -> None:
    dense = looked(Head(tiny_models.build("bert")))
    assert dense["loads"] == {}
    changes: list[dict[str, Any]] = [
        {},
        {"top_k": 1},
        {"num_experts": 16},
        {"layers": [0]},
        {"selection": "bottom"},
        {"partition": "random"},
    ]
    found = [looked(Head(routed(**change))) for change in changes]
    assert len({json.dumps(one) for one in [dense, *found]}) == 7


def test_the_summary_sees_two_logits_that_changed_places() -> None:
    logits = torch.arange(12.0).reshape(3, 4)
    swapped = logits.flatten()[[1, 0, *range(2, 12)]].reshape(3, 4)
    one, other = LogitsSummary.of(logits), LogitsSummary.of(swapped)
    assert (one.mean, one.deviation, one.rms) == (other.mean, other.deviation, other.rms)
    assert one.projection != other.projection
    assert LogitsSummary.of(logits.clone()) == one


def test_first_losses_are_kept_with_all_digits_and_with_a_checkpoint(tmp_path: Path) -> None:
    probe = Probe()
    for number in range(3):
        probe.note(torch.tensor(1 / (number + 3)))
    checkpoint = tmp_path / "checkpoint-3"
    args: Any = SimpleNamespace(output_dir=str(tmp_path))
    arguments: TrainingArguments = args
    state = TrainerState(global_step=3)
    state.is_world_process_zero = True
    probe.on_save(arguments, state, TrainerControl())
    again = Probe()
    again.resume(checkpoint)
    for number in range(20):
        again.note(torch.tensor(float(number)))
    losses = again.summary()["losses"]
    assert len(losses) == FIRST_STEPS
    assert losses[:3] == probe.summary()["losses"]
    assert float(losses[0]) == float(torch.tensor(1 / 3))


def test_a_loss_that_is_no_number_can_be_written(tmp_path: Path) -> None:
    probe = Probe()
    probe.note(torch.tensor(float("nan")))
    assert json.loads(json.dumps(probe.summary(), allow_nan=False))["losses"] == ["nan"]


def test_a_model_that_is_shared_by_processes_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.training.probe.is_sharded", lambda: True)
    assert looked(Head(tiny_models.build("bert"))) == {"losses": [], "loads": {}}
