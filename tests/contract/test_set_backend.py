"""``set_backend_`` replaces modules and nothing else, and rejects what the sparse backend cannot compute."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import emoe
from emoe.layer import routed_layers
from tests import converted, tiny_models
from tests.converted import assert_same, inputs, net, step
from tests.plain_net import FFN, PlainNet

pytestmark = pytest.mark.usefixtures("always_sparse")
NAMES = ["bert", "gpt2", "llama", "phi3", "t5", "VisionTransformer", "TransformerEncoder"]


def types(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("name", NAMES)
def test_names_parameters_and_state_stay(name: str) -> None:
    masked, model, values = converted.model(name), converted.model(name), tiny_models.inputs(name)
    parameters, keys = list(model.named_parameters()), list(model.state_dict())
    expected = step(masked, values)
    for backend in ("sparse", "sparse", "masked", "sparse", "masked"):
        emoe.set_backend_(model, backend)
        for (before, first), (after, second) in zip(parameters, model.named_parameters(), strict=True):
            assert (before, id(first)) == (after, id(second))
        assert list(model.state_dict()) == keys
        assert all(layer.backend == backend for layer in routed_layers(model))
        assert (types(model) == types(masked)) == (backend == "masked")
        assert_same(step(model, values), expected)
    emoe.set_backend_(model.train(), "sparse")
    emoe.set_backend_(model.eval(), "masked")
    assert not any(module.training for module in model.modules())


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("backend", converted.BACKENDS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_copies_are_models_with_their_own_weights(name: str, backend: str, way: str) -> None:
    settings = {"output_bias": "per_expert", "aux_loss_coefficient": 0.1}
    model, values = converted.model(name, backend, **settings), tiny_models.inputs(name)
    expected = step(model, values)
    twin = COPIES[way](model)
    assert types(twin) == types(model)
    assert emoe.aux_loss(twin) == 0.0
    assert_same(step(twin, values), expected)
    emoe.set_backend_(twin, "masked")
    assert_same(step(twin, values), expected)
    with torch.no_grad():
        routed_layers(twin)[0].ffn.proj_in.weight.zero_()
    assert_same(step(model, values), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_sparse_model_is_saved_and_folded_back(name: str, tmp_path: Path) -> None:
    model, dense, values = converted.model(name, "sparse"), tiny_models.build(name), tiny_models.inputs(name)
    expected = tiny_models.output(model, values)
    emoe.save_pretrained(model, tmp_path)
    again = emoe.from_pretrained(tiny_models.loader(name), tmp_path, **tiny_models.load_options(name))
    assert {layer.backend for layer in routed_layers(again)} == {"masked"}
    torch.testing.assert_close(tiny_models.output(again, values), expected, atol=1e-4, rtol=1e-4)
    emoe.to_dense_(model, restore_order=True)
    assert types(model) == types(dense)
    assert torch.equal(tiny_models.output(model, values), tiny_models.output(dense, values))


@pytest.mark.parametrize("settings", converted.SETTINGS)
def test_compiled_exported_and_traced_models_give_the_masked_result(settings: str) -> None:
    torch.compiler.reset()
    model, x = net("sparse", **converted.SETTINGS[settings]), inputs()
    expected = step(net("masked", **converted.SETTINGS[settings]), x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same({key.removeprefix("_orig_mod."): grad for key, grad in step(compiled, x).items()}, expected)
    exported = torch.export.export(model, (x,)).module()
    traced = torch.jit.trace(model, (x,), check_trace=False)
    for function in (exported, traced):
        torch.testing.assert_close(function(inputs(5, seed=1)), model(inputs(5, seed=1)), atol=1e-4, rtol=1e-4)


def test_other_settings_apply_to_a_sparse_model() -> None:
    masked, sparse = (net(backend, aux_loss_coefficient=0.1, expert_dropout=0.3) for backend in converted.BACKENDS)
    for model in (masked, sparse):
        emoe.set_top_k_(model, 3)
        with emoe.record_routing(model) as record:
            model(inputs())
        assert record.layers[0].experts_per_token == 3
    assert float(emoe.aux_loss(sparse)) == pytest.approx(float(emoe.aux_loss(masked)))
    assert_same(step(sparse.train(), inputs()), step(masked.train(), inputs()))


def test_lora_on_attention_trains_beside_sparse_ffns() -> None:
    results = []
    for backend in converted.BACKENDS:
        base = converted.model("llama", backend)
        torch.manual_seed(1)
        adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
        results.append(step(adapted, tiny_models.inputs("llama")))
        assert all("lora_" in name for name in results[-1] if name != "output")
    assert_same(results[1], results[0])


def test_peft_refuses_lora_on_a_sparse_projection() -> None:
    for target in ("gate_proj", "up_proj", "down_proj"):
        with pytest.raises(ValueError, match="not supported"):
            get_peft_model(converted.model("llama", "sparse"), LoraConfig(target_modules=[target]))


# ---------------------------------------------------------------- rejections


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def add_hook(path: str, kind: str = "forward") -> Callable[[PlainNet], object]:
    return lambda model: getattr(model.layers[0].get_submodule(path), f"register_{kind}_hook")(lambda *_: None)


def offload(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def shard_projection(model: PlainNet) -> None:
    fully_shard(model.layers[0].outer, mesh=init_device_mesh("cpu", (1,)))


def shard_weights(model: PlainNet) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    weight = distribute_tensor(model.layers[0].outer.weight.detach(), init_device_mesh("cpu", (1,)), [Replicate()])
    model.layers[0].outer.weight = nn.Parameter(weight)


def quantize(model: nn.Module) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def add_lora(model: PlainNet) -> None:
    get_peft_model(model, LoraConfig(target_modules=["up"]))


def parametrize(model: PlainNet) -> None:
    nn.utils.parametrizations.weight_norm(model.layers[0].outer)


BEFORE: dict[str, tuple[dict[str, Any], Callable[[PlainNet], object]]] = {
    "score inter": ({"score": "inter"}, lambda model: None),
    "score up_abs": ({"score": "up_abs"}, lambda model: None),
    "hook on in": ({}, add_hook("inner")),
    "hook on up": ({}, add_hook("up", "forward_pre")),
    "hook on out": ({}, add_hook("outer", "full_backward")),
    "hook on activation": ({}, add_hook("act")),
    "adapter": ({}, add_lora),
    "offloaded": ({}, offload),
    "sharded": ({}, shard_projection),
    "parametrized": ({}, parametrize),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("case", BEFORE)
def test_set_backend_rejects(case: str) -> None:
    settings, change = BEFORE[case]
    model = net(**settings)
    change(model)
    before = types(model)
    with pytest.raises(emoe.ConversionError) as error:
        emoe.set_backend_(model, "sparse")
    assert "\n" not in str(error.value)
    assert "layers.0" in str(error.value)
    assert types(model) == before  # unchanged, and still usable
    emoe.set_backend_(model, "masked")
    assert model(inputs()).shape == (5, 16)


AFTER: dict[str, Callable[[PlainNet], object]] = {
    "hook on in": add_hook("inner", "forward_pre"),
    "hook on up": add_hook("up"),
    "hook on out": add_hook("outer"),
    "hook on activation": add_hook("act", "full_backward_pre"),
    "offloaded": offload,
    "sharded weight": shard_weights,
    "quantized": quantize,
    "second derivative": lambda model: None,
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("case", AFTER)
def test_a_forward_pass_rejects(case: str) -> None:
    model, x = net("sparse"), inputs().requires_grad_()
    AFTER[case](model)
    with pytest.raises(RuntimeError, match=r"emoe\.set_backend_\(model, 'masked'\)") as error:
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    assert "\n" not in str(error.value)
    emoe.set_backend_(model, "masked")


class CustomFFN(FFN):
    """An FFN whose code does more between its projections than its row says."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__(16, 64)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.between(self.act(self.inner(x))))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


