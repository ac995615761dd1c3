"""``for_inference_`` and ``fix_experts_``, for every kind of FFN."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

import emoe
from emoe.architectures import find_ffns
from emoe.layer import routed_layers
from emoe.routers import AvgKRouter
from tests import converted, tiny_models
from tests.converted import assert_same, inputs, net, step

pytestmark = pytest.mark.usefixtures("always_sparse")
LEARNED = converted.SETTINGS["learned"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", converted.VARIANTS)
@torch.no_grad()
def test_outputs_are_the_masked_ones(variant: str, dtype: torch.dtype) -> None:
    masked, frozen = (net(config=converted.VARIANTS[variant]).to(dtype) for _ in range(2))
    emoe.for_inference_(frozen)
    for tokens in (1, 2, 9, 40, 70):  # few, and for each dtype too many for the layout
        x = inputs(tokens, seed=tokens).to(dtype)
        expected = masked(x)
        tolerance = 1e-4 if dtype == torch.float32 else 0.05 * float(expected.abs().max())
        torch.testing.assert_close(frozen(x), expected, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 9])
@torch.no_grad()
def test_only_the_chosen_experts_are_read(gated: bool, tokens: int) -> None:
    model = net(gated=gated, **LEARNED)  # whose scores do not depend on the experts' weights
    x = inputs(1).expand(tokens, 16)
    with emoe.record_routing(model) as record:
        expected = model(x)
    emoe.set_backend_(model, "sparse")
    unused = (record.layers[0].loads == 0).repeat_interleave(8)
    ffn = model.layers[0]
    for parameter in (*ffn.inner.parameters(), *(ffn.up.parameters() if gated else ())):
        parameter[unused] = torch.nan
    ffn.outer.weight[:, unused] = torch.nan
    emoe.for_inference_(model)
    torch.testing.assert_close(model(x), expected)
    emoe.set_backend_(model, "masked")
    assert model(x).isnan().all()


def test_it_serves_until_it_trains() -> None:
    model, x = net().train(), inputs(1)
    keys = list(model.state_dict())
    emoe.for_inference_(model)
    assert not any(module.training for module in model.modules())
    assert [layer.backend for layer in routed_layers(model)] == ["sparse"]
    assert list(model.state_dict()) == keys
    # training discards the layout: from then on the weights are those of the modules
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    masked = net()
    masked.load_state_dict(model.state_dict())
    assert_same(step(model.eval(), x), step(masked, x))
    emoe.for_inference_(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), masked(x))


@torch.no_grad()
def test_settings_of_a_frozen_model_can_change() -> None:
    model, masked, x = net(), net(), inputs(1)
    emoe.for_inference_(model)
    for change in (
        lambda m: emoe.set_top_k_(m, 3),
        lambda m: emoe.fix_experts_(m, {0: torch.arange(8)}),
    ):
        for network in (model, masked):
            change(network)
        torch.testing.assert_close(model(x), masked(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3"])
def test_changed_weights_are_used_by_any_number_of_tokens(name: str) -> None:
    """Five tokens alone, which use the layout, must equal the same five among more."""
    model, other = converted.model(name), converted.model(name)
    for parameter in other.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    emoe.for_inference_(model)
    values = tiny_models.inputs(name, rows=1)
    tiny_models.output(model, values)
    model.load_state_dict(other.state_dict())
    assert_equal_outputs(model, converted_like(other, model), values)
    model.to(torch.bfloat16).to(torch.float64).to(torch.float32)
    assert_equal_outputs(model, converted_like(model, model), values)
    for layer in routed_layers(
        model
    ):  # as PEFT merges adapters: PyTorch does not count this change
        for _, module in layer.ffn.projections():
            module.weight.data += 0.1 * torch.randn_like(module.weight)
    assert_equal_outputs(model, converted_like(model, model), values)


def converted_like(source: nn.Module, model: nn.Module) -> nn.Module:
    """Return a masked copy of a model with the state of another one."""
    copied = copy.deepcopy(model)
    emoe.set_backend_(copied, "masked")
    copied.load_state_dict(source.state_dict())
    return copied


def assert_equal_outputs(model: nn.Module, masked: nn.Module, values: dict[str, Tensor]) -> None:
    expected = tiny_models.output(masked, values)
    torch.testing.assert_close(tiny_models.output(model, values), expected, atol=1e-4, rtol=1e-4)


def test_gradients_are_computed_although_the_model_serves() -> None:
    model, masked, x = net(), net(), inputs(5)
    emoe.for_inference_(model)
    with torch.no_grad():
        expected = model(x)
    assert_same(step(model, x), step(masked, x))
    model.requires_grad_(False)
    assert torch.equal(model(x), expected)  # frozen weights need no gradient


@torch.no_grad()
def test_autocast_repeats_what_the_first_call_computed() -> None:
    """The compiled kernels take over in the second call."""
    for model in (net(), emoe.for_inference_(net())):
        with torch.autocast("cpu", torch.bfloat16):
            first, second = (model(inputs(5)) for _ in range(2))
        assert torch.equal(first, second)


@torch.no_grad()
def test_a_subclass_of_the_router_keeps_its_scores() -> None:
    class Turned(AvgKRouter):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    turned, bottom, x = net(), net(selection="bottom"), inputs(5)
    layer = routed_layers(turned)[0]
    layer.router = Turned(layer.ffn, layer.config).eval()
    for _ in range(3):
        torch.testing.assert_close(turned.eval()(x), bottom.eval()(x))


@torch.no_grad()
def test_mean_keys_follow_the_weights_in_evaluation() -> None:
    """The masked path keeps them between calls."""
    model, fresh, x = net(), net(), inputs(5)
    model(x)
    for change in (
        lambda weight: weight.mul_(-1),
        lambda weight: weight.data.add_(torch.randn_like(weight)),
        lambda weight: setattr(weight, "data", torch.randn_like(weight)),
    ):
        weight = model.layers[0].inner.weight
        change(weight)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(model(x), copy.deepcopy(fresh)(x))
    with torch.inference_mode():
        weight.mul_(-1)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(model(x), copy.deepcopy(fresh)(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_mean_keys_follow_a_change_of_one_expert_that_pytorch_does_not_count(name: str) -> None:
    """In GPT-2's weights, the neurons of an expert are columns, elsewhere rows."""
    sizes: dict[str, dict[str, int]] = {
        "bert": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 1},
        "gpt2": {"n_embd": 192, "n_inner": 768, "n_layer": 1},
    }
    config = AutoConfig.for_model(name, vocab_size=60, **sizes[name])
    model = AutoModel.from_config(config).eval()
    experts = emoe.EMoEConfig(num_experts=64, top_k=16, layers=[0], partition="contiguous")
    emoe.convert_(model, experts)
    (layer,) = routed_layers(model)
    weight = layer.ffn.proj_in.weight.data
    neurons = weight.T if name == "gpt2" else weight
    tokens = torch.arange(5)[None]
    for expert in range(64):
        model(tokens)
        neurons.unflatten(0, (64, -1))[expert] *= -1
        changed = model(tokens).last_hidden_state
        assert torch.equal(changed, copy.deepcopy(model)(tokens).last_hidden_state), expert


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("selection", ["top", "bottom"])
@pytest.mark.parametrize("tokens", [0, 1, 300])
@pytest.mark.parametrize("first_neuron", ["finite", "infinite"])
def test_one_kernel_masks_neurons_as_the_separate_steps_do(
    first_neuron: str, tokens: int, selection: Any, dtype: torch.dtype
) -> None:
    """The first call has no mean keys yet, so it scores, chooses and masks in separate steps."""
    model = net(gated=False, selection=selection).eval().to(dtype)
    if first_neuron == "infinite":
        model.layers[0].inner.bias[0] = torch.inf  # times zero, it is no number
    x = inputs(tokens).to(dtype)
    if tokens > 1:
        x[0] = 0.0  # its experts have equal scores
        x[1] = torch.inf  # it has no highest score
    separate_steps = model(x)
    one_kernel = model(x)
    assert torch.equal(one_kernel.nan_to_num(nan=7.0), separate_steps.nan_to_num(nan=7.0))


