"""Test that ``set_backend_`` replaces only modules, and rejects FFNs that it cannot compute."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

import emoe
from emoe.architectures import find_ffns
from emoe.layer import routed_layers
from tests import converted, tiny_models
from tests.converted import assert_same, inputs, net, process_group, step
from tests.model_folders import assert_same as assert_equal
from tests.plain_net import FFN, PlainNet

pytestmark = pytest.mark.usefixtures("always_sparse")
NAMES = ["bert", "gpt2", "llama", "phi3", "t5", "VisionTransformer", "TransformerEncoder"]


def types(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("name", NAMES)
def test_names_parameters_and_state_stay(name: str, tmp_path: Path) -> None:
    masked, model, values = converted.model(name), converted.model(name), tiny_models.inputs(name)
    parameters, keys = list(model.named_parameters()), list(model.state_dict())
    expected = step(masked, values)
    for backend in ("sparse", "sparse", "masked", "sparse"):
        emoe.set_backend_(model, backend)
        for (before, first), (after, second) in zip(
            parameters, model.named_parameters(), strict=True
        ):
            assert (before, id(first)) == (after, id(second))
        assert list(model.state_dict()) == keys
        assert all(layer.backend == backend for layer in routed_layers(model))
        assert (types(model) == types(masked)) == (backend == "masked")
        assert_same(step(model, values), expected)
    emoe.save_pretrained(model, tmp_path)
    again = emoe.from_pretrained(
        tiny_models.loader(name), tmp_path, **tiny_models.load_options(name)
    )
    assert_same(step(again, values), expected)
    emoe.set_backend_(model, "masked")
    emoe.set_backend_(model.train(), "sparse")
    emoe.set_backend_(model.eval(), "masked")
    assert not any(module.training for module in model.modules())
    emoe.set_backend_(model, "sparse")
    emoe.to_dense_(model, restore_order=True)
    assert_equal(model.state_dict(), tiny_models.build(name).state_dict())
    assert types(model) == types(tiny_models.build(name))


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("backend", converted.BACKENDS)
@pytest.mark.parametrize("name", sorted(tiny_models.BUILDERS))
def test_copies_are_models_with_their_own_weights(name: str, backend: str) -> None:
    settings = {"output_bias": "per_expert", "aux_loss_coefficient": 0.1}
    model, values = converted.model(name, backend, **settings), tiny_models.inputs(name)
    expected = step(model, values)
    for copied in (copy.deepcopy, pickled, saved_and_loaded):
        twin = copied(model)
        assert types(twin) == types(model)
        assert emoe.aux_loss(twin) == 0.0
        assert_same(step(twin, values), expected)
        with torch.no_grad():
            find_ffns(twin)[0].proj_in.weight.zero_()
        emoe.to_dense_(twin)
        assert types(twin) == types(tiny_models.build(name))
    assert_same(step(model, values), expected)


def test_lora_trains_beside_sparse_ffns_and_is_refused_in_them() -> None:
    settings, results = LoraConfig(target_modules=["q_proj"], init_lora_weights=False), []
    for backend in converted.BACKENDS:
        base = converted.model("llama", backend)
        torch.manual_seed(1)
        results.append(step(get_peft_model(base, settings).eval(), tiny_models.inputs("llama")))
    assert_same(results[1], results[0])
    for target in ("gate_proj", "up_proj", "down_proj"):
        with pytest.raises(ValueError, match="not supported"):
            get_peft_model(converted.model("llama", "sparse"), LoraConfig(target_modules=[target]))


def add_hook(path: str, kind: str) -> Callable[[PlainNet], object]:
    return lambda model: getattr(model.layers[0].get_submodule(path), f"register_{kind}_hook")(
        lambda *_: None
    )


def shard_weights(model: PlainNet) -> None:
    weight = distribute_tensor(
        model.layers[0].outer.weight.detach(), init_device_mesh("cpu", (1,)), [Replicate()]
    )
    model.layers[0].outer.weight = nn.Parameter(weight)


Change = Callable[[PlainNet], object]
HOOKS: dict[str, Change] = {
    "hook on in": add_hook("inner", "forward_pre"),
    "hook on up": add_hook("up", "forward"),
    "hook on out": add_hook("outer", "full_backward"),
    "hook on activation": add_hook("act", "full_backward_pre"),
    "offloaded": lambda model: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
}
BEFORE: dict[str, Change] = {
    **HOOKS,
    "adapter": lambda model: get_peft_model(model, LoraConfig(target_modules=["up"])),
    "sharded": lambda model: fully_shard(model.layers[0].outer, mesh=init_device_mesh("cpu", (1,))),
    "parametrized": lambda model: nn.utils.parametrizations.weight_norm(model.layers[0].outer),
}
AFTER: dict[str, Change] = {
    **HOOKS,
    "sharded weight": shard_weights,
}


def assert_rejected(model: PlainNet) -> None:
    x = inputs().to(model.layers[0].outer.weight.dtype)
    before, expected = types(model), model(x)
    with pytest.raises(emoe.ConversionError, match=r"layers\.0") as error:
        emoe.set_backend_(model, "sparse")
    assert "\n" not in str(error.value)
    assert types(model) == before  # unchanged, and still usable
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("case", BEFORE)
def test_set_backend_rejects(case: str, tmp_path: Path) -> None:
    model = net()
    with process_group(tmp_path):
        BEFORE[case](model)
        assert_rejected(model)


@pytest.mark.parametrize("case", AFTER)
def test_a_forward_pass_rejects(case: str, tmp_path: Path) -> None:
    model, x = net("sparse"), inputs().requires_grad_()
    with process_group(tmp_path):
        AFTER[case](model)
    with pytest.raises(RuntimeError, match=r"emoe\.set_backend_\(model, 'masked'\)") as error:
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    assert "\n" not in str(error.value)
    emoe.set_backend_(model, "masked")


class CustomFFN(FFN):
    """Run code between projections that the FFN's row lacks."""

    def __init__(
        self,
        between: Callable[[Tensor], Tensor],
        activation: nn.Module | None = None,
        *,
        gated: bool = False,
    ) -> None:
        super().__init__(16, 64, gated=gated)
        self.between, self.act = between, activation or self.act

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.inner(x))
        if self.up is not None:
            hidden = hidden * self.up(x)
        return self.outer(self.between(hidden))


CUSTOM: dict[str, Callable[[], FFN]] = {
    "clamp": lambda: CustomFFN(lambda hidden: hidden.clamp(max=3)),
    "scale": lambda: CustomFFN(lambda hidden: hidden * 1.05, gated=True),
    "activation across neurons": lambda: CustomFFN(nn.Identity(), nn.Softmax(-1)),
    "activation in place": lambda: CustomFFN(nn.Identity(), nn.ReLU(inplace=True)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CUSTOM)
def test_an_ffn_that_does_more_than_its_row_says_is_rejected(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = PlainNet(CUSTOM[case]()).to(dtype)
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0]))
    assert_rejected(model)


class KeywordFFN(CustomFFN):
    """Take further arguments, as many modules of transformers do."""

    def forward(self, x: Tensor, *_args: Any, scale: float = 1.0, **_kwargs: Any) -> Tensor:
        return scale * super().forward(x)


def test_further_arguments_do_not_hide_what_an_ffn_does() -> None:
    torch.manual_seed(0)
    model = PlainNet(KeywordFFN(lambda hidden: hidden * 2))
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0]))
    assert_rejected(model)


@pytest.mark.parametrize("score", ["inter", "up_abs"])
def test_scores_that_need_every_neuron_are_rejected(score: str) -> None:
    assert_rejected(net(score=score))
