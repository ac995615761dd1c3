"""When is the sparse path faster? A formula whose constants were measured, so that the choice is the same in every run.

Time of the sparse path as a share of the dense FFN's, forward and backward, with T tokens, experts of s neurons, k of N
used, width h::

    k/N  +  (per_expert + per_share * k/N) / s  +  threads * (per_call + per_product / (h * s)) / T

The second term is what small experts lose in efficiency, the third what costs the same however many tokens there are. The constants are fits to points
that ``benchmarks.speed.layer.measure`` measured with one and two threads, T 16 to 2048, s 12 to 384, h 384 to 2048, k/N 1/4 and 1/2: 280 in float32 with the
compiled kernels, on two cores of an AMD EPYC (Zen 3); 116 in float32 and 112 in bfloat16 by PyTorch's small products, on two cores of one of Zen 4. Without
compiled kernels PyTorch takes one expert after the other, whose products share badly over threads: the first two terms then cost
``1 + (threads - 1) * (per_thread + per_thread_expert / s)`` times as much. ``snakemake speed`` shows how well it holds where it runs.

Few tokens without gradients are decoded (:mod:`emoe.sparse.decode`), in ``k/N * (first + (doubled + per_expert / s) * log2(T)) + calls / (h * s * N)`` of the
dense time: a fit to 106 points of the kind that ``benchmarks.speed.decode.measure_prompt`` measures, in float32 with slower compiled kernels than there are now, on Zen 3, T 1 to 64, s 8 to 96, h 256 to 2048, one and two threads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class _Costs(NamedTuple):
    per_expert: float
    per_share: float
    per_call: float
    per_product: float


_COMPILED_FLOAT32 = _Costs(3.3, 5.0, 10.0, 4e4)
_FLOAT32 = _Costs(3.7, 10.0, 7.2, 1.26e5)
_COSTS = {torch.float32: _FLOAT32, torch.float64: _FLOAT32, torch.bfloat16: _Costs(11.0, 36.0, 48.0, 1.7e6)}
_PER_THREAD, _PER_THREAD_EXPERT = 0.25, 8.0
# decoding without kernels, where each token's experts are copied, and in bfloat16 on most processors
_DECODE_READS, _DECODE_CALLS = 1.15, 4e4
# with them, experts are read once, and what grows with the tokens is that their products do less at a time than dense ones
_DECODE_FIRST, _DECODE_DOUBLED, _DECODE_PER_EXPERT, _DECODE_COMPILED_CALLS = 0.87, 0.13, 2.0, 6.3e4


def predicted_time_ratio(
    tokens: int,
    hidden: int,
    expert_size: int,
    active: float,
    dtype: torch.dtype,
    threads: int,
    *,
    compiled: bool = True,
) -> float | None:
    """Predict the time of the sparse path on a CPU as a share of the dense FFN's; None for a dtype that it does not take.

    Args:
        tokens: of the forward pass.
        hidden: the FFN's width h.
        expert_size: neurons of an expert, s.
        active: share of the experts that a token uses.
        dtype: of the products.
        threads: that torch uses.
        compiled: with the compiled kernels.

    >>> predicted_time_ratio(2048, 768, 48, 0.25, torch.float32, threads=1) < 0.5
    True
    """
    costs = _COMPILED_FLOAT32 if compiled and dtype == torch.float32 else _COSTS.get(dtype)
    if costs is None:
        return None
    small_experts = (costs.per_expert + costs.per_share * active) / expert_size
    few_tokens = threads * (costs.per_call + costs.per_product / (hidden * expert_size)) / max(tokens, 1)
    sharing = 1.0 if compiled else 1 + (threads - 1) * (_PER_THREAD + _PER_THREAD_EXPERT / expert_size)
    return (active + small_experts) * sharing + few_tokens


def decodes_many(dtype: torch.dtype, *, in_place: bool) -> bool:
    """Whether decoding pays for more than a very few tokens: where the compiled kernels read weights in place, and dense products are no faster.

    They are for bfloat16, unless the processor is one without AVX-512, where PyTorch multiplies bfloat16 slower than float32.
    """
    slow_bfloat16 = torch.backends.cpu.get_cpu_capability() == "AVX2"
    return in_place and (dtype == torch.float32 or (dtype == torch.bfloat16 and slow_bfloat16))


def predicted_decode_ratio(
    tokens: int,
    hidden: int,
    expert_size: int,
    active: float,
    num_experts: int,
    dtype: torch.dtype = torch.float32,
    *,
    in_place: bool = True,
) -> float:
    """Predict the time of decoding so few tokens by :mod:`emoe.sparse.decode` as a share of the dense FFN's.

    Args:
        tokens: of the forward pass, T.
        hidden: the FFN's width h.
        expert_size: neurons of an expert, s.
        active: share of the experts that a token uses.
        num_experts: N.
        dtype: of the products.
        in_place: the compiled kernels read weights where they lie.
    """
    weights = hidden * expert_size * num_experts
    if not decodes_many(dtype, in_place=in_place):
        return _DECODE_READS * tokens * active + _DECODE_CALLS / weights
    growth = (_DECODE_DOUBLED + _DECODE_PER_EXPERT / expert_size) * math.log2(tokens)
    return active * (_DECODE_FIRST + growth) + _DECODE_COMPILED_CALLS / weights
