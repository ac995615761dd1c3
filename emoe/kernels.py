"""The three products of an FFN of experts: in C++ on a CPU with a compiler, grouped on an accelerator, else one expert at a time; with the same results.

A *pair* is a token and one of its experts. Shapes: T tokens, N experts of s neurons, h width, P pairs.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import itertools
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from emoe import grouped

_SOURCE = Path(__file__).with_name("kernels.cpp")
_NAME = "emoe_kernels"
_TOKENS_PER_CHUNK = 2048
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pairs:
    """The chosen pairs, sorted by chunk of tokens, then expert, then token.

    Attributes:
        rows: ``[P]`` int64, the tokens.
        experts: ``[P]`` int64.
        starts: ``[chunks * N + 1]`` int64; the pairs of chunk c and expert e begin at ``starts[c * N + e]``.
        tokens: T.
    """

    rows: Tensor
    experts: Tensor
    starts: Tensor
    tokens: int

    @staticmethod
    def of(mask: Tensor) -> Pairs:
        """The pairs of a boolean mask ``[T, N]``."""
        tokens, num_experts = mask.shape
        chunks = _chunks(tokens) if mask.device.type == "cpu" and compiled_kernels() else 1
        length = -(-tokens // chunks)
        padded = torch.nn.functional.pad(mask, (0, 0, 0, length * chunks - tokens))
        by_expert = padded.view(chunks, length, num_experts).transpose(1, 2)
        chunk, expert, row = by_expert.nonzero(as_tuple=True)
        counts = by_expert.sum(2).flatten()
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Pairs(chunk * length + row, expert, starts, tokens)


def _chunks(tokens: int) -> int:
    """As many for each thread, of about 2048 tokens (fewer, and the calls weigh more than the cache gains); the number shapes the order of sums, so it depends on nothing else."""
    threads = torch.get_num_threads()
    return threads * max(1, -(-tokens // (threads * _TOKENS_PER_CHUNK)))


def gather_mm(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Pairs) -> Tensor:
    """``x[token]`` times the expert's rows of ``weight [N, s, h]``, plus ``bias [N, s]``: ``[P, s]``."""
    if compiled := _usable(x):
        return compiled.gather_mm(x.contiguous(), weight, bias, pairs.rows, pairs.starts)
    if grouped.is_usable(x):
        return grouped.gather_mm(x, weight, bias, pairs)
    out = x.new_empty(len(pairs.rows), weight.shape[1])
    for expert, low, high in _blocks(pairs, weight.shape[0]):
        picked = x.index_select(0, pairs.rows[low:high])
        out[low:high] = torch.nn.functional.linear(picked, weight[expert], None if bias is None else bias[expert])
    return out


def scatter_mm(a: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
    """Sum over each token's pairs of ``a [P, s]`` times the expert's ``weight [N, s, h]``: ``[T, h]``, summed in float32."""
    if compiled := _usable(a):
        return compiled.scatter_mm(a.contiguous(), weight, pairs.rows, pairs.starts, pairs.tokens)
    if grouped.is_usable(weight):
        return grouped.scatter_mm(a, weight, pairs)
    out = torch.zeros(pairs.tokens, weight.shape[2], dtype=_sum_type(a), device=a.device)
    for expert, low, high in _blocks(pairs, weight.shape[0]):
        out.index_add_(0, pairs.rows[low:high], (a[low:high] @ weight[expert]).to(out.dtype))
    return out.to(a.dtype)


def outer_mm(a: Tensor, x: Tensor, pairs: Pairs, like: Tensor) -> Tensor:
    """Sum over each expert's pairs of ``a[pair]^T x[token]``: ``[N, s, h]``, laid out in memory as ``like`` is."""
    out = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    if compiled := _usable(a):
        compiled.outer_mm(a.contiguous(), x.contiguous(), pairs.rows, pairs.starts, out)
        return out
    if grouped.is_usable(x):
        return out.copy_(grouped.outer_mm(a, x, pairs))
    sums = torch.zeros(like.shape, dtype=_sum_type(a), device=a.device)
    for expert, low, high in _blocks(pairs, like.shape[0]):
        sums[expert] += a[low:high].t() @ x.index_select(0, pairs.rows[low:high])
    return out.copy_(sums)


def expert_sums(a: Tensor, pairs: Pairs, num_experts: int) -> Tensor:
    """Sum over each expert's pairs of ``a [P, s]``: ``[N, s]``."""
    dtype = _sum_type(a)
    sums = torch.zeros(num_experts, a.shape[1], dtype=dtype, device=a.device)
    return sums.index_add_(0, pairs.experts, a.to(dtype)).to(a.dtype)


def _sum_type(a: Tensor) -> torch.dtype:
    return torch.float64 if a.dtype == torch.float64 else torch.float32


def _blocks(pairs: Pairs, num_experts: int) -> list[tuple[int, int, int]]:
    """``(expert, first pair, end)`` of all blocks that are not empty."""
    starts = pairs.starts.tolist()
    return [
        (block % num_experts, low, high) for block, (low, high) in enumerate(itertools.pairwise(starts)) if high > low
    ]


def _usable(x: Tensor) -> ModuleType | None:
    return compiled_kernels() if x.device.type == "cpu" and x.dtype != torch.float16 else None


@functools.cache
def compiled_kernels() -> ModuleType | None:
    """The compiled module, built once a machine (about half a minute) and kept in the user's cache; None without a compiler."""
    version = f"{torch.__version__} {torch.version.git_version}"
    digest = hashlib.sha256(version.encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "emoe" / digest
    library = cache / f"{_NAME}.so"
    try:
        if not library.exists():
            _build(library)
        return _load(library)
    except (OSError, RuntimeError, ImportError) as error:
        _logger.warning("emoe: no compiled kernels, the sparse backend uses PyTorch: %s", str(error).splitlines()[0])
        return None


def _build(library: Path) -> None:
    import ninja
    from torch.utils import cpp_extension

    _logger.warning("emoe: compiling kernels, once on this machine")
    library.parent.mkdir(parents=True, exist_ok=True)
    path = os.environ.get("PATH", os.defpath)
    # the package's own program, which is on the path only in an activated environment
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, path])
    try:
        # in a folder of its own and then moved, so that processes that start together do not meet
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            cpp_extension.load(
                _NAME,
                [str(_SOURCE)],
                extra_cflags=["-O3", "-fopenmp"],
                extra_ldflags=["-fopenmp"],
                build_directory=folder,
            )
            (Path(folder) / library.name).replace(library)
    finally:
        os.environ["PATH"] = path


def _load(library: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(_NAME, str(library))
    spec = importlib.util.spec_from_loader(_NAME, loader)
    if spec is None:
        raise ImportError(f"{library} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
