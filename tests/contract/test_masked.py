"""The masked path, the default of ``convert_``, with hooks, derivatives, copies and offloaded weights."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import emoe
from emoe.architectures import find_ffns
from tests import tiny_models
from tests.converted import BACKENDS, SETTINGS, Settings, assert_same, inputs, model, net, step

WEIGHT = "layers.0.inner.weight"
pytestmark = pytest.mark.usefixtures("always_sparse")


def gradient_penalty(network: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), network.get_parameter(WEIGHT))[0]


def gradients_by_row(network: nn.Module, x: Tensor) -> Tensor:
    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(network, parameters, (row,)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(
        dict(network.named_parameters()), x
    )[WEIGHT]


DERIVATIVES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "gradient penalty": gradient_penalty,
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "gradients by row": gradients_by_row,
}


@pytest.mark.parametrize("settings", ["plain", "output biases"])
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives_of_all_experts_are_those_of_the_dense_ffn(
    derivative: str, settings: str
) -> None:
    network = net(top_k=8, **SETTINGS[settings])
    actual = DERIVATIVES[derivative](network, inputs())
    expected = DERIVATIVES[derivative](emoe.to_dense_(network), inputs())
    torch.testing.assert_close(actual, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_forward_pass_keeps_no_input(backend: str, settings: str) -> None:
    network, x = net(backend, **SETTINGS[settings]), inputs(40).requires_grad_() * 1.0
    alive = weakref.ref(x)
    network(x)
    del x
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    "settings", [{"aux_loss_coefficient": 0.1, "capacity_factor": 1.0}, SETTINGS["learned"]]
)
def test_peft_trains_whole_ffns(settings: Settings) -> None:
    """PEFT copies the modules that ``modules_to_save`` names."""
    values = {**tiny_models.inputs("llama"), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    plain, base = model("llama", **settings), model("llama", **settings)
    expected = step(plain, values)
    adapted = get_peft_model(
        base, LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"], lora_dropout=0.0)
    )
    with emoe.record_routing(base) as record:
        actual = step(adapted.eval(), values)
    assert record.layers[0].tokens == 33
    torch.testing.assert_close(actual["output"], expected["output"])
    trained = next(
        key for key in actual if key.endswith("mlp.modules_to_save.default.up_proj.weight")
    )
    torch.testing.assert_close(
        actual[trained], expected["layers.0.mlp.up_proj.weight"], atol=1e-4, rtol=1e-4
    )
    assert float(emoe.aux_loss(adapted)) == pytest.approx(float(emoe.aux_loss(plain)))
    copy.deepcopy(adapted)


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_hooks_are_called_once_and_change_nothing(kind: str, settings: str) -> None:
    network, calls = net(**SETTINGS[settings]), []
    expected = step(network, inputs())
    children = dict(network.layers[0].named_children())
    for name, module in children.items():
        getattr(module, f"register_{kind}_hook")(lambda *_args, name=name: calls.append(name))
    assert_same(step(network, inputs()), expected)
    assert sorted(calls) == sorted(children)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "phi3"])
@pytest.mark.parametrize(
    "settings", [{}, {"score_bias": True}, SETTINGS["learned"], SETTINGS["output biases"]]
)
@torch.no_grad()
def test_offloaded_weights_give_the_same(name: str, settings: Settings, tmp_path: Path) -> None:
    values = tiny_models.inputs(name)
    expected = tiny_models.output(model(name, **settings), values)
    for offload in (
        accelerate.cpu_offload,
        lambda *args, **kwargs: accelerate.disk_offload(*args, tmp_path, **kwargs),
    ):
        network = model(name, **settings)
        offload(network, execution_device=torch.device("cpu"))
        for _ in range(2):
            torch.testing.assert_close(tiny_models.output(network, values), expected)


@torch.no_grad()
def test_offloaded_ffns_are_recorded_and_get_fixed_experts() -> None:
    values = tiny_models.inputs("bert")
    network, offloaded = model("bert"), model("bert")
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    with emoe.record_routing(network, window=1) as expected:
        tiny_models.output(network, values)
    with emoe.record_routing(offloaded, window=1) as record:
        tiny_models.output(offloaded, values)
    assert record.summary() == expected.summary()
    usage = {number: layer.loads for number, layer in expected.layers.items()}
    for number, loads in usage.items():
        assert torch.equal(record.layers[number].loads, loads)
        assert torch.equal(record.layers[number].windows[0], loads)

    emoe.fix_experts_(network, usage)
    emoe.fix_experts_(offloaded, usage)
    with_fixed_experts = tiny_models.output(network, values)
    torch.testing.assert_close(tiny_models.output(offloaded, values), with_fixed_experts)


@torch.no_grad()
def test_offloaded_output_biases_are_not_folded() -> None:
    values = tiny_models.inputs("bert")
    network = model("bert", **SETTINGS["output biases"])
    accelerate.cpu_offload(network, execution_device=torch.device("cpu"))
    with pytest.raises(emoe.ConversionError, match=r"output\.dense.*remove_hook_from_submodules"):
        emoe.to_dense_(network)

    accelerate.hooks.remove_hook_from_submodules(network)
    expected = emoe.to_dense_(model("bert", **SETTINGS["output biases"]))
    actual = emoe.to_dense_(network)
    torch.testing.assert_close(
        tiny_models.output(actual, values), tiny_models.output(expected, values)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(16,), (0, 16), (2, 3, 4, 16)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_inputs_of_any_shape(shape: tuple[int, ...], settings: str, backend: str) -> None:
    network, x = (
        net(backend, **SETTINGS[settings]),
        torch.randn(shape, generator=torch.Generator().manual_seed(0)),
    )
    y = network(x)
    assert y.shape == shape
    for row, output in zip(x.reshape(-1, 16), y.reshape(-1, 16), strict=True):
        torch.testing.assert_close(output, network(row), atol=1e-5, rtol=1e-4)


def test_t5_in_half_precision_keeps_its_out_projection_in_single() -> None:
    """transformers loads T5 like this with ``dtype=torch.float16``."""
    dense, network = tiny_models.build("t5").half(), model("t5", top_k=8).half()
    for ffn in (*find_ffns(dense), *find_ffns(network)):
        ffn.proj_out.float()
    expected, actual = (tiny_models.output(m, tiny_models.inputs("t5")) for m in (dense, network))
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)
    message = r"block\.0.*wo is torch\.float32 and .*wi is torch\.float16: cast .*keep it masked"
    with pytest.raises(emoe.ConversionError, match=message):
        emoe.set_backend_(network, "sparse")
    emoe.set_backend_(network.bfloat16(), "sparse")
