"""Predict if the sparse products are faster than the dense FFN.

The constants were measured, so the choice is the same in every run.

The time of the sparse products, forward and backward, is predicted as a share of the dense FFN's
time. With T tokens, width h, and k of N experts of s neurons used, this share is::

    k/N  +  (per_expert + per_share * k/N) / s  +  threads * (per_call + per_product / (h * s)) / T

The second term is the lower efficiency of small experts. The third is a cost that does not depend
on the tokens. The constants are fits to the measure ``layer`` of the benchmark ``speed`` with one
and two threads, T 16 to 2048, s 12 to 384, h 384 to 2048 and k/N 1/4 and 1/2. The compiled kernels
were measured in float32 with 280 settings, on two cores of an AMD EPYC (Zen 3). PyTorch's small
products were measured on two cores of a Zen 4, with 116 settings in float32 and 112 in bfloat16.

Without compiled kernels, PyTorch computes one expert after another and uses threads badly, so the
first two terms cost ``1 + (threads - 1) * (per_thread + per_thread_expert / s)`` times as much.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from emoe.sparse.kernels import can_group, has_compiled_kernels, num_threads


class _Costs(NamedTuple):
    """The constants of the prediction for one dtype. The module's docstring has the formula."""

    per_expert: float
    per_share: float
    per_call: float
    per_product: float


# of the compiled kernels
_COMPILED_FLOAT32 = _Costs(per_expert=3.3, per_share=5.0, per_call=10.0, per_product=4e4)
# of PyTorch's small products
_FLOAT32 = _Costs(per_expert=3.7, per_share=10.0, per_call=7.2, per_product=1.26e5)
_COSTS = {
    torch.float32: _FLOAT32,
    torch.float64: _FLOAT32,  # not measured
    torch.bfloat16: _Costs(per_expert=11.0, per_share=36.0, per_call=48.0, per_product=1.7e6),
}
_PER_THREAD = 0.25
_PER_THREAD_EXPERT = 8.0


def pays_off(x: Tensor, expert_size: int, active: float) -> bool:
    """Check if the sparse products should be faster than the dense FFN for these inputs.

    On a CPU, the predicted time must be below the dense FFN's. On an accelerator, PyTorch must have
    a grouped product for these inputs.

    Args:
        x: FFN inputs ``[T, h]``.
        expert_size: number of neurons per expert.
        active: share of the experts that a token uses.
    """
    tokens, width = x.shape
    dtype = dtype_of_products(x)
    if x.device.type != "cpu":
        # can_group reads only the device, dtype and width of its argument
        example = x.new_empty(0, width, dtype=dtype)
        return can_group(example)
    ratio = predicted_time_ratio(
        tokens,
        width,
        expert_size,
        active,
        dtype,
        threads=num_threads(),
        compiled=has_compiled_kernels(),
    )
    return ratio is not None and ratio < 1


def dtype_of_products(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer multiplies inputs ``x``, under autocast or not."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def predicted_time_ratio(
    tokens: int,
    width: int,
    expert_size: int,
    active: float,
    dtype: torch.dtype,
    threads: int,
    compiled: bool = True,
) -> float | None:
    """Predict the time of the sparse products on a CPU, divided by the dense FFN's time.

    None if there are no constants for the dtype.

    Args:
        tokens: number of tokens of the forward pass, T.
        width: the model's width, h.
        expert_size: number of neurons per expert, s.
        active: share of the experts that a token uses.
        dtype: dtype of the products.
        threads: number of torch's threads.
        compiled: true if the compiled kernels are available.
    """
    costs = _costs_of(dtype, compiled)
    if costs is None:
        return None
    # The three terms of the formula in the module's docstring. The first is `active`, the second is
    # the lower efficiency of small experts.
    small_experts = (costs.per_expert + costs.per_share * active) / expert_size
    # the third: a cost that does not depend on the tokens, as a share of the time of all tokens
    per_call = costs.per_call + costs.per_product / (width * expert_size)
    few_tokens = threads * per_call / max(tokens, 1)
    # without compiled kernels, PyTorch computes one expert after another and uses threads badly
    slowdown = 1.0
    if not compiled:
        per_thread = _PER_THREAD + _PER_THREAD_EXPERT / expert_size
        slowdown = 1 + (threads - 1) * per_thread
    return (active + small_experts) * slowdown + few_tokens


def _costs_of(dtype: torch.dtype, compiled: bool) -> _Costs | None:
    """Return the constants for a dtype; None if it has none."""
    if compiled and dtype == torch.float32:
        return _COMPILED_FLOAT32
    return _COSTS.get(dtype)
