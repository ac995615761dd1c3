"""Look at a model in training, and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Give every module its mode back, and the random generators their state: training goes on as if nobody had looked."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
