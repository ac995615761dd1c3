"""Facts of the machine that ``torch.compile`` takes as constants, because it cannot compute them.

It calls these functions while it compiles, and keeps the results. The import of this module imports
PyTorch's compiler, so only compiled code imports it.
"""

from __future__ import annotations

import torch
from torch.autograd.forward_ad import make_dual

from emoe.compiled.build import compiled_kernels


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_compiled_kernels() -> bool:
    """Check if there are compiled kernels."""
    return compiled_kernels() is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_exporting() -> bool:
    """Check if ``torch.export`` traces this code.

    In older versions of torch, compiled code takes ``torch.compiler.is_exporting()`` for True.
    """
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_in_forward_mode() -> bool:
    """Check if this code computes forward-mode derivatives."""
    number = torch.zeros(())
    try:
        make_dual(number, number)
    except RuntimeError:  # raised outside of the context in which dual numbers exist
        return False
    return True


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def num_threads() -> int:
    """Return the number of torch's threads."""
    return torch.get_num_threads()
