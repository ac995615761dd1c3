"""A router from outside, word by word as docs/adding.md adds it, does whatever the library's own do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import emoe
from emoe.layer import routed_layers
from emoe.config import ROUTERS
from emoe.routers import AvgKRouter
from emoe.schema import config_schema
from emoe.sparse import path
from emoe.sparse.decode import decode_ffn
from emoe.sparse.ffn import sparse_ffn
from tests import tiny_models
from tests.converted import BACKENDS, model, net
from tests.pages import python_blocks

NAMES = ["bert", "gpt2", "llama", "phi3"]


@pytest.fixture(autouse=True)
def router(registry: None) -> type[emoe.Router]:
    """The page's router, registered as the page registers it."""
    names: dict[str, Any] = {}
    exec(python_blocks("docs/adding.md")[0], names)  # noqa: S102 -- our own page
    assert ROUTERS["linear"].load() is names["LinearRouter"]
    return names["LinearRouter"]


def converted(name: str, **settings: Any) -> nn.Module:
    return model(name, **{"router": "linear", "weighting": "softmax_times_k", **settings})


def gradients(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    y = tiny_models.output(model, values)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"output": y.detach()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("output_bias", ["shared", "per_expert"])
def test_masked_and_sparse_agree_and_teach_it(name: str, output_bias: str) -> None:
    values = tiny_models.inputs(name)
    masked, sparse = (converted(name, output_bias=output_bias, backend=backend) for backend in BACKENDS)
    expected = gradients(masked, values)
    with mock.patch.object(path, "sparse_ffn", side_effect=sparse_ffn) as spy:
        found = gradients(sparse, values)
    assert spy.call_count == tiny_models.LAYERS
    assert found.keys() == expected.keys()
    taught = [key for key in found if key.endswith("router.linear.weight")]
    assert len(taught) == tiny_models.LAYERS
    assert all(found[key].any() for key in taught)
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5 * scale, rtol=1e-3, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_decodes(dtype: torch.dtype) -> None:
    x, results = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).to(dtype), []
    for backend in BACKENDS:
        found = net(backend, router="linear", weighting="softmax_times_k")
        with mock.patch.object(path, "decode_ffn", side_effect=decode_ffn) as spy, torch.no_grad():
            results.append(found.to(dtype)(x))
        assert spy.called == (backend == "sparse")
    close = {"atol": 0.05 * float(results[0].abs().max()), "rtol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(*results, **close)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_saved_and_loaded_and_taken_away(name: str, tmp_path: Path) -> None:
    values, dense = tiny_models.inputs(name), tiny_models.build(name)
    model = converted(name)
    gradients(model, values)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    expected = tiny_models.output(model, values)
    emoe.save_pretrained(model, tmp_path)
    again = emoe.from_pretrained(tiny_models.loader(name), tmp_path)
    for twin in (again, copy.deepcopy(model)):
        assert torch.equal(routed_layers(twin)[0].router.linear.weight, routed_layers(model)[0].router.linear.weight)
        torch.testing.assert_close(tiny_models.output(twin, values), expected)
    assert emoe.to_dense_(again, restore_order=True).state_dict().keys() == dense.state_dict().keys()
    assert type(tiny_models.stock(name, tmp_path)) is type(dense)


def test_it_trains_and_is_saved_beside_adapters(tmp_path: Path) -> None:
    values, base = tiny_models.inputs("bert"), converted("bert")
    before = copy.deepcopy(base)
    settings = LoraConfig(target_modules=["query"], modules_to_save=["router"], init_lora_weights=False)
    model = get_peft_model(base, settings)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    found = gradients(model, values)
    assert all("lora_" in key or ".router." in key for key in found if key != "output")
    assert sum(".router." in key for key in found) == tiny_models.LAYERS
    optimizer.step()
    emoe.update_gates_(model)
    model.eval()
    expected = tiny_models.output(model, values)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(tiny_models.output(PeftModel.from_pretrained(before, tmp_path), values), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(tiny_models.output(merged, values), expected, atol=1e-5, rtol=1e-4)
    emoe.save_pretrained(merged, tmp_path / "merged")
    again = emoe.from_pretrained(tiny_models.loader("bert"), tmp_path / "merged")
    torch.testing.assert_close(tiny_models.output(again, values), expected, atol=1e-5, rtol=1e-4)


def test_it_compiles_in_one_graph() -> None:
    torch.compiler.reset()
    values, model = tiny_models.inputs("bert"), converted("bert")
    expected = tiny_models.output(model, values)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(tiny_models.output(compiled, values), expected)


def test_settings_schema_and_records_know_it() -> None:
    values, model = tiny_models.inputs("bert"), converted("bert", aux_loss_coefficient=0.1, count_padding=True)
    assert "linear" in config_schema(emoe.EMoEConfig)["router"]["enum"]
    emoe.set_top_k_(model, 3)
    with emoe.record_routing(model) as record:
        tiny_models.output(model, values)
    assert record.layers[0].experts_per_token == 3
    assert emoe.aux_loss(model) > 0


def test_without_anything_learned_every_chosen_expert_may_weigh_the_same(router: type[emoe.Router]) -> None:
    emoe.register_router("fixed", type("Fixed", (router,), {"learned": False}))
    model = converted("bert", router="fixed", weighting="binary")
    found = gradients(model, tiny_models.inputs("bert"))
    assert not any(".router." in key for key in found)
    with pytest.raises(emoe.ConfigError, match="router='linear', else the router gets no gradient"):
        converted("bert", weighting="binary")


def test_a_checkpoint_whose_router_is_not_registered_is_one_clear_error(tmp_path: Path) -> None:
    emoe.save_pretrained(converted("bert"), tmp_path)
    del ROUTERS["linear"]
    wanted = r"config\.json, 'emoe': EMoEConfig\.router is 'linear', .*\(emoe\.register_router\); choose from avg_k, cosine, fixed$"
    with pytest.raises(emoe.CheckpointError, match=wanted) as error:
        emoe.from_pretrained(tiny_models.loader("bert"), tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_no_router_is_refused() -> None:
    for name, cls in (("linear", nn.Linear), ("linear", None), ("my router", emoe.Router), (3, emoe.Router)):
        with pytest.raises(emoe.ConversionError, match="register_router"):
            emoe.register_router(name, cls)  # type: ignore[arg-type]


class _Opposite(AvgKRouter):
    def linear_scores(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return -super().linear_scores(x, gate)


class _FirstNumbers(emoe.Router):
    learned = False

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :8].float()


@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("router", [_Opposite, _FirstNumbers])
def test_another_router_may_have_the_name_of_avg_k(
    router: type[emoe.Router], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        usual = net("masked")(x)
        monkeypatch.setitem(ROUTERS, "avg_k", ROUTERS["avg_k"])  # to have it back
        emoe.register_router("avg_k", router)
        masked, sparse = (net(backend)(x) for backend in BACKENDS)
    torch.testing.assert_close(sparse, masked, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(masked, usual, atol=1e-3)
