"""The three products of an FFN of experts: C++ on a CPU, grouped on an accelerator, else one expert at a time.

Shapes: T tokens, N experts of s neurons, h width, P pairs (:mod:`emoe.sparse.pairs`).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from emoe.sparse import grouped
from emoe.sparse.build import compiled_kernels
from emoe.sparse.pairs import Pairs, chunks_for_threads


def pairs_of(mask: Tensor, x: Tensor) -> Pairs:
    """List the pairs of a mask ``[T, N]``, in as many chunks as the implementation for inputs like ``x`` uses."""
    return Pairs.of(mask, chunks_for_threads(len(mask)) if _compiled_for(x) else 1)


def gather_mm(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Pairs) -> Tensor:
    """Multiply ``x[token]`` by the expert's rows of ``weight [N, s, h]`` and add ``bias [N, s]``: ``[P, s]``."""
    if compiled := _compiled_for(x):
        return compiled.gather_mm(x.contiguous(), weight, bias, pairs.rows, pairs.starts)
    if grouped.is_usable(x):
        return grouped.gather_mm(x, weight, bias, pairs)
    out = x.new_empty(len(pairs.rows), weight.shape[1])
    for expert, rows, block in _blocks(pairs, out):
        picked = x.index_select(0, rows)
        if bias is None:
            torch.mm(picked, weight[expert].t(), out=block)
        else:
            torch.addmm(bias[expert], picked, weight[expert].t(), out=block)
    return out


def scatter_mm(a: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
    """Sum ``a[pair]`` times the expert's ``weight [N, s, h]`` over each token's pairs in float32: ``[T, h]``."""
    if compiled := _compiled_for(a):
        return compiled.scatter_mm(a.contiguous(), weight, pairs.rows, pairs.starts, pairs.tokens)
    if grouped.is_usable(weight):
        return grouped.scatter_mm(a, weight, pairs)
    out = torch.zeros(pairs.tokens, weight.shape[2], dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)
    for expert, rows, block in _blocks(pairs, a):
        out.index_add_(0, rows, (block @ weight[expert]).to(out.dtype))
    return out.to(a.dtype)


def outer_mm(a: Tensor, x: Tensor, pairs: Pairs, weight: Tensor) -> Tensor:
    """Sum ``a[pair]^T x[token]`` over each expert's pairs: ``[N, s, h]`` with the memory layout of ``weight``."""
    out = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
    if compiled := _compiled_for(a):
        compiled.outer_mm(a.contiguous(), x.contiguous(), pairs.rows, pairs.starts, out)
        return out
    if grouped.is_usable(x):
        return out.copy_(grouped.outer_mm(a, x, pairs))
    out[pairs.starts.diff() == 0] = 0
    for expert, rows, block in _blocks(pairs, a):
        torch.mm(block.t(), x.index_select(0, rows), out=out[expert])
    return out


def expert_sums(a: Tensor, pairs: Pairs, num_experts: int) -> Tensor:
    """Sum ``a [P, s]`` over each expert's pairs: ``[N, s]``."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    sums = torch.zeros(num_experts, a.shape[1], dtype=dtype, device=a.device)
    return sums.index_add_(0, pairs.experts, a.to(dtype)).to(a.dtype)


def _blocks(pairs: Pairs, per_pair: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert that has pairs, with its tokens and its rows of ``per_pair [P, ...]``; needs a single chunk."""
    counts = pairs.starts.diff().tolist()
    blocks = zip(pairs.rows.split(counts), per_pair.split(counts), strict=True)
    return ((expert, *block) for expert, block in enumerate(blocks) if counts[expert])


def _compiled_for(x: Tensor) -> ModuleType | None:
    """Return the compiled kernels if they take inputs like ``x``."""
    return compiled_kernels() if x.device.type == "cpu" and x.dtype != torch.float16 else None
