"""``fix_experts_``: every token has the most used experts, for every architecture, backend and saved model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import emoe
from emoe.architectures import find_ffns
from emoe.layer import routed_layers
from tests import converted, tiny_models

NAMES = ["bert", "gpt2", "llama", "phi3", "t5", "vit"]
Usage = dict[int, Tensor]


def usage(model: nn.Module, values: dict[str, Tensor]) -> Usage:
    with emoe.record_routing(model) as record:
        tiny_models.output(model, values)
    return {number: layer.loads for number, layer in record.layers.items()}


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", converted.BACKENDS)
def test_all_tokens_have_the_neurons_of_the_most_used_experts(name: str, backend: str) -> None:
    values, model = tiny_models.inputs(name), converted.model(name, backend)
    counts = usage(model, values)
    emoe.fix_experts_(model, counts)
    # compare with the dense model without the other neurons, in the order of the experts
    pruned = emoe.to_dense_(converted.model(name))
    for ffn in find_ffns(pruned):
        keep = torch.zeros(8, ffn.d // 8)
        keep[counts[ffn.index].argsort(descending=True, stable=True)[:2]] = 1
        ffn.proj_out.register_forward_pre_hook(lambda _, args, keep=keep: (args[0] * keep.flatten(),))
    torch.testing.assert_close(
        tiny_models.output(model, values), tiny_models.output(pruned, values), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
def test_they_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    values, model = tiny_models.inputs(name), converted.model(name, score_bias=True)
    emoe.fix_experts_(model, usage(model, values))
    emoe.save_pretrained(model, tmp_path)
    again = emoe.from_pretrained(tiny_models.loader(name), tmp_path)
    layer = routed_layers(again)[0]
    assert (layer.config.router, layer.config.score_bias) == ("fixed", False)
    torch.testing.assert_close(tiny_models.output(again, values), tiny_models.output(model, values))


UNSUITABLE: dict[str, Callable[[Usage], Usage]] = {
    "missing layer": lambda counts: {},
    "shares": lambda counts: {n: c.double() / c.sum() for n, c in counts.items()},
    "all zero": lambda counts: {n: c * 0 for n, c in counts.items()},
}


@pytest.mark.parametrize("case", [*UNSUITABLE, "learned router"])
def test_unsuitable_counts_are_rejected(case: str) -> None:
    values, settings = tiny_models.inputs("bert"), converted.SETTINGS["learned"] if case == "learned router" else {}
    model = converted.model("bert", **settings)
    expected, counts = tiny_models.output(model, values), usage(model, values)
    with pytest.raises(emoe.ConversionError, match=r"layer.0"):
        emoe.fix_experts_(model, UNSUITABLE.get(case, dict)(counts))
    assert torch.equal(tiny_models.output(model, values), expected)
