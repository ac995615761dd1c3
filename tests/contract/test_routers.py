"""Test that the user's router of docs/adding.md works like the library's routers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import emoe
from emoe.config import ROUTERS
from emoe.layer import routed_layers
from tests import converted, tiny_models
from tests.converted import BACKENDS, assert_same, step
from tests.pages import python_blocks

LINEAR = {"router": "linear", "weighting": "softmax_times_k"}
pytestmark = pytest.mark.usefixtures("always_sparse")


@pytest.fixture(autouse=True)
def router(registry: None) -> None:
    """Register the page's router."""
    exec(python_blocks("docs/adding.md")[0], {})  # noqa: S102 -- our own page


def model_of(name: str, backend: str = "masked", **settings: Any) -> Any:
    return converted.model(name, backend, **{**LINEAR, **settings})


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3"])
@pytest.mark.parametrize("output_bias", ["shared", "per_expert"])
def test_both_backends_train_save_freeze_and_remove_it(
    name: str, output_bias: str, tmp_path: Path
) -> None:
    values, (masked, sparse) = (
        tiny_models.inputs(name),
        (model_of(name, b, output_bias=output_bias) for b in BACKENDS),
    )
    results = step(masked, values)
    assert_same(step(sparse, values), results)
    trained = [grad.any() for key, grad in results.items() if key.endswith("router.linear.weight")]
    assert len(trained) == tiny_models.LAYERS
    assert all(trained)
    emoe.save_pretrained(sparse, tmp_path)
    again = emoe.from_pretrained(tiny_models.loader(name), tmp_path)
    emoe.for_inference_(sparse)
    for model in (again, sparse):
        torch.testing.assert_close(
            tiny_models.output(model, values), results["output"], atol=1e-4, rtol=1e-4
        )
    assert emoe.to_dense_(again).state_dict().keys() == tiny_models.build(name).state_dict().keys()


def test_it_is_trained_and_saved_beside_adapters(tmp_path: Path) -> None:
    values, base = tiny_models.inputs("bert"), model_of("bert")
    before = copy.deepcopy(base)
    settings = LoraConfig(
        target_modules=["query"], modules_to_save=["router"], init_lora_weights=False
    )
    model = get_peft_model(base, settings)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    assert sum(".router." in key for key in step(model, values)) == tiny_models.LAYERS
    optimizer.step()
    expected = tiny_models.output(model.eval(), values)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        tiny_models.output(PeftModel.from_pretrained(before, tmp_path), values), expected
    )
    emoe.save_pretrained(model.merge_and_unload(), tmp_path / "merged")
    again = emoe.from_pretrained(tiny_models.loader("bert"), tmp_path / "merged")
    torch.testing.assert_close(tiny_models.output(again, values), expected, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_whose_router_is_not_registered_is_an_error(tmp_path: Path) -> None:
    emoe.save_pretrained(model_of("bert"), tmp_path)
    del ROUTERS["linear"]
    with pytest.raises(
        emoe.CheckpointError, match=r"'linear'.*emoe\.register_router.*avg_k"
    ) as error:
        emoe.from_pretrained(tiny_models.loader("bert"), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_router_with_too_few_scores_is_named(backend: str) -> None:
    class Short(emoe.Router):
        learned = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float()[..., :3]

    emoe.register_router("short", Short)
    with pytest.raises(
        emoe.ConversionError, match="Short returned 3 scores per token for 4 experts"
    ):
        tiny_models.output(
            converted.model("bert", backend, router="short", num_experts=4),
            tiny_models.inputs("bert"),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_learned_router_that_leaves_one_expert_is_trained(backend: str) -> None:
    config = emoe.EMoEConfig(
        num_experts=4,
        top_k=3,
        selection="not_top",
        router="cosine",
        weighting="softmax",
        layers="all",
    )
    net = converted.net(backend, config=config)
    net(torch.randn(6, 16)).square().sum().backward()
    router = routed_layers(net)[0].router
    gradients = [parameter.grad for parameter in router.parameters()]
    # the weight of a single expert is its share among all experts, not always 1
    assert gradients
    assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_a_running_gate_stays_in_single_precision_without_values() -> None:
    net = converted.net(gate_momentum=0.5)
    net.half().to("meta").to_empty(device="cpu")
    router = routed_layers(net)[0].router
    assert router.gate.dtype == torch.float32
    assert router.gate.device.type == "cpu"
