"""``load_state_dict`` of a converted model rejects a dense model's state, whose neurons are in another order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import emoe
from emoe.layer import routed_layers
from tests import converted, tiny_models
from tests.model_folders import assert_same


def trained(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Change weights much more than fine-tuning does, and round them."""
    torch.manual_seed(1)
    changed = {name: x + 0.2 * x.std() * torch.randn(x.shape) if x.ndim == 2 else x for name, x in state.items()}
    return {name: tensor.bfloat16() for name, tensor in changed.items()}


def orders(model: nn.Module) -> list[Tensor | None]:
    return [layer.permutation for layer in routed_layers(model)]


def assert_rejected(model: nn.Module, state: Any) -> None:
    before, permutations = copy.deepcopy(model.state_dict()), orders(model)
    with pytest.raises(emoe.CheckpointError, match=r"dense.*emoe\.convert_"):
        model.load_state_dict(state)
    assert_same(model.state_dict(), before)
    assert orders(model) == permutations


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3", "VisionTransformer"])
def test_a_dense_state_dict_is_rejected_and_a_converted_one_is_not(name: str) -> None:
    model = converted.model(name)
    assert_rejected(model, tiny_models.build(name).state_dict())
    assert_rejected(model, trained(tiny_models.build(name).state_dict()))
    permutations = orders(model)
    model.load_state_dict(trained(model.state_dict()))
    assert orders(model) == permutations


def test_wrappers_copies_and_adapters_are_checked_too() -> None:
    dense, model = tiny_models.build("bert"), converted.model("bert")
    assert_rejected(nn.ModuleDict({"module": copy.deepcopy(model)}), nn.ModuleDict({"module": dense}).state_dict())
    emoe.set_backend_(model, "sparse")
    assert_rejected(model, dense.state_dict())
    emoe.set_backend_(model, "masked")
    settings = LoraConfig(target_modules=["intermediate.dense"])
    adapted, other = (get_peft_model(network, settings) for network in (model, dense))
    assert_rejected(adapted, other.state_dict())


def test_the_weights_of_another_model_leave_the_first_order_unknown() -> None:
    """As for a model that is built and converted anew, to load trained weights from torch's own checkpoint."""
    model, other = converted.model("bert"), tiny_models.build("bert", seed=1)
    emoe.convert_(other, routed_layers(model)[0].config)
    model.load_state_dict(other.state_dict())
    assert set(orders(model)) == {None}
    with pytest.raises(emoe.ConversionError, match=r"order.*unknown"):
        emoe.to_dense_(model, restore_order=True)
    emoe.to_dense_(model)


def test_states_that_cannot_be_compared_are_loaded() -> None:
    dense = tiny_models.build("bert").state_dict()
    converted.model("bert", partition="contiguous").load_state_dict(dense)  # the experts keep the dense order
    model = converted.model("bert")
    model.load_state_dict({"pooler.dense.bias": torch.ones(32)}, strict=False)
    empty = copy.deepcopy(model).to("meta")
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty.pooler.dense.bias, torch.ones(32))
