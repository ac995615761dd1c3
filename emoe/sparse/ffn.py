"""Compute the chosen experts of an FFN on views of the dense weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from emoe.sparse.operators import gather_mm, list_pairs, scatter_mm

Activation = Callable[[Tensor], Tensor]
# weight [N, s, h] and bias [N, s] of each in-projection
Inputs = Sequence[tuple[Tensor, Tensor | None]]


def sparse_ffn(
    x: Tensor,
    inputs: Inputs,
    values: Tensor,
    activation: Activation,
    mask: Tensor,
    weights: Tensor | None,
    experts_per_token: int,
) -> Tensor:
    """Sum the outputs of each token's chosen experts, without the output bias.

    N is the number of experts, s the number of neurons of an expert.

    Args:
        x: FFN inputs ``[T, h]``.
        inputs: weight ``[N, s, h]`` and bias ``[N, s]`` of the in-projection and, if the FFN is
            gated, of the up-projection.
        values: weight of the out-projection, one row for each neuron ``[N, s, h]``.
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
    differentiated = [x, values, weights]
    for weight, bias in inputs:
        differentiated += [weight, bias]
    if _have_tangents(differentiated):
        raise RuntimeError(
            "no forward-mode derivatives of sparse FFNs: call emoe.set_backend_(model, 'masked')"
        )
    device_type = x.device.type
    # the operators do not know autocast: cast the tensors as autocast does for linear layers
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x = x.to(dtype)
        values = values.to(dtype)
        cast_inputs = []
        for weight, bias in inputs:
            cast_bias = None if bias is None else bias.to(dtype)
            cast_inputs.append((weight.to(dtype), cast_bias))
        inputs = cast_inputs

    with torch.autocast(device_type, enabled=False):
        pairs = list_pairs(mask, x, experts_per_token)
        # pre-activations [P, s] of the P chosen pairs, for each in-projection
        pre_activations = [gather_mm(x, weight, bias, pairs) for weight, bias in inputs]
        hidden = activation(pre_activations[0])
        # a gated FFN multiplies by its up-projection
        if len(pre_activations) > 1:
            hidden = hidden * pre_activations[1]
        if weights is not None:
            per_pair = weights[pairs.token, pairs.expert]
            hidden = hidden * per_pair.unsqueeze(1).to(hidden.dtype)
        return scatter_mm(hidden, values, pairs)


def _have_tangents(tensors: Iterable[Tensor | None]) -> bool:
    """Check if one of some tensors has a tangent, which stands for a forward-mode derivative."""
    # while it is compiled, a tensor does not tell
    if torch.compiler.is_compiling():
        from emoe.sparse import constants

        return bool(constants.is_in_forward_mode())
    given = [tensor for tensor in tensors if tensor is not None]
    return any(unpack_dual(tensor).tangent is not None for tensor in given)
