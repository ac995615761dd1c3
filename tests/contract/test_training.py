"""Converted models under the tools that people train with."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model

import emoe
from tests import tiny_models

ALL = emoe.EMoEConfig(num_experts=8, top_k=8, layers="all")
SOME = emoe.EMoEConfig(num_experts=8, top_k=2, layers="all")


def adapted(config: emoe.EMoEConfig | None):
    model = tiny_models.build("bert")
    if config:
        emoe.convert_(model, config)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)).eval()


def test_lora_with_all_experts_is_the_dense_model_with_lora() -> None:
    values = tiny_models.inputs("bert")
    dense, routed = adapted(None), adapted(ALL)
    torch.testing.assert_close(
        tiny_models.output(routed, values), tiny_models.output(dense, values), atol=1e-5, rtol=1e-4
    )


def test_saving_with_adapters_is_refused(tmp_path) -> None:
    with pytest.raises(emoe.ConversionError, match="merge the adapters first"):
        emoe.save_pretrained(adapted(SOME), tmp_path)


PUBLISHED = {
    "emoe": emoe.EMoEConfig.as_published("tutel", num_experts=8, top_k=2, layers="all"),
    "emoe_learn": emoe.EMoEConfig.as_published("tutel", num_experts=8, top_k=2, layers="all", router="cosine"),
    "gmoe": emoe.GMoEConfig.as_published("tutel", num_experts=4, layers="all", count_padding=False),
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_checkpointing_replays_noise_dropout_and_drops(method: str) -> None:
    values, gradients = tiny_models.inputs("bert"), []
    for checkpointing in (False, True):
        model = tiny_models.build("bert")
        torch.manual_seed(0)
        emoe.convert_(model, PUBLISHED[method])
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        (tiny_models.output(model, values).square().sum() + 100 * emoe.aux_loss(model)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, atol=1e-4 * float(plain.abs().max()), rtol=1e-4)


@pytest.mark.parametrize(("method", "training"), [*((method, True) for method in PUBLISHED), ("emoe_learn", False)])
def test_published_layers_compile_without_a_graph_break(method: str, training: bool) -> None:
    values = {**tiny_models.inputs("bert"), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    model = tiny_models.build("bert")
    model.encoder.layer = model.encoder.layer[:1]  # each takes a second to compile
    emoe.convert_(model, dataclasses.replace(PUBLISHED[method], expert_dropout=0.0, router_noise=1e-6))
    for module in model.train(training).modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected, loss = tiny_models.output(model, values), emoe.aux_loss(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(tiny_models.output(compiled, values), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(emoe.aux_loss(model), loss, atol=1e-4, rtol=1e-3)


def test_bf16_autocast_keeps_the_choice_of_experts() -> None:
    values = tiny_models.inputs("bert")
    loads = []
    for enabled in (False, True):
        model = tiny_models.build("bert")
        emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0]))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), emoe.record_routing(model) as record:
            model(**values)
        loads.append(record.layers[0].loads)
    # the FFN's input is rounded below it, so a few near-ties may change
    assert int((loads[0] - loads[1]).abs().sum()) <= 4


def test_training_by_hand_lowers_the_loss() -> None:
    model = tiny_models.build("bert").train()
    emoe.convert_(
        model,
        emoe.EMoEConfig(
            num_experts=8, top_k=4, layers=[3], router="cosine", weighting="softmax_times_k", aux_loss_coefficient=0.01
        ),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    values, losses = tiny_models.inputs("bert"), []
    for _ in range(30):
        loss = (tiny_models.output(model, values)[:, 0, 0] - 2).square().mean() + emoe.aux_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
