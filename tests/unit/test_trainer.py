"""Train converted models with ``transformers.Trainer``: checkpoints, gates, balance loss, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BertForSequenceClassification,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    Trainer,
    ViTForImageClassification,
)

import emoe
from emoe.layer import routed_layers
from tests import converted, tiny_models
from tests.classifiers import METHODS, SIZES, SOME, bert, load, logits, rows
from tests.converted import without_dropout
from tests.model_folders import assert_same

# plain gradient descent over the rows in their order
CONSTANT = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0}
BY_HAND = {**CONSTANT, "optim": "sgd", "train_sampling_strategy": "sequential"}
USUAL = {
    "save_strategy": "no",
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
}
QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}


def trainer(
    model: Any,
    folder: Path,
    *,
    callback: Any = None,
    data: Any = None,
    compute_loss: Any = None,
    **settings: Any,
) -> Trainer:
    arguments: Any = transformers.TrainingArguments(str(folder), **{**USUAL, **QUIET, **settings})
    parts = {
        "train_dataset": data or rows(),
        "eval_dataset": data or rows(),
        "compute_loss_func": compute_loss,
    }
    return Trainer(model, arguments, callbacks=[callback or emoe.TrainerCallback()], **parts)


def assert_same_experts(again: Any, model: Any) -> None:
    assert torch.equal(logits(again), logits(model))
    assert_same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_keep_the_experts_and_training_resumes_identically(
    method: str, tmp_path: Path
) -> None:
    model = bert(METHODS[method])
    trainer(model, tmp_path, save_strategy="steps", save_steps=2).train()
    halfway, again = load(tmp_path / "checkpoint-2"), load(tmp_path / "checkpoint-4")
    assert_same_experts(again, model)
    for layer, expected in zip(routed_layers(halfway), routed_layers(model), strict=True):
        assert layer.config == expected.config
    if method != "gmoe":
        dense, expected = (
            emoe.to_dense_(network, restore_order=True) for network in (again, model)
        )
        assert_same(dense.state_dict(), expected.state_dict())
    resumed = bert(METHODS[method])
    trainer(resumed, tmp_path / "again").train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert_same_experts(resumed, load(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("method", METHODS)
def test_save_model_saves_the_experts_but_not_the_original_order(
    method: str, tmp_path: Path
) -> None:
    model = bert(METHODS[method])
    emoe.set_top_k_(model, 3)
    trainer(model, tmp_path).save_model(str(tmp_path))
    assert not list(tmp_path.glob("emoe_*"))
    again = load(tmp_path)
    assert_same_experts(again, model)
    if method != "gmoe":
        with pytest.raises(emoe.ConversionError, match="leave out restore_order"):
            emoe.to_dense_(again, restore_order=True)
    emoe.save_pretrained(again, tmp_path / "ours")
    assert_same_experts(load(tmp_path / "ours"), model)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "t5", "gpt2"])
def test_checkpoints_load_although_the_library_renames_tensors(name: str, tmp_path: Path) -> None:
    model, values = (
        converted.model(name, router="cosine", weighting="softmax"),
        tiny_models.inputs(name),
    )
    model.save_pretrained(tmp_path)
    again = emoe.from_pretrained(type(model), tmp_path)
    assert torch.equal(tiny_models.output(again, values), tiny_models.output(model, values))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = bert(METHODS["emoe, momentum"])
    steps = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(
        model, tmp_path, **steps, load_best_model_at_end=True, metric_for_best_model="loss"
    )
    run.train()
    assert run.state.best_global_step == 2  # the labels are random, so the loss rises
    assert_same_experts(load(tmp_path / "checkpoint-2"), model)


def build(cls: Any) -> Any:
    """Build a model without dropout, with a running gate and a large balance loss."""
    torch.manual_seed(0)
    model = without_dropout(
        cls(cls.config_class(**SIZES, vocab_size=60, image_size=16, patch_size=8))
    )
    emoe.convert_(model, emoe.EMoEConfig(**SOME, aux_loss_coefficient=5.0, gate_momentum=0.5))
    return model


def texts() -> list[dict[str, torch.Tensor]]:
    """Make rows of eight tokens with 7, 6, 4 and 2 labels."""
    masked = [torch.arange(8) < 2 * index for index in range(4)]
    ids = [row["input_ids"] for row in rows(4)]
    return [
        {"input_ids": x, "labels": x.masked_fill(m, -100)} for x, m in zip(ids, masked, strict=True)
    ]


def tagged() -> list[dict[str, torch.Tensor]]:
    """Make rows of eight tokens with a label of two classes each."""
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"] % 2} for row in rows(4)]


def images() -> list[dict[str, torch.Tensor]]:
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return [
        {"pixel_values": image, "labels": torch.tensor(index % 2)}
        for index, image in enumerate(pixels)
    ]


def batch(data: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


class Interrupt(transformers.TrainerCallback):
    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


# model, rows, and the weights of two forward passes in the loss of a step
LOSSES: dict[str, tuple[Any, list[dict[str, torch.Tensor]], tuple[float, float]]] = {
    "mean that Trainer divides": (BertForSequenceClassification, rows(4), (0.5, 0.5)),
    "mean that it does not divide": (BertForSequenceClassification, rows(4), (1, 1)),
    "mean of the loss function that can divide": (LlamaForTokenClassification, tagged(), (1, 1)),
    "after an interrupted training": (BertForSequenceClassification, rows(4), (1, 1)),
    "sum over tokens": (LlamaForCausalLM, texts(), (13 / 19, 6 / 19)),
    "sum over rows": (ViTForImageClassification, images(), (0.5, 0.5)),
}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_has_the_balance_loss_once_scaled_like_the_models_loss_and_moves_gates(
    kind: str, tmp_path: Path
) -> None:
    """One step of plain gradient descent on two forward passes of two rows each."""
    cls, data, weights = LOSSES[kind]
    model, expected = build(cls), build(cls).train()
    model.accepts_loss_kwargs = kind != "mean that Trainer divides"
    for part, weight in zip((batch(data[:2]), batch(data[2:])), weights, strict=True):
        ((expected(**part).loss + emoe.aux_loss(expected)) * weight).backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    emoe.update_gates_(expected)
    passes = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    if kind == "after an interrupted training":
        run = trainer(model, tmp_path, data=data, **passes)
        run.add_callback(Interrupt())
        with pytest.raises(KeyboardInterrupt):
            run.train()
    run = trainer(model, tmp_path, data=data, **passes, **BY_HAND)
    run.train()
    assert_close(model.state_dict(), expected.state_dict())
    # evaluation, and the model after training, have the task's loss alone
    with torch.no_grad():
        task = float(model.eval()(**batch(data)).loss)
    assert run.evaluate()["eval_loss"] == pytest.approx(task, rel=1e-4)
    assert float(model.train()(**batch(data)).loss.detach()) == pytest.approx(task, rel=1e-4)


class TwoTowers(torch.nn.Module):
    """Two models that were converted separately. The second one computes the loss."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, **inputs: Any) -> Any:
        self.first(**inputs)
        return self.second(**inputs)


