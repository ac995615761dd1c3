"""The three products of an FFN of experts, for the chosen experts only.

On a CPU, the compiled kernels in C++ compute them. On a GPU, PyTorch's grouped product does.
Without these, PyTorch computes one expert after another.

Shapes: T tokens, N experts of s neurons, h width, P pairs of a token and a chosen expert.

The grouped product is one call of PyTorch for all experts. The rows of its tensors must have a
multiple of 16 bytes. For that, neurons of zeros are appended. The width h is never padded. On a
GPU, a token's outputs are summed in varying order unless
``torch.use_deterministic_algorithms(True)`` is set. The grouped product is tested on a CPU and not
timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from emoe.compiled.build import compiled_kernels

# With smaller chunks, more calls are needed, which take longer than the cache saves.
_TOKENS_PER_CHUNK = 2048
_ALIGNMENT = 16  # bytes, of the rows of a grouped product


@dataclass(frozen=True)
class Pairs:
    """The (token, expert) pairs that were chosen.

    They are sorted by chunk of tokens, then expert, then token.

    Attributes:
        token: token number of each pair ``[P]`` int64.
        expert: expert number of each pair ``[P]`` int64.
        starts: ``[chunks * N + 1]`` int64. The pairs of chunk c and expert e start at
            ``starts[c * N + e]``. The last element is P.
        num_tokens: number of tokens T.
    """

    token: Tensor
    expert: Tensor
    starts: Tensor
    num_tokens: int

    @property
    def ends(self) -> Tensor:
        """End of each expert's pairs, ``[N]`` int32. Only for pairs in one chunk."""
        return self.starts[1:].to(torch.int32)


def list_pairs(mask: Tensor, num_chunks: int) -> Pairs:
    """List the (token, expert) pairs of a mask.

    Args:
        mask: chosen experts ``[T, N]`` bool.
        num_chunks: number of chunks of tokens (:func:`number_of_chunks`).
    """
    num_tokens, num_experts = mask.shape
    chunk_size = _ceil_divide(num_tokens, num_chunks)
    # append tokens that choose no expert, so that all chunks have the same size
    num_missing = chunk_size * num_chunks - num_tokens
    padded = F.pad(mask, (0, 0, 0, num_missing))  # adds rows at the end
    # [chunks, N, tokens of the chunk]
    by_expert = padded.view(num_chunks, chunk_size, num_experts).transpose(1, 2)
    # nonzero lists the pairs by chunk, then expert, then token
    chunk, expert, token_in_chunk = by_expert.nonzero(as_tuple=True)
    # pairs start where those of the chunks and experts before them end
    counts = by_expert.sum(2).flatten()
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    token = chunk * chunk_size + token_in_chunk
    # cloned, because nonzero returns views of one tensor, and an operator must return whole tensors
    return Pairs(token, expert.clone(), starts, num_tokens)


def number_of_chunks(x: Tensor) -> int:
    """Return the number of chunks into which the tokens of FFN inputs ``[T, h]`` are split.

    For compiled kernels it is a multiple of the number of threads, and determines the order in
    which they sum. Other kernels get one chunk.
    """
    if not _takes_compiled(x):
        return 1
    threads = num_threads()
    chunks_per_thread = _ceil_divide(x.shape[0], threads * _TOKENS_PER_CHUNK)
    # a thread has a chunk even if there are no tokens
    return threads * max(1, chunks_per_thread)


def _ceil_divide(number: int, divisor: int) -> int:
    """Divide a number of at least 0, and round up."""
    # `//` rounds down; with this addition, any remainder raises the result by 1
    return (number + divisor - 1) // divisor


