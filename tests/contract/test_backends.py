"""The sparse backend gives what the masked one gives: outputs, gradients, records, for every architecture and variant."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import emoe
from benchmarks.speed.layer import kept_bytes
from emoe.sparse import grouped, kernels, path
from emoe.sparse.build import compiled_kernels
from emoe.sparse.cost_model import predicted_time_ratio
from emoe.sparse.ffn import sparse_ffn
from emoe.sparse.kernels import expert_sums, gather_mm, outer_mm, pairs_of, scatter_mm
from tests import tiny_models
from tests.plain_net import plain_net

MASKED = emoe.EMoEConfig(num_experts=8, top_k=2, layers="all", backend="masked")
CONFIGS: dict[str, emoe.EMoEConfig | emoe.GMoEConfig] = {
    "emoe": MASKED,
    "not_top": dataclasses.replace(MASKED, selection="not_top"),
    "learned": dataclasses.replace(MASKED, router="cosine", weighting="softmax_times_k", aux_loss_coefficient=0.1),
    "published": emoe.EMoEConfig.as_published(
        "tutel", num_experts=8, top_k=2, layers="all", expert_dropout=0.0, backend="masked"
    ),
    "gmoe": emoe.GMoEConfig(num_experts=4, top_k=2, layers="all", backend="masked"),
    "gate": dataclasses.replace(MASKED, score="gate", weighting="softmax_times_k"),
    "up": dataclasses.replace(MASKED, score="up", weighting="softmax_times_k"),
}

IMPLEMENTATIONS = ["compiled", "grouped", "pytorch"]


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path, "_told", set())


def use(implementation: str, patch: pytest.MonkeyPatch) -> None:
    """Take one implementation of the products, whatever the device."""
    if implementation == "compiled" and compiled_kernels() is None:
        pytest.skip("no compiler on this machine")
    if implementation != "compiled":
        patch.setattr(kernels, "compiled_kernels", lambda: None)
    if implementation == "grouped":
        if not hasattr(nn.functional, "grouped_mm"):
            pytest.skip("this torch has no grouped_mm")
        patch.setattr(grouped, "is_usable", lambda x: x.dtype != torch.float64 and not x.shape[-1] % 8)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch; the tests have one."""
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use(request.param, monkeypatch)
    return request.param


def pair(name: str, config: emoe.EMoEConfig | emoe.GMoEConfig) -> tuple[nn.Module, nn.Module]:
    """The same converted model with both backends."""
    models = []
    for backend in ("masked", "sparse"):
        model = tiny_models.build(name)
        torch.manual_seed(0)
        emoe.convert_(model, dataclasses.replace(config, backend=backend))
        models.append(model)
    return models[0], models[1]


