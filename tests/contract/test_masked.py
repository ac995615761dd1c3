"""The masked path, the default of ``convert_``, with hooks, derivatives, threads, copies and offloaded weights."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import emoe
from emoe.architectures import find_ffns
from emoe.layer import routed_layers
from tests import tiny_models
from tests.converted import BACKENDS, SETTINGS, Settings, assert_same, inputs, model, net, step
from tests.plain_net import PlainNet


class ByHand(nn.Module):
    """The masked FFN of a converted net, written from its definition."""

    def __init__(self, network: PlainNet) -> None:
        super().__init__()
        self.layers = network.layers

    def forward(self, x: Tensor) -> Tensor:
        ffn, linear = self.layers[0], nn.functional.linear  # without the hooks of the projections
        z, router = linear(x, ffn.inner.weight, ffn.inner.bias), ffn.act.router
        by_mean = linear(x, ffn.inner.weight).unflatten(-1, (8, -1)).mean(-1)
        scores = router(x.flatten(0, -2)).view(by_mean.shape) if router.learned else by_mean
        chosen = torch.zeros_like(scores).scatter(-1, scores.topk(2).indices, 1.0)
        if router.learned:
            chosen = 2 * scores.masked_fill(chosen == 0, -torch.inf).softmax(-1)
        hidden = nn.functional.gelu(z) * (1 if ffn.up is None else ffn.up(x))
        y = linear(hidden * chosen.repeat_interleave(8, -1), ffn.outer.weight, ffn.outer.bias)
        return y if ffn.act.output_bias is None else y + chosen @ ffn.act.output_bias


def gradient_penalty(network: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
    return torch.cat([g.flatten() for g in torch.autograd.grad(grad.square().sum(), list(network.parameters()))])


def gradients_by_row(network: nn.Module, x: Tensor) -> Tensor:
    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(network, parameters, (row,)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(dict(network.named_parameters()), x[:, None])
    return torch.cat([grad.flatten() for grad in grads.values()])


DERIVATIVES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "gradient penalty": gradient_penalty,
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "gradients by row": gradients_by_row,
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives_of_any_kind(derivative: str, settings: str) -> None:
    network = net(**SETTINGS[settings])
    actual, expected = (DERIVATIVES[derivative](f, inputs()) for f in (network, ByHand(network)))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


# ---------------------------------------------------------------- nothing is left of a forward pass


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_forward_pass_leaves_nothing_even_if_hooks_keep_detached_outputs(backend: str, settings: str) -> None:
    network, outputs = net(backend, **SETTINGS[settings]), []
    hooked = ("inner", "act", "outer") if backend == "masked" else ("",)
    for module in map(network.layers[0].get_submodule, hooked):
        module.register_forward_hook(lambda _module, _args, y: outputs.append(y.detach()))
    h = inputs(40).requires_grad_() * 1.0
    alive = weakref.ref(h)
    network(h)
    del h
    gc.collect()
    assert len(outputs) == len(hooked)
    assert alive() is None  # no input, and no graph that holds it


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_share_a_model(name: str, backend: str) -> None:
    network = model(name, backend, capacity_factor=1.5, aux_loss_coefficient=0.1)
    values = {**tiny_models.inputs(name), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    batches = [values, {key: value[:2, :7] for key, value in values.items()}]

    def serve(number: int) -> tuple[Tensor, float]:
        with torch.no_grad():
            outputs = [tiny_models.output(network, batches[number]) for _ in range(30)]
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        return outputs[0], float(emoe.aux_loss(network))

    expected = [serve(number) for number in (0, 1)]
    with emoe.record_routing(network) as record, ThreadPoolExecutor(2) as threads:
        results = list(threads.map(serve, (0, 1)))
    for (output, loss), (expected_output, expected_loss) in zip(results, expected, strict=True):
        assert torch.equal(output, expected_output)
        assert loss == expected_loss
    assert record.layers[0].tokens == 30 * (33 + 14)


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupted_pass_does_not_change_the_next(backend: str) -> None:
    network, values = model("bert", backend, aux_loss_coefficient=0.1), tiny_models.inputs("bert")
    expected, loss = tiny_models.output(network, values), float(emoe.aux_loss(network))

    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    hook = network.encoder.layer[2].output.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny_models.output(network, values)
    hook.remove()
    assert torch.equal(tiny_models.output(network, values), expected)
    assert float(emoe.aux_loss(network)) == loss


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("settings", [{"aux_loss_coefficient": 0.1, "capacity_factor": 1.0}, SETTINGS["learned"]])
def test_peft_trains_whole_ffns(settings: Settings) -> None:
    """PEFT copies the modules that ``modules_to_save`` names."""
    values = {**tiny_models.inputs("llama"), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    plain, base = model("llama", **settings), model("llama", **settings)
    expected = step(plain, values)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"], lora_dropout=0.0))
    with emoe.record_routing(base) as record:
        actual = step(adapted.eval(), values)
    assert record.layers[0].tokens == 33
    torch.testing.assert_close(actual["output"], expected["output"])
    name = "layers.0.mlp.up_proj.weight"
    saved = next(key for key in actual if key.endswith("mlp.modules_to_save.default.up_proj.weight"))
    torch.testing.assert_close(actual[saved], expected[name], atol=1e-4, rtol=1e-4)
    assert float(emoe.aux_loss(adapted)) == pytest.approx(float(emoe.aux_loss(plain)))
    copy.deepcopy(adapted)


# ---------------------------------------------------------------- hooks and offloaded weights


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
@pytest.mark.parametrize("settings", [{}, {"score_bias": True}, SETTINGS["learned"], SETTINGS["output biases"]])
@torch.no_grad()
def test_offloaded_weights_give_the_same(name: str, settings: Settings, tmp_path: Path) -> None:
    values = tiny_models.inputs(name)
    expected = tiny_models.output(model(name, **settings), values)
    for offload in (accelerate.cpu_offload, lambda *args, **kwargs: accelerate.disk_offload(*args, tmp_path, **kwargs)):
        network = model(name, **settings)
        offload(network, execution_device=torch.device("cpu"))
        for _ in range(2):
            torch.testing.assert_close(tiny_models.output(network, values), expected)


# ---------------------------------------------------------------- the balance loss


def test_the_balance_loss_is_that_of_each_layers_last_call() -> None:
    network, values = model("bert", aux_loss_coefficient=0.1, **SETTINGS["learned"]), tiny_models.inputs("bert")
    tiny_models.output(network, values)
    expected = float(emoe.aux_loss(network))
    assert expected == pytest.approx(0.1 * sum(float(layer.aux_loss) for layer in routed_layers(network)))
    adapted = get_peft_model(network, LoraConfig(r=4, target_modules=["query"], lora_dropout=0.0)).eval()
    for _ in range(2):  # a second backward pass through the first loss would fail
        (adapted(**values).last_hidden_state.sum() + emoe.aux_loss(adapted)).backward()
        assert float(emoe.aux_loss(adapted)) == pytest.approx(expected)


# ---------------------------------------------------------------- unusual inputs, types and optimizers


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(16,), (0, 16), (2, 0, 16), (1, 1, 16), (2, 3, 4, 16)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_inputs_of_any_shape(shape: tuple[int, ...], settings: str, backend: str) -> None:
    network, x = net(backend, **SETTINGS[settings]), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = network(x)
    assert y.shape == shape
    for row, output in zip(x.reshape(-1, 16), y.reshape(-1, 16), strict=True):
        torch.testing.assert_close(output, network(row), atol=1e-5, rtol=1e-4)


def test_t5_in_half_precision_keeps_its_out_projection_in_single() -> None:
    dense, network = tiny_models.build("t5").half(), model("t5", top_k=8).half()
    for ffn in (*find_ffns(dense), *find_ffns(network)):
        ffn.proj_out.float()
    expected, actual = (tiny_models.output(m, tiny_models.inputs("t5")) for m in (dense, network))
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)


class NoFloat64(TorchDispatchMode):
    """Fail at operations that give float64 numbers, except single ones, which the CPU can compute."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        assert not (isinstance(result, Tensor) and result.dtype == torch.float64 and result.ndim), function
        return result


