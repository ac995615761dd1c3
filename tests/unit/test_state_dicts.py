"""``load_state_dict`` of a converted model: neurons in another order than its experts' are refused, nothing else is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import emoe
from emoe.layer import routed_layers
from tests import tiny_models

CONFIG = emoe.EMoEConfig(num_experts=8, top_k=2, layers="last:2")
State = dict[str, Tensor]


def converted(name: str = "bert", seed: int = 0, **changes: Any) -> Any:
    model = tiny_models.build(name, seed)
    emoe.convert_(model, emoe.EMoEConfig(**{"num_experts": 8, "top_k": 2, "layers": "last:2", **changes}))
    return model


def trained(state: State, strength: float = 0.2) -> State:
    """As after much more training than fine-tuning is."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + strength * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point() and tensor.numel() > 1
        else tensor
        for name, tensor in state.items()
    }


def refused(model: nn.Module, state: Any, message: str, part: nn.Module | None = None) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    orders = [layer.permutation for layer in routed_layers(model)]
    with pytest.raises(emoe.CheckpointError, match=message):
        (part or model).load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [layer.permutation for layer in routed_layers(model)] == orders


@pytest.mark.parametrize("change", [dict, trained, lambda state: {k: v.bfloat16() for k, v in state.items()}])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3", "VisionTransformer"])
def test_a_dense_state_dict_is_refused_and_an_own_one_is_not(name: str, change: Callable[[State], State]) -> None:
    model = converted(name)
    refused(model, change(tiny_models.build(name).state_dict()), r"is a dense model's: .* before emoe\.convert_")
    orders = [layer.permutation for layer in routed_layers(model)]
    model.load_state_dict(change(converted(name).state_dict()))
    assert [layer.permutation for layer in routed_layers(model)] == orders


@pytest.mark.parametrize("change", [dict, trained])
def test_a_state_dict_of_another_partition_is_refused(change: Callable[[State], State]) -> None:
    model = converted()
    refused(model, change(converted(partition="random").state_dict()), "of another partition: the neurons of encoder")


@pytest.mark.parametrize("change", [dict, trained])
def test_a_partition_that_differs_in_two_neurons_is_another(change: Callable[[State], State]) -> None:
    model, other = converted(), tiny_models.build("bert")
    order = {layer.ffn_index: layer.permutation.clone() for layer in routed_layers(model)}
    order[3][[5, 40]] = order[3][[40, 5]]
    emoe.convert_(other, CONFIG, partition=order)
    refused(model, change(other.state_dict()), r"of another partition: the neurons of encoder\.layer\.3")


def test_parts_wrappers_and_copies_are_watched_too() -> None:
    dense, model = tiny_models.build("bert"), converted()
    refused(model, dense.encoder.state_dict(), "dense", model.encoder)
    refused(model, dense.encoder.layer[3].state_dict(), "dense", model.encoder.layer[3])
    wrapper = nn.ModuleDict({"module": copy.deepcopy(model)})
    refused(wrapper, nn.ModuleDict({"module": dense}).state_dict(), "dense")
    adapted = get_peft_model(model, LoraConfig(target_modules=["intermediate.dense"]))
    other = get_peft_model(tiny_models.build("bert"), LoraConfig(target_modules=["intermediate.dense"]))
    refused(adapted, other.state_dict(), "dense")


def test_the_weights_of_another_model_leave_the_first_order_unknown() -> None:
    """A model that is built anew and converted to take trained weights, as from a checkpoint of PyTorch's own."""
    model = converted()
    model.load_state_dict(dict(converted(seed=1).state_dict()))
    assert [layer.permutation for layer in routed_layers(model)] == [None, None]
    with pytest.raises(emoe.ConversionError, match="stood at first is not known"):
        emoe.to_dense_(model, restore_order=True)
    emoe.to_dense_(model)
    # a state dict that comes from a module tells whether that was converted
    refused(converted(), tiny_models.build("bert", 1).state_dict(), "is a dense model's")
    converted().load_state_dict(converted(seed=1).state_dict())


def test_a_dense_state_dict_is_loaded_before_the_conversion() -> None:
    dense = tiny_models.build("bert", 1)
    model = converted()
    emoe.to_dense_(model, restore_order=True).load_state_dict(dense.state_dict())
    emoe.convert_(model, CONFIG)
    emoe.to_dense_(model, restore_order=True)
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_compared_is_loaded() -> None:
    dense = tiny_models.build("bert")
    converted(partition="contiguous").load_state_dict(dense.state_dict())  # the first order is that of the experts
    model = converted()
    model.load_state_dict({"pooler.dense.bias": torch.ones(32)}, strict=False)
    empty = copy.deepcopy(model).to("meta")
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty.pooler.dense.bias, torch.ones(32))
    copies = tiny_models.build("bert")
    emoe.convert_(copies, emoe.GMoEConfig(num_experts=2, layers=[3]))
    with pytest.raises(RuntimeError, match="size mismatch"):
        copies.load_state_dict(dense.state_dict(), strict=False)
