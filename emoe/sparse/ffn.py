"""Compute the chosen experts of an FFN, forward and backward, on views of the dense weights.

The backward pass needs the FFN's input and the pre-activations of the chosen experts. It computes
the activation again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from emoe.sparse.kernels import Pairs, expert_sums, gather_mm, outer_mm, pairs_of, scatter_mm

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

    Returns:
        Outputs ``[T, h]`` in the dtype of ``x``, or under autocast in the dtype of autocast.
    """
    # weight, bias, weight, bias: autograd takes tensors as single arguments, but not in lists
    in_projections: list[Tensor | None] = []
    for weight, bias in inputs:
        in_projections += [weight, bias]
    device_type = x.device.type
    # autocast is off inside the autograd function: cast the tensors as autocast does for linear
    # layers
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x = x.to(dtype)
        values = values.to(dtype)
        in_projections = [None if tensor is None else tensor.to(dtype) for tensor in in_projections]
    pairs = pairs_of(mask, x)
    per_pair = None
    if weights is not None:
        per_pair = weights[pairs.token, pairs.expert]
    with torch.autocast(device_type, enabled=False):
        return _SparseFFN.apply(activation, pairs, per_pair, x, values, *in_projections)


class _SavedTensors(NamedTuple):
    """The tensors that the backward pass of :func:`sparse_ffn` needs.

    P is the number of chosen (token, expert) pairs.

    Attributes:
        per_pair: expert weights ``[P]``, None if all are 1.
        x: FFN inputs ``[T, h]``, None if no in-projection's weight needs a gradient.
        values: weight of the out-projection ``[N, s, h]``.
        weights: weight ``[N, s, h]`` of each in-projection.
        biases: bias ``[N, s]`` or None of each in-projection.
        pre_activations: outputs ``[P, s]`` of each in-projection.
    """

    per_pair: Tensor | None
    x: Tensor | None
    values: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    pre_activations: Sequence[Tensor]


class _NeededGradients(NamedTuple):
    """Which inputs of the autograd function need a gradient.

    Attributes:
        x: true if the FFN inputs need one.
        values: true if the out-projection's weight needs one.
        weights: true for each in-projection whose weight needs one.
        biases: true for each in-projection whose bias needs one.
    """

    x: bool
    values: bool
    weights: Sequence[bool]
    biases: Sequence[bool]


class _SparseFFN(torch.autograd.Function):
    """The autograd function of :func:`sparse_ffn`: its sum of outputs, with a backward pass.

    The arguments ``activation``, ``x`` and ``values`` of ``forward`` are those of
    :func:`sparse_ffn`. ``pairs`` are the chosen pairs, and ``per_pair`` are their expert weights.
    ``in_projections`` are each in-projection's weight and bias, one after another.
    """

    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        pairs: Pairs,
        per_pair: Tensor | None,
        x: Tensor,
        values: Tensor,
        *in_projections: Any,
    ) -> Tensor:
        # weight, bias, and for a gated FFN the up-projection's weight and bias
        weights = in_projections[::2]
        biases = in_projections[1::2]
        pre_activations = []
        for weight, bias in zip(weights, biases, strict=True):
            pre_activations.append(gather_mm(x, weight, bias, pairs))
        ctx.activation = activation
        ctx.pairs = pairs
        # the input is only needed for the gradients of the in-projections' weights
        saved_x = x if any(_needed_gradients(ctx).weights) else None
        ctx.save_for_backward(per_pair, saved_x, values, *in_projections, *pre_activations)
        hidden = _hidden(activation, pre_activations, per_pair)
        return scatter_mm(hidden, values, pairs)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "no second derivatives of sparse FFNs: call emoe.set_backend_(model, 'masked')"
            )
        saved = _saved_tensors(ctx)
        needed = _needed_gradients(ctx)
        pairs = ctx.pairs

        # compute the input of the out-projection again, now with a graph
        with torch.enable_grad():
            pre_activations = [z.detach().requires_grad_() for z in saved.pre_activations]
            per_pair = None
            if saved.per_pair is not None:
                per_pair = saved.per_pair.detach().requires_grad_()
            hidden = _hidden(ctx.activation, pre_activations, per_pair)

        d_values = None
        if needed.values:
            d_values = outer_mm(hidden.detach(), d_y, pairs, saved.values)

        d_hidden = gather_mm(d_y, saved.values, None, pairs)

        # through the activation: gradients of the pre-activations, then of the expert weights
        inputs = [*pre_activations]
        if per_pair is not None:
            inputs.append(per_pair)
        gradients = torch.autograd.grad(hidden, inputs, d_hidden)
        d_pre_activations = gradients[: len(pre_activations)]
        d_per_pair = None
        if per_pair is not None:
            d_per_pair = gradients[-1]

        d_in_projections = _in_projection_gradients(d_pre_activations, saved, needed, pairs)
        d_x = None
        if needed.x:
            d_x = _input_gradient(d_pre_activations, saved.weights, pairs)
        # One gradient for each argument of `forward`. The activation and the pairs have none.
        return None, None, d_per_pair, d_x, d_values, *d_in_projections


