"""The sparse backend gives the masked results: outputs, gradients and records of every architecture and variant."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import emoe
from emoe.layer import routed_layers
from emoe.sparse import cost_model, grouped, kernels, module
from emoe.sparse.build import compiled_kernels
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
    if implementation == "grouped":
        if not hasattr(nn.functional, "grouped_mm"):
            pytest.skip("this torch has no grouped_mm")
        patch.setattr(grouped, "is_usable", lambda x: x.dtype != torch.float64 and not x.shape[-1] % 8)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use(request.param, monkeypatch)
    return request.param


@contextmanager
def threads(count: int) -> Iterator[None]:
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


@pytest.fixture
def sparse_calls() -> Iterator[mock.Mock]:
    """Count the FFNs that are computed sparsely."""
    with mock.patch.object(module, "sparse_ffn", side_effect=sparse_ffn) as spy:
        yield spy


@pytest.mark.parametrize("name", sorted(tiny_models.BUILDERS))
def test_every_architecture(name: str, sparse_calls: mock.Mock) -> None:
    values = tiny_models.inputs(name)
    masked, sparse = (converted.model(name, backend) for backend in converted.BACKENDS)
    assert_same(step(sparse, values), step(masked, values))
    # with dropout on hidden neurons the sparse FFN computes the masked products, with the same random numbers
    assert_same(step(sparse.train(), values), step(masked.train(), values))
    emoe.set_backend_(sparse, "masked")
    for model in (masked, sparse):
        without_dropout(model)
    emoe.set_backend_(sparse, "sparse")
    sparse_calls.reset_mock()
    assert_same(step(sparse, values), step(masked, values))
    assert sparse_calls.call_count == len(routed_layers(sparse))


USUAL: dict[str, Any] = {"num_experts": 8, "top_k": 2, "layers": "all"}
PUBLISHED = {**USUAL, "expert_dropout": 0.0}
VARIANTS: dict[str, emoe.EMoEConfig | emoe.GMoEConfig] = {
    "emoe": emoe.EMoEConfig(**USUAL),
    "score bias": emoe.EMoEConfig(**USUAL, score_bias=True, expert_dropout=0.3),
    "not_top": emoe.EMoEConfig(**USUAL, selection="not_top"),
    "learned": emoe.EMoEConfig(**USUAL, router="cosine", weighting="softmax_times_k", aux_loss_coefficient=0.1),
    "published": emoe.EMoEConfig.as_published("tutel", **PUBLISHED),
    "published, learned": emoe.EMoEConfig.as_published("tutel", **PUBLISHED, router="cosine"),
    "gmoe": emoe.GMoEConfig(num_experts=4, top_k=2, layers="all"),
    "gate": emoe.EMoEConfig(**USUAL, score="gate", weighting="softmax_times_k"),
    "up": emoe.EMoEConfig(**USUAL, score="up", weighting="softmax_times_k"),
    "momentum": emoe.EMoEConfig(**USUAL, gate_momentum=0.5, weighting="softmax"),
}
# every variant with one kind of FFN at least three times, with the implementations in turn
CASES = [
    (name, variant, IMPLEMENTATIONS[(row + column) % 3])
    for row, variant in enumerate(VARIANTS)
    for column, name in enumerate(["bert", "llama", "phi3", "gpt2"])
    if variant != "up" or name in ("llama", "phi3")  # the others have no up-projection
]


@pytest.mark.parametrize(("name", "variant", "implementation"), CASES, indirect=["implementation"])
def test_every_variant(name: str, variant: str, implementation: str) -> None:
    values = tiny_models.inputs(name)
    values["attention_mask"] = (torch.arange(11) < torch.tensor([[11], [7], [4]])).long()
    masked, sparse = (converted.model(name, backend, VARIANTS[variant]).train() for backend in converted.BACKENDS)
    with emoe.record_routing(masked) as expected, emoe.record_routing(sparse) as record:
        assert_same(step(sparse, values), step(masked, values))
        for model in (masked, sparse):
            emoe.update_gates_(model)
        assert_same(step(sparse, values), step(masked, values))
    for number, layer in expected.layers.items():
        assert torch.equal(record.layers[number].loads, layer.loads)
        assert (record.layers[number].tokens, record.layers[number].drop_rate) == (layer.tokens, layer.drop_rate)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("score", ["keys", "gate"])
def test_bf16(whole: bool, score: str, implementation: str) -> None:
    values = tiny_models.inputs("llama")
    masked, sparse = (converted.model("llama", backend, score=score) for backend in converted.BACKENDS)
    reference = tiny_models.output(masked, values).detach()
    errors, loads = [], []
    for model in (masked, sparse):
        model.to(torch.bfloat16 if whole else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=not whole), emoe.record_routing(model) as record:
            tensors = step(model, values)
        assert tensors["output"].dtype == (torch.bfloat16 if whole else torch.float32)
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
        errors.append(float((tensors["output"].float() - reference).abs().mean()))
        loads.append(record.layers[0].loads)
    assert errors[1] < 1.2 * errors[0] + 1e-4
    assert torch.equal(*loads)


def check_products(tokens: int, n: int, s: int, h: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Compare an FFN and all gradients with the dense products and a mask on them, in three memory layouts."""
    random = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random).to(dtype)

    mask = torch.rand(tokens, n, generator=random) < 0.4
    gated, biased, weighted = (torch.rand(3, generator=random) < 0.5).tolist()
    x, values = draw(tokens, h), draw(h, n, s).permute(1, 2, 0)  # as values are stored in an out-projection
    keys = [draw(n, s, h), draw(n, s, 2 * h)[..., ::2], draw(h, n, s).permute(1, 2, 0)][seed % 3]
    inputs = [(keys, draw(n, s) if biased else None)] + ([(draw(n, s, h), None)] if gated else [])
    weights = torch.rand(tokens, n, generator=random).to(dtype) if weighted else None
    tensors = [x, values, weights, *(tensor for pair in inputs for tensor in pair)]
    leaves = [tensor.requires_grad_() for tensor in tensors if tensor is not None]

    def dense() -> Tensor:
        pre = [torch.einsum("th,nsh->tns", x, w) + (0 if b is None else b) for w, b in inputs]
        hidden = nn.functional.silu(pre[0]) * (pre[1] if gated else 1)
        hidden = hidden * (mask if weights is None else weights * mask).to(dtype).unsqueeze(-1)
        return torch.einsum("tns,nsh->th", hidden, values)

    y, expected = sparse_ffn(x, inputs, values, nn.functional.silu, mask, weights), dense()
    dy = draw(tokens, h)
    grads = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy)
    for actual, wanted in [(y, expected), *zip(*grads, strict=True)]:
        atol = 1e-5 * max(1.0, float(wanted.abs().max())) if wanted.numel() else 0.0
        torch.testing.assert_close(actual, wanted, atol=atol, rtol=1e-4)
    if tokens:
        assert grads[0][1].stride() == values.stride()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(0, 40), st.integers(1, 6), st.integers(1, 5), st.integers(1, 7), st.integers(0, 999)))