def replaced(name: str, module: nn.Module) -> FFN:
    ffn = FFN(16, 64)
    setattr(ffn, name, module)
    return ffn


CUSTOM: dict[str, Callable[[], FFN]] = {
    "clamp": lambda: CustomFFN(lambda hidden: hidden.clamp(max=0.1)),
    "norm": lambda: CustomFFN(lambda hidden: nn.functional.layer_norm(hidden, (64,))),
    "order": lambda: CustomFFN(lambda hidden: hidden.roll(1, -1)),
    "linear subclass": lambda: replaced("inner", Scaled(16, 64)),
    "activation across neurons": lambda: replaced("act", nn.Softmax(-1)),
    "activation in place": lambda: replaced("act", nn.ReLU(inplace=True)),
}


@pytest.mark.parametrize("case", CUSTOM)
def test_an_ffn_that_does_more_than_its_row_says_is_rejected(case: str) -> None:
    torch.manual_seed(0)
    model = PlainNet(CUSTOM[case]())
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0]))
    expected, before = model(inputs()), types(model)
    with pytest.raises(emoe.ConversionError, match=r"layers\.0"):
        emoe.set_backend_(model, "sparse")
    assert types(model) == before
    assert torch.equal(model(inputs()), expected)


def test_other_calls_of_set_backend_are_errors() -> None:
    with pytest.raises(emoe.ConversionError, match="convert"):
        emoe.set_backend_(tiny_models.build("bert"), "sparse")
    with pytest.raises(emoe.EMoEError, match="'sparse'"):
        emoe.set_backend_(converted.model("bert"), "spares")


@pytest.mark.parametrize("selection", ["top", "random"])
def test_it_draws_no_random_numbers(selection: str) -> None:
    model = converted.model("llama", selection=selection)
    state = torch.get_rng_state()
    emoe.set_backend_(model, "sparse")
    assert torch.equal(torch.get_rng_state(), state)
