"""Test every registered architecture with common tools for training and serving."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import emoe
from emoe.architectures import find_ffns
from tests import converted, tiny_models
from tests.converted import assert_same, step, without_dropout

ARCHITECTURES = sorted(tiny_models.BUILDERS)
ALL = emoe.EMoEConfig(num_experts=8, top_k=8, layers="all")
SOME = emoe.EMoEConfig(num_experts=8, top_k=2, layers="all")


def attention_projections(model: nn.Module) -> list[str]:
    ffns = find_ffns(model)
    modules = [
        item
        for item in model.named_modules()
        if any(item[0].startswith(f"{ffn.name}.") for ffn in ffns)
    ]
    # torch's attention does not call its projections as modules, and timm's Beit not its first
    whole = [name for name, module in modules if isinstance(module, nn.MultiheadAttention)]
    linear = [name for name, module in modules if isinstance(module, nn.Linear | Conv1D)]
    is_beit = isinstance(model, timm.models.beit.Beit)
    return whole or [
        x
        for x in linear
        if re.search("att|EncDec", x, re.I) and not (is_beit and x.endswith("qkv"))
    ]


def ffn_projections(model: nn.Module) -> list[str]:
    return [f"{ffn.name}.{path}" for ffn in find_ffns(model) for path, _ in ffn.projections()]


def with_adapters(model: nn.Module, targets: list[str]) -> Any:
    assert targets
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(
            model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        ).eval()


def assert_checkpointing_changes_nothing(
    name: str, backend: str, config: Any, use_reentrant: bool
) -> None:
    """Compare gradients and records with and without gradient checkpointing."""
    plain, checkpointed = (
        without_dropout(converted.model(name, backend, config)) for _ in range(2)
    )
    if name in tiny_models.TIMM:
        checkpointed.set_grad_checkpointing(True)
    else:
        checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    values = tiny_models.inputs(name)
    if "input_ids" in values:
        values["attention_mask"] = torch.ones(3, 11, dtype=torch.long)
        for model in (
            (plain, checkpointed) if use_reentrant else ()
        ):  # segments need an input with a gradient
            model.enable_input_require_grads()
    with emoe.record_routing(plain) as expected, emoe.record_routing(checkpointed) as record:
        assert_same(step(checkpointed, values), step(plain, values))
    assert [layer.tokens for layer in record.layers.values()] == [
        x.tokens for x in expected.layers.values()
    ]


@pytest.fixture(autouse=True)
def _no_fast_path() -> Iterator[None]:
    """Disable torch's fast path for dense encoders in evaluation, which ignores adapters."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", ARCHITECTURES)
class TestTools:
    @pytest.mark.parametrize("where", ["attention", "ffn"])
    def test_lora_trains_merges_and_folds_back(self, name: str, where: str) -> None:
        values, base = tiny_models.inputs(name), converted.model(name)
        model = with_adapters(
            base, attention_projections(base) if where == "attention" else ffn_projections(base)
        )
        tensors = step(model, values)
        expected = tensors.pop("output")
        assert all("lora_" in key for key in tensors)
        assert any(grad.abs().sum() > 0 for grad in tensors.values())
        merged = model.merge_and_unload()
        torch.testing.assert_close(
            tiny_models.output(merged, values), expected, atol=1e-4, rtol=1e-3
        )
        emoe.to_dense_(merged, restore_order=True)
        assert merged.state_dict().keys() == tiny_models.build(name).state_dict().keys()

    def test_a_dense_model_with_lora_becomes_emoe(self, name: str) -> None:
        """LoRA2EMoE: train the dense model, evaluate it with experts."""
        values, base = tiny_models.inputs(name), tiny_models.build(name)
        model = with_adapters(base, attention_projections(base))
        dense = tiny_models.output(model, values)
        emoe.convert_(model, ALL)
        torch.testing.assert_close(tiny_models.output(model, values), dense, atol=1e-5, rtol=1e-4)
        emoe.to_dense_(model, restore_order=True)
        emoe.convert_(model, SOME)
        assert (tiny_models.output(model, values) - dense).abs().max() > 1e-3

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing_gives_the_same_gradients(
        self, name: str, use_reentrant: bool
    ) -> None:
        if name.startswith("Transformer") or (use_reentrant and name in tiny_models.TIMM):
            pytest.skip("torch's stacks have no checkpointing, timm's have one kind")
        assert_checkpointing_changes_nothing(name, "masked", SOME, use_reentrant)

    def test_bf16(self, name: str) -> None:
        values, model, dense = (
            tiny_models.inputs(name),
            converted.model(name, top_k=8),
            tiny_models.build(name),
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            routed, plain = (tiny_models.output(m, values) for m in (model, dense))
            tiny_models.output(
                converted.model(name).train(), values
            ).float().square().mean().backward()
        torch.testing.assert_close(routed.float(), plain.float(), atol=0.1, rtol=0.1)
        rounded = {key: x.bfloat16() if x.is_floating_point() else x for key, x in values.items()}
        whole = tiny_models.output(model.bfloat16(), rounded)
        assert whole.dtype == torch.bfloat16
        assert torch.isfinite(whole).all()


@pytest.mark.parametrize("name", tiny_models.DECODERS)
def test_generation_is_the_same_with_and_without_a_cache_and_frozen(name: str) -> None:
    model = tiny_models.build_generator(name)
    emoe.convert_(model, SOME)
    ids = torch.randint(
        3, tiny_models.VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0)
    )
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # padded on the left
    options = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    without = model.generate(ids, use_cache=False, **options)
    with emoe.record_routing(model) as record:
        assert torch.equal(model.generate(ids, **options), without)
    if not model.config.is_encoder_decoder:
        assert record.layers[0].tokens == int(mask.sum()) + 2 * 7
    emoe.for_inference_(model)
    assert torch.equal(model.generate(ids, **options), without)


SPARSE = dataclasses.replace(SOME, router="cosine", weighting="softmax")
CHECKPOINTED = [("bert", "masked", config) for config in converted.PUBLISHED.values()]
CHECKPOINTED += [("bert", "sparse", SPARSE), ("llama", "sparse", SPARSE)]


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("name", "backend", "config"), CHECKPOINTED)
def test_checkpointing_replays_noise_dropout_and_drops(
    name: str, backend: str, config: Any, use_reentrant: bool
) -> None:
    if use_reentrant:  # runs the forward pass without gradients, so also the balance loss
        config = dataclasses.replace(config, aux_loss_coefficient=0.0)
    assert_checkpointing_changes_nothing(name, backend, config, use_reentrant)
