"""A few tokens at a time, as a language model decodes them: only the chosen experts' weights are read.

Such a forward pass is bound by memory, so two things are kept between passes while nothing is trained: the mean keys, and the values laid out by
neuron (``[d, h]``, as large as the out-projection's weight), without which an expert's values lie scattered over memory. Both are forgotten when
the model trains or a gradient is recorded, and made again when the weights have changed: when PyTorch counts a change, when they are other tensors, when any
optimiser has taken a step, or when one of 16 places of each is not what it was. A few numbers that something else changed behind PyTorch's back, between two passes of a
model at rest, are not seen.

One token at a time, to decide how a pass is computed takes as long as to compute it. So what was decided is kept too, as long as a guard (:mod:`emoe.decision_guard`) sees
that all it was decided by is as it was.

The compiled kernels read the weights once, where they lie; PyTorch copies the chosen ones first.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from emoe.architectures import FFN
from emoe.decision_guard import Guard, Sampled
from emoe.sparse.build import compiled_kernels

_COMPILED = (torch.float32, torch.bfloat16)


class DecodeWeights(NamedTuple):
    """One FFN's weights as decoding reads them.

    Attributes:
        inputs: ``[N, s * h]`` weights of the in-projections, the activated one first; views, where they lie by neuron.
        biases: theirs, ``[N, s]`` or None.
        values: ``[N, s * h]`` by neuron, a copy; or ``[h, N, s]`` as they lie in the out-projection.
        gate: mean keys ``[N, h]``, for a router that scores by them.
        kernels: the compiled ones, where they can read the inputs' weights, or None; values they read by neuron only.
    """

    inputs: list[Tensor]
    biases: list[Tensor | None]
    values: Tensor
    gate: Tensor | None
    kernels: ModuleType | None


class Decoding(NamedTuple):
    """How a forward pass is decoded.

    Attributes:
        weights: the FFN's.
        activation: elementwise.
        activation_name: by which the kernels know it, or None.
        bias: of the out-projection.
        output_biases: ``[N, h]``, those of the experts instead.
        top_k: how many experts are chosen, those with the largest products with the gate; None where the router chooses.
        whole: the FFN's module does nothing but call the FFN's parts.
    """

    weights: DecodeWeights
    activation: Callable[[Tensor], Tensor]
    activation_name: str | None
    bias: Tensor | None
    output_biases: Tensor | None
    top_k: int | None
    whole: bool


class Way(NamedTuple):
    """How the sparse path computes a forward pass.

    Attributes:
        guard: read all that this was chosen by.
        decoding: how it is decoded; None where it is no few tokens of a model at rest.
    """

    guard: Guard
    decoding: Decoding | None


class DecodeCache:
    """What is kept of one FFN's weights between the forward passes of decoding, and how the last of them was decoded.

    Threads may share it: what is kept is replaced as a whole. Copies start empty.
    """

    def __init__(self) -> None:
        self._kept: tuple[Hashable, list[Sampled], DecodeWeights] | None = None
        self._last: tuple[tuple[Any, ...], Way] | None = None

    def last(self, x: Tensor) -> Way | None:
        """How the last forward pass was decoded, where its input was like this one and all that was read for it is as it was."""
        last = self._last
        return last[1] if last is not None and last[0] == _like(x) and last[1].guard.holds() else None

    def remember(self, x: Tensor, way: Way) -> None:
        """Remember how a forward pass with this input is decoded, as long as the guard holds."""
        if (kernels := compiled_kernels()) is not None:
            way.guard.compare_by(kernels)
        self._last = (_like(x), way)

    def get(
        self, weights: Sequence[Tensor], settings: Hashable, guard: Guard, make: Callable[[], DecodeWeights]
    ) -> DecodeWeights:
        """What ``make`` gave for these weights as they are, made now where they have changed.

        Args:
            weights: whose changes count.
            settings: what else it is made from, and where the weights lie.
            guard: is told to see whether they change.
            make: makes it.
        """
        kept = self._kept
        if kept is None or kept[0] != settings or not all(map(Sampled.is_still, kept[1], weights)):
            kept = self._kept = (settings, [Sampled(weight) for weight in weights], make())
        for sampled, weight in zip(kept[1], weights, strict=True):
            guard.numbers(weight, sampled)
        return kept[2]

    def clear(self) -> None:
        """Forget it, and give the memory back."""
        self._kept = self._last = None

    def __reduce__(self) -> tuple[type[DecodeCache], tuple[()]]:
        return DecodeCache, ()


def _like(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device


@torch.no_grad()
def decode_weights(ffn: FFN, num_experts: int, gate: Tensor | None, *, by_neuron: bool) -> DecodeWeights:
    """Lay out an FFN's weights for :func:`decode_ffn`.

    Args:
        ffn: whose weights.
        num_experts: N.
        gate: mean keys, where the router scores by them.
        by_neuron: copy the values, so that those of an expert lie together.
    """
    blocks, values = ffn.blocks(num_experts)
    inputs = [weight.detach().flatten(1) for weight, _ in blocks]
    biases = [None if bias is None else bias.detach() for _, bias in blocks]
    laid_out = values.contiguous().flatten(1) if by_neuron else values.permute(2, 0, 1)
    read = (*inputs, *(bias for bias in biases if bias is not None))
    readable = all(t.is_contiguous() and t.device.type == "cpu" and t.dtype in _COMPILED for t in read)
    kernels = compiled_kernels() if readable else None
    return DecodeWeights(inputs, biases, laid_out.detach(), gate, kernels)


def choose_by_gate(x: Tensor, weights: DecodeWeights, top_k: int) -> Tensor:
    """The experts ``[T, k]`` of weights that are chosen by their gate."""
    experts: Tensor = cast(ModuleType, weights.kernels).chosen_by(weights.gate, x, top_k)
    return experts


def decode_ffn(x: Tensor, decoding: Decoding, experts: Tensor, scales: Tensor | None) -> Tensor:
    """Sum of the chosen experts' outputs, without the output bias; no gradient.

    Args:
        x: ``[..., h]``, the FFN's input of T tokens.
        decoding: how it is decoded.
        experts: ``[T, k]``, the chosen ones.
        scales: their weights ``[T, k]``, or None where all are 1.

    Returns:
        ``[..., h]``, a view of nothing: whoever changes one in place could not under FSDP2, or later with gradients.
    """
    weights, name = decoding.weights, decoding.activation_name
    if weights.kernels is not None and weights.values.ndim == 2 and name is not None:
        y: Tensor = weights.kernels.ffn_mm(x, weights.inputs, weights.biases, weights.values, name, experts, scales)
        return y
    pre = _rows(x.reshape(len(experts), -1), weights, experts)
    hidden = decoding.activation(pre[0])
    if len(pre) > 1:
        hidden = hidden * pre[1]
    if scales is not None:
        hidden = (hidden.view(*experts.shape, -1) * scales.unsqueeze(-1).to(hidden.dtype)).flatten(1)
    return _values_times(hidden, weights, experts).view(x.shape).data


def _rows(x: Tensor, weights: DecodeWeights, experts: Tensor) -> list[Tensor]:
    """Pre-activations of the chosen experts' neurons, ``[T, k * s]``, and the up-projection's part of a gated FFN."""
    if weights.kernels is not None:
        found: list[Tensor] = weights.kernels.rows_mm(x, weights.inputs, weights.biases, experts)
        return found
    flat = experts.flatten()
    return [
        _rows_times(x, weight.index_select(0, flat).view(len(x), -1, x.shape[1]), bias, flat)
        for weight, bias in zip(weights.inputs, weights.biases, strict=True)
    ]


def _rows_times(x: Tensor, weights: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
    """``x [T, h]`` times each row's own ``weights [T, n, h]``, plus those of ``bias [N, s]``: ``[T, n]``."""
    z = F.linear(x, weights[0]) if len(x) == 1 else torch.bmm(weights, x.unsqueeze(2)).squeeze(2)
    return z if bias is None else z + bias.index_select(0, experts).view(len(x), -1)


def _values_times(hidden: Tensor, weights: DecodeWeights, experts: Tensor) -> Tensor:
    """``hidden [T, k * s]`` times the values of each row's own experts ``[T, k]``: ``[T, h]``."""
    by_neuron = weights.values.ndim == 2
    if weights.kernels is not None and by_neuron:
        y: Tensor = weights.kernels.values_mm(hidden, weights.values, experts)
        return y
    tokens, flat = len(hidden), experts.flatten()
    if by_neuron:
        chosen = weights.values.index_select(0, flat).view(tokens, hidden.shape[1], -1)
        return hidden @ chosen[0] if tokens == 1 else torch.bmm(hidden.unsqueeze(1), chosen).squeeze(1)
    chosen = weights.values.index_select(1, flat).view(weights.values.shape[0], tokens, -1)
    return F.linear(hidden, chosen[:, 0]) if tokens == 1 else torch.einsum("tn,htn->th", hidden, chosen)
