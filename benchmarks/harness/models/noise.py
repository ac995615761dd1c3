"""NoisyTune (Wu et al. 2022), a baseline of the paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


@torch.no_grad()
def noisy_tuning_(
    model: nn.Module, intensity: float = 0.15, *, seed: int = 0, exclude: Sequence[str] = ("classifier", "score")
) -> int:
    """Add uniform noise to the pre-trained weights in place, before fine-tuning.

    Each parameter gets ``U(-1/2, 1/2) * intensity * std(parameter)``. Parameters with one element have no standard
    deviation and stay unchanged, as does the new head.

    Args:
        model: the model.
        intensity: lambda; the authors use 0.15.
        seed: seed of the noise.
        exclude: name components of the new head's parameters.

    Returns:
        The number of changed parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    changed = 0
    for name, parameter in model.named_parameters():
        if parameter.numel() < 2 or not set(exclude).isdisjoint(name.split(".")):
            continue
        noise = torch.rand(parameter.shape, generator=generator) - 0.5
        parameter.add_((noise * intensity * parameter.float().std().cpu()).to(parameter))
        changed += parameter.numel()
    return changed
