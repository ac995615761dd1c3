"""A few tokens at a time: the chosen experts' weights are read and nothing else, with the masked path's results."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import emoe
from emoe.layer import routed_layers
from emoe.sparse import decode, path
from emoe.sparse.build import compiled_kernels
from emoe.sparse.cost_model import predicted_decode_ratio
from emoe.sparse.decode import decode_ffn
from tests import tiny_models
from tests.converted import net
from tests.plain_net import plain_net

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scattered values": {"decode_cache": False},
    "learned": {"router": "cosine", "weighting": "softmax_times_k"},
    "own biases": {"output_bias": "per_expert"},
    "not top": {"selection": "not_top"},
    "bias": {"score_bias": True},
    "unit length": {"normalize_gate": True},
    "momentum": {"gate_momentum": 0.5},
    "gate": {"score": "gate"},
}


@pytest.fixture(params=["compiled", "PyTorch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What reads the weights."""
    if request.param == "PyTorch":
        monkeypatch.setattr(decode, "compiled_kernels", lambda: None)
    elif compiled_kernels() is None:
        pytest.skip("no compiler on this machine")
    return str(request.param)


def decodes(found: nn.Module, x: Tensor) -> bool:
    with mock.patch.object(path, "decode_ffn", side_effect=decode_ffn) as spy, torch.no_grad():
        found(x)
    return spy.called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_output_is_the_masked_paths(
    variant: str, tokens: int, gated: bool, dtype: torch.dtype, kernels: str
) -> None:
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    models = [net(backend, gated, **VARIANTS[variant]).to(dtype) for backend in ("masked", "sparse")]
    # neurons by which experts are scored are rounded in half precision: the mask computes them
    by_neurons = variant == "gate" and dtype == torch.bfloat16
    assert [decodes(model, x) for model in models] == [False, not by_neurons]
    with torch.no_grad():
        expected, found = (model(x) for model in models)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.abs().max()), rtol=tolerance)


def test_what_is_kept_follows_the_weights() -> None:
    x, changes = torch.randn(1, 16), 0
    masked, sparse = net("masked"), net("sparse")
    with torch.no_grad():
        other = {name: tensor * 1.5 for name, tensor in masked.state_dict().items()}

    def step(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model(torch.ones(2, 16)).sum().backward()
        optimizer.step()
        model.zero_grad()

    def scale(model: nn.Module) -> None:
        with torch.no_grad():
            model.layers[0].outer.weight.mul_(2)

    def write_behind_the_counter(model: nn.Module) -> None:
        model.layers[0].outer.weight.data.mul_(2)

    def write_a_few_numbers_and_say_so(model: nn.Module) -> None:
        model.layers[0].outer.weight.data.view(-1)[1::17] += 1  # beside the places that are compared
        model.train().eval()

    for change in (
        lambda model: None,
        step,
        scale,
        write_behind_the_counter,
        write_a_few_numbers_and_say_so,
        lambda model: model.load_state_dict(other),
        lambda model: emoe.set_top_k_(model, 3),
        lambda model: model.double().float(),
        lambda model: setattr(model.layers[0].up, "weight", nn.Parameter(torch.ones(64, 16))),
        lambda model: model.layers[0].inner.weight.data.neg_(),  # as an average of weights is swapped in
        lambda model: setattr(model.layers[0].outer, "weight", nn.Parameter(torch.ones(16, 64))),
    ):
        for model in (masked, sparse):
            change(model)
        assert decodes(sparse, x)
        with torch.no_grad():
            torch.testing.assert_close(sparse(x), masked(x), atol=1e-3, rtol=1e-4)
        changes += 1
    assert changes == 11


def test_it_is_for_models_at_rest_only() -> None:
    x = torch.randn(1, 16)
    sparse = net("sparse")
    assert decodes(sparse, x)
    assert not decodes(sparse, torch.randn(65, 16))
    assert not decodes(copy.deepcopy(sparse).train(), x)
    with mock.patch.object(path, "decode_ffn", side_effect=decode_ffn) as spy:
        sparse(x.requires_grad_()).sum().backward()
        assert not spy.called
    for settings in ({"capacity_factor": 1.0, "count_padding": True}, {"score": "inter", "backend": "auto"}):
        assert not decodes(net(**{"backend": "sparse", **settings}), x)
    thresholded = net("sparse")
    emoe.set_top_k_(thresholded, score_threshold=0.0)
    assert not decodes(thresholded, x)
    with torch.inference_mode():
        made_there = copy.deepcopy(sparse)
        for module in made_there.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.clone(), requires_grad=False)
        assert not decodes(made_there, x)  # changes of such weights cannot be seen
        assert decodes(sparse, x)


def test_copies_do_not_share_what_is_kept() -> None:
    x, sparse = torch.randn(1, 16), net("sparse")
    with torch.no_grad():
        expected = sparse(x)
        twin = copy.deepcopy(sparse)
        twin.layers[0].outer.weight.zero_()
        assert not twin(x).any()
        assert torch.equal(sparse(x), expected)


