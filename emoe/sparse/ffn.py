"""Compute the chosen experts of an FFN on views of the dense weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from emoe.architectures import Blocks, InBlocks
from emoe.sparse.operators import gather_mm, list_pairs, scatter_mm

Activation = Callable[[Tensor], Tensor]


def sparse_ffn(
    x: Tensor,
    blocks: Blocks,
    activation: Activation,
    mask: Tensor,
    weights: Tensor | None,
    experts_per_token: int,
) -> Tensor:
    """Sum the outputs of each token's chosen experts, without the output bias.

    Args:
        x: FFN inputs ``[T, h]``.
        blocks: weights of the FFN by expert.
        activation: elementwise function that does not write over its input.
        mask: chosen experts ``[T, N]`` bool.
        weights: expert weights ``[T, N]``, None if all chosen experts have weight 1.
        experts_per_token: number of experts that a token chooses. In compiled code every token must
            have this number of experts in the mask.

    Returns:
        Outputs ``[T, h]`` in the dtype of ``x``, or under autocast in the dtype of autocast.

    Raises:
        RuntimeError: a tensor has a forward-mode derivative, which the operators would lose.
    """
    if _have_tangents(x, weights, blocks):
        raise RuntimeError(
            "no forward-mode derivatives of sparse FFNs: call emoe.set_backend_(model, 'masked')"
        )
    device_type = x.device.type
    # the operators do not know autocast: cast the tensors as autocast does for linear layers
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x = x.to(dtype)
        blocks = _cast(blocks, dtype)

    with torch.autocast(device_type, enabled=False):
        pairs = list_pairs(mask, x, experts_per_token)
        # pre-activations [P, s] of the P chosen pairs
        z = gather_mm(x, blocks.activated.weight, blocks.activated.bias, pairs)
        # a gated FFN multiplies by its up-projection
        up = None
        if blocks.up is not None:
            up = gather_mm(x, blocks.up.weight, blocks.up.bias, pairs)
        hidden = activation(z)
        if up is not None:
            hidden = hidden * up
        if weights is not None:
            weight_of_pair = weights[pairs.token, pairs.expert]  # [P]
            hidden = hidden * weight_of_pair.unsqueeze(1).to(hidden.dtype)
        return scatter_mm(hidden, blocks.values, pairs)


def _cast(blocks: Blocks, dtype: torch.dtype) -> Blocks:
    """Cast all weights and biases of an FFN."""
    up = blocks.up
    if up is not None:
        up = _cast_projection(up, dtype)
    return Blocks(
        activated=_cast_projection(blocks.activated, dtype),
        up=up,
        values=blocks.values.to(dtype),
    )


def _cast_projection(blocks: InBlocks, dtype: torch.dtype) -> InBlocks:
    """Cast the weight and the bias, if there is one, of an in-projection or up-projection."""
    bias = blocks.bias
    if bias is not None:
        bias = bias.to(dtype)
    return InBlocks(weight=blocks.weight.to(dtype), bias=bias)


def _have_tangents(x: Tensor, weights: Tensor | None, blocks: Blocks) -> bool:
    """Check if an argument of :func:`sparse_ffn` has a tangent, its forward-mode derivative."""
    # compiled code cannot read the tangent of a tensor
    if torch.compiler.is_compiling():
        from emoe.sparse import constants

        return bool(constants.is_in_forward_mode())
    tensors = [x, weights, blocks.activated.weight, blocks.activated.bias, blocks.values]
    if blocks.up is not None:
        tensors += [blocks.up.weight, blocks.up.bias]
    given = [tensor for tensor in tensors if tensor is not None]
    return any(unpack_dual(tensor).tangent is not None for tensor in given)
