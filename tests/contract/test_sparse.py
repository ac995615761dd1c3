"""The sparse backend gives the masked results: outputs, gradients and records of every architecture and variant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import emoe
from emoe.compiled.build import compiled_kernels
from emoe.layer import routed_layers
from emoe.sparse import constants, cost_model, ffn, kernels, module, operators
from emoe.sparse.ffn import sparse_ffn
from tests import converted, tiny_models
from tests.converted import assert_same, step, without_dropout
from tests.plain_net import plain_net

IMPLEMENTATIONS = ["compiled", "grouped", "pytorch"]
pytestmark = pytest.mark.usefixtures("always_sparse")


def use(implementation: str, patch: pytest.MonkeyPatch) -> None:
    """Choose an implementation of the products on any device."""
    if implementation == "compiled" and compiled_kernels() is None:
        pytest.skip("no compiler on this machine")
    if implementation != "compiled":
        patch.setattr(kernels, "compiled_kernels", lambda: None)
        patch.setattr(constants, "compiled_kernels", lambda: None)
    if implementation == "grouped":
        if not hasattr(nn.functional, "grouped_mm"):
            pytest.skip("this torch has no grouped_mm")
        patch.setattr(
            kernels, "can_group", lambda x: x.dtype != torch.float64 and not x.shape[-1] % 8
        )


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use(request.param, monkeypatch)
    return request.param


@pytest.fixture
def sparse_calls() -> Iterator[mock.Mock]:
    """Count the FFNs that are computed sparsely."""
    with mock.patch.object(ffn, "sparse_ffn", side_effect=sparse_ffn) as spy:
        yield spy


@pytest.mark.parametrize("name", sorted(tiny_models.BUILDERS))
def test_every_architecture(name: str, sparse_calls: mock.Mock) -> None:
    values = tiny_models.inputs(name)
    masked, sparse = (converted.model(name, backend) for backend in converted.BACKENDS)
    assert_same(step(sparse, values), step(masked, values))
    # with dropout on hidden neurons the sparse FFN computes the masked products, with the same random numbers
    assert_same(step(sparse.train(), values), step(masked.train(), values))
    masked, sparse = without_dropout(masked), without_dropout(converted.model(name))
    emoe.set_backend_(sparse, "sparse")
    sparse_calls.reset_mock()
    assert_same(step(sparse, values), step(masked, values))
    assert sparse_calls.call_count == len(routed_layers(sparse))


# every variant with one kind of FFN at least three times, with the implementations in turn
CASES = [
    (name, variant, IMPLEMENTATIONS[(row + column) % 3])
    for row, variant in enumerate(converted.VARIANTS)
    for column, name in enumerate(["bert", "llama", "phi3", "gpt2"])
    if variant != "up" or name in ("llama", "phi3")  # the others have no up-projection
]


@pytest.mark.parametrize(("name", "variant", "implementation"), CASES, indirect=["implementation"])
def test_every_variant(name: str, variant: str, implementation: str) -> None:
    values = tiny_models.inputs(name)
    values["attention_mask"] = (torch.arange(11) < torch.tensor([[11], [7], [4]])).long()
    masked, sparse = (
        converted.model(name, backend, converted.VARIANTS[variant]).train()
        for backend in converted.BACKENDS
    )
    with emoe.record_routing(masked) as expected, emoe.record_routing(sparse) as record:
        assert_same(step(sparse, values), step(masked, values))
        for model in (masked, sparse):
            emoe.update_gates_(model)
        assert_same(step(sparse, values), step(masked, values))
    for number, layer in expected.layers.items():
        assert torch.equal(record.layers[number].loads, layer.loads)
        assert (record.layers[number].tokens, record.layers[number].drop_rate) == (
            layer.tokens,
            layer.drop_rate,
        )


def assert_sparse_is_masked(
    tokens: int, experts: int, size: int, hidden: int, seed: int, dtype: torch.dtype
) -> None:
    networks = [
        plain_net(hidden, experts * size, gated=seed % 3 == 0, seed=seed).to(dtype)
        for _ in range(2)
    ]
    chosen = {
        "num_experts": experts,
        "top_k": 1 + seed % experts,
        "layers": [0],
        "partition": "contiguous",
    }
    for network in networks:
        emoe.convert_(network, emoe.EMoEConfig(**chosen, weighting=("binary", "softmax")[seed % 2]))
    emoe.set_backend_(networks[0], "sparse")
    x = (
        torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)
        / hidden**0.5
    )
    assert_same(*(step(network, x) for network in networks))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(
    st.tuples(
        st.integers(1, 40),
        st.integers(1, 6),
        st.integers(1, 5),
        st.integers(1, 7),
        st.integers(0, 999),
    )
)
def test_ffns_of_any_shape(implementation: str, shape: tuple[int, int, int, int, int]) -> None:
    tokens, experts, size, hidden, seed = shape
    with pytest.MonkeyPatch.context() as patch:
        use(implementation, patch)
        patch.setattr("emoe.sparse.module.pays_off", lambda *_args, **_options: True)
        hidden = 8 * hidden if implementation == "grouped" else hidden
        for dtype in (torch.float32, torch.float64):
            assert_sparse_is_masked(tokens, experts, size, hidden, seed, dtype)


LARGE = [
    (700, 2, 24, 40),
    (300, 3, 48, 300),
    (150, 2, 88, 520),
    (900, 1, 33, 8),
    (60, 5, 16, 1100),
    (4200, 2, 12, 20),
]


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("threads", [1, 2])
def test_pairs_that_fill_more_than_a_tile_of_the_compiled_products(
    threads: int, shape: Any
) -> None:
    torch.set_num_threads(threads)
    try:
        assert_sparse_is_masked(*shape, seed=threads, dtype=torch.float32)
    finally:
        torch.set_num_threads(1)


def path_after(network: nn.Module, x: torch.Tensor) -> str:
    """Return the path that the text of a net of one FFN shows after a forward pass."""
    assert "last_path='not called yet'" in repr(network)
    network(x)
    return re.search("last_path='(.*)'", repr(network))[1]


def test_the_text_of_a_model_shows_its_last_path(monkeypatch: pytest.MonkeyPatch) -> None:
    x = converted.inputs(5)
    frozen = converted.net("sparse")
    emoe.for_inference_(frozen)
    with torch.no_grad():
        assert path_after(frozen, x) == "sparse, with the layout of for_inference_"
    assert path_after(converted.net("sparse"), x) == "sparse"
    dropping = converted.net("sparse", expert_dropout=0.5)
    assert path_after(dropping.train(), x) == "masked: dropout is active"
    rounded = converted.net("sparse", score="gate").bfloat16()
    assert path_after(rounded, x.bfloat16()).startswith("masked: torch.bfloat16 would round")
    compiled = converted.net("sparse")
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        runs_twice = torch.compile(compiled, backend="eager", fullgraph=True)
        assert path_after(runs_twice, x) == "sparse"
        runs_twice(x)
    limited = torch.compile(converted.net("sparse", capacity_factor=1.5), backend="eager")
    assert path_after(limited, x).startswith("masked: compiled, with a capacity")
    traced = converted.net("sparse")
    torch.jit.trace(traced, x, check_trace=False)
    assert "last_path='masked: exported or traced'" in repr(traced)
    monkeypatch.setattr(module, "pays_off", cost_model.pays_off)
    too_short = converted.net("sparse")
    assert path_after(too_short, x).startswith("masked: no gain is expected for 5 tokens")


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("gated", "weighting"), [(False, "softmax"), (True, "binary")])
def test_compiled_code_computes_the_sparse_products(
    gated: bool, weighting: str, dynamic: bool, implementation: str
) -> None:
    settings = {"gated": gated, "weighting": weighting}
    compiled = converted.net("sparse", **settings).train()
    torch.compiler.reset()
    compiled.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    # as many tokens as the grouped products take, and then more
    for tokens in (8, 40):
        x = converted.inputs(tokens)
        masked = converted.net("masked", **settings).train()
        expected = step(masked, x)
        assert_same(step(compiled, x), expected)
    assert "last_path='sparse'" in repr(compiled)


def test_compiled_code_takes_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    # the real choice between the sparse and the masked products
    monkeypatch.setattr(module, "pays_off", cost_model.pays_off)
    if compiled_kernels() is None:
        pytest.skip("no compiler on this machine")
    torch.compiler.reset()
    compiled = converted.net("sparse")
    backend = CompileCounterWithBackend("aot_eager")
    call = torch.compile(compiled, backend=backend, dynamic=True, fullgraph=True)
    for tokens in range(5, 15):
        x = converted.inputs(tokens)
        torch.testing.assert_close(call(x), converted.net()(x), atol=1e-4, rtol=1e-4)
    assert "last_path='masked: no gain is expected" in repr(compiled)
    assert backend.frame_count <= 2
    call(converted.inputs(3000))
    assert "last_path='sparse'" in repr(compiled)


def test_operators_follow_the_rules_of_torch_library(implementation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 16, generator=generator, requires_grad=True)
    weight = torch.randn(4, 8, 16, generator=generator, requires_grad=True)
    bias = torch.randn(4, 8, generator=generator, requires_grad=True)
    mask = torch.zeros(6, 4, dtype=torch.bool)
    mask[:, [1, 3]] = True
    pairs = operators.list_pairs(mask, x, experts_per_token=2)
    a = torch.randn(12, 8, generator=generator, requires_grad=True)
    places = (pairs.token, pairs.expert, pairs.starts)
    torch.library.opcheck(torch.ops.emoe.list_pairs, (mask, kernels.number_of_chunks(x), 12))
    torch.library.opcheck(torch.ops.emoe.gather_mm, (x, weight, bias, *places))
    torch.library.opcheck(torch.ops.emoe.scatter_mm, (a, weight, *places, 6))
    torch.library.opcheck(torch.ops.emoe.outer_mm, (a, x, weight, *places))


@pytest.mark.parametrize(("gated", "weighting"), [(False, "binary"), (True, "softmax")])
def test_second_derivatives(gated: bool, weighting: str, implementation: str) -> None:
    gradients = {}
    for backend in converted.BACKENDS:
        network = converted.net(backend, gated=gated, weighting=weighting)
        x = converted.inputs(8).requires_grad_()
        (first,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        gradients[backend] = torch.autograd.grad(first.square().sum(), [x, *network.parameters()])
    for sparse, masked in zip(gradients["sparse"], gradients["masked"], strict=True):
        torch.testing.assert_close(sparse, masked, rtol=1e-4, atol=1e-4 * float(masked.abs().max()))


@pytest.mark.parametrize("name", ["x", "inner.weight", "outer.weight"])
def test_forward_mode_derivatives_are_refused(name: str) -> None:
    network, x = converted.net("sparse"), converted.inputs(5)
    layer = network.layers[0]
    values = {"x": x, **dict(layer.named_parameters())}

    def output(value: torch.Tensor) -> torch.Tensor:
        changed = values | {name: value}
        parameters = {key: tensor for key, tensor in changed.items() if key != "x"}
        return torch.func.functional_call(layer, parameters, (changed["x"],))

    value = values[name].detach()

    def derivative(value: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(output, (value,), (torch.ones_like(value),))[1]

    torch.compiler.reset()
    for call in (derivative, torch.compile(derivative, backend="eager")):
        with pytest.raises(RuntimeError, match=r"no forward-mode derivatives of sparse FFNs: call"):
            call(value)


@pytest.mark.parametrize(
    ("tokens", "has_amx", "uses_layout"), [(64, False, True), (64, True, False), (16, True, True)]
)
@torch.no_grad()
def test_processors_with_amx_use_a_layout_in_bfloat16_for_fewer_tokens(
    tokens: int, has_amx: bool, uses_layout: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    capabilities = {"amx_bf16": has_amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    frozen = converted.net("sparse").bfloat16()
    emoe.for_inference_(frozen)
    path = path_after(frozen, converted.inputs(tokens).bfloat16())
    assert path.endswith("with the layout of for_inference_") == uses_layout


@torch.no_grad()
def test_a_torch_that_does_not_tell_of_amx_is_taken_to_have_it_with_avx512(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    frozen = converted.net("sparse").bfloat16()
    emoe.for_inference_(frozen)
    assert path_after(frozen, converted.inputs(64).bfloat16()) == "sparse"


@pytest.mark.parametrize(
    ("tokens", "top_k", "pays_off"), [(2000, 2, True), (2, 2, False), (2000, 8, False)]
)
def test_sparse_products_are_used_if_they_pay_off(
    tokens: int,
    top_k: int,
    pays_off: bool,
    sparse_calls: mock.Mock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "pays_off", cost_model.pays_off)
    monkeypatch.setattr(cost_model, "has_compiled_kernels", lambda: True)
    network = converted.net("sparse", top_k=top_k)
    sparse_calls.reset_mock()
    network(converted.inputs(tokens))
    assert sparse_calls.called == pays_off
