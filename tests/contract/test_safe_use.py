"""A converted model wherever PyTorch models are used: a forward pass leaves nothing behind, and no backend gives another result, gradient or hook call than the masked one."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from transformers import LlamaConfig, LlamaForCausalLM

import emoe
from emoe.layer import routed_layers
from tests import tiny_models
from tests.plain_net import plain_net

Settings = dict[str, Any]
SETTINGS: dict[str, Settings] = {
    "plain": {},
    "learned": {"router": "cosine", "weighting": "softmax_times_k"},
    "own biases": {"output_bias": "per_expert"},
}
BACKENDS = ("masked", "sparse")
LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def net(backend: str = "auto", gated: bool = True, **settings: Any) -> nn.Module:
    """One gated FFN of 64 neurons and width 16, converted."""
    found = plain_net(16, 64, gated=gated)
    torch.manual_seed(0)
    emoe.convert_(found, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0], backend=backend, **settings))
    return found


def model(name: str, backend: str = "auto", **settings: Any) -> nn.Module:
    found = tiny_models.build(name)
    torch.manual_seed(0)
    emoe.convert_(found, emoe.EMoEConfig(num_experts=8, top_k=2, layers="all", backend=backend, **settings))
    return found.eval()


def inputs(rows: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


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
    wrong: list[object] = []

    def serve(place: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(60):
                    if not torch.equal(tiny_models.output(found, batches[place]), expected[place]):
                        wrong.append(place)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(place,)) for place in (0, 1)]
    with emoe.record_routing(found) as record:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
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
@pytest.mark.parametrize("settings", [{}, {"score_bias": True}, {"value_norm_weighted": True}, SETTINGS["learned"]])
def test_offloaded_weights_route_as_those_in_place(name: str, settings: Settings) -> None:
    found, values = model(name, **settings), tiny_models.inputs(name)
    with torch.no_grad():
        expected = tiny_models.output(found, values)
        accelerate.cpu_offload(found, execution_device=torch.device("cpu"))
        assert torch.equal(tiny_models.output(found, values), expected)
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


# tracing, exporting


SERVED: dict[str, Settings] = {**SETTINGS, "capacity": {"capacity_factor": 1.5}, "not top": {"selection": "not_top"}}


@pytest.mark.parametrize("settings", SERVED)
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs(settings: str, strict: bool) -> None:
    if strict and torch.__version__ < "2.9":
        pytest.skip("strict export of this torch refuses any change of a module's attributes while it traces")
    found, x = net(**SERVED[settings]), inputs()
    program = torch.export.export(found, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), found(x))
    torch.testing.assert_close(found(x), net("masked", **SERVED[settings])(x))


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "llama", "phi3", "t5"])
def test_traced_models(name: str) -> None:
    found, values = model(name), tiny_models.inputs(name)
    if hasattr(found, "config"):
        found.config.use_cache = False

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = found

        def forward(self, *tensors: Tensor) -> Tensor:
            return tiny_models.output(self.model, dict(zip(values, tensors, strict=True)))

    arguments = tuple(values.values())
    traced = torch.jit.trace(Wrapped().eval(), arguments, check_trace=False)
    torch.testing.assert_close(traced(*arguments), tiny_models.output(found, values))


@pytest.fixture
def runtime() -> Any:
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


# what dynamo exports is the program of test_exported_programs, which has all settings
@pytest.mark.parametrize(
    ("settings", "dynamo"), [*((name, False) for name in SERVED), ("learned", True), ("capacity", True)]
)
def test_onnx(settings: str, dynamo: bool, runtime: Any, tmp_path) -> None:
    found, x = net(**SERVED[settings]), inputs()
    torch.onnx.export(found, (x,), tmp_path / "model.onnx", dynamo=dynamo, input_names=["x"], verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (y,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), found(x), atol=1e-4, rtol=1e-4)


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


# what an outsider tried: code between the projections, other projections and activations, copies


class Block(nn.Module):
    """An FFN whose own code does something with its hidden neurons."""

    def __init__(self, between: Callable[[Tensor], Tensor | None], activation: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.act, self.outer = nn.Linear(16, 64), activation or nn.GELU(), nn.Linear(64, 16)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.inner(x))
        changed = self.between(h)
        return self.outer(h if changed is None else changed)


class Blocks(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def both(build: Callable[[], nn.Module], **settings: Any) -> list[nn.Module]:
    """The same network with both backends."""
    emoe.register_ffn("Blocks", emoe.FFNSpec("layers", "inner", "act", "outer"))
    found = []
    for backend in BACKENDS:
        torch.manual_seed(0)
        network = Blocks(build())
        config = {"num_experts": 8, "top_k": 2, "layers": "all", "partition": "contiguous", **settings}
        emoe.convert_(network, emoe.EMoEConfig(backend=backend, **config))
        found.append(network)
    return found


def trained(network: nn.Module) -> list[Tensor]:
    """Output and all gradients of a pass in training."""
    torch.manual_seed(1)
    x = inputs(40).requires_grad_()
    y = network.train()(x)
    (y.square().sum() + emoe.aux_loss(network)).backward()
    return [y.detach(), *(p.grad for p in (x, *network.parameters()) if p.grad is not None)]


def agree(networks: list[nn.Module]) -> None:
    masked, sparse = (trained(network) for network in networks)
    assert len(masked) == len(sparse)
    for first, second in zip(masked, sparse, strict=True):
        torch.testing.assert_close(second, first, atol=1e-4 * float(first.abs().max()) + 1e-6, rtol=1e-4)


LOOKS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "set in place": lambda h: h[..., :20].zero_() is None or None,
    "item": lambda h: h.__setitem__((..., slice(20)), 0.0),
    "clamp in place": lambda h: h.clamp_(max=0.1),
    "stack": lambda h: torch.stack([h, h]).sum(0),
    "list": lambda h: torch.cat([h, h * 2], dim=-1)[..., 64:] * 1,
    "reshape": lambda h: h.reshape(-1, 64),
    "dropout": lambda h: nn.functional.dropout(h, 0.5, True),
    "tensor hook": lambda h: h.register_hook(lambda grad: grad * 2) and None,
    "mean": lambda h: h.mean() and None,
}


@pytest.mark.parametrize("look", LOOKS)
def test_code_that_looks_at_neurons_sees_and_changes_them(look: str) -> None:
    networks = both(lambda: Block(LOOKS[look]), aux_loss_coefficient=0.1)
    agree(networks)
    assert float(emoe.aux_loss(networks[0])) == pytest.approx(float(emoe.aux_loss(networks[1])))


def test_a_gradient_that_would_be_lost_is_an_error() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, h: Tensor) -> Tensor:
            return h * 2

        @staticmethod
        def backward(_ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    _, sparse = both(lambda: Block(Twice.apply))
    with pytest.raises(
        RuntimeError, match=r"an autograd\.Function reads an FFN's hidden neurons .* emoe\.set_backend_"
    ):
        trained(sparse)
    agree(both(lambda: Block(Twice.apply))[:1] * 2)


@pytest.mark.parametrize(
    "activation",
    [
        lambda: nn.Softmax(-1),
        lambda: nn.Sequential(nn.GELU(), nn.Dropout(0.3)),
        lambda: nn.RReLU(),
        lambda: nn.Sequential(nn.ReLU(inplace=True)),
        lambda: nn.Sequential(nn.GELU(), nn.LayerNorm(64, elementwise_affine=False)),
    ],
)
def test_activations_that_are_not_known_to_be_elementwise(activation: Callable[[], nn.Module]) -> None:
    agree(both(lambda: Block(lambda h: None, activation())))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


def test_projections_that_do_more_than_their_weight_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        block = Block(lambda h: None)
        block.inner = Scaled(16, 64)
        return block

    agree(both(build))
    networks, linear = both(lambda: Block(lambda h: None)), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: linear(self, x) * 2)
    agree(networks)


def test_hooks_on_what_holds_a_part_of_the_ffn() -> None:
    """BERT's in-projection and activation stand in one module, its out-projection in another."""
    results = []
    for backend in BACKENDS:
        found, seen = model("bert", backend), []
        layer = found.encoder.layer[0]
        layer.intermediate.register_forward_hook(lambda _m, _a, h: h.__setitem__((..., slice(20)), 0.0))
        layer.output.register_full_backward_hook(lambda _m, grads, _g, seen=seen: seen.append(grads[0].abs().sum()))
        y = tiny_models.output(found, tiny_models.inputs("bert"))
        y.square().sum().backward()
        results.append((y.detach(), seen[0], layer.intermediate.dense.weight.grad))
    for masked, sparse in zip(*results, strict=True):
        torch.testing.assert_close(sparse, masked, atol=1e-5, rtol=1e-3)


