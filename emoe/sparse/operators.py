"""The products of an FFN of experts as operators of PyTorch, with their derivatives.

``torch.compile`` cannot follow the code of the products. It treats an operator as one step of the
compiled program, whose result has a known shape.

An operator takes the tensors of :class:`Pairs` one by one, because it cannot take other objects.
PyTorch calls three functions of each product:

- ``_empty_…`` gives compiled code a tensor of the result's shape. It has the product's arguments.
- ``_save_for_…`` keeps what the derivative needs.
- ``…_backward`` computes the derivative: a gradient for each argument, None if it has none.

Shapes: T tokens, N experts of s neurons, h width, P pairs of a token and a chosen expert.
"""

# ruff: noqa: ARG001 - PyTorch prescribes the arguments of these functions

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emoe.sparse import kernels
from emoe.sparse.kernels import Pairs


def list_pairs(mask: Tensor, x: Tensor, experts_per_token: int) -> Pairs:
    """Compute :func:`kernels.list_pairs` as an operator.

    Args:
        mask: chosen experts ``[T, N]`` bool.
        x: FFN inputs ``[T, h]``, whose device and dtype determine the kernels.
        experts_per_token: number of chosen experts of a token. Only compiled code uses it, to know
            the number of pairs in advance.
    """
    num_tokens = mask.shape[0]
    num_chunks = kernels.number_of_chunks(x)
    token, expert, starts = _list_pairs(mask, num_chunks, num_tokens * experts_per_token)
    return Pairs(token, expert, starts, num_tokens)


@torch.library.custom_op("emoe::list_pairs", mutates_args=())
def _list_pairs(mask: Tensor, num_chunks: int, num_pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors of :class:`Pairs`.

    Only the function below uses ``num_pairs``, because it has a mask without values.
    """
    pairs = kernels.list_pairs(mask, num_chunks)
    return pairs.token, pairs.expert, pairs.starts


@_list_pairs.register_fake
def _empty_list_pairs(
    mask: Tensor, num_chunks: int, num_pairs: int
) -> tuple[Tensor, Tensor, Tensor]:
    num_experts = mask.shape[1]
    token = mask.new_empty(num_pairs, dtype=torch.int64)
    expert = mask.new_empty(num_pairs, dtype=torch.int64)
    starts = mask.new_empty(num_chunks * num_experts + 1, dtype=torch.int64)
    return token, expert, starts


def gather_mm(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Pairs) -> Tensor:
    """Compute :func:`kernels.gather_mm` ``[P, s]``, with a derivative."""
    return _gather_mm(x, weight, bias, pairs.token, pairs.expert, pairs.starts)


def scatter_mm(a: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
    """Compute :func:`kernels.scatter_mm` ``[T, h]``, with a derivative."""
    return _scatter_mm(a, weight, pairs.token, pairs.expert, pairs.starts, pairs.num_tokens)


def outer_mm(a: Tensor, x: Tensor, pairs: Pairs, like: Tensor) -> Tensor:
    """Compute :func:`kernels.outer_mm` ``[N, s, h]``, with a derivative."""
    return _outer_mm(a, x, like, pairs.token, pairs.expert, pairs.starts)


@torch.library.custom_op("emoe::gather_mm", mutates_args=())
def _gather_mm(
    x: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor, expert: Tensor, starts: Tensor
) -> Tensor:
    return kernels.gather_mm(x, weight, bias, Pairs(token, expert, starts, x.shape[0]))


@_gather_mm.register_fake
def _empty_gather_mm(
    x: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor, expert: Tensor, starts: Tensor
) -> Tensor:
    return x.new_empty(token.shape[0], weight.shape[1])


def _save_for_gather_mm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _bias, token, expert, starts = inputs
    ctx.num_tokens = x.shape[0]
    _needs_x, needs_weight, *_ = ctx.needs_input_grad
    # only the gradient of the weight needs the input
    saved_x = x if needs_weight else None
    ctx.save_for_backward(saved_x, weight, token, expert, starts)


def _gather_mm_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, token, expert, starts = ctx.saved_tensors
    pairs = Pairs(token, expert, starts, ctx.num_tokens)
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    d_x = None
    if needs_x:
        d_x = scatter_mm(d_out, weight, pairs)
    d_weight = None
    if needs_weight:
        d_weight = outer_mm(d_out, x, pairs, like=weight)
    d_bias = None
    if needs_bias:
        d_bias = kernels.expert_sums(d_out, pairs, num_experts=weight.shape[0])
    # no gradients of token, expert and starts
    return d_x, d_weight, d_bias, None, None, None


_gather_mm.register_autograd(_gather_mm_backward, setup_context=_save_for_gather_mm)


@torch.library.custom_op("emoe::scatter_mm", mutates_args=())
def _scatter_mm(
    a: Tensor, weight: Tensor, token: Tensor, expert: Tensor, starts: Tensor, num_tokens: int
) -> Tensor:
    return kernels.scatter_mm(a, weight, Pairs(token, expert, starts, num_tokens))


@_scatter_mm.register_fake
def _empty_scatter_mm(
    a: Tensor, weight: Tensor, token: Tensor, expert: Tensor, starts: Tensor, num_tokens: int
) -> Tensor:
    return a.new_empty(num_tokens, weight.shape[2])


def _save_for_scatter_mm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, weight, token, expert, starts, num_tokens = inputs
    ctx.num_tokens = num_tokens
    _needs_a, needs_weight, *_ = ctx.needs_input_grad
    # only the gradient of the weight needs the rows
    saved_a = a if needs_weight else None
    ctx.save_for_backward(saved_a, weight, token, expert, starts)


def _scatter_mm_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    a, weight, token, expert, starts = ctx.saved_tensors
    pairs = Pairs(token, expert, starts, ctx.num_tokens)
    needs_a, needs_weight, *_ = ctx.needs_input_grad
    d_a = None
    if needs_a:
        d_a = gather_mm(d_out, weight, None, pairs)
    d_weight = None
    if needs_weight:
        d_weight = outer_mm(a, d_out, pairs, like=weight)
    # no gradients of token, expert, starts and num_tokens
    return d_a, d_weight, None, None, None, None


_scatter_mm.register_autograd(_scatter_mm_backward, setup_context=_save_for_scatter_mm)


@torch.library.custom_op("emoe::outer_mm", mutates_args=())
def _outer_mm(
    a: Tensor, x: Tensor, like: Tensor, token: Tensor, expert: Tensor, starts: Tensor
) -> Tensor:
    return kernels.outer_mm(a, x, Pairs(token, expert, starts, x.shape[0]), like)


@_outer_mm.register_fake
def _empty_outer_mm(
    a: Tensor, x: Tensor, like: Tensor, token: Tensor, expert: Tensor, starts: Tensor
) -> Tensor:
    return torch.empty_like(like)


def _save_for_outer_mm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, x, _like, token, expert, starts = inputs
    ctx.save_for_backward(a, x, token, expert, starts)


def _outer_mm_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    # the FFN's backward pass calls outer_mm, so this gives second derivatives of the FFN
    a, x, token, expert, starts = ctx.saved_tensors
    pairs = Pairs(token, expert, starts, x.shape[0])
    d_a = gather_mm(x, d_out, None, pairs)
    d_x = scatter_mm(a, d_out, pairs)
    # no gradients of like (only its layout is used), token, expert and starts
    return d_a, d_x, None, None, None, None


_outer_mm.register_autograd(_outer_mm_backward, setup_context=_save_for_outer_mm)
