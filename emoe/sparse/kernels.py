"""The three products of an FFN of experts: in C++ on a CPU, grouped on a GPU, else one expert at a time.

Shapes: T tokens, N experts of s neurons, h width, P pairs of a token and a chosen expert.

The grouped product is one call of PyTorch for all experts. It needs rows of a multiple of 16 bytes, so smaller experts
are padded. On a GPU the order of a token's sum varies unless ``torch.use_deterministic_algorithms(True)`` is set. It is
tested on a CPU and not timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from emoe.compiled.build import compiled_kernels

_TOKENS_PER_CHUNK = 2048  # smaller chunks cost more calls than the cache saves


@dataclass(frozen=True)
class Pairs:
    """Hold the chosen pairs, sorted by chunk of tokens, then expert, then token.

    Attributes:
        rows: tokens ``[P]`` int64.
        experts: experts ``[P]`` int64.
        starts: ``[chunks * N + 1]`` int64; the pairs of chunk c and expert e start at ``starts[c * N + e]``.
        tokens: number of tokens T.
    """

    rows: Tensor
    experts: Tensor
    starts: Tensor
    tokens: int

    @property
    def ends(self) -> Tensor:
        """End of each expert's pairs ``[N]`` int32, in a single chunk."""
        return self.starts[1:].to(torch.int32)


def pairs_of(mask: Tensor, x: Tensor) -> Pairs:
    """List the pairs of a mask ``[T, N]``, in the number of chunks that the products of ``x`` need."""
    tokens, num_experts = mask.shape
    threads = torch.get_num_threads()
    # the same number for each thread; it determines the order of sums
    chunks = (
        threads * max(1, -(-tokens // (threads * _TOKENS_PER_CHUNK))) if _compiled_for(x) else 1
    )
    length = -(-tokens // chunks)
    padded = F.pad(mask, (0, 0, 0, length * chunks - tokens))
    by_expert = padded.view(chunks, length, num_experts).transpose(1, 2)
    chunk, expert, row = by_expert.nonzero(as_tuple=True)
    counts = by_expert.sum(2).flatten()
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Pairs(chunk * length + row, expert, starts, tokens)


def gather_mm(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Pairs) -> Tensor:
    """Multiply ``x[token]`` by the expert's rows of ``weight [N, s, h]`` and add ``bias [N, s]``: ``[P, s]``."""
    if compiled := _compiled_for(x):
        return compiled.gather_mm(x.contiguous(), weight, bias, pairs.rows, pairs.starts)
    if can_group(x):
        product = F.grouped_mm(x[pairs.rows], pad_rows(weight).transpose(1, 2), offs=pairs.ends)[
            :, : weight.shape[1]
        ]
        return product.contiguous() if bias is None else product + bias[pairs.experts]
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
    out = torch.zeros(
        pairs.tokens,
        weight.shape[2],
        dtype=torch.promote_types(a.dtype, torch.float32),
        device=a.device,
    )
    if can_group(weight):
        product = F.grouped_mm(pad_rows(a), pad_rows(weight), offs=pairs.ends)
        return out.index_add_(0, pairs.rows, product.to(out.dtype)).to(a.dtype)
    for expert, rows, block in _blocks(pairs, a):
        out.index_add_(0, rows, (block @ weight[expert]).to(out.dtype))
    return out.to(a.dtype)


def outer_mm(a: Tensor, x: Tensor, pairs: Pairs, weight: Tensor) -> Tensor:
    """Sum ``a[pair]^T x[token]`` over each expert's pairs: ``[N, s, h]`` with the memory layout of ``weight``."""
    out = torch.empty_strided(
        weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device
    )
    if compiled := _compiled_for(a):
        compiled.outer_mm(a.contiguous(), x.contiguous(), pairs.rows, pairs.starts, out)
        return out
    if can_group(x):
        return out.copy_(
            F.grouped_mm(pad_rows(a).t(), x[pairs.rows], offs=pairs.ends)[:, : a.shape[1]]
        )
    out[pairs.starts.diff() == 0] = 0
    for expert, rows, block in _blocks(pairs, a):
        torch.mm(block.t(), x.index_select(0, rows), out=out[expert])
    return out


def expert_sums(a: Tensor, pairs: Pairs, num_experts: int) -> Tensor:
    """Sum ``a [P, s]`` over each expert's pairs: ``[N, s]``."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    sums = torch.zeros(num_experts, a.shape[1], dtype=dtype, device=a.device)
    return sums.index_add_(0, pairs.experts, a.to(dtype)).to(a.dtype)


def can_group(x: Tensor) -> bool:
    """Check if ``grouped_mm`` takes ``x [..., h]``: PyTorch documents bfloat16 on compute capability 8 and later."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0) and x.shape[-1] % 8 == 0


def pad_rows(x: Tensor) -> Tensor:
    """Pad dimension 1 with zeros to a multiple of 16 bytes; the result is contiguous."""
    missing = -x.shape[1] % (16 // x.element_size())
    return (F.pad(x, (*[0, 0] * (x.dim() - 2), 0, missing)) if missing else x).contiguous()


def _blocks(pairs: Pairs, per_pair: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert with pairs, its tokens, and its rows of ``per_pair [P, ...]``; only for pairs in one chunk."""
    counts = pairs.starts.diff().tolist()
    blocks = zip(pairs.rows.split(counts), per_pair.split(counts), strict=True)
    return ((expert, *block) for expert, block in enumerate(blocks) if counts[expert])


def _compiled_for(x: Tensor) -> ModuleType | None:
    """Return the compiled kernels if they take inputs like ``x``."""
    return compiled_kernels() if x.device.type == "cpu" and x.dtype != torch.float16 else None
