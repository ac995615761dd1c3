"""Every registered architecture under the tools that people train and serve with."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import emoe
from emoe.architectures import find_ffns
from emoe.layer import routed_layers
from tests import tiny_models
from tests.converted import model as converted

ARCHITECTURES = sorted(tiny_models.BUILDERS)
SOME = emoe.EMoEConfig(num_experts=8, top_k=2, layers="all")

# one of each kind of FFN; of the others one layer is, which takes a fourth of the time. `aot_eager`, which traces the
# gradient too, is in test_training.py and test_backends.py
COMPILED_WHOLE = ("bert", "gpt2", "llama", "phi3", "t5", "VisionTransformer")


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def attention_projections(model: nn.Module) -> list[str]:
    ffns = [ffn.name for ffn in find_ffns(model)]
    whole = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    if whole:  # torch's own does not call its projections as modules
        return whole
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and any(name.startswith(f"{prefix}.") for prefix in ffns)
        and ("att" in name.lower() or "EncDec" in name)
        and not (name.endswith("qkv") and "Beit" in type(model).__name__)  # timm's Beit does not call it as a module
    ]


def ffn_projections(model: nn.Module) -> list[str]:
    return [f"{ffn.name}.{path}" for ffn in find_ffns(model) for path in (*dict(ffn.inputs()), ffn.spec.proj_out)]


def with_adapters(model: nn.Module, targets: list[str]) -> Any:
    assert targets
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()


@pytest.fixture(autouse=True)
def _no_fast_path():
    """Torch's fast path for dense encoders in evaluation leaves adapters out."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", ARCHITECTURES)
class TestTools:
    @pytest.mark.parametrize("where", ["attention", "ffn"])
    def test_lora_trains_merges_and_folds_back(self, name: str, where: str) -> None:
        values = tiny_models.inputs(name)
        base = converted(name)
        model = with_adapters(base, attention_projections(base) if where == "attention" else ffn_projections(base))
        expected = tiny_models.output(model, values)
        expected.square().mean().backward()
        grads = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
        assert grads
        assert all("lora_" in key for key in grads)
        assert any(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
        merged = model.merge_and_unload()
        torch.testing.assert_close(tiny_models.output(merged, values), expected, atol=1e-4, rtol=1e-3)
        emoe.to_dense_(merged, restore_order=True)
        assert merged.state_dict().keys() == tiny_models.build(name).state_dict().keys()

    def test_a_dense_model_with_lora_becomes_emoe(self, name: str) -> None:
        """LoRA2EMoE: trained dense, evaluated as experts."""
        values = tiny_models.inputs(name)
        base = tiny_models.build(name)
        model = with_adapters(base, attention_projections(base))
        dense = tiny_models.output(model, values)
        emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=8, layers="all"))
        torch.testing.assert_close(tiny_models.output(model, values), dense, atol=1e-5, rtol=1e-4)
        emoe.to_dense_(model, restore_order=True)
        emoe.convert_(model, SOME)
        assert (tiny_models.output(model, values) - dense).abs().max() > 1e-3

    def test_gradient_checkpointing_gives_the_same_gradients(self, name: str) -> None:
        values = tiny_models.inputs(name)
        gradients = []
        for checkpointing in (False, True):
            model = without_dropout(converted(name))
            if checkpointing and name.startswith("Transformer"):
                pytest.skip("torch's own stacks have no checkpointing")
            if checkpointing and name in tiny_models.TIMM:
                model.set_grad_checkpointing(True)
            elif checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            torch.manual_seed(0)  # for dropout that is no module
            with emoe.record_routing(model) as record:
                result = tiny_models.output(model, values)
                (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
            gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
            gradients[-1]["tokens"] = torch.tensor([float(layer.tokens) for layer in record.layers.values()])
        assert gradients[0].keys() == gradients[1].keys()
        for key, plain in gradients[0].items():
            torch.testing.assert_close(
                gradients[1][key], plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()), msg=key
            )

    def test_compiled_without_a_graph_break_it_gives_the_same(self, name: str) -> None:
        values = tiny_models.inputs(name)
        model = converted(name)
        expected = tiny_models.output(model, values)
        torch.compiler.reset()
        if name in COMPILED_WHOLE:
            model = torch.compile(model, backend="eager", fullgraph=True)
        else:
            find_ffns(model)[-1].layer.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(tiny_models.output(model, values), expected, atol=1e-5, rtol=1e-4)

    def test_bf16_autocast(self, name: str) -> None:
        values = tiny_models.inputs(name)
        model = converted(name, top_k=8)
        dense = tiny_models.build(name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            routed, plain = (tiny_models.output(m, values) for m in (model, dense))
            tiny_models.output(converted(name).train(), values).float().square().mean().backward()
        torch.testing.assert_close(routed.float(), plain.float(), atol=0.1, rtol=0.1)

    def test_whole_model_in_bf16(self, name: str) -> None:
        values = {
            key: value.bfloat16() if value.is_floating_point() else value
            for key, value in tiny_models.inputs(name).items()
        }
        model = converted(name).bfloat16()
        result = tiny_models.output(model, values)
        assert result.dtype == torch.bfloat16
        assert torch.isfinite(result).all()


@pytest.mark.parametrize("name", tiny_models.DECODERS)
def test_generation_with_the_cache_is_generation_without_it(name: str) -> None:
    model = tiny_models.build_generator(name)
    emoe.convert_(model, SOME)
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # padded on the left
    texts = []
    for cache in (True, False):
        with emoe.record_routing(model) as record:
            texts.append(
                model.generate(
                    ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=cache
                )
            )
        if cache and not model.config.is_encoder_decoder:
            assert record.layers[0].tokens == int(mask.sum()) + 2 * 7
    assert torch.equal(*texts)
    assert len(routed_layers(model)) == tiny_models.LAYERS
