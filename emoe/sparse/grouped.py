"""The products of :mod:`emoe.sparse.kernels` with PyTorch's grouped matrix product: one call for all experts.

``grouped_mm`` needs rows of a multiple of 16 bytes, so smaller experts are padded. On a GPU the order of a token's sum
varies unless ``torch.use_deterministic_algorithms(True)`` is set. Tested on a CPU, not timed on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from emoe.sparse.pairs import Pairs


def is_usable(x: Tensor) -> bool:
    """Check if ``grouped_mm`` takes ``x [..., h]``: PyTorch documents bfloat16 on compute capability 8 and later."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0) and x.shape[-1] % _alignment(x) == 0


def gather_mm(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Pairs) -> Tensor:
    """See :func:`emoe.sparse.kernels.gather_mm`."""
    size = weight.shape[1]
    out = F.grouped_mm(x[pairs.rows], _padded(weight, 1).transpose(1, 2), offs=_ends(pairs))[:, :size]
    return out.contiguous() if bias is None else out + bias[pairs.experts]


def scatter_mm(a: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
    """See :func:`emoe.sparse.kernels.scatter_mm`."""
    product = F.grouped_mm(_padded(a, 1), _padded(weight, 1), offs=_ends(pairs))
    sums = torch.zeros(pairs.tokens, weight.shape[2], dtype=torch.float32, device=a.device)
    return sums.index_add_(0, pairs.rows, product.float()).to(a.dtype)


def outer_mm(a: Tensor, x: Tensor, pairs: Pairs) -> Tensor:
    """See :func:`emoe.sparse.kernels.outer_mm`."""
    return F.grouped_mm(_padded(a, 1).t(), x[pairs.rows], offs=_ends(pairs))[:, : a.shape[1]]


def _ends(pairs: Pairs) -> Tensor:
    return pairs.starts[1:].to(torch.int32)  # of each expert: an accelerator uses a single chunk of tokens


def _alignment(x: Tensor) -> int:
    return 16 // x.element_size()


def _padded(x: Tensor, dim: int) -> Tensor:
    """Pad dimension ``dim`` with zeros to an aligned length; the result is contiguous."""
    missing = -x.shape[dim] % _alignment(x)
    return F.pad(x, (*[0, 0] * (x.dim() - 1 - dim), 0, missing)).contiguous() if missing else x.contiguous()
