"""Facts of the machine that ``torch.compile`` takes as constants, because it cannot compute them.

It calls these functions while it compiles, and keeps the results. The import of this module imports
PyTorch's compiler, so only compiled code imports it.
"""

from __future__ import annotations

import torch

from emoe.compiled.build import compiled_kernels


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_compiled_kernels() -> bool:
    """Check if there are compiled kernels."""
    return compiled_kernels() is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def num_threads() -> int:
    """Return the number of torch's threads."""
    return torch.get_num_threads()
