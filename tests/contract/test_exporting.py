"""Converted models are traced, exported and served where the dense model is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tiny_models
from tests.converted import SETTINGS, Settings, inputs, model, net

SERVED: dict[str, Settings] = {**SETTINGS, "capacity": {"capacity_factor": 1.5}, "not top": {"selection": "not_top"}}
OF_KEYS: dict[str, Settings] = {
    name: {name: value}
    for name, value in (("normalize_gate", True), ("value_norm_weighted", True), ("gate_momentum", 0.5))
}


@pytest.mark.parametrize("settings", [*SERVED, *OF_KEYS])
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs(settings: str, strict: bool) -> None:
    if strict and torch.__version__ < "2.9":
        pytest.skip("strict export of this torch refuses any change of a module's attributes while it traces")
    given = (SERVED | OF_KEYS)[settings]
    found, x = net(**given), inputs()
    program = torch.export.export(found, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), found(x))
    torch.testing.assert_close(found(x), net("masked", **given)(x))


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "llama", "phi3", "t5"])
def test_traced_models(name: str) -> None:
    found, values = model(name), tiny_models.inputs(name)
    if hasattr(found, "config"):
        found.config.use_cache = False

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = found

        def forward(self, *tensors: Tensor) -> Tensor:
            return tiny_models.output(self.model, dict(zip(values, tensors, strict=True)))

    arguments = tuple(values.values())
    traced = torch.jit.trace(Wrapped().eval(), arguments, check_trace=False)
    torch.testing.assert_close(traced(*arguments), tiny_models.output(found, values))


@pytest.fixture
def runtime() -> Any:
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


# what dynamo exports is the program of test_exported_programs, which has all settings
@pytest.mark.parametrize(
    ("settings", "dynamo"), [*((name, False) for name in SERVED), ("learned", True), ("capacity", True)]
)
def test_onnx(settings: str, dynamo: bool, runtime: Any, tmp_path) -> None:
    found, x = net(**SERVED[settings]), inputs()
    torch.onnx.export(found, (x,), tmp_path / "model.onnx", dynamo=dynamo, input_names=["x"], verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (y,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), found(x), atol=1e-4, rtol=1e-4)
