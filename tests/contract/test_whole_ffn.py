"""One token through a language model's FFN: its module's own code need not run, and nobody sees a difference."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import emoe
from tests import tiny_models
from tests.converted import BACKENDS
from tests.converted import model as converted

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


def ffn(model: nn.Module) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith("mlp"))


def token(module: Any, tokens: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, tokens, module.gate_proj.in_features, generator=generator)


def own_code_runs(module: Any, call: Callable[[Tensor], Tensor] | None = None, tokens: int = 1) -> bool:
    """Whether the library's own ``forward`` of the FFN is called."""
    plain = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("transformers."))
    code, seen = plain.forward.__code__, set()
    x = token(module, tokens)
    sys.setprofile(lambda frame, event, _: seen.add(frame.f_code) if event == "call" else None)
    try:
        with torch.no_grad():
            (call or module)(x)
    finally:
        sys.setprofile(None)
    return code in seen


@pytest.mark.parametrize("name", FAMILIES)
def test_a_token_does_not_go_through_its_code(name: str) -> None:
    masked, sparse = (ffn(converted(name, backend)) for backend in BACKENDS)
    assert [own_code_runs(masked), own_code_runs(sparse)] == [True, False]
    with torch.no_grad():
        torch.testing.assert_close(sparse(token(sparse)), masked(token(sparse)))
        assert sparse(token(sparse)).add_(1).shape == token(sparse).shape  # a tensor of its own
    # many tokens, gradients, training
    assert own_code_runs(sparse, tokens=65)
    x = token(sparse)
    ours, theirs = (
        torch.autograd.grad(module(x).square().sum(), module.up_proj.weight)[0] for module in (sparse, masked)
    )
    torch.testing.assert_close(ours, theirs)
    sparse.train()
    assert own_code_runs(sparse)


class _OfSeveral(nn.Module):
    """As Llama's, but for one star."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            getattr(plain, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")
        )

    def forward(self, *x: Any) -> Any:
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


def test_code_that_takes_other_arguments_is_not_known() -> None:
    model = tiny_models.build("llama")
    layer = model.layers[0]
    layer.mlp = _OfSeveral(layer.mlp)
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0], backend="sparse"))
    assert type(layer.mlp) is _OfSeveral


def test_hooks_of_its_module_are_called() -> None:
    module, seen = ffn(converted("llama", "sparse")), []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module.register_forward_hook(lambda _, args, output: output * 2)
    reference = ffn(converted("llama", "masked"))
    with torch.no_grad():
        torch.testing.assert_close(module(token(module)), 2 * reference(token(module)))
    assert len(seen) == 1


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj", "act_fn"])
def test_hooks_of_its_parts_are_called(part: str) -> None:
    module, seen = ffn(converted("llama", "sparse")), []
    getattr(module, part).register_forward_hook(lambda *_: seen.append(part))
    assert own_code_runs(module)
    assert seen == [part]


def _other_class(module: Any, patch: pytest.MonkeyPatch) -> None:
    plain = type(module).__mro__[2]
    patch.setattr(plain, "forward", lambda self, x: self.down_proj(self.up_proj(x)) * 0 + 7)


def _other_code(module: Any, patch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x)) * 0 + 7

    patch.setattr(type(module).__mro__[2].forward, "__code__", forward.__code__)


def _other_forward(module: Any, patch: pytest.MonkeyPatch) -> None:
    module.forward = lambda x: torch.full_like(x, 7)


def _other_activation(module: Any, patch: pytest.MonkeyPatch) -> None:
    # by an activation that gives nothing, and an out-projection that then gives its bias
    module.act_fn = _Zero()
    module.down_proj.bias = nn.Parameter(torch.full((module.down_proj.out_features,), 7.0))


class _Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("replace", [_other_class, _other_code, _other_forward, _other_activation])
def test_what_is_put_in_its_place_runs(replace: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    module = ffn(converted("llama", "sparse"))
    assert not own_code_runs(module)
    replace(module, monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(module(token(module)), torch.full_like(token(module), 7.0))


def test_copies_decode_by_their_own_weights() -> None:
    model = converted("llama", "sparse")
    before = ffn(model)(token(ffn(model)))
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other = ffn(made)
        with torch.no_grad():
            torch.testing.assert_close(other(token(other)), before)
            other.down_proj.weight.zero_()
            assert not other(token(other)).any()
        assert not own_code_runs(other)
    torch.testing.assert_close(ffn(model)(token(ffn(model))), before)


def test_a_dense_model_is_as_it_was() -> None:
    plain = type(ffn(tiny_models.build("llama")))
    model = converted("llama", "sparse")
    module = ffn(model)
    kept = module.forward  # as libraries do that put something around it
    assert type(module) is not plain
    assert isinstance(module, plain)
    emoe.set_backend_(model, "masked")
    assert type(module) is plain
    emoe.set_backend_(model, "sparse")
    assert not own_code_runs(module)
    emoe.to_dense_(model)
    assert type(module) is plain
    assert own_code_runs(module)
    with torch.no_grad():
        torch.testing.assert_close(kept(token(module)), module(token(module)))


def test_keywords_and_other_inputs_are_its_own_codes() -> None:
    module, reference = ffn(converted("llama", "sparse")), ffn(converted("llama", "masked"))
    assert own_code_runs(module, lambda x: module(x=x))
    assert not own_code_runs(module, lambda x: module(x[0]))
    with torch.no_grad():
        torch.testing.assert_close(module(token(module)[0, 0]), reference(token(module)[0, 0]))
    for wrong in (torch.ones(1, 3), [1.0]):
        errors = []
        for each in (module, reference):
            with pytest.raises(Exception) as raised, torch.no_grad():  # noqa: PT011  whatever the masked path says
                each(wrong)
            errors.append(type(raised.value))
        assert errors[0] is errors[1]


def test_threads_decode_together() -> None:
    module = ffn(converted("llama", "sparse"))
    xs = [torch.randn(1, 1, module.gate_proj.in_features) for _ in range(2)]
    with torch.no_grad():
        expected = [module(x) for x in xs]

    def serve(place: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(module(xs[place]), expected[place]) for _ in range(200))

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(serve, (0, 1)))


@pytest.mark.parametrize("compiled", [False, True])
def test_answers_are_the_masked_paths(compiled: bool) -> None:
    answers = []
    for backend in BACKENDS:
        model = tiny_models.build_generator("llama").eval()
        emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers="all", backend=backend))
        step = torch.compile(model, backend="eager") if compiled else model
        with torch.no_grad():
            answers.append(
                step(torch.tensor([[3, 5, 7]])).logits
                if compiled
                else model.generate(torch.tensor([[3, 5, 7]]), max_new_tokens=8, do_sample=False)
            )
    torch.testing.assert_close(answers[0], answers[1])