def test_the_balance_loss_of_any_part_is_added(tmp_path: Path) -> None:
    def build_towers() -> TwoTowers:
        return TwoTowers(bert(METHODS["emoe"]), bert(METHODS["emoe-learn"]))

    model = build_towers()
    expected = without_dropout(build_towers())
    data = rows(4)
    (expected(**batch(data)).loss + emoe.aux_loss(expected)).backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    # Trainer cannot see in `**inputs` which columns the model uses
    one_step = {"max_steps": 1, "remove_unused_columns": False, **BY_HAND}
    trainer(without_dropout(model), tmp_path, data=data, **one_step).train()
    assert_close(model.state_dict(), expected.state_dict())


def test_a_module_around_converted_models_is_trained_with_checkpoints(tmp_path: Path) -> None:
    model = TwoTowers(bert(METHODS["emoe"]), bert(METHODS["emoe-learn"]))
    halfway = {"save_strategy": "steps", "save_steps": 2, "remove_unused_columns": False}
    trainer(model, tmp_path, **halfway).train()
    resumed = TwoTowers(bert(METHODS["emoe"]), bert(METHODS["emoe-learn"]))
    trainer(resumed, tmp_path / "again", **halfway).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert_same(resumed.state_dict(), model.state_dict())
    # emoe does not know the layers of this module, by whose numbers it would find the orders
    assert not list(tmp_path.rglob("emoe_*"))


def test_models_without_experts_are_errors(tmp_path: Path) -> None:
    with pytest.raises(emoe.ConversionError, match="convert it first"):
        trainer(bert(None), tmp_path).train()


def test_balance_losses_that_cannot_be_added_are_errors(tmp_path: Path) -> None:
    model = bert(METHODS["emoe-learn"])

    def own_loss(
        outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits, labels) + emoe.aux_loss(model)

    with pytest.raises(emoe.ConfigError, match="add_aux_loss=False"):
        trainer(model, tmp_path, compute_loss=own_loss).train()
    trainer(
        model, tmp_path, callback=emoe.TrainerCallback(add_aux_loss=False), compute_loss=own_loss
    ).train()
    reentrant = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    with pytest.raises(
        emoe.ConfigError, match="use_reentrant"
    ):  # the balance loss would have no gradient
        trainer(model, tmp_path, **reentrant).train()


def test_adapters_are_saved_without_the_model_whose_experts_they_use(tmp_path: Path) -> None:
    model = bert(METHODS["emoe"])
    emoe.save_pretrained(model, tmp_path / "base")
    adapted: Any = get_peft_model(
        model, LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    )
    trainer(adapted, tmp_path, save_strategy="steps", save_steps=2).train()
    with pytest.raises(emoe.CheckpointError, match="holds adapters, not a model"):
        load(tmp_path / "checkpoint-4")
    again = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "checkpoint-4")
    assert torch.equal(logits(again), logits(adapted))
