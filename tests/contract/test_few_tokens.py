"""The compiled products of a few tokens, by themselves: each is what PyTorch makes of the chosen experts' weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import transformers.activations as theirs
from torch import Tensor, nn
from torch.nn import functional as F

from emoe.decision_guard import Guard
from emoe.sparse.activations import activation_name, is_elementwise
from emoe.sparse.build import compiled_kernels

NAMED: dict[str, list[nn.Module]] = {
    "relu": [nn.ReLU(), theirs.ACT2FN["relu"]],
    "silu": [nn.SiLU(), theirs.ACT2FN["silu"], theirs.ACT2FN["swish"]],
    "gelu": [nn.GELU(), theirs.ACT2FN["gelu"]],
    "gelu_tanh": [nn.GELU(approximate="tanh"), theirs.ACT2FN["gelu_pytorch_tanh"]],
}


@pytest.fixture
def kernels() -> ModuleType:
    compiled = compiled_kernels()
    if compiled is None:
        pytest.skip("no compiler on this machine")
    return compiled


class Case(NamedTuple):
    """Weights of two in-projections, a bias of the first and values, by neuron; tokens, and the experts of each."""

    x: Tensor
    experts: Tensor
    inputs: list[Tensor]
    biases: list[Tensor | None]
    values: Tensor
    size: int

    def of(self, weights: Tensor) -> Tensor:
        """Each token's own rows of some weights, ``[T, k, s, h]`` in float32."""
        return weights.float().view(len(weights), self.size, -1)[self.experts]


def random_case(random: torch.Generator) -> Case:
    def one_of(*values: int) -> int:
        return values[int(torch.randint(len(values), (), generator=random))]

    n, size, h, tokens = one_of(1, 3, 8), one_of(1, 7, 8, 24, 33), one_of(1, 5, 16, 67), one_of(1, 2, 8, 40)
    dtype = (torch.float32, torch.bfloat16)[one_of(0, 1)]
    k = one_of(*range(1, n + 1))
    experts = torch.stack([torch.randperm(n, generator=random)[:k] for _ in range(tokens)])
    x, keys, ups, bias, values = (
        torch.randn(*shape, generator=random).to(dtype)
        for shape in ((tokens, h), (n, size * h), (n, size * h), (n, size), (n, size * h))
    )
    return Case(x, experts, [keys, ups], [bias, None], values, size)


def tolerance(case: Case) -> dict[str, float]:
    return {"atol": 1e-4, "rtol": 1e-4} if case.x.dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}


@pytest.mark.parametrize("seed", range(6))
def test_products_of_random_shapes(seed: int, kernels: ModuleType) -> None:
    random = torch.Generator().manual_seed(seed)
    for _ in range(25):
        case = random_case(random)
        found = kernels.rows_mm(case.x, case.inputs, case.biases, case.experts)
        wanted = [torch.einsum("th,tksh->tks", case.x.float(), case.of(weight)) for weight in case.inputs]
        bias = case.biases[0]
        assert bias is not None
        wanted[0] += bias.float()[case.experts]
        for ours, expected in zip(found, wanted, strict=True):
            assert ours.dtype == case.x.dtype
            torch.testing.assert_close(ours.float(), expected.flatten(1), **tolerance(case))
        y = torch.einsum("tks,tksh->th", found[0].float().view_as(wanted[0]), case.of(case.values))
        torch.testing.assert_close(kernels.values_mm(found[0], case.values, case.experts).float(), y, **tolerance(case))


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_a_whole_ffn_is_its_products_and_the_activation_between_them(
    name: str, weighted: bool, gated: bool, kernels: ModuleType
) -> None:
    random = torch.Generator().manual_seed(0)
    for _ in range(25):
        case = random_case(random)
        inputs, biases = (case.inputs, case.biases) if gated else (case.inputs[:1], case.biases[:1])
        scales = torch.rand(case.experts.shape, generator=random) if weighted else None
        pre = kernels.rows_mm(case.x, inputs, biases, case.experts)
        hidden = NAMED[name][0](pre[0])
        if gated:
            hidden = hidden * pre[1]
        if scales is not None:
            rows = hidden.view(*scales.shape, -1)
            hidden = (rows * scales.unsqueeze(-1).to(hidden.dtype)).flatten(1)
        expected = kernels.values_mm(hidden, case.values, case.experts)
        for shape in ((*case.x.shape,), (1, *case.x.shape)):
            found = kernels.ffn_mm(case.x.view(shape), inputs, biases, case.values, name, case.experts, scales)
            assert (found.shape, found.dtype, found._base) == (shape, case.x.dtype, None)
            torch.testing.assert_close(found.view_as(expected).float(), expected.float(), **tolerance(case))


