"""Converted models are exported and traced wherever the dense model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny_models
from tests.converted import SETTINGS, Settings, inputs, model, net

SERVED: dict[str, Settings] = {**SETTINGS, "capacity": {"capacity_factor": 1.5}, "not top": {"selection": "not_top"}}


@pytest.mark.parametrize(
    ("settings", "strict"), [*((name, False) for name in SERVED), ("learned", True), ("output biases", True)]
)
def test_exported_programs(settings: str, strict: bool) -> None:
    if strict and torch.__version__ < "2.9":
        pytest.skip("strict export of this torch rejects changes of attributes while it traces")
    network, x = net(**SERVED[settings]), inputs()
    program = torch.export.export(network, (x,), strict=strict)
    torch.testing.assert_close(program.module()(inputs(seed=1)), network(inputs(seed=1)))


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "llama", "phi3", "t5"])
def test_traced_models(name: str) -> None:
    network, values = model(name), tiny_models.inputs(name)
    network.requires_grad_(False).config.use_cache = False

    def last_states(*tensors: Tensor) -> Tensor:
        return tiny_models.output(network, dict(zip(values, tensors, strict=True)))

    traced = torch.jit.trace(last_states, tuple(values.values()), check_trace=False)
    torch.testing.assert_close(traced(*values.values()), tiny_models.output(network, values))


@pytest.fixture
def runtime() -> Any:
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


# the newer exporter takes the program of test_exported_programs, which has all settings
@pytest.mark.parametrize(
    ("settings", "dynamo"), [*((name, False) for name in SERVED), ("learned", True), ("capacity", True)]
)
def test_onnx(settings: str, dynamo: bool, runtime: Any, tmp_path: Path) -> None:
    network, x = net(**SERVED[settings]), inputs()
    torch.onnx.export(network, (x,), tmp_path / "model.onnx", dynamo=dynamo, input_names=["x"], verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (y,) = session.run(None, {"x": inputs(seed=1).numpy()})
    torch.testing.assert_close(torch.from_numpy(y), network(inputs(seed=1)), atol=1e-4, rtol=1e-4)