def gather_mm(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Pairs) -> Tensor:
    """Multiply each pair's token by its expert's weight, and add the expert's bias.

    Args:
        x: a row for each token ``[T, h]``.
        weight: weights ``[N, s, h]``.
        bias: biases ``[N, s]`` or None.
        pairs: chosen pairs.

    Returns:
        Products ``[P, s]``.
    """
    compiled = _compiled_for(x)
    if compiled is not None:
        return compiled.gather_mm(x.contiguous(), weight, bias, pairs.token, pairs.starts)
    if can_group(x):
        return _gather_mm_grouped(x, weight, bias, pairs)
    expert_size = weight.shape[1]
    out = x.new_empty(len(pairs.token), expert_size)
    # one expert after another
    for of_expert in _split_by_expert(pairs, out):
        inputs = x.index_select(0, of_expert.tokens)
        weight_of_expert = weight[of_expert.expert].t()
        # `rows` is a view of the expert's rows in `out`, so the products are written into `out`
        if bias is None:
            torch.mm(inputs, weight_of_expert, out=of_expert.rows)
        else:
            torch.addmm(bias[of_expert.expert], inputs, weight_of_expert, out=of_expert.rows)
    return out


def _gather_mm_grouped(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Pairs) -> Tensor:
    """Multiply each pair's token by its expert's weight, with one grouped product for all experts.

    The arguments and the result are those of :func:`gather_mm`.
    """
    expert_size = weight.shape[1]
    # the product has a column for each neuron; the columns of appended neurons are removed
    padded_weight = pad_neurons(weight).transpose(1, 2)  # [N, h, padded s]
    padded_product = F.grouped_mm(x[pairs.token], padded_weight, offs=pairs.ends)  # [P, padded s]
    product = padded_product[:, :expert_size]
    if bias is None:
        return product.contiguous()
    return product + bias[pairs.expert]


