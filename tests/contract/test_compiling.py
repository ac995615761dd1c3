"""Converted models compile without a graph break, and give the eager results."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import emoe
from emoe.architectures import find_ffns
from tests import converted, tiny_models
from tests.converted import net, without_dropout

# The others compile one layer, in a quarter of the time. The compiler of torch 2.8 cannot trace transformers' decoders.
COMPILED_WHOLE = ("bert", "llama", "t5") if torch.__version__ >= "2.9" else ("bert",)


@pytest.mark.parametrize("name", sorted(tiny_models.BUILDERS))
def test_every_architecture(name: str) -> None:
    values, model = tiny_models.inputs(name), converted.model(name)
    expected = tiny_models.output(model, values)
    torch.compiler.reset()
    if name in COMPILED_WHOLE:
        model = torch.compile(model, backend="eager", fullgraph=True)
    else:
        model.get_submodule(find_ffns(model)[-1].name).compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(tiny_models.output(model, values), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("method", "training"), [("gmoe", True), ("emoe_learn", True), ("emoe_learn", False)])
def test_published_layers(method: str, training: bool) -> None:
    values = {**tiny_models.inputs("bert"), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    model = tiny_models.build("bert")
    model.encoder.layer = model.encoder.layer[:1]  # each takes a second to compile
    emoe.convert_(model, dataclasses.replace(converted.PUBLISHED[method], expert_dropout=0.0, router_noise=1e-6))
    without_dropout(model).train(training)
    expected, loss = tiny_models.output(model, values), emoe.aux_loss(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(tiny_models.output(compiled, values), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(emoe.aux_loss(model), loss, atol=1e-4, rtol=1e-3)


def test_dynamic_shapes() -> None:
    torch.compiler.reset()
    network = net(aux_loss_coefficient=0.1).train()
    compiled = torch.compile(network, backend="eager", dynamic=True)
    for rows in (7, 9):
        torch.testing.assert_close(compiled(converted.inputs(rows)), network(converted.inputs(rows)))
