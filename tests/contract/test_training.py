"""Converted models under the tools that people train with."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import emoe
from tests import tiny_models

ALL = emoe.EMoEConfig(num_experts=8, top_k=8, layers="all")
SOME = emoe.EMoEConfig(num_experts=8, top_k=2, layers="all")
# adapters on attention only, and on the FFN too
TARGETS = {"attention": ["query", "value"], "ffn": ["query", "intermediate.dense", "output.dense"]}


def adapted(targets: str, config: emoe.EMoEConfig | None):
    model = tiny_models.build("bert")
    if config:
        emoe.convert_(model, config)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS[targets], init_lora_weights=False)).eval()


@pytest.mark.parametrize("targets", TARGETS)
def test_lora_routes_by_the_adapted_keys_and_merges(targets: str) -> None:
    values = tiny_models.inputs("bert")
    model = adapted(targets, SOME)
    expected = tiny_models.output(model, values)
    merged = model.merge_and_unload()
    torch.testing.assert_close(tiny_models.output(merged, values), expected, atol=1e-5, rtol=1e-4)


def test_lora_with_all_experts_is_the_dense_model_with_lora() -> None:
    values = tiny_models.inputs("bert")
    dense, routed = adapted("attention", None), adapted("attention", ALL)
    torch.testing.assert_close(
        tiny_models.output(routed, values), tiny_models.output(dense, values), atol=1e-5, rtol=1e-4
    )


def test_saving_with_adapters_is_refused(tmp_path) -> None:
    with pytest.raises(emoe.ConversionError, match="merge the adapters first"):
        emoe.save_pretrained(adapted("attention", SOME), tmp_path)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    values = tiny_models.inputs("bert")
    gradients = []
    for checkpointing in (False, True):
        model = tiny_models.build("bert")
        emoe.convert_(model, SOME)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        tiny_models.output(model, values).square().sum().backward()
        gradients.append([p.grad for p in model.encoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


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