@torch.no_grad()
def test_training_discards_the_kept_mean_keys() -> None:
    model, x = net(), inputs(5)
    model(x)
    model.train()
    # one element, which may not be among those that are compared
    model.layers[0].inner.weight.data[1, 1] += 10.0
    model.eval()
    assert torch.equal(model(x), copy.deepcopy(model)(x))


@torch.no_grad()
def test_a_frozen_model_can_be_traced() -> None:
    model = net()
    emoe.for_inference_(model)
    traced = torch.jit.trace(model, (inputs(2),), check_trace=False)
    for seed in range(8):  # which choose different numbers of experts
        x = inputs(2, seed)
        torch.testing.assert_close(traced(x), model(x), atol=1e-4, rtol=1e-4)


def count_usage(model: nn.Module, values: dict[str, Tensor]) -> dict[int, Tensor]:
    with emoe.record_routing(model) as record:
        tiny_models.output(model, values)
    return {number: layer.loads for number, layer in record.layers.items()}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3", "t5", "vit"])
@pytest.mark.parametrize("backend", converted.BACKENDS)
def test_all_tokens_have_the_neurons_of_the_most_used_experts(
    name: str, backend: str, tmp_path: Path
) -> None:
    values, model = tiny_models.inputs(name), converted.model(name, backend)
    counts = count_usage(model, values)
    emoe.fix_experts_(model, counts)
    # compare with the dense model without the other neurons, in the order of the experts
    pruned = emoe.to_dense_(converted.model(name))
    for ffn in find_ffns(pruned):
        keep = torch.zeros(8, ffn.d // 8)
        keep[counts[ffn.index].argsort(descending=True, stable=True)[:2]] = 1
        ffn.proj_out.register_forward_pre_hook(
            lambda _, args, keep=keep: (args[0] * keep.flatten(),)
        )
    emoe.save_pretrained(model, tmp_path)
    for fixed in (model, emoe.from_pretrained(tiny_models.loader(name), tmp_path)):
        result, expected = tiny_models.output(fixed, values), tiny_models.output(pruned, values)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["missing layer", "shares", "negative", "learned router"])