def scatter_mm(a: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
    """Multiply each pair's row by its expert's weight, and sum the products of each token's pairs.

    Sums are computed in float32 at least.

    Args:
        a: a row for each pair ``[P, s]``.
        weight: weights ``[N, s, h]``.
        pairs: chosen pairs.

    Returns:
        Sums ``[T, h]`` in the dtype of ``a``.
    """
    compiled = _compiled_for(a)
    if compiled is not None:
        return compiled.scatter_mm(
            a.contiguous(), weight, pairs.token, pairs.starts, pairs.num_tokens
        )
    sum_dtype = torch.promote_types(a.dtype, torch.float32)
    width = weight.shape[2]
    sums = torch.zeros(pairs.num_tokens, width, dtype=sum_dtype, device=a.device)
    if can_group(weight):
        # Neurons of zeros are appended, for the alignment. The product sums over the neurons, so
        # these change neither its shape [P, h] nor its values.
        products = F.grouped_mm(pad_neurons(a), pad_neurons(weight), offs=pairs.ends)
        sums.index_add_(0, pairs.token, products.to(sum_dtype))
    else:
        # one expert after another
        for of_expert in _split_by_expert(pairs, a):
            products = of_expert.rows @ weight[of_expert.expert]
            sums.index_add_(0, of_expert.tokens, products.to(sum_dtype))
    return sums.to(a.dtype)


def outer_mm(a: Tensor, x: Tensor, pairs: Pairs, like: Tensor) -> Tensor:
    """Sum the outer products of ``a[pair]`` and ``x[token of the pair]`` over each expert's pairs.

    Args:
        a: a row for each pair ``[P, s]``.
        x: a row for each token ``[T, h]``.
        pairs: chosen pairs.
        like: tensor ``[N, s, h]`` with the memory layout, dtype and device of the result. Only
            these are used.

    Returns:
        Sums ``[N, s, h]``.
    """
    out = torch.empty_like(like)
    compiled = _compiled_for(a)
    if compiled is not None:
        compiled.outer_mm(a.contiguous(), x.contiguous(), pairs.token, pairs.starts, out)
        return out
    if can_group(x):
        # [N, padded s, h]: a row for each neuron; the rows of appended neurons are removed
        padded_sums = F.grouped_mm(pad_neurons(a).t(), x[pairs.token], offs=pairs.ends)
        expert_size = a.shape[1]
        return out.copy_(padded_sums[:, :expert_size])
    # the loop below skips experts without pairs, so their sums of 0 are set here
    out[pairs.starts.diff() == 0] = 0
    for of_expert in _split_by_expert(pairs, a):
        inputs = x.index_select(0, of_expert.tokens)
        torch.mm(of_expert.rows.t(), inputs, out=out[of_expert.expert])
    return out


def expert_sums(a: Tensor, pairs: Pairs, num_experts: int) -> Tensor:
    """Sum the rows ``[P, s]`` of each expert's pairs: ``[N, s]``.

    Args:
        a: a row for each pair ``[P, s]``.
        pairs: chosen pairs.
        num_experts: number of experts N.
    """
    sum_dtype = torch.promote_types(a.dtype, torch.float32)
    sums = torch.zeros(num_experts, a.shape[1], dtype=sum_dtype, device=a.device)
    sums.index_add_(0, pairs.expert, a.to(sum_dtype))
    return sums.to(a.dtype)


def can_group(x: Tensor) -> bool:
    """Check if PyTorch's ``grouped_mm`` takes a tensor ``[..., h]``.

    PyTorch documents it for bfloat16 on GPUs of compute capability 8 and later.
    """
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    capability = torch.cuda.get_device_capability(x.device)
    # eight numbers in bfloat16 have 16 bytes
    is_aligned = x.shape[-1] % 8 == 0
    return capability >= (8, 0) and is_aligned


def pad_neurons(x: Tensor) -> Tensor:
    """Append neurons of zeros until dimension 1, over the neurons, has a multiple of 16 bytes.

    The result is contiguous.

    Args:
        x: weights ``[N, s, h]``, or a row for each pair ``[P, s]``.
    """
    num_neurons = x.shape[1]
    # this number of elements has 16 bytes
    multiple = _ALIGNMENT // x.element_size()
    num_padded = _ceil_divide(num_neurons, multiple) * multiple
    num_missing = num_padded - num_neurons
    if num_missing == 0:
        return x.contiguous()
    # F.pad takes the elements to add before and after, for each dimension from the last one on
    if x.dim() == 2:
        return F.pad(x, (0, num_missing)).contiguous()
    return F.pad(x, (0, 0, 0, num_missing)).contiguous()


class _PairsOfExpert(NamedTuple):
    """The pairs of one expert.

    Attributes:
        expert: number of the expert.
        tokens: token of each pair ``[count]`` int64.
        rows: a row for each of these pairs ``[count, ...]``, as a view.
    """

    expert: int
    tokens: Tensor
    rows: Tensor


def _split_by_expert(pairs: Pairs, rows: Tensor) -> Iterator[_PairsOfExpert]:
    """Yield the pairs of each expert that has any. Only for pairs in one chunk.

    Args:
        pairs: chosen pairs.
        rows: a row for each pair ``[P, ...]``.
    """
    counts = pairs.starts.diff().tolist()
    tokens_of_experts = pairs.token.split(counts)
    rows_of_experts = rows.split(counts)
    for expert, count in enumerate(counts):
        if count > 0:
            yield _PairsOfExpert(expert, tokens_of_experts[expert], rows_of_experts[expert])


def _compiled_for(x: Tensor) -> ModuleType | None:
    """Return the compiled kernels, None if there are none or they do not take inputs like ``x``."""
    return compiled_kernels() if _takes_compiled(x) else None


def _takes_compiled(x: Tensor) -> bool:
    """Check if there are compiled kernels, and they take inputs like ``x``."""
    return x.device.type == "cpu" and x.dtype != torch.float16 and has_compiled_kernels()


def has_compiled_kernels() -> bool:
    """Check if there are compiled kernels."""
    if torch.compiler.is_compiling():
        from emoe.sparse import constants

        return bool(constants.has_compiled_kernels())
    return compiled_kernels() is not None


def num_threads() -> int:
    """Return the number of torch's threads."""
    if torch.compiler.is_compiling():
        from emoe.sparse import constants

        return int(constants.num_threads())
    return torch.get_num_threads()
