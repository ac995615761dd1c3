"""``set_backend_`` replaces modules and nothing else, and rejects what the sparse backend cannot compute."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

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
    masked, sparse = (net(backend, **converted.SETTINGS[settings]) for backend in converted.BACKENDS)
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    actual = {key.removeprefix("_orig_mod."): tensor for key, tensor in step(compiled, inputs()).items()}
    assert_same(actual, step(masked, inputs()))
    exported = torch.export.export(sparse, (inputs(),)).module()
    traced = torch.jit.trace(sparse, (inputs(),), check_trace=False)
    for function in (exported, traced):
        torch.testing.assert_close(function(inputs(seed=1)), masked(inputs(seed=1)), atol=1e-4, rtol=1e-4)


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


# ---------------------------------------------------------------- rejections


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def add_hook(path: str, kind: str) -> Callable[[PlainNet], object]:
    return lambda model: getattr(model.layers[0].get_submodule(path), f"register_{kind}_hook")(lambda *_: None)


def offload(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def shard_weights(model: PlainNet) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    weight = distribute_tensor(model.layers[0].outer.weight.detach(), init_device_mesh("cpu", (1,)), [Replicate()])
    model.layers[0].outer.weight = nn.Parameter(weight)


def quantize(model: nn.Module) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


Change = Callable[[PlainNet], object]
HOOKS: dict[str, Change] = {
    "hook on in": add_hook("inner", "forward_pre"),
    "hook on up": add_hook("up", "forward"),
    "hook on out": add_hook("outer", "full_backward"),
    "hook on activation": add_hook("act", "full_backward_pre"),
    "offloaded": offload,
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
    "quantized": quantize,
    "second derivative": lambda model: None,
}


def assert_rejected(model: PlainNet, message: str) -> None:
    before, expected = types(model), model(inputs())
    with pytest.raises(emoe.ConversionError, match=message) as error:
        emoe.set_backend_(model, "sparse")
    assert "\n" not in str(error.value)
    assert types(model) == before  # unchanged, and still usable
    emoe.set_backend_(model, "masked")
    assert torch.equal(model(inputs()), expected)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("case", BEFORE)
def test_set_backend_rejects(case: str) -> None:
    model = net()
    BEFORE[case](model)
    assert_rejected(model, r"layers\.0")


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

    def __init__(self, between: Callable[[Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__(16, 64)
        self.between = between
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.between(self.act(self.inner(x))))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


CUSTOM: dict[str, Callable[[], FFN]] = {
    "clamp": lambda: CustomFFN(lambda hidden: hidden.clamp(max=0.1)),
    "norm": lambda: CustomFFN(lambda hidden: nn.functional.layer_norm(hidden, (64,))),
    "order": lambda: CustomFFN(lambda hidden: hidden.roll(1, -1)),
    "linear subclass": lambda: CustomFFN(nn.Identity(), inner=Scaled(16, 64)),
    "activation across neurons": lambda: CustomFFN(nn.Identity(), act=nn.Softmax(-1)),
    "activation in place": lambda: CustomFFN(nn.Identity(), act=nn.ReLU(inplace=True)),
}


@pytest.mark.parametrize("case", CUSTOM)
def test_an_ffn_that_does_more_than_its_row_says_is_rejected(case: str) -> None:
    torch.manual_seed(0)
    model = PlainNet(CUSTOM[case]())
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0]))
    assert_rejected(model, r"layers\.0")


@pytest.mark.parametrize("score", ["inter", "up_abs"])
def test_scores_that_need_every_neuron_are_rejected(score: str) -> None:
    assert_rejected(net(score=score), r"layers\.0")


def test_other_backends_are_errors() -> None:
    with pytest.raises(emoe.ConfigError, match="'sparse'"):
        emoe.set_backend_(net(), "spares")


@pytest.mark.parametrize("selection", ["top", "random"])
def test_it_draws_no_random_numbers(selection: str) -> None:
    model = converted.model("llama", selection=selection)
    state = torch.get_rng_state()
    emoe.set_backend_(model, "sparse")
    assert torch.equal(torch.get_rng_state(), state)