def test_unsuitable_counts_are_rejected(case: str) -> None:
    values = tiny_models.inputs("bert")
    model = converted.model(
        "bert", **converted.SETTINGS["learned" if case == "learned router" else "plain"]
    )
    expected, counts = tiny_models.output(model, values), count_usage(model, values)
    unsuitable = {
        "missing layer": {},
        "shares": {number: loads / loads.sum() for number, loads in counts.items()},
        "negative": {number: -loads for number, loads in counts.items()},
    }
    with pytest.raises(emoe.ConversionError, match=r"layer.0"):
        emoe.fix_experts_(model, unsuitable.get(case, counts))
    assert torch.equal(tiny_models.output(model, values), expected)


def test_counts_of_parts_with_equal_layer_numbers_are_rejected() -> None:
    first, second, x = net(), net(), inputs()
    counts = count_usage(first, {"x": x})
    expected = second(x)
    with pytest.raises(emoe.ConversionError, match="fix_experts_: parts of the model"):
        emoe.fix_experts_(nn.ModuleList([first, second]), counts)
    assert torch.equal(second(x), expected)


def test_counts_of_parts_with_different_layer_numbers_are_used() -> None:
    parts = nn.ModuleList([converted.model("bert", layers=[number]) for number in (0, 2)])
    values = tiny_models.inputs("bert")
    first_counts, second_counts = (count_usage(part, values) for part in parts)
    emoe.fix_experts_(parts, {**first_counts, **second_counts})
    assert [emoe.config_of(part).router for part in parts] == ["fixed", "fixed"]
