"""Train converted models with ``transformers.Trainer``: checkpoints, gates, balance loss, adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
)

import emoe
from emoe.layer import routed_layers
from tests import tiny_models
from tests.classifiers import METHODS, SIZES, SOME, bert, logits, rows
from tests.converted import without_dropout

# plain gradient descent over the rows in their order
BY_HAND = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
    "train_sampling_strategy": "sequential",
}


def trainer(model: Any, folder: Path, *, callback: Any = None, data: Any = None, **settings: Any) -> Trainer:
    options = {
        "save_strategy": "no",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        **settings,
    }
    functions = {name: options.pop(name) for name in ("compute_loss_func",) if name in options}
    arguments = transformers.TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", **options
    )
    data = rows() if data is None else data
    callbacks = [callback or emoe.TrainerCallback()]
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks, **functions)


def assert_same_experts(again: Any, model: Any) -> None:
    assert torch.equal(logits(again), logits(model))
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_keep_the_experts_and_training_resumes_identically(method: str, tmp_path: Path) -> None:
    model = bert(METHODS[method])
    trainer(model, tmp_path, save_strategy="steps", save_steps=2).train()
    assert_same_experts(emoe.from_pretrained(BertForSequenceClassification, tmp_path / "checkpoint-4"), model)
    halfway = emoe.from_pretrained(BertForSequenceClassification, tmp_path / "checkpoint-2")
    for layer, expected in zip(routed_layers(halfway), routed_layers(model), strict=True):
        assert layer.config == expected.config
        assert (layer.permutation is None) == (expected.permutation is None)
        assert layer.permutation is None or torch.equal(layer.permutation, expected.permutation)
    resumed = bert(METHODS[method])
    trainer(resumed, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_experts(resumed, model)


@pytest.mark.parametrize("how", ["model.save_pretrained", "trainer.save_model"])
@pytest.mark.parametrize("method", METHODS)
def test_what_the_models_own_library_saves_has_the_experts_but_not_the_first_order(
    method: str, how: str, tmp_path: Path
) -> None:
    model = bert(METHODS[method])
    run = trainer(model, tmp_path)
    run.train()
    if how == "trainer.save_model":
        run.save_model(str(tmp_path))
    else:
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("emoe_*"))
    again = emoe.from_pretrained(BertForSequenceClassification, tmp_path)
    assert_same_experts(again, model)
    if method != "gmoe":
        with pytest.raises(emoe.ConversionError, match="leave out restore_order"):
            emoe.to_dense_(again, restore_order=True)
    # and a folder of ours that is made of it says so too
    emoe.save_pretrained(again, tmp_path / "ours")
    assert_same_experts(emoe.from_pretrained(BertForSequenceClassification, tmp_path / "ours"), model)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "t5", "gpt2"])
def test_names_that_the_library_changes_when_it_saves_are_found(name: str, tmp_path: Path) -> None:
    model = tiny_models.build(name)
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers="all", router="cosine", weighting="softmax"))
    model.save_pretrained(tmp_path)
    again = emoe.from_pretrained(type(model), tmp_path)
    values = tiny_models.inputs(name)
    assert torch.equal(tiny_models.output(again, values), tiny_models.output(model, values))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = bert(METHODS["emoe, momentum"])
    steps = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    # any metric will do
    run = trainer(model, tmp_path, **steps, load_best_model_at_end=True, metric_for_best_model="steps_per_second")
    run._determine_best_metric = lambda metrics, trial: _first_is_best(run)  # type: ignore[method-assign]
    run.train()
    best = Path(run.state.best_model_checkpoint or "")
    assert best.name == "checkpoint-2"
    assert_same_experts(emoe.from_pretrained(BertForSequenceClassification, best), model)


def _first_is_best(run: Trainer) -> bool:
    run.state.best_global_step = 2
    return run.state.global_step == 2


class Hub:
    """Record the names of the files that are uploaded to the hub, by folder."""

    def __init__(self) -> None:
        self.uploads: dict[str, set[str]] = {}

    def create_repo(self, name: str, **_: object) -> Any:
        return type("Url", (), {"repo_id": f"me/{name}"})

    def upload_folder(self, *, folder_path: str, path_in_repo: str = ".", **_: object) -> Any:
        self.uploads[path_in_repo] = {path.name for path in Path(folder_path).iterdir()}
        return type("Job", (), {"done": lambda self: True, "result": lambda self: None})()


def test_what_is_pushed_has_the_sidecars_beside_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    model = bert(METHODS["emoe"])
    run = trainer(
        model, tmp_path / "out", save_strategy="steps", save_steps=2, push_to_hub=True, hub_strategy="checkpoint"
    )
    run.train()
    wanted = {"config.json", "model.safetensors", "emoe_config.json", "emoe_partition.safetensors"}
    assert wanted <= hub.uploads["."]
    assert wanted <= hub.uploads["last-checkpoint"]
    assert_same_experts(emoe.from_pretrained(BertForSequenceClassification, tmp_path / "out"), model)
    run.save_model(str(tmp_path / "out"))
    assert_same_experts(emoe.from_pretrained(BertForSequenceClassification, tmp_path / "out"), model)


BALANCED = emoe.EMoEConfig(**SOME, aux_loss_coefficient=5.0)


def build(cls: type) -> Any:
    torch.manual_seed(0)
    config = (LlamaConfig if issubclass(cls, LlamaForCausalLM) else BertConfig)(vocab_size=60, **SIZES)
    model = without_dropout(cls(config))
    emoe.convert_(model, BALANCED)
    return model


def texts() -> list[dict[str, torch.Tensor]]:
    """Rows with equal numbers of tokens and different numbers of labels."""
    data = []
    for index, row in enumerate(rows(4)):
        labels = row["input_ids"].clone()
        labels[: 2 * index] = -100
        data.append({"input_ids": row["input_ids"], "labels": labels})
    return data


def batch(data: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


TWO_PASSES = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("kind", ["mean that Trainer divides", "mean that it does not divide", "sum over labels"])
def test_the_balance_loss_is_scaled_like_the_models_loss(kind: str, tmp_path: Path) -> None:
    """One step of plain gradient descent on two forward passes of two rows each."""
    sums = kind == "sum over labels"
    data, cls = (texts(), LlamaForCausalLM) if sums else (rows(4), BertForSequenceClassification)
    model, expected = build(cls), build(cls).train()
    if kind == "mean that Trainer divides":
        model.accepts_loss_kwargs = False
    parts = [batch(data[:2]), batch(data[2:])]
    counts = [float((part["labels"][..., 1:] != -100).sum()) if sums else 1.0 for part in parts]
    whole = 1.0 if kind == "mean that it does not divide" else sum(counts)
    for part, count in zip(parts, counts, strict=True):
        ((expected(**part).loss + emoe.aux_loss(expected)) * count / whole).backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    run = trainer(model, tmp_path, data=data, **TWO_PASSES, **BY_HAND)
    run.train()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    # evaluation, and the model after training, have the task's loss alone
    with torch.no_grad():
        task = model.eval()(**batch(data)).loss
    torch.testing.assert_close(run.evaluate()["eval_loss"], float(task), atol=1e-4, rtol=1e-4)
    model.train()
    assert float(model(**batch(data)).loss.detach()) == pytest.approx(float(task), rel=1e-4)


@pytest.mark.parametrize(("outputs", "weight"), [(1, 1.0), (2, 0.5)])
def test_a_regression_ignores_the_number_of_labels_but_a_classification_divides_by_it(
    outputs: int, weight: float, tmp_path: Path
) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        config = ViTConfig(num_labels=outputs, image_size=16, patch_size=8, **SIZES)
        return emoe.convert_(vit := ViTForImageClassification(config), BALANCED) and vit

    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 0, 1]) if outputs == 2 else torch.tensor([0.0, 1.0, 2.0, 3.0])
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    trained, expected = model(), model().train()
    for half in (data[:2], data[2:]):
        ((expected(**batch(half)).loss + emoe.aux_loss(expected)) * weight).backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    trainer(trained, tmp_path, data=data, **TWO_PASSES, **BY_HAND).train()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_an_interrupted_training_leaves_no_second_balance_loss(tmp_path: Path) -> None:
    class Interrupt(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model = build(BertForSequenceClassification)
    run = trainer(model, tmp_path, max_steps=1, **BY_HAND)
    run.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    again = build(BertForSequenceClassification)
    for each in (model, again):
        trainer(each, tmp_path, max_steps=1, **BY_HAND).train()
    assert_same_experts(model, again)


def test_gates_move_after_each_step_as_they_do_by_hand(tmp_path: Path) -> None:
    model, expected = (without_dropout(bert(METHODS["emoe, momentum"])) for _ in range(2))
    optimizer = torch.optim.SGD(expected.train().parameters(), lr=0.1)
    for start in (0, 4):
        expected(**batch(rows()[start : start + 4])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        emoe.update_gates_(expected)
    trainer(model, tmp_path, max_steps=2, **BY_HAND).train()
    for pair in zip(routed_layers(model), routed_layers(expected), strict=True):
        torch.testing.assert_close(*(layer.router.gate for layer in pair))


def test_what_cannot_be_trained_or_loaded_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(emoe.ConversionError, match="TrainerCallback: the model has no routed FFN; convert it first"):
        trainer(bert(None), tmp_path).train()
    model = bert(METHODS["emoe-learn"])
    model.save_pretrained(tmp_path / "saved")
    stock = BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    for call in (lambda: trainer(stock, tmp_path).train(), lambda: emoe.to_dense_(stock)):
        with pytest.raises(emoe.ConversionError, match=r"loaded it as dense: load it with emoe\.from_pretrained"):
            call()

    def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits, labels) + emoe.aux_loss(model)

    with pytest.raises(emoe.ConfigError, match=r"returned no loss .*add_aux_loss=False"):
        trainer(model, tmp_path, compute_loss_func=own_loss).train()
    callback = emoe.TrainerCallback(add_aux_loss=False)
    trainer(model, tmp_path, callback=callback, compute_loss_func=own_loss).train()
    text = json.loads((tmp_path / "saved" / "config.json").read_text())
    text["emoe"]["ffns"] = 2
    (tmp_path / "saved" / "config.json").write_text(json.dumps(text))
    with pytest.raises(emoe.CheckpointError, match="the model has 4 FFNs"):
        emoe.from_pretrained(BertForSequenceClassification, tmp_path / "saved")


def test_adapters_are_saved_without_the_model_whose_experts_they_use(tmp_path: Path) -> None:
    model = bert(METHODS["emoe"])
    emoe.save_pretrained(model, tmp_path / "base")
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    trainer(adapted, tmp_path, save_strategy="steps", save_steps=2).train()
    with pytest.raises(emoe.CheckpointError, match=r"holds adapters, not a model: .*emoe\.from_pretrained"):
        emoe.from_pretrained(BertForSequenceClassification, tmp_path / "checkpoint-4")
    base = emoe.from_pretrained(BertForSequenceClassification, tmp_path / "base")
    from peft import PeftModel

    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "checkpoint-4")), logits(adapted))


def test_the_mark_is_the_converted_models_alone_and_goes_with_its_experts(tmp_path: Path) -> None:
    shared = BertConfig(vocab_size=60, **SIZES)
    model, other = (BertForSequenceClassification(shared) for _ in range(2))
    emoe.convert_(model, METHODS["emoe"])
    emoe.set_top_k_(model, 3)
    for part, experts in ((model, 3), (other, None)):
        part.save_pretrained(tmp_path)
        mark = json.loads((tmp_path / "config.json").read_text()).get("emoe")
        assert (mark and mark["config"]["top_k"]) == experts
    assert model.bert.config is model.bert.encoder.layer[0].attention.self.config
    emoe.to_dense_(model)
    model.save_pretrained(tmp_path)
    assert "emoe" not in json.loads((tmp_path / "config.json").read_text())


def test_a_part_that_was_converted_for_itself_is_saved_with_the_whole(tmp_path: Path) -> None:
    model = bert(None)
    emoe.convert_(model.bert, METHODS["emoe"])
    trainer(model, tmp_path, save_strategy="steps", save_steps=4).train()
    assert_same_experts(emoe.from_pretrained(BertForSequenceClassification, tmp_path / "checkpoint-4"), model)
    model.save_pretrained(tmp_path / "plain")
    assert_same_experts(emoe.from_pretrained(BertForSequenceClassification, tmp_path / "plain"), model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_that_loses_the_balance_loss_is_refused(reentrant: bool, tmp_path: Path) -> None:
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    run = trainer(bert(METHODS["emoe-learn"]), tmp_path, max_steps=1, **checkpointing)
    if not reentrant:
        run.train()
        return
    with pytest.raises(emoe.ConfigError, match="use_reentrant"):
        run.train()
