"""Experts that are fixed by their use: every token has the same, whatever the architecture, the backend and the way back from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import emoe
from emoe.architectures import find_ffns
from emoe.layer import routed_layers
from tests import tiny_models
from tests.converted import model as converted

NAMES = ["bert", "gpt2", "llama", "phi3", "t5", "vit"]


def usage(model: nn.Module, values: dict[str, Tensor]) -> dict[int, Tensor]:
    with emoe.record_routing(model) as record:
        tiny_models.output(model, values)
    return {number: layer.loads for number, layer in record.layers.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["masked", "sparse"])
def test_all_tokens_have_the_neurons_of_the_most_used_experts(name: str, backend: str) -> None:
    values, model = tiny_models.inputs(name), converted(name, backend=backend)
    counts = usage(model, values)
    emoe.fix_experts_(model, counts)
    again = usage(model, values)
    for number, loads in again.items():
        most = counts[number].argsort(descending=True, stable=True)[:2]
        assert set(loads.nonzero().flatten().tolist()) == set(most.tolist())
        assert loads[most[0]] == loads[most[1]]

    # the dense model whose other neurons are cut off, in the order of the experts
    pruned = emoe.to_dense_(converted(name))
    for ffn in find_ffns(pruned):
        keep = torch.zeros(8, ffn.d // 8)
        keep[counts[ffn.index].argsort(descending=True, stable=True)[:2]] = 1
        kept = keep.flatten()
        ffn.proj_out.register_forward_pre_hook(lambda _, args, kept=kept: (args[0] * kept,))
    torch.testing.assert_close(tiny_models.output(model, values), tiny_models.output(pruned, values))


@pytest.mark.parametrize("name", NAMES)
def test_they_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    values, model = tiny_models.inputs(name), converted(name, score_bias=True)
    emoe.fix_experts_(model, usage(model, values))
    emoe.save_pretrained(model, tmp_path)
    again = emoe.from_pretrained(tiny_models.loader(name), tmp_path)
    layer = routed_layers(again)[0]
    assert (layer.config.router, layer.config.score_bias) == ("fixed", False)
    torch.testing.assert_close(tiny_models.output(again, values), tiny_models.output(model, values))


def test_counts_are_not_rounded_by_a_cast() -> None:
    model = converted("bert")
    close = torch.tensor([1000, 1001, 1002, 1003, 0, 0, 0, 0])
    emoe.fix_experts_(model, {layer.ffn_index: close for layer in routed_layers(model)})
    model.to(torch.bfloat16)
    assert set(torch.stack(list(usage(model, tiny_models.inputs("bert")).values())).nonzero()[:, 1].tolist()) == {2, 3}


def test_the_others_get_no_gradient() -> None:
    values, model = tiny_models.inputs("bert"), converted("bert")
    counts = usage(model, values)
    emoe.fix_experts_(model, counts)
    tiny_models.output(model.train(), values).square().sum().backward()
    for ffn in find_ffns(model):
        by_expert = ffn.proj_in.weight.grad.unflatten(0, (8, -1)).abs().sum((1, 2))
        assert set(by_expert.nonzero().flatten().tolist()) == set(
            counts[ffn.index].argsort(descending=True, stable=True)[:2].tolist()
        )


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({}, lambda counts: {}, r"usage has no layer 0; it has \[\]"),
        ({}, lambda counts: {n: c[:4] for n, c in counts.items()}, r"shape \[4\], but there are 8 experts"),
        ({}, lambda counts: {n: c.double() / c.sum() for n, c in counts.items()}, "must be whole numbers from 0"),
        ({}, lambda counts: {n: c - 10**6 for n, c in counts.items()}, "must be whole numbers from 0"),
        ({}, lambda counts: {n: c * 0 for n, c in counts.items()}, r"record\.layers\[0\]\.loads has them"),
        ({"router": "cosine", "weighting": "softmax"}, lambda counts: counts, "routes by 'cosine'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_changes(settings: dict[str, Any], change: Any, message: str) -> None:
    values, model = tiny_models.inputs("bert"), converted("bert", **settings)
    expected, counts = tiny_models.output(model, values), usage(model, values)
    with pytest.raises(emoe.ConversionError, match=message):
        emoe.fix_experts_(model, change(counts))
    assert torch.equal(tiny_models.output(model, values), expected)


def test_a_conversion_cannot_know_them() -> None:
    dense = tiny_models.build("bert")
    with pytest.raises(emoe.ConversionError, match=r"router='fixed' needs to know .* emoe\.fix_experts_"):
        emoe.convert_(dense, emoe.EMoEConfig(num_experts=8, top_k=2, layers="all", router="fixed"))
    assert not routed_layers(dense)
    with pytest.raises(emoe.ConversionError, match="fix_experts_"):
        emoe.fix_experts_(dense, {})
