"""A converted model wherever PyTorch models are used: a forward pass leaves nothing behind, and no backend gives another result, gradient or hook call than the masked one."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

import emoe
from emoe.layer import routed_layers
from tests import tiny_models
from tests.converted import BACKENDS, SETTINGS, Settings, inputs, model, net
from tests.plain_net import plain_net


def state_of(found: nn.Module) -> dict[str, Any]:
    """Every attribute of every module, tensors by identity."""
    return {
        f"{name}.{key}": id(value) if isinstance(value, Tensor) else str(value)
        for name, module in found.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_modules")
    }


# derivatives


def penalty(found: nn.Module, x: Tensor) -> Tensor:
    """The gradient of a gradient penalty by the weights."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(found(x).square().sum(), x, create_graph=True)
    return torch.cat([g.flatten() for g in torch.autograd.grad(grad.square().sum(), list(found.parameters()))])


def with_dual_numbers(found: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(found(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def per_sample(found: nn.Module, x: Tensor) -> Tensor:
    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(found, parameters, (row,)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(dict(found.named_parameters()), x)
    return torch.cat([grad.flatten() for grad in grads.values()])


DERIVATIVES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "hvp": lambda f, x: torch.autograd.functional.hvp(lambda v: f(v).square().sum(), x, torch.ones_like(x))[1],
    "gradient penalty": penalty,
    "hessian": lambda f, x: torch.func.hessian(lambda v: f(v).square().sum())(x),
    "grad": lambda f, x: torch.func.grad(lambda v: f(v).square().sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x.expand(3, *x.shape)),
    "dual numbers": with_dual_numbers,
    "gradients by row": per_sample,
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives_of_any_kind_are_the_masked_paths(derivative: str, settings: str) -> None:
    masked, sparse = (DERIVATIVES[derivative](net(b, **SETTINGS[settings]), inputs()) for b in BACKENDS)
    assert masked.abs().max() > 1e-3
    torch.testing.assert_close(sparse, masked, atol=1e-4 * float(masked.abs().max()), rtol=1e-4)


# nothing stays behind


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_forward_pass_leaves_nothing_on_the_model(backend: str, settings: str) -> None:
    found = net(backend, **SETTINGS[settings])
    before = state_of(found)
    found(inputs())
    assert state_of(found) == before


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_share_a_model(name: str, backend: str) -> None:
    found = model(name, backend, capacity_factor=1.5, aux_loss_coefficient=0.1)
    values = {**tiny_models.inputs(name), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    batches = [values, {key: value[:2, :7] for key, value in values.items()}]
    with torch.no_grad():
        expected = [tiny_models.output(found, batch) for batch in batches]

    def serve(place: int) -> bool:
        with torch.no_grad():
            outputs = [tiny_models.output(found, batches[place]) for _ in range(60)]
        return all(torch.equal(one, expected[place]) for one in outputs)

    with emoe.record_routing(found) as record, ThreadPoolExecutor(2) as threads:
        assert all(threads.map(serve, (0, 1)))
    assert record.layers[0].tokens == 60 * (33 + 14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_pass_does_not_feed_the_next(backend: str, error: type[BaseException]) -> None:
    found, values = model("bert", backend, aux_loss_coefficient=0.1), tiny_models.inputs("bert")
    expected, loss = tiny_models.output(found, values), float(emoe.aux_loss(found))

    def interrupt(*_args: object) -> None:
        raise error

    hook = found.encoder.layer[2].output.dense.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        tiny_models.output(found, values)
    hook.remove()
    assert torch.equal(tiny_models.output(found, values), expected)
    assert float(emoe.aux_loss(found)) == loss


def test_copies_and_pickles_are_models_of_their_own() -> None:
    found, values = (
        model("bert", "sparse", output_bias="per_expert", aux_loss_coefficient=0.1),
        tiny_models.inputs("bert"),
    )
    expected = tiny_models.output(found, values)
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found)), torch.load(file, weights_only=False)):
        assert emoe.aux_loss(twin) == 0.0
        assert torch.equal(tiny_models.output(twin, values), expected)
        with torch.no_grad():
            routed_layers(twin)[0].ffn.proj_in.weight.zero_()
    assert torch.equal(tiny_models.output(found, values), expected)


# others who look


WATCHED = ("inner", "up", "act", "outer")
HOOKS = ("forward_pre", "forward", "full_backward", "full_backward_pre")


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("place", WATCHED)
def test_hooks_are_called_as_often_and_change_nothing(kind: str, place: str) -> None:
    results = []
    for backend in BACKENDS:
        found, calls = net(backend), []
        module = getattr(found.layers[0], place)
        getattr(module, f"register_{kind}_hook")(lambda *_args, calls=calls: calls.append(1))
        x = inputs().requires_grad_()
        found(x).square().sum().backward()
        assert len(calls) == 1
        results.append(x.grad)
    torch.testing.assert_close(*results)


def test_global_hooks_see_the_same_calls() -> None:
    seen = []
    for backend in BACKENDS:
        calls: list[str] = []
        hook = nn_module.register_module_forward_hook(lambda m, _args, _y, calls=calls: calls.append(type(m).__name__))
        net(backend)(inputs())
        hook.remove()
        seen.append(calls)
    assert seen[0] == seen[1]


class Counting(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", ["inner", "up", "outer"])
@pytest.mark.parametrize("settings", ["plain", "learned"])
def test_replaced_forwards_are_called_and_outlive_the_experts(when: str, place: str, settings: str) -> None:
    found, hook = plain_net(16, 64, gated=True), Counting()
    if when == "before":
        add_hook_to_module(getattr(found.layers[0], place), hook)
    torch.manual_seed(0)
    config = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0], backend="sparse", **SETTINGS[settings])
    emoe.convert_(found, config)
    if when == "after":
        add_hook_to_module(getattr(found.layers[0], place), hook)
    torch.testing.assert_close(found(inputs()), net("masked", **SETTINGS[settings])(inputs()))
    emoe.to_dense_(found)
    found(inputs())
    assert hook.calls == 2


# offloaded weights


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "phi3"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"score_bias": True},
        {"value_norm_weighted": True},
        SETTINGS["learned"],
        SETTINGS["own biases"],
        {**SETTINGS["own biases"], "backend": "sparse"},
    ],
)
def test_offloaded_weights_route_as_those_in_place(name: str, settings: Settings) -> None:
    found, values = model(name, **settings), tiny_models.inputs(name)
    with torch.no_grad():
        expected = tiny_models.output(found, values)
        accelerate.cpu_offload(found, execution_device=torch.device("cpu"))
        for _ in range(2):  # by the mask, which is the sparse path's result but for rounding
            torch.testing.assert_close(tiny_models.output(found, values), expected)
        if settings.get("backend") != "sparse":
            assert torch.equal(tiny_models.output(found, values), expected)