def results(model: nn.Module, values: dict[str, Tensor], **context) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    model.zero_grad()
    y = tiny_models.output(model, values)
    loss = (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + emoe.aux_loss(model)
    loss.backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def agree(first, second, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(second[0], first[0], atol=tolerance, rtol=tolerance)
    assert first[1].keys() == second[1].keys()
    # some gradients are zero but for rounding (a bias that softmax ignores), so all are held to the largest
    scale = max(float(grad.abs().max()) for grad in first[1].values())
    for name, grad in first[1].items():
        torch.testing.assert_close(second[1][name], grad, atol=1e-5 * scale, rtol=1e-3, msg=name)


def takes_sparse_path(model: nn.Module, values: dict[str, Tensor]) -> bool:
    with mock.patch.object(path, "sparse_ffn", side_effect=sparse_ffn) as spy:
        tiny_models.output(model, values)
    return spy.called


@pytest.mark.parametrize("name", sorted(tiny_models.BUILDERS))
def test_every_architecture(name: str) -> None:
    values = tiny_models.inputs(name)
    masked, sparse = pair(name, MASKED)
    for training in (False, True):
        agree(results(masked.train(training), values), results(sparse.train(training), values))
    assert takes_sparse_path(sparse.eval(), values) != name.startswith("Transformer")  # their activation is a function


# each kind with each architecture and each implementation, and each of these with the other
VARIANTS = [
    (name, kind, IMPLEMENTATIONS[(row + column) % 3])
    for row, kind in enumerate(CONFIGS)
    for column, name in enumerate(["bert", "llama", "phi3", "gpt2"])
    if kind != "up" or name in ("llama", "phi3")  # the others have no up-projection
]


@pytest.mark.parametrize(
    ("name", "kind", "implementation"), [*VARIANTS, ("llama", "up", "compiled")], indirect=["implementation"]
)
def test_every_variant(name: str, kind: str, implementation: str) -> None:
    values = tiny_models.inputs(name)
    values["attention_mask"] = (torch.arange(11) < torch.tensor([[11], [7], [4]])).long()
    masked, sparse = (model.train() for model in pair(name, CONFIGS[kind]))
    agree(results(masked, values), results(sparse, values))
    assert takes_sparse_path(sparse, values)
    with emoe.record_routing(masked) as one, emoe.record_routing(sparse) as other:
        for model in (masked, sparse):
            torch.manual_seed(2)
            tiny_models.output(model, values)
    assert all(torch.equal(one.layers[i].loads, other.layers[i].loads) for i in one.layers)


def test_the_state_is_the_dense_models_and_folds_back(tmp_path) -> None:
    values = tiny_models.inputs("bert")
    dense = tiny_models.build("bert")
    _, sparse = pair("bert", MASKED)
    assert sparse.state_dict().keys() == dense.state_dict().keys()
    expected = tiny_models.output(sparse, values)
    twin = copy.deepcopy(sparse)
    emoe.save_pretrained(sparse, tmp_path)
    for model in (twin, emoe.from_pretrained(type(dense), tmp_path)):
        torch.testing.assert_close(tiny_models.output(model, values), expected)
        assert takes_sparse_path(model, values)
    emoe.to_dense_(sparse, restore_order=True)
    torch.testing.assert_close(tiny_models.output(sparse, values), tiny_models.output(dense, values))
    assert {type(module) for module in sparse.modules()} == {type(module) for module in dense.modules()}


def test_adapters_and_dropout_take_the_masked_path_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    values = tiny_models.inputs("bert")
    outputs = []
    for model in pair("bert", MASKED):
        torch.manual_seed(1)
        adapted = get_peft_model(
            model, LoraConfig(target_modules=["intermediate.dense"], init_lora_weights=False)
        ).eval()
        with caplog.at_level(logging.WARNING):
            outputs += [tiny_models.output(adapted, values) for _ in range(2)]
    torch.testing.assert_close(outputs[0], outputs[2])
    told = [record.message for record in caplog.records if "takes the masked path" in record.message]
    assert told == ["emoe: encoder.layer.0 takes the masked path: a projection carries an adapter or was replaced"]
    merged = adapted.merge_and_unload()
    assert takes_sparse_path(merged, values)
    _, dropping = pair("bert", dataclasses.replace(MASKED, expert_dropout=0.5))
    assert not takes_sparse_path(dropping.train(), values)
    assert takes_sparse_path(dropping.eval(), values)


def test_hooks_see_hidden_neurons() -> None:
    values, seen = tiny_models.inputs("bert"), []
    _, sparse = pair("bert", MASKED)
    layer = sparse.encoder.layer[0]
    for module in (layer.intermediate.dense, layer.intermediate.intermediate_act_fn):
        hook = module.register_forward_hook(lambda m, args, y: seen.append(y))
        tiny_models.output(sparse, values)
        hook.remove()
    hook = layer.output.dense.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    tiny_models.output(sparse, values)
    hook.remove()
    assert [y.shape[-1] for y in seen] == [layer.intermediate.dense.out_features] * 3
    assert takes_sparse_path(sparse, values)


@pytest.mark.parametrize("whole", [False, True])
def test_bf16(whole: bool, implementation: str) -> None:
    values = tiny_models.inputs("llama")
    masked, sparse = pair("llama", MASKED)
    reference = tiny_models.output(masked, values)
    errors = []
    for model in (masked, sparse):
        if whole:
            y, grads = results(model.bfloat16(), values)
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y, grads = results(model, values)
        assert all(torch.isfinite(grad).all() for grad in grads.values())
        errors.append(float((y.float() - reference).abs().mean()))
    assert errors[1] < 1.2 * errors[0] + 1e-4


def test_a_compiled_model_takes_the_masked_path_in_one_graph() -> None:
    torch.compiler.reset()
    values = tiny_models.inputs("bert")
    _, sparse = pair("bert", MASKED)
    sparse.encoder.layer = sparse.encoder.layer[:1]  # each takes a second to compile
    expected = tiny_models.output(sparse.eval(), values)
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(tiny_models.output(compiled, values), expected)


def test_auto_takes_the_path_that_is_expected_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def takes_sparse(tokens: int, dtype: torch.dtype = torch.float32, **config) -> bool:
        net = plain_net(64, 1536).to(dtype)
        emoe.convert_(net, emoe.EMoEConfig(layers=[0], partition="random", **config))
        with mock.patch.object(path, "sparse_ffn", side_effect=sparse_ffn) as spy:
            net(torch.randn(tokens, 64, dtype=dtype))
        return spy.called

    monkeypatch.setattr(path, "compiled_kernels", object)
    assert takes_sparse(2000, num_experts=16, top_k=4)
    assert not takes_sparse(2000, num_experts=16, top_k=16)
    assert not takes_sparse(2, num_experts=16, top_k=4)
    assert not takes_sparse(2000, num_experts=256, top_k=128)
    assert not takes_sparse(2000, num_experts=16, top_k=4, backend="masked")
    assert not takes_sparse(2000, num_experts=16, top_k=4, score="inter")
    assert not takes_sparse(2000, dtype=torch.float16, num_experts=16, top_k=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not takes_sparse(2000, num_experts=64, top_k=32)  # pays in float32 only
    assert takes_sparse(2000, num_experts=64, top_k=32)
    # without a compiler experts run one after the other, which a second thread does not help
    monkeypatch.setattr(path, "compiled_kernels", lambda: None)
    assert takes_sparse(2000, num_experts=64, top_k=32)
    with threads(2):
        assert not takes_sparse(2000, num_experts=64, top_k=32)
        assert takes_sparse(2000, num_experts=16, top_k=4)


def test_the_expected_time_grows_with_what_costs_time() -> None:
    usual = {"tokens": 1024, "hidden": 768, "expert_size": 48, "active": 0.25, "dtype": torch.float32, "threads": 1}

    def share(**changes) -> float:
        found = predicted_time_ratio(**{**usual, **changes})
        assert found is not None
        return found

    assert 0.25 < share() < 0.4
    assert share(active=0.5) > share()
    assert share(expert_size=12) > share()
    assert share(tokens=16) > share(tokens=128) > share()
    assert share(threads=4) > share()
    assert share(dtype=torch.bfloat16) > share()
    assert share(compiled=False) > share()
    assert share(compiled=False, threads=2) > share(threads=2)


def test_gradient_checkpointing() -> None:
    values, found = tiny_models.inputs("llama"), []
    for checkpointing in (False, True):
        _, sparse = pair("llama", MASKED)
        if checkpointing:
            sparse.train().gradient_checkpointing_enable({"use_reentrant": False})
        found.append(results(sparse, values))
    agree(*found)


def check_products(tokens: int, n: int, s: int, h: int, seed: int) -> None:
    """Each product against einsum, with weights by neuron, as they lie in an out-projection, and with gaps between all numbers."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tokens, n, generator=generator) < 0.4
    x, w = (torch.randn(size, generator=generator) for size in ((tokens, h), (n, s, h)))
    b = torch.randn(n, s, generator=generator)
    pairs = pairs_of(mask, x)
    a = torch.randn(len(pairs.rows), s, generator=generator)
    dense = torch.zeros(tokens, n, s)
    dense[pairs.rows, pairs.experts] = a
    close = functools.partial(torch.testing.assert_close, atol=3e-5 * max(s, h, tokens) ** 0.5, rtol=1e-5)
    full = torch.einsum("th,nsh->tns", x, w)
    outer = torch.einsum("tns,th->nsh", dense, x)
    across = w.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    gaps = torch.zeros(n, s, 2 * h)[..., ::2].copy_(w)
    for laid in (w, across, gaps):
        close(gather_mm(x, laid, b, pairs), (full + b)[pairs.rows, pairs.experts])
        close(gather_mm(x, laid, None, pairs), full[pairs.rows, pairs.experts])
        close(scatter_mm(a, laid, pairs), torch.einsum("tns,nsh->th", dense, w))
        found = outer_mm(a, x, pairs, laid)
        assert found.stride() == laid.stride()
        close(found, outer)
    close(expert_sums(a, pairs, n), dense.sum(0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=30, deadline=None)
@given(st.tuples(st.integers(0, 40), st.integers(1, 6), st.integers(1, 5), st.integers(1, 7), st.integers(0, 999)))
def test_products_of_random_pairs(implementation: str, shape) -> None:
    tokens, n, s, h, seed = shape
    with pytest.MonkeyPatch.context() as patch:
        use(implementation, patch)
        check_products(tokens, n, s, 8 * h if implementation == "grouped" else h, seed)


@pytest.mark.parametrize(
    "shape",
    [(700, 2, 24, 40), (300, 3, 48, 300), (150, 2, 88, 520), (900, 1, 33, 8), (60, 5, 16, 1100), (4200, 2, 12, 20)],
    ids=str,
)
def test_products_of_many_pairs(implementation: str, shape: tuple[int, int, int, int]) -> None:
    """More than fit into one block, panel or tile of the compiled ones, and less."""
    check_products(*shape, seed=0)
    with threads(2):
        check_products(*shape, seed=0)


def test_gradients_are_right_in_double_precision(implementation: str) -> None:
    torch.manual_seed(0)
    mask = torch.rand(9, 4) < 0.5
    tensors = [
        torch.randn(size, dtype=torch.float64) for size in ((9, 3), (4, 2, 3), (4, 2), (4, 2, 3), (4, 2, 3), (9, 4))
    ]

    def function(x, w, b, up, values, weights):
        return sparse_ffn(x, [(w, b), (up, None)], values, nn.functional.silu, mask, weights)

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in tensors])


def test_less_is_kept_for_the_backward_pass() -> None:
    """At half of the experts at most 0.35 of what the dense FFN keeps."""
    dense, sparse = plain_net(64, 256), plain_net(64, 256)
    emoe.convert_(sparse, emoe.EMoEConfig(num_experts=8, top_k=4, layers=[0], backend="sparse"))
    x = torch.randn(2048, 64, requires_grad=True)
    assert kept_bytes(sparse, lambda: sparse(x)) <= 0.35 * kept_bytes(dense, lambda: dense(x))