def test_projections_replaced_by_their_copies_compute_with_their_own_weights() -> None:
    networks = both(lambda: Block(lambda h: None))
    for network in networks:
        for name in ("inner", "outer"):
            setattr(network.layers[0], name, copy.deepcopy(getattr(network.layers[0], name)))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.5)
    agree(networks)


@pytest.mark.parametrize("step", [{"fused": True}, {"foreach": True}])
def test_decoding_follows_optimisers_that_do_not_count_their_changes(step: dict[str, bool]) -> None:
    masked, sparse = both(lambda: Block(lambda h: None))
    x = inputs(1)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(sparse.eval()(x), masked.eval()(x), atol=1e-5, rtol=1e-4)
        for network in (masked, sparse):
            optimizer = torch.optim.AdamW(network.parameters(), lr=0.05, **step)
            network.eval()(inputs(8)).square().sum().backward()
            optimizer.step()
            network.zero_grad()


def test_decoding_follows_weights_written_behind_pytorchs_back() -> None:
    masked, sparse = both(lambda: Block(lambda h: None))
    x, changes = inputs(1), 0

    def merge(weight: Tensor) -> None:
        weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))

    for change in (
        lambda block: merge(block.outer.weight),  # as PEFT merges adapters
        lambda block: block.inner.weight.data.copy_(
            block.inner.weight.data * -1
        ),  # as an average of weights is swapped in
        lambda block: setattr(block.outer, "weight", nn.Parameter(torch.ones(16, 64))),
    ):
        with torch.no_grad():
            sparse(x)
            for network in (masked, sparse):
                network.eval()
                change(network.layers[0])
            torch.testing.assert_close(sparse(x), masked(x), atol=1e-4, rtol=1e-4)
        changes += 1
    assert changes == 3


