"""Converted models among other people's code: between the projections, in place of them, and around the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import emoe
from tests import tiny_models
from tests.converted import BACKENDS, LLAMA, SETTINGS, inputs, model, net
from tests.plain_net import plain_net


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