@pytest.mark.parametrize("config", [emoe.EMoEConfig, emoe.GMoEConfig])
def test_published_layers_need_no_float64_on_the_device(config: Any) -> None:
    """MPS has no float64."""
    network = model("bert", config=config.as_published("tutel", num_experts=8, top_k=2, layers="all")).train()
    with NoFloat64():
        step(network, {**tiny_models.inputs("bert"), "attention_mask": torch.ones(3, 11, dtype=torch.long)})


@pytest.mark.parametrize("config", [emoe.EMoEConfig.as_published("tutel", num_experts=8, top_k=2), emoe.GMoEConfig()])
def test_an_optimizer_from_before_the_conversion_trains_all_but_a_new_router(config: Any) -> None:
    network = tiny_models.build("bert").train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    emoe.convert_(network, dataclasses.replace(config, aux_loss_coefficient=0.0))
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    tiny_models.output(network, tiny_models.inputs("bert")).square().sum().backward()
    optimizer.step()
    for name, parameter in network.named_parameters():
        has_gradient = parameter.grad is not None and parameter.grad.any()
        assert torch.equal(parameter, before[name]) == (not has_gradient or ".router." in name), name


def test_torchs_fused_encoder_layer_does_not_bypass_the_experts() -> None:
    results = []
    for grad in (True, False):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
        stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        emoe.convert_(stack, emoe.EMoEConfig(num_experts=8, top_k=1, layers="all"))
        with torch.set_grad_enabled(grad):
            results.append(stack(torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))))
    torch.testing.assert_close(*results)