def test_random_shapes(implementation: str, shape: tuple[int, int, int, int, int]) -> None:
    tokens, n, s, h, seed = shape
    with pytest.MonkeyPatch.context() as patch:
        use(implementation, patch)
        check_products(tokens, n, s, 8 * h if implementation == "grouped" else h, seed)
        check_products(tokens, n, s, h, seed, torch.float64)


LARGE = [(700, 2, 24, 40), (300, 3, 48, 300), (150, 2, 88, 520), (900, 1, 33, 8), (60, 5, 16, 1100), (4200, 2, 12, 20)]


@pytest.mark.parametrize(
    ("implementation", "shape"),
    [*(("compiled", shape) for shape in LARGE), ("grouped", LARGE[0]), ("pytorch", LARGE[0])],
    indirect=["implementation"],
)
def test_larger_shapes(implementation: str, shape: tuple[int, int, int, int]) -> None:
    """Pairs that fill more than a block, panel or tile of the compiled products, on one and two threads."""
    check_products(*shape, seed=0)
    with threads(2):
        check_products(*shape, seed=1)


def kept_bytes(net: nn.Module) -> int:
    """Count the bytes that a forward pass keeps for the backward pass, without parameters."""
    x, sizes = torch.randn(2048, 64, requires_grad=True), {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    return sum(size for pointer, size in sizes.items() if pointer not in parameters)


def test_the_backward_pass_keeps_less_memory_than_the_dense_ffn() -> None:
    """At half of the experts at most 0.35 of the bytes."""
    dense, sparse = plain_net(64, 256), plain_net(64, 256)
    emoe.convert_(sparse, emoe.EMoEConfig(num_experts=8, top_k=4, layers=[0]))
    emoe.set_backend_(sparse, "sparse")
    assert kept_bytes(sparse) <= 0.35 * kept_bytes(dense)


@pytest.mark.parametrize(
    ("tokens", "size", "active", "dtype", "expected"),
    [
        (2000, 24, 1 / 2, torch.float32, True),
        (2, 96, 1 / 4, torch.float32, False),  # few tokens
        (2000, 96, 1.0, torch.float32, False),  # every expert
        (2000, 24, 1 / 2, torch.bfloat16, False),  # pays off in float32 only
        (2000, 96, 1 / 4, torch.float16, False),  # not measured
    ],
)
def test_sparse_products_are_used_if_they_pay_off(
    tokens: int, size: int, active: float, dtype: torch.dtype, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_model, "compiled_kernels", object)
    assert cost_model.pays_off(torch.empty(tokens, 64, dtype=dtype), size, active) == expected
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            assert not cost_model.pays_off(torch.empty(tokens, 64), size, active)