def test_threads_decode_together() -> None:
    sparse, xs = net("sparse"), torch.randn(2, 1, 16)
    with torch.no_grad():
        expected = [sparse(x) for x in xs]

    def serve(place: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(sparse(xs[place]), expected[place]) for _ in range(200))

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(serve, (0, 1)))


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_answers_are_the_masked_paths(name: str) -> None:
    answers = []
    for backend in ("masked", "sparse"):
        model = tiny_models.build(name).eval()
        emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers="all", backend=backend))
        x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
        layers = [layer.ffn.layer for layer in routed_layers(model)]
        with torch.no_grad():
            answers.append([(layer.mlp)(x) for layer in layers])
    for masked, sparse in zip(*answers, strict=True):
        torch.testing.assert_close(sparse, masked, atol=1e-5, rtol=1e-4)


def test_auto_decodes_where_fewer_weights_are_read() -> None:
    found = plain_net(256, 1024)
    emoe.convert_(found, emoe.EMoEConfig(num_experts=32, top_k=8, layers=[0], partition="random"))
    read_once = compiled_kernels() is not None
    assert [decodes(found, torch.randn(tokens, 256)) for tokens in (1, 64, 65)] == [True, read_once, False]
    emoe.set_top_k_(found, 31)
    assert not decodes(found, torch.randn(1, 256))


@pytest.mark.parametrize(("dtype", "compiled"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)])
def test_expected_time_of_decoding_grows_with_tokens_and_experts(dtype: torch.dtype, compiled: bool) -> None:
    def expected(tokens: int, active: float) -> float:
        return predicted_decode_ratio(tokens, 576, 24, active, 64, dtype, in_place=compiled)

    assert expected(1, 0.25) < expected(2, 0.25) < expected(2, 0.5) < expected(8, 0.5)
    many = compiled and (dtype == torch.float32 or torch.backends.cpu.get_cpu_capability() == "AVX2")
    assert (expected(32, 0.25) < 1) == many


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("tokens", [9, 64])
def test_more_tokens_are_decoded_as_the_mask_computes_them(tokens: int, settings: str) -> None:
    if compiled_kernels() is None:
        pytest.skip("no compiler on this machine")
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(2))
    masked, sparse = (net(backend, **VARIANTS[settings]) for backend in ("masked", "sparse"))
    assert decodes(sparse, x) == (settings != "scattered values")
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), masked(x), atol=1e-4, rtol=1e-4)


def test_a_bias_that_does_not_lie_in_one_piece_is_read_as_it_is(kernels: str) -> None:
    models = [net(backend) for backend in ("masked", "sparse")]
    strided = torch.randn(128, generator=torch.Generator().manual_seed(3))[::2]
    for model in models:
        model.layers[0].inner.bias = nn.Parameter(strided)
    x = torch.randn(1, 16)
    assert decodes(models[1], x)
    with torch.no_grad():
        torch.testing.assert_close(models[1](x), models[0](x), atol=1e-5, rtol=1e-5)


def test_scores_of_another_type_than_float32_choose_as_they_do_elsewhere(kernels: str) -> None:
    class Doubles(emoe.Router):
        learned = False

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :8].double()

    emoe.register_router("doubles", Doubles)
    masked, sparse = (net(backend, router="doubles") for backend in ("masked", "sparse"))
    x = torch.randn(1, 16)
    assert decodes(sparse, x)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), masked(x), atol=1e-5, rtol=1e-5)


class _Twice(nn.Module):
    def forward(self, bias: Tensor) -> Tensor:
        return 2 * bias


def parametrized(layer: Any) -> None:
    parametrize.register_parametrization(layer, "output_bias", _Twice())


def a_buffer(layer: Any) -> None:
    bias = layer.output_bias.detach() * 2
    del layer.output_bias
    layer.register_buffer("output_bias", bias)


@pytest.mark.parametrize("change", [parametrized, a_buffer])
def test_experts_own_biases_that_became_something_else(change: Callable[[Any], None]) -> None:
    masked, sparse = (net(backend, gated=False, output_bias="per_expert") for backend in ("masked", "sparse"))
    x = torch.randn(1, 16)
    with torch.no_grad():
        before = sparse(x)
        for model in (masked, sparse):
            change(model.layers[0].act)
        torch.testing.assert_close(sparse(x), masked(x), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(sparse(x), before, atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_a_step_of_any_optimiser_is_seen(seed: int) -> None:
    x, found = torch.randn(1, 16, generator=torch.Generator().manual_seed(seed)), []
    for backend in ("masked", "sparse"):
        model = plain_net(16, 512, gated=True)
        config = emoe.EMoEConfig(num_experts=64, top_k=1, layers=[0], partition="contiguous", backend=backend)
        emoe.convert_(model, config)
        with torch.no_grad():
            model(x)
        # a step that changes one expert, by a compiled pass, and of an optimiser whose changes PyTorch does not count
        torch.compile(model, backend="eager")(x).square().sum().backward()
        torch.optim.SGD(model.parameters(), 0.1, fused=True).step()
        with torch.no_grad():
            found.append(model(x))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