@pytest.mark.parametrize("name", NAMED)
def test_activations_are_pytorchs_to_the_last_bits(name: str, kernels: ModuleType) -> None:
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88.4, 88.6, -88.4, -88.6, 1e4, -1e4, torch.inf, torch.nan])
    z = torch.cat([torch.linspace(-100, 100, 20001), torch.linspace(-1, 1, 20001), special])[:, None]
    one = torch.ones(1, 1)
    # one neuron of one expert, whose weights are 1: it is the token that is activated
    found = kernels.ffn_mm(z, [one], [None], one, name, torch.zeros(len(z), 1, dtype=torch.long), None)
    torch.testing.assert_close(found, NAMED[name][0](z), rtol=2e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("threads", [2, 3, 8, 40])
def test_any_number_of_threads_gives_the_same_but_for_rounding(threads: int, kernels: ModuleType) -> None:
    random, before = torch.Generator().manual_seed(1), torch.get_num_threads()

    def results(case: Case) -> list[Tensor]:
        x, experts, inputs, biases, values, _ = case
        scales = torch.arange(1.0, experts.numel() + 1).view_as(experts) / experts.numel()
        pre = kernels.rows_mm(x, inputs, biases, experts)
        whole = kernels.ffn_mm(x, inputs, biases, values, "silu", experts, scales)
        return [*pre, kernels.values_mm(pre[0], values, experts), whole]

    try:
        for _ in range(25):
            case = random_case(random)
            torch.set_num_threads(1)
            one = results(case)
            torch.set_num_threads(threads)
            several, again = results(case), results(case)
            for expected, found, same in zip(one, several, again, strict=True):
                assert torch.equal(found, same)
                torch.testing.assert_close(found.float(), expected.float(), **tolerance(case))
    finally:
        torch.set_num_threads(before)


def test_an_unknown_activation_is_refused(kernels: ModuleType) -> None:
    case = random_case(torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="no activation called tanh"):
        kernels.ffn_mm(case.x, case.inputs, case.biases, case.values, "tanh", case.experts, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_products_with_the_gate_are_chosen(dtype: torch.dtype, kernels: ModuleType) -> None:
    random = torch.Generator().manual_seed(0)
    for n, h, tokens in ((1, 5, 1), (8, 16, 3), (64, 67, 9), (300, 576, 2)):
        gate, x = torch.randn(n, h, generator=random), torch.randn(1, tokens, h, generator=random).to(dtype)
        found = kernels.chosen_by(gate, x, min(n, 4))
        torch.testing.assert_close(found, (x[0].float() @ gate.t()).topk(min(n, 4)).indices)


@pytest.mark.parametrize("name", NAMED)
def test_what_has_a_name_is_that_function(name: str) -> None:
    z = torch.linspace(-30, 30, 2001)
    for module in NAMED[name]:
        guard = Guard()
        assert activation_name(module, guard) == name
        assert guard.holds()
        torch.testing.assert_close(module(z), NAMED[name][0](z))


class OwnSiLU(nn.SiLU):
    def forward(self, z: Tensor) -> Tensor:
        return 2 * F.silu(z)


class CalledTwice(nn.SiLU):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(super().__call__(*args, **kwargs))


def test_an_activation_that_calls_somebody_elses_module_is_not_known() -> None:
    for name in (
        "gelu",
        "gelu_new",
        "gelu_pytorch_tanh",
        "quick_gelu",
        "relu",
        "relu2",
        "silu",
        "mish",
        "tanh",
        "leaky_relu",
    ):
        assert is_elementwise(theirs.ACT2FN[name], Guard()), name
    changed = theirs.ACT2FN["gelu"]
    changed.act = nn.Softmax(-1)
    assert not is_elementwise(changed, Guard())


def test_what_computes_something_else_has_none() -> None:
    others = ("gelu_new", "gelu_fast", "quick_gelu", "gelu_python", "gelu_python_tanh", "relu2", "gelu_10", "mish")
    changed = theirs.ACT2FN["gelu_pytorch_tanh"]
    changed.act = functools.partial(F.gelu, approximate="tanh", input=torch.ones(1))
    for module in (*(theirs.ACT2FN[name] for name in others), nn.Mish(), nn.Tanh(), OwnSiLU(), CalledTwice(), changed):
        assert activation_name(module, Guard()) is None


def test_a_function_that_was_replaced_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard()
    assert activation_name(nn.SiLU(), guard) == "silu"
    monkeypatch.setattr(F, "silu", lambda x, inplace=False: 2 * x)
    assert not guard.holds()
    assert activation_name(nn.SiLU(), Guard()) is None
    assert activation_name(theirs.ACT2FN["silu"], Guard()) is None


def test_a_forward_that_was_replaced_is_seen() -> None:
    for kind in (nn.SiLU, theirs.SiLUActivation):
        guard = Guard()
        assert activation_name(kind(), guard) == "silu"
        with mock.patch.object(kind, "forward", lambda self, x: 2 * x):
            assert not guard.holds()
            assert activation_name(kind(), Guard()) is None


def other_keywords(module: Any) -> None:
    module.act.keywords["approximate"] = "none"


@pytest.mark.parametrize(
    ("module", "change"),
    [
        (nn.GELU(), lambda module: setattr(module, "approximate", "tanh")),
        (theirs.ACT2FN["gelu"], lambda module: setattr(module, "act", F.relu)),
        (theirs.ACT2FN["gelu_pytorch_tanh"], other_keywords),
        (nn.SiLU(), lambda module: setattr(module, "__class__", nn.Tanh)),
    ],
    ids=["approximate", "act", "keywords", "class"],
)
def test_a_change_of_an_activation_is_seen(module: nn.Module, change: Callable[[Any], None]) -> None:
    guard = Guard()
    assert activation_name(module, guard) is not None
    change(module)
    assert not guard.holds()