def test_weights_on_disk_route_as_those_in_place(tmp_path) -> None:
    found, values = model("bert"), tiny_models.inputs("bert")
    with torch.no_grad():
        expected = tiny_models.output(found, values)
        accelerate.disk_offload(found, tmp_path, execution_device=torch.device("cpu"))
        assert torch.equal(tiny_models.output(found, values), expected)


# the balance loss belongs to a pass


def test_the_balance_loss_is_of_one_pass_whoever_calls() -> None:
    found = model("bert", count_padding=True, aux_loss_coefficient=0.1, **SETTINGS["learned"]).train()
    values = tiny_models.inputs("bert")
    adapted = get_peft_model(found, LoraConfig(r=4, target_modules=["query"], lora_dropout=0.0)).eval()
    tiny_models.output(adapted, values)
    expected = float(emoe.aux_loss(adapted))
    for _ in range(2):  # a second backward pass through the first one's loss would fail
        (adapted(**values).last_hidden_state.sum() + emoe.aux_loss(adapted)).backward()
        assert float(emoe.aux_loss(adapted)) == pytest.approx(expected)
    embedded = found.embeddings(input_ids=values["input_ids"])
    for call in (lambda: found.encoder(embedded), lambda: found.forward(**values), lambda: found(**values)):
        for _ in range(2):
            call()
            assert float(emoe.aux_loss(found)) == pytest.approx(expected)


def test_both_stacks_of_an_encoder_decoder_count() -> None:
    found, values = model("t5", count_padding=True, aux_loss_coefficient=0.1), tiny_models.inputs("t5")
    tiny_models.output(found, values)
    expected = float(emoe.aux_loss(found))
    found.forward(**values)
    assert float(emoe.aux_loss(found)) == pytest.approx(expected)


# odd inputs and optimisers


@pytest.mark.parametrize("shape", [(16,), (0, 16), (2, 0, 16), (1, 1, 16), (2, 3, 4, 16)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_inputs_of_any_shape(shape: tuple[int, ...], settings: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    masked, sparse = (net(backend, **SETTINGS[settings])(x) for backend in BACKENDS)
    assert masked.shape == shape
    torch.testing.assert_close(sparse, masked)


def test_t5_in_half_precision_keeps_its_out_projection_in_single() -> None:
    results = []
    for backend in BACKENDS:
        found = model("t5", backend).half()
        for layer in routed_layers(found):
            layer.ffn.proj_out.float()
        results.append(tiny_models.output(found, tiny_models.inputs("t5")))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "config",
    [
        emoe.EMoEConfig(num_experts=8, top_k=2, layers="all", output_bias="per_expert"),
        emoe.GMoEConfig(num_experts=3, layers="all", aux_loss_coefficient=0.0),
    ],
)
def test_an_optimiser_from_before_the_conversion_trains_what_it_has(config: Any) -> None:
    found = tiny_models.build("bert").train()
    optimizer = torch.optim.SGD(found.parameters(), lr=1.0)
    emoe.convert_(found, config)
    before = {name: parameter.clone() for name, parameter in found.named_parameters()}
    tiny_models.output(found, tiny_models.inputs("bert")).square().sum().backward()
    optimizer.step()
    still = {
        name
        for name, p in found.named_parameters()
        if torch.equal(p, before[name]) and p.grad is not None and p.grad.any()
    }
    # a router is new: an optimiser that is to train it has to be made after the conversion
    assert all(".router." in name for name in still)


def test_torchs_fused_encoder_layer_does_not_pass_the_experts_by() -> None:
    results = []
    for grad in (True, False):
        torch.manual_seed(0)
        found = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
        stack = nn.TransformerEncoder(found, 2, enable_nested_tensor=False)
        emoe.convert_(stack, emoe.EMoEConfig(num_experts=8, top_k=1, layers="all"))
        with torch.set_grad_enabled(grad):
            results.append(stack(torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))))
    torch.testing.assert_close(*results)
