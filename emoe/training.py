"""What a training step needs of a converted model: its balance loss, and running gates that follow the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emoe.layer import routed_layers


def aux_loss(model: nn.Module) -> Tensor | float:
    """Sum the balance losses of the last forward pass over layers, times their coefficient (:func:`emoe.routing.balance_loss`).

    Add it to the task loss of a training step. A pass is one call of the model, or of a part of it that is called by itself,
    in the same thread.

    Args:
        model: a converted model.

    Returns:
        A scalar with its graph; the number 0.0 where the configuration asks for no loss.
    """
    layers = routed_layers(model)
    newest = max((layer.pass_loss.number for layer in layers), default=0)
    losses = [
        loss * layer.config.aux_loss_coefficient
        for layer in layers
        if (loss := layer.pass_loss.read(newest)) is not None
    ]
    return torch.stack(losses).sum() if losses else 0.0


def update_gates_(model: nn.Module) -> None:
    """Move running gates towards the present mean keys; call it after each optimiser step.

    Only a configuration with ``gate_momentum`` has running gates. Without it gates are computed from the weights
    in every forward pass, and this does nothing.

    Args:
        model: a converted model.
    """
    for layer in routed_layers(model):
        layer.router.update_()
