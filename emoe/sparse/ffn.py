"""An FFN of experts that computes only the chosen experts, forward and backward, on the dense weights as they are.

For the backward pass it keeps the FFN's input and the pre-activations of the chosen experts; the activation is computed again. A gradient that is itself to be
differentiated (``create_graph``) is taken through the masked products, which PyTorch can differentiate as often as is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from emoe.sparse.kernels import expert_sums, gather_mm, outer_mm, pairs_of, scatter_mm
from emoe.sparse.pairs import Pairs
from emoe.tensors import versions

Activation = Callable[[Tensor], Tensor]


def sparse_ffn(
    x: Tensor,
    inputs: Sequence[tuple[Tensor, Tensor | None]],
    values: Tensor,
    activation: Activation,
    mask: Tensor,
    weights: Tensor | None,
) -> Tensor:
    """Sum of the chosen experts' outputs, without the output bias.

    Args:
        x: ``[T, h]``.
        inputs: ``[N, s, h]`` weight and ``[N, s]`` bias (or None) of the in-projection whose output is activated,
            and of the up-projection of a gated FFN.
        values: ``[N, s, h]``.
        activation: elementwise; must not write over its input.
        mask: ``[T, N]`` bool, the chosen experts.
        weights: ``[T, N]`` of the chosen experts, or None where all are 1.

    Returns:
        ``[T, h]`` in the dtype of ``x`` (under autocast in autocast's).
    """
    tensors = [x, values, *(tensor for pair in inputs for tensor in pair)]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    pairs = pairs_of(mask, tensors[0])  # type: ignore[arg-type]
    per_pair = None if weights is None else weights[pairs.rows, pairs.experts]
    with torch.autocast(x.device.type, enabled=False):
        return _SparseFFN.apply(activation, pairs, per_pair, *tensors)


class _SparseFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        pairs: Pairs,
        per_pair: Tensor | None,
        x: Tensor,
        values: Tensor,
        *inputs: Tensor | None,
    ) -> Tensor:
        pre = [gather_mm(x, w, b, pairs) for w, b in zip(inputs[::2], inputs[1::2], strict=True)]  # type: ignore[arg-type]
        ctx.activation, ctx.pairs = activation, pairs
        needed = ctx.needs_input_grad
        hidden_needed, hooked = any((*needed[2:4], *needed[5:])), saved_tensors_have_hooks()
        # what a gradient is computed from must not change before; all else is there for the gradient's own, and may
        wanted = [any(needed[5::2]) or hooked, hidden_needed, *[needed[3], False] * len(pre)]
        tensors = [x, values, *inputs]
        ctx.save_for_backward(per_pair, *(t if want else None for t, want in zip(tensors, wanted, strict=True)), *pre)
        ctx.others = [None if want else t for t, want in zip(tensors, wanted, strict=True)]
        ctx.versions = [None if t is None else versions([t]) for t in ctx.others]
        return scatter_mm(_hidden(activation, pre, per_pair), values, pairs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        per_pair, *saved = ctx.saved_tensors
        count = (len(saved) - 2) // 3
        tensors, pre = saved[: 2 + 2 * count], saved[2 + 2 * count :]
        functorch = torch._C._functorch
        batched = functorch.is_batchedtensor(dy) or functorch.is_legacy_batchedtensor(dy)
        if torch.is_grad_enabled() or batched:
            return _differentiable_backward(ctx, dy, per_pair, *map(_either, tensors, ctx.others, ctx.versions))
        dy = dy.resolve_neg()
        x, values, *inputs = tensors
        weights = [
            saved if other is None else other for saved, other in zip(inputs[::2], ctx.others[2::2], strict=True)
        ]
        biases = ctx.others[3::2]
        pairs, needed = ctx.pairs, ctx.needs_input_grad
        with torch.enable_grad():
            leaves = [z.detach().requires_grad_() for z in pre]
            scale = None if per_pair is None else per_pair.detach().requires_grad_()
            hidden = _hidden(ctx.activation, leaves, scale)
        d_values = (
            outer_mm(hidden.detach(), dy, pairs, ctx.others[1] if values is None else values) if needed[4] else None
        )
        if values is None:  # nothing in front of the hidden neurons has a gradient
            return None, None, None, None, d_values, *(None for _ in inputs)
        grads = torch.autograd.grad(
            hidden, leaves if scale is None else [*leaves, scale], gather_mm(dy, values, None, pairs)
        )
        d_scale = None if scale is None else grads[-1]
        d_x: Tensor | None = None
        d_inputs: list[Tensor | None] = []
        for place, (weight, bias, dz) in enumerate(zip(weights, biases, grads, strict=False)):
            d_inputs.append(outer_mm(dz, x, pairs, weight) if needed[5 + 2 * place] else None)
            d_inputs.append(
                expert_sums(dz, pairs, weight.shape[0]) if bias is not None and needed[6 + 2 * place] else None
            )
            if needed[3]:
                part = scatter_mm(dz, weight, pairs)
                d_x = part if d_x is None else d_x + part
        ctx.others[0] = None  # an input lives no longer than what was saved; the weights do anyway
        return None, None, d_scale, d_x, d_values, *d_inputs


def saved_tensors_have_hooks() -> bool:
    """Whether somebody keeps saved tensors elsewhere, or drops them until they are computed again."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _either(saved: Tensor | None, other: Tensor | None, then: list[int | None] | None) -> Tensor:
    """What was saved, or what was only kept, if it has not changed."""
    if saved is None and other is None and then is not None:
        raise RuntimeError("an FFN's input was kept for one backward pass: give create_graph=True to the first")
    if other is not None and versions([other]) != then:
        raise RuntimeError(
            f"a tensor of shape {list(other.shape)} that the gradient of an FFN's gradient needs was changed by an inplace operation"
        )
    return cast(Tensor, saved if other is None else other)


def _differentiable_backward(
    ctx: Any, dy: Tensor, per_pair: Tensor | None, x: Tensor, values: Tensor, *inputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The same gradients with a graph of their own, from all neurons and a mask on them."""
    num_experts, size, _ = values.shape
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        # aliases, because the gradient is by each of them alone, also where one was computed from another
        tensors = [None if t is None else t.view_as(t) for t in (per_pair, x, values, *inputs)]
        scale, x, values, *inputs = tensors  # type: ignore[assignment]
        ones = x.new_ones(len(ctx.pairs.rows)) if scale is None else scale.to(x.dtype)
        weights = x.new_zeros(ctx.pairs.tokens, num_experts).index_put((ctx.pairs.rows, ctx.pairs.experts), ones)
        pre = [
            F.linear(x, cast(Tensor, weight).flatten(0, 1), None if bias is None else bias.flatten())
            for weight, bias in zip(inputs[::2], inputs[1::2], strict=True)
        ]
        blocks = _hidden(ctx.activation, pre, None).unflatten(-1, (num_experts, size))
        y = (blocks * weights.unsqueeze(-1)).flatten(1) @ values.flatten(0, 1)
    wanted = [place for place in range(len(tensors)) if ctx.needs_input_grad[2 + place]]
    found = torch.autograd.grad(y, [cast(Tensor, tensors[place]) for place in wanted], dy, create_graph=create_graph)
    grads = dict(zip(wanted, found, strict=True))
    return (None, None, *(grads.get(place) for place in range(len(tensors))))


def _hidden(activation: Activation, pre: Sequence[Tensor], per_pair: Tensor | None) -> Tensor:
    """What goes into the out-projection, ``[P, s]``."""
    hidden = activation(pre[0])
    if len(pre) > 1:
        hidden = hidden * pre[1]
    return hidden if per_pair is None else hidden * per_pair.unsqueeze(1).to(hidden.dtype)
