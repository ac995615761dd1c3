"""Compile, export and trace converted models like the dense model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

import emoe
from emoe.architectures import find_ffns
from tests import tiny_models
from tests.converted import BACKENDS, PUBLISHED, SETTINGS, Settings, inputs, model, net

SERVED: dict[str, Settings] = {
    **SETTINGS,
    "capacity": {"capacity_factor": 1.5},
    "not top": {"selection": "not_top"},
}
pytestmark = pytest.mark.usefixtures("always_sparse")
# The others compile one layer, in a quarter of the time. The compiler of torch 2.8 cannot trace transformers' decoders.
COMPILED_WHOLE = ("bert", "llama", "t5") if torch.__version__ >= "2.9" else ("bert",)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(tiny_models.BUILDERS))
def test_every_architecture_compiles_without_a_graph_break(name: str) -> None:
    values, network = tiny_models.inputs(name), model(name)
    expected = tiny_models.output(network, values)
    torch.compiler.reset()
    if name in COMPILED_WHOLE:
        network = torch.compile(network, backend="eager", fullgraph=True)
    else:
        network.get_submodule(find_ffns(network)[-1].name).compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(tiny_models.output(network, values), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "training"), [("gmoe", True), ("emoe_learn", True), ("emoe_learn", False)]
)
def test_published_layers_compile(method: str, training: bool) -> None:
    config = dataclasses.replace(PUBLISHED[method], expert_dropout=0.0, router_noise=1e-6)
    network = net(config=config).train(training)
    x, mask = inputs(6).view(2, 3, 16), torch.ones(2, 3)
    expected, loss = network(x, mask), emoe.aux_loss(network)
    torch.compiler.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(emoe.aux_loss(network), loss, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_models_take_dynamic_shapes(backend: str) -> None:
    torch.compiler.reset()
    network = net(backend, aux_loss_coefficient=0.1).train()
    compiled = torch.compile(network, backend="eager", dynamic=True)
    for rows in (7, 9):
        torch.testing.assert_close(compiled(inputs(rows)), network(inputs(rows)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("settings", "strict"),
    [*((name, False) for name in SERVED), ("learned", True), ("output biases", True)],
)
def test_exported_programs(settings: str, strict: bool, backend: str) -> None:
    if strict and torch.__version__ < "2.9":
        pytest.skip("strict export of this torch rejects changes of attributes while it traces")
    program = torch.export.export(
        net(backend, **SERVED[settings]), (inputs(),), strict=strict
    ).module()
    # it runs without this library, which alone knows the sparse operators
    assert not any("emoe" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(
        program(inputs(seed=1)), net(**SERVED[settings])(inputs(seed=1)), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "llama", "phi3", "t5"])
def test_traced_models(name: str, backend: str) -> None:
    network, values = model(name, backend), tiny_models.inputs(name)
    network.requires_grad_(False).config.use_cache = False

    def last_states(*tensors: Tensor) -> Tensor:
        return tiny_models.output(network, dict(zip(values, tensors, strict=True)))

    traced, expected = (
        torch.jit.trace(last_states, tuple(values.values()), check_trace=False),
        model(name),
    )
    torch.testing.assert_close(
        traced(*values.values()), tiny_models.output(expected, values), atol=1e-4, rtol=1e-4
    )


# the newer exporter takes the program of test_exported_programs, which has all settings
@pytest.mark.parametrize(
    ("settings", "dynamo"),
    [*((name, False) for name in SERVED), ("learned", True), ("capacity", True)],
)
def test_onnx(settings: str, dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime, network, x = pytest.importorskip("onnxruntime"), net(**SERVED[settings]), inputs()
    torch.onnx.export(
        network, (x,), tmp_path / "model.onnx", dynamo=dynamo, input_names=["x"], verbose=False
    )
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (y,) = session.run(None, {"x": inputs(seed=1).numpy()})
    torch.testing.assert_close(torch.from_numpy(y), network(inputs(seed=1)), atol=1e-4, rtol=1e-4)