def test_parts_can_be_copied_whatever_the_balance_loss() -> None:
    """PEFT copies the modules that it trains as a whole."""
    values = {**tiny_models.inputs("llama"), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    expected = None
    for whole in (False, True):
        found = model("llama", aux_loss_coefficient=0.1, capacity_factor=1.0)
        if whole:
            found = get_peft_model(
                found, LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"], lora_dropout=0.0)
            )
        found.eval()
        y, loss = tiny_models.output(found.base_model.model if whole else found, values), float(emoe.aux_loss(found))
        with emoe.record_routing(found.base_model.model if whole else found) as record:
            tiny_models.output(found.base_model.model if whole else found, values)
        assert record.layers[0].tokens == 33
        copy.deepcopy(found)
        expected = expected or (y, loss)
        torch.testing.assert_close(y, expected[0])
        assert loss == pytest.approx(expected[1])


def test_other_peoples_classes_stay_and_ours_goes() -> None:
    found = plain_net(16, 64)
    config = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0])
    emoe.convert_(found, config)
    nn.utils.parametrizations.weight_norm(found.layers[0].outer)
    expected = found(inputs())
    emoe.to_dense_(found)
    dense = found(inputs())
    assert not torch.allclose(dense, expected)
    nn.utils.parametrize.remove_parametrizations(found.layers[0].outer, "weight")
    torch.testing.assert_close(found(inputs()), dense)
    emoe.convert_(found, config)
    found(inputs())


def test_dynamic_shapes_compile() -> None:
    torch.compiler.reset()
    found = net(aux_loss_coefficient=0.1).train()
    compiled = torch.compile(found, backend="eager", dynamic=True)
    torch.testing.assert_close(compiled(inputs(7)), found(inputs(7)))


def test_batched_gradients() -> None:
    masked, sparse = (
        torch.autograd.functional.jacobian(net(backend), inputs(3), vectorize=True) for backend in BACKENDS
    )
    torch.testing.assert_close(sparse, masked, atol=1e-4, rtol=1e-4)


def test_inputs_of_other_tensor_classes() -> None:
    class Tagged(Tensor):
        pass

    for settings in SETTINGS.values():
        found = net(**settings)
        torch.testing.assert_close(found(inputs().as_subclass(Tagged)).as_subclass(Tensor), found(inputs()))


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_checkpoint_loads_with_a_layer_on_disk_or_says_why_not(settings: str, tmp_path) -> None:
    torch.manual_seed(0)
    found = LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=64, **LLAMA)).eval()
    emoe.convert_(found, emoe.EMoEConfig(num_experts=8, top_k=2, layers="all", **SETTINGS[settings]))
    emoe.save_pretrained(found, tmp_path / "model")
    places: dict[str, Any] = {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb", "layers.0")}
    options = {
        "device_map": {**places, "lm_head": "cpu", "model.layers.1": "disk"},
        "offload_folder": tmp_path / "disk",
    }
    if settings == "learned":
        with pytest.raises(
            emoe.CheckpointError, match=r"the device_map offloads model\.layers\.1, whose experts have a router"
        ):
            emoe.from_pretrained(LlamaForCausalLM, tmp_path / "model", **options)
        return
    if settings == "own biases":
        return  # Llama's out-projection has none
    loaded = emoe.from_pretrained(LlamaForCausalLM, tmp_path / "model", **options)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, found(ids).logits)


def test_a_layer_that_several_specs_fit_is_one_ffn() -> None:
    found = plain_net(16, 64, gated=True)  # fits both rows of its class
    report = emoe.convert_(found, emoe.EMoEConfig(num_experts=8, top_k=2, layers="all"))
    assert report.total_layers == 1
