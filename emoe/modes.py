"""The training and evaluation modes of a model's modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training or evaluation mode of each module of a model after a ``with`` block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        # not with train(), which would change all modules below a module
        for module, is_training in modes:
            module.training = is_training
