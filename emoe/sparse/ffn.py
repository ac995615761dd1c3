"""Compute the chosen experts of an FFN, forward and backward, on views of the dense weights.

The backward pass needs the FFN's input and the pre-activations of the chosen experts; it computes the activation again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from emoe.sparse.kernels import Pairs, expert_sums, gather_mm, outer_mm, pairs_of, scatter_mm

Activation = Callable[[Tensor], Tensor]
Inputs = Sequence[
    tuple[Tensor, Tensor | None]
]  # weight [N, s, h] and bias [N, s] of each in-projection


def sparse_ffn(
    x: Tensor,
    inputs: Inputs,
    values: Tensor,
    activation: Activation,
    mask: Tensor,
    weights: Tensor | None,
) -> Tensor:
    """Sum the outputs of the chosen experts, without the output bias.

    Args:
        x: FFN inputs ``[T, h]``.
        inputs: weight ``[N, s, h]`` and bias ``[N, s]`` of the in-projection and, if gated, the up-projection.
        values: values ``[N, s, h]``.
        activation: elementwise function that does not write over its input.
        mask: chosen experts ``[T, N]`` bool.
        weights: expert weights ``[T, N]``, None if all chosen experts have weight 1.

    Returns:
        Outputs ``[T, h]`` in the dtype of ``x``, or in autocast's.
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
        *inputs: Any,
    ) -> Tensor:
        pre = [
            gather_mm(x, weight, bias, pairs)
            for weight, bias in zip(inputs[::2], inputs[1::2], strict=True)
        ]
        ctx.activation, ctx.pairs = activation, pairs
        x_needed = any(ctx.needs_input_grad[5::2])  # for the gradients of the in-projections
        ctx.save_for_backward(per_pair, x if x_needed else None, values, *inputs, *pre)
        return scatter_mm(_hidden(activation, pre, per_pair), values, pairs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "no second derivatives of sparse FFNs: call emoe.set_backend_(model, 'masked')"
            )
        per_pair, x, values, *saved = ctx.saved_tensors
        count = len(saved) // 3
        inputs, pre = saved[: 2 * count], saved[2 * count :]
        weights, biases = inputs[::2], inputs[1::2]
        pairs, needed = ctx.pairs, ctx.needs_input_grad
        with torch.enable_grad():
            leaves = [z.detach().requires_grad_() for z in pre]
            scale = None if per_pair is None else per_pair.detach().requires_grad_()
            hidden = _hidden(ctx.activation, leaves, scale)
        d_values = outer_mm(hidden.detach(), dy, pairs, values) if needed[4] else None
        leaves = leaves if scale is None else [*leaves, scale]
        grads = torch.autograd.grad(hidden, leaves, gather_mm(dy, values, None, pairs))
        d_x: Tensor | None = None
        d_inputs: list[Tensor | None] = []
        for i, (weight, bias, dz) in enumerate(zip(weights, biases, grads, strict=False)):
            d_inputs.append(outer_mm(dz, x, pairs, weight) if needed[5 + 2 * i] else None)
            d_inputs.append(
                expert_sums(dz, pairs, weight.shape[0])
                if bias is not None and needed[6 + 2 * i]
                else None
            )
            if needed[3]:
                dx = scatter_mm(dz, weight, pairs)
                d_x = dx if d_x is None else d_x + dx
        return None, None, None if scale is None else grads[-1], d_x, d_values, *d_inputs


def _hidden(activation: Activation, pre: Sequence[Tensor], per_pair: Tensor | None) -> Tensor:
    """Compute the input of the out-projection ``[P, s]``."""
    hidden = activation(pre[0])
    if len(pre) > 1:
        hidden = hidden * pre[1]
    return hidden if per_pair is None else hidden * per_pair.unsqueeze(1).to(hidden.dtype)
