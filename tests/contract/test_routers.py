"""A router of the user's, as docs/adding.md adds it, does what the library's own routers do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import emoe
from emoe.config import ROUTERS
from tests import converted, tiny_models
from tests.converted import BACKENDS, assert_same, step
from tests.pages import python_blocks

NAMES = ["bert", "gpt2", "llama", "phi3"]
LINEAR = {"router": "linear", "weighting": "softmax_times_k"}
pytestmark = pytest.mark.usefixtures("always_sparse")


@pytest.fixture(autouse=True)
def router(registry: None) -> None:
    """Register the page's router as the page registers it."""
    exec(python_blocks("docs/adding.md")[0], {})  # noqa: S102 -- our own page


def model_of(name: str, backend: str = "masked", **settings: Any) -> Any:
    return converted.model(name, backend, **{**LINEAR, **settings})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("output_bias", ["shared", "per_expert"])
def test_both_backends_agree_and_train_it(name: str, output_bias: str) -> None:
    values = tiny_models.inputs(name)
    masked, sparse = (step(model_of(name, backend, output_bias=output_bias), values) for backend in BACKENDS)
    assert_same(sparse, masked)
    trained = [key for key in masked if key.endswith("router.linear.weight")]
    assert len(trained) == tiny_models.LAYERS
    assert all(masked[key].any() for key in trained)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_saved_and_loaded_and_removed(name: str, tmp_path: Path) -> None:
    values, model = tiny_models.inputs(name), model_of(name)
    step(model, values)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    expected = tiny_models.output(model, values)
    emoe.save_pretrained(model, tmp_path)
    again = emoe.from_pretrained(tiny_models.loader(name), tmp_path)
    for twin in (again, copy.deepcopy(model)):
        torch.testing.assert_close(tiny_models.output(twin, values), expected)
    stock = tiny_models.stock(name, tmp_path)
    assert emoe.to_dense_(again, restore_order=True).state_dict().keys() == stock.state_dict().keys()


def test_it_is_trained_and_saved_beside_adapters(tmp_path: Path) -> None:
    values, base = tiny_models.inputs("bert"), model_of("bert")
    before = copy.deepcopy(base)
    settings = LoraConfig(target_modules=["query"], modules_to_save=["router"], init_lora_weights=False)
    model = get_peft_model(base, settings)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    grads = [key for key in step(model, values) if key != "output"]
    assert all("lora_" in key or ".router." in key for key in grads)
    assert sum(".router." in key for key in grads) == tiny_models.LAYERS
    optimizer.step()
    emoe.update_gates_(model)
    expected = tiny_models.output(model.eval(), values)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(tiny_models.output(PeftModel.from_pretrained(before, tmp_path), values), expected)
    merged = model.merge_and_unload()
    emoe.save_pretrained(merged, tmp_path / "merged")
    again = emoe.from_pretrained(tiny_models.loader("bert"), tmp_path / "merged")
    torch.testing.assert_close(tiny_models.output(again, values), expected, atol=1e-5, rtol=1e-4)


def test_compiled_frozen_and_recorded() -> None:
    torch.compiler.reset()
    values, model = tiny_models.inputs("bert"), model_of("bert", aux_loss_coefficient=0.1, count_padding=True)
    emoe.set_top_k_(model, 3)
    with emoe.record_routing(model) as record:
        expected = tiny_models.output(model, values)
    assert record.layers[0].experts_per_token == 3
    assert emoe.aux_loss(model) > 0
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    emoe.for_inference_(model)
    for network in (compiled, model):
        torch.testing.assert_close(tiny_models.output(network, values), expected, atol=1e-5, rtol=1e-4)


def test_a_router_that_learns_needs_a_weighting_with_a_gradient() -> None:
    with pytest.raises(emoe.ConfigError, match="gradient"):
        model_of("bert", weighting="binary")


def test_a_checkpoint_whose_router_is_not_registered_is_an_error(tmp_path: Path) -> None:
    emoe.save_pretrained(model_of("bert"), tmp_path)
    del ROUTERS["linear"]
    with pytest.raises(emoe.CheckpointError, match=r"'linear'.*emoe\.register_router.*avg_k") as error:
        emoe.from_pretrained(tiny_models.loader("bert"), tmp_path)
    assert "\n" not in str(error.value)
