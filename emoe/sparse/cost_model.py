"""When is the sparse path faster? A formula whose constants were measured, so that the choice is the same in every run.

Time of the sparse path as a share of the dense FFN's, forward and backward, with T tokens, experts of s neurons, k of N
used, width h::

    k/N  +  (per_expert + per_share * k/N) / s  +  threads * (per_call + per_product / (h * s)) / T

The second term is what small experts lose in efficiency, the third what costs the same however many tokens there are. The constants are fits to points
that ``benchmarks.speed.layer.measure`` measured with one and two threads, T 16 to 2048, s 12 to 384, h 384 to 2048, k/N 1/4 and 1/2: 280 in float32 with the
compiled kernels, on two cores of an AMD EPYC (Zen 3); 116 in float32 and 112 in bfloat16 by PyTorch's small products, on two cores of one of Zen 4. Without
compiled kernels PyTorch takes one expert after the other, whose products share badly over threads: the first two terms then cost
``1 + (threads - 1) * (per_thread + per_thread_expert / s)`` times as much. ``snakemake speed`` shows how well it holds where it runs.
"""

from __future__ import annotations

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
# decoding copies the chosen experts' weights in front of the products, which are bound by memory, and has its own routing to pay for
_DECODE_READS, _DECODE_CALLS = 1.15, 4e4


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


def predicted_decode_ratio(tokens: int, hidden: int, expert_size: int, active: float, num_experts: int) -> float:
    """Predict the time of decoding so few tokens by :mod:`emoe.sparse.decode` as a share of the dense FFN's.

    Args:
        tokens: of the forward pass.
        hidden: the FFN's width h.
        expert_size: neurons of an expert, s.
        active: share of the experts that a token uses.
        num_experts: N.
    """
    return _DECODE_READS * tokens * active + _DECODE_CALLS / (hidden * expert_size * num_experts)
