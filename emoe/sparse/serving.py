"""Compute few tokens with an FFN whose weights do not change.

Only the weights of chosen experts are read, and each of them once.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from emoe.architectures import InBlocks, bias_of, weight_of
from emoe.compiled.build import is_in_memory
from emoe.layer import RoutedActivation
from emoe.routers import Stamp

_DTYPES = (torch.float32, torch.bfloat16)
# largest number of tokens for which a layout is used
_MAX_TOKENS = 64
# Processors with AMX multiply matrices in bfloat16 much faster than in float32. So they use a
# layout in bfloat16 for fewer tokens.
_MAX_TOKENS_BFLOAT16_AMX = 16


class Layout:
    """The weights of an FFN by expert, for kernels that read the weights of one neuron at a time.

    They are views if the weights of each neuron lie together in memory, else copies. Linear layers
    give views of the in-projections and copies of the values. GPT-2's Conv1D gives the opposite. A
    layout must not be used after the weights have changed (:meth:`is_current`).

    Attributes:
        kernels: compiled kernels.

    Args:
        layer: routed FFN whose weights are on the CPU, in float32 or bfloat16 (:func:`can_serve`).
        kernels: compiled kernels.
    """

    def __init__(self, layer: RoutedActivation, kernels: ModuleType) -> None:
        self._activation = layer.activation
        self.kernels = kernels
        blocks = layer.ffn.blocks(layer.config.num_experts)
        self._activated = _contiguous(blocks.activated)
        self._up: InBlocks | None = None
        if blocks.up is not None:
            self._up = _contiguous(blocks.up)
        self._values = blocks.values.detach().contiguous()

        # The stamps detect later changes of the weights. They must know which of the tensors above
        # are copies. `contiguous` copied the in-projections if the weights are transposed, as in
        # GPT-2. Otherwise it copied the values.
        self._in_projections = [module for _, module in layer.ffn.in_projections()]
        self._proj_out = layer.ffn.proj_out
        has_input_copies = layer.ffn.spec.transposed
        self._input_stamps = []
        for module in self._in_projections:
            self._input_stamps.append(Stamp(module, has_copy=has_input_copies))
        self._value_stamp = Stamp(self._proj_out, has_copy=not has_input_copies)
        self._bias_addresses = self._addresses_of_biases()

    def is_current(self) -> bool:
        """Check that the FFN's weights and biases are the same and unchanged."""
        if self._addresses_of_biases() != self._bias_addresses:
            return False
        for stamp, module in zip(self._input_stamps, self._in_projections, strict=True):
            if not stamp.still_matches(module):
                return False
        return self._value_stamp.still_matches(self._proj_out)

    def _addresses_of_biases(self) -> list[int]:
        """Return the addresses of the in-projections' biases in memory.

        The layout does not use the output bias, which SparseFFN adds.
        """
        biases = [bias_of(module) for module in self._in_projections]
        return [bias.data_ptr() for bias in biases if bias is not None]

    def compute(self, x: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
        """Sum the outputs ``[T, h]`` of the chosen experts in float32, without the output bias.

        Args:
            x: FFN inputs ``[T, h]``.
            mask: chosen experts ``[T, N]`` bool.
            weights: expert weights ``[T, N]``, None if all chosen experts have weight 1.
        """
        # pre-activations [P, s]: a row for each chosen pair, sorted by expert, then token
        z = self.kernels.few_gather_mm(x, mask, self._activated.weight, self._activated.bias)
        hidden = self._activation(z)
        if self._up is not None:  # a gated FFN
            up = self.kernels.few_gather_mm(x, mask, self._up.weight, self._up.bias)
            hidden = hidden * up
        if weights is not None:
            # nonzero lists the pairs of the transposed mask [N, T] by expert, then token, like `z`
            expert, token = mask.t().nonzero(as_tuple=True)
            weight_of_pair = weights[token, expert]  # [P]
            hidden = hidden * weight_of_pair.unsqueeze(1).to(hidden.dtype)
        return self.kernels.few_scatter_mm(hidden, mask, self._values)


def _contiguous(blocks: InBlocks) -> InBlocks:
    """Return an in-projection's blocks without gradient, and with a contiguous weight."""
    bias = blocks.bias
    if bias is not None:
        bias = bias.detach()
    return InBlocks(weight=blocks.weight.detach().contiguous(), bias=bias)


def can_serve(layer: RoutedActivation) -> bool:
    """Check if the kernels take a routed FFN's weights.

    They take contiguous weights on the CPU, all in float32 or all in bfloat16.
    """
    weights = [weight_of(module) for _, module in layer.ffn.projections()]
    dtype = weights[0].dtype
    if dtype not in _DTYPES:
        return False
    for weight in weights:
        if weight.dtype != dtype:
            return False
        if not is_in_memory(weight) or not weight.is_contiguous():
            return False
    return True


def are_few(rows: Tensor) -> bool:
    """Check if inputs ``[T, h]`` have few enough tokens for a layout.

    With more tokens, other products should be faster than :meth:`Layout.compute`.
    """
    max_tokens = _MAX_TOKENS
    if rows.dtype == torch.bfloat16 and _may_have_amx():
        max_tokens = _MAX_TOKENS_BFLOAT16_AMX
    return len(rows) <= max_tokens


def _may_have_amx() -> bool:
    """Check if the processor multiplies matrices in bfloat16 with AMX, or might.

    Older versions of torch do not say. Every processor that has AMX has AVX-512 too.
    """
    if not hasattr(torch.cpu, "get_capabilities"):
        return torch.backends.cpu.get_cpu_capability() == "AVX512"
    # processors of other makers have no such key
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
