"""Serve few tokens of a frozen FFN: read only the chosen experts' weights, and each of them once."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from emoe.architectures import bias_of, weight_of
from emoe.compiled.build import is_in_memory
from emoe.layer import RoutedActivation
from emoe.routers import Stamp

_DTYPES = (torch.float32, torch.bfloat16)
_MAX_TOKENS = 64
_MAX_TOKENS_BFLOAT16 = (
    16  # processors with AVX-512 may multiply matrices in bfloat16 much faster than in float32
)


class Layout:
    """The weights of a frozen FFN by expert: views where each neuron's weights lie together, else copies.

    Linear layers give views of the in-projections and copies of the values; GPT-2's Conv1D the opposite.

    Args:
        layer: routed FFN with plain weights on the CPU, in float32 or bfloat16.
        kernels: compiled kernels.
    """

    def __init__(self, layer: RoutedActivation, kernels: ModuleType) -> None:
        self._activation, self._kernels = layer.activation, kernels
        inputs, values = layer.ffn.blocks(layer.config.num_experts)
        self._inputs = []
        for weight, bias in inputs:
            self._inputs.append(
                (weight.detach().contiguous(), None if bias is None else bias.detach())
            )
        self._values = values.detach().contiguous()
        self._projections = [module for _, module in layer.ffn.projections()]
        is_transposed = layer.ffn.spec.transposed
        self._stamps = [Stamp(module, has_copy=is_transposed) for module in self._projections[:-1]]
        self._stamps.append(Stamp(self._projections[-1], has_copy=not is_transposed))
        self._bias_addresses = self._addresses_of_biases()

    def is_current(self) -> bool:
        """Check that the FFN's weights and biases are the same and unchanged."""
        if self._addresses_of_biases() != self._bias_addresses:
            return False
        return all(
            stamp.is_of(module)
            for stamp, module in zip(self._stamps, self._projections, strict=True)
        )

    def _addresses_of_biases(self) -> list[int]:
        biases = [
            bias_of(module) for module in self._projections[:-1]
        ]  # SparseFFN adds the last one
        return [bias.data_ptr() for bias in biases if bias is not None]

    def compute(self, x: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
        """Sum the outputs ``[T, h]`` of the chosen experts in float32, without the output bias.

        Args:
            x: FFN inputs ``[T, h]``.
            mask: chosen experts ``[T, N]`` bool.
            weights: expert weights ``[T, N]``, None if all chosen experts have weight 1.
        """
        neurons = [
            self._kernels.few_gather_mm(x, mask, weight, bias) for weight, bias in self._inputs
        ]
        hidden = self._activation(neurons[0])
        if len(neurons) > 1:  # the FFN is gated
            hidden = hidden * neurons[1]
        if weights is not None:
            per_pair = weights.t()[mask.t()]  # by expert, as the kernels order them
            hidden = hidden * per_pair.unsqueeze(1).to(hidden.dtype)
        return self._kernels.few_scatter_mm(hidden, mask, self._values)


def can_serve(layer: RoutedActivation) -> bool:
    """Check if the kernels take a routed FFN's weights."""
    weights = [weight_of(module) for _, module in layer.ffn.projections()]
    has_one_dtype = len({weight.dtype for weight in weights}) == 1
    are_plain = all(is_in_memory(weight) and weight.is_contiguous() for weight in weights)
    return has_one_dtype and are_plain and weights[0].dtype in _DTYPES


def are_few(rows: Tensor) -> bool:
    """Check if inputs ``[T, h]`` have few enough tokens for :meth:`Layout.compute` to be the fastest."""
    is_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    is_half = rows.dtype == torch.bfloat16
    return len(rows) <= (_MAX_TOKENS_BFLOAT16 if is_half and is_avx512 else _MAX_TOKENS)