def _in_projection_gradients(
    d_pre_activations: Sequence[Tensor],
    saved: _SavedTensors,
    needed: _NeededGradients,
    pairs: Pairs,
) -> list[Tensor | None]:
    """Compute the gradients of the in-projections' weights and biases.

    Args:
        d_pre_activations: gradient of the outputs ``[P, s]`` of each in-projection.
        saved: tensors of the forward pass.
        needed: which gradients are needed.
        pairs: chosen pairs.

    Returns:
        For each in-projection, the gradient of its weight ``[N, s, h]`` and of its bias ``[N, s]``,
        one after another. None for a gradient that is not needed.
    """
    gradients: list[Tensor | None] = []
    for index, d_z in enumerate(d_pre_activations):
        weight = saved.weights[index]
        d_weight = None
        if needed.weights[index]:
            # the input was saved if a weight needs a gradient
            d_weight = outer_mm(d_z, cast(Tensor, saved.x), pairs, weight)
        d_bias = None
        if needed.biases[index] and saved.biases[index] is not None:
            d_bias = expert_sums(d_z, pairs, num_experts=weight.shape[0])
        gradients += [d_weight, d_bias]
    return gradients


def _input_gradient(
    d_pre_activations: Sequence[Tensor], weights: Sequence[Tensor], pairs: Pairs
) -> Tensor:
    """Compute the gradient of the FFN's inputs ``[T, h]``: a sum over the in-projections.

    Args:
        d_pre_activations: gradient of the outputs ``[P, s]`` of each in-projection.
        weights: weight ``[N, s, h]`` of each in-projection.
        pairs: chosen pairs.
    """
    d_x = scatter_mm(d_pre_activations[0], weights[0], pairs)
    # the up-projection of a gated FFN
    if len(weights) > 1:
        d_x = d_x + scatter_mm(d_pre_activations[1], weights[1], pairs)
    return d_x


def _needed_gradients(ctx: Any) -> _NeededGradients:
    """Read which arguments of ``_SparseFFN.forward`` need a gradient."""
    _activation, _pairs, _per_pair, x, values, *in_projections = ctx.needs_input_grad
    # weight, bias, weight, bias
    return _NeededGradients(
        x=x, values=values, weights=in_projections[::2], biases=in_projections[1::2]
    )


def _saved_tensors(ctx: Any) -> _SavedTensors:
    """Read the tensors that ``_SparseFFN.forward`` saved."""
    per_pair, x, values, *others = ctx.saved_tensors
    # weight and bias of each in-projection come first, then the pre-activations of all
    num_in_projections = len(others) // 3
    in_projections = others[: 2 * num_in_projections]  # weight, bias, weight, bias
    pre_activations = others[2 * num_in_projections :]
    return _SavedTensors(
        per_pair=per_pair,
        x=x,
        values=values,
        weights=in_projections[::2],
        biases=in_projections[1::2],
        pre_activations=pre_activations,
    )


def _hidden(
    activation: Activation, pre_activations: Sequence[Tensor], per_pair: Tensor | None
) -> Tensor:
    """Compute the inputs of the out-projection ``[P, s]``, times the expert weights.

    Args:
        activation: elementwise function.
        pre_activations: outputs ``[P, s]`` of each in-projection.
        per_pair: expert weights ``[P]``, None if all are 1.
    """
    hidden = activation(pre_activations[0])
    # a gated FFN multiplies by its up-projection
    if len(pre_activations) > 1:
        hidden = hidden * pre_activations[1]
    if per_pair is not None:
        hidden = hidden * per_pair.unsqueeze(1).to(hidden.dtype)
    return hidden
