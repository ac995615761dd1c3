"""When is the sparse path faster? A formula whose constants were measured, so that the choice is the same in every run.

Time of the sparse path as a share of the dense FFN's, forward and backward, with T tokens, experts of s neurons, k of N
used, width h::

    k / N * (1 + per_neuron / s)  +  threads * (per_call + per_product / (h * s)) / T

The first part is what the products cost, which are the less efficient the smaller an expert is. The second is what costs the same however
many tokens there are. The constants are a fit to 116 (float32) and 112 (bfloat16) measured points on two cores of an AMD EPYC (Zen 4), one and two
threads, T 16 to 2048, s 12 to 384, h 384 to 2048, with k/N 1/4 and 1/2; ``snakemake speed`` shows how well it holds where it runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class _Costs(NamedTuple):
    per_neuron: float
    per_call: float
    per_product: float


_FLOAT32 = _Costs(20.0, 8.0, 1.3e5)
_COSTS = {torch.float32: _FLOAT32, torch.float64: _FLOAT32, torch.bfloat16: _Costs(65.0, 50.0, 1.8e6)}


def sparse_share(
    tokens: int, hidden: int, expert_size: int, active: float, dtype: torch.dtype, threads: int
) -> float | None:
    """Expected time of the compiled sparse path on a CPU as a share of the dense FFN's; None for a dtype that it does not take.

    Args:
        tokens: of the forward pass.
        hidden: the FFN's width h.
        expert_size: neurons of an expert, s.
        active: share of the experts that a token uses.
        dtype: of the products.
        threads: that torch uses.
    """
    costs = _COSTS.get(dtype)
    if costs is None:
        return None
    overhead = threads * (costs.per_call + costs.per_product / (hidden * expert_size))
    return active * (1 + costs.per_neuron / expert_size) + overhead / max(tokens, 1)
