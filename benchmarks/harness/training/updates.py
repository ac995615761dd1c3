"""What training does to the FFNs: how far their weights move, and whether the gradients of two sets agree on where to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from benchmarks.harness.training.trainer import finite
from benchmarks.harness.training.undisturbed import undisturbed
from emoe.architectures import find_ffns
from emoe.layer_numbers import resolve_layers

# the gradients of all layers would take a whole backward pass; experts are in the last ones
_LAST = "last-quarter:1"


def ffn_weights(model: nn.Module, layers: str = "all") -> dict[int, list[nn.Parameter]]:
    """The weight matrices of every FFN that is trained, by layer; of GMoE those of all copies."""
    ffns = find_ffns(model)
    found = {}
    for place in resolve_layers(layers, len(ffns)):
        ffn = ffns[place]
        matrices = [module.weight for module in (*dict(ffn.inputs()).values(), ffn.proj_out)]
        trained = [weight for weight in matrices if isinstance(weight, nn.Parameter) and weight.requires_grad]
        if len(trained) == len(matrices):
            found[ffn.index] = trained
    return found


class WeightChange:
    """Measures how far the FFNs' weights move from where they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = ffn_weights(model)
        self._start = {
            layer: [weight.detach().cpu().clone() for weight in weights] for layer, weights in self._weights.items()
        }

    @torch.no_grad()
    def summary(self) -> dict[str, float | None]:
        """By layer the norm of the change as a share of the norm before, None where it diverged; layers that are not trained have none."""
        found: dict[str, float | None] = {}
        for layer, weights in self._weights.items():
            start = self._start[layer]
            change = _norm(weight.cpu() - old for weight, old in zip(weights, start, strict=True))
            found[str(layer)] = finite(change / max(_norm(start), 1e-12))
        return found


def _norm(tensors: Iterable[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


def gradient_agreement(
    model: nn.Module, reference: Iterable[Mapping[str, Any]], others: Mapping[str, Iterable[Mapping[str, Any]]]
) -> dict[str, dict[str, float | None]]:
    """Compare the loss's gradient on other rows with that on the reference rows, for the FFNs in the last quarter of the layers.

    The model is evaluated (no dropout) and stays as it was.

    Args:
        model: called with a batch, it gives ``loss``.
        reference: batches with labels.
        others: batches with labels, by the name of their set.

    Returns:
        The cosine by layer and name: 1 where both ask for the same change of the weights, negative where one undoes the other, None of a model that diverged.
    """
    weights = ffn_weights(model, _LAST)
    if not weights:
        return {}
    with undisturbed(model):
        model.eval()
        own = _gradients(model, weights, reference)
        found: dict[str, dict[str, float | None]] = {str(layer): {} for layer in weights}
        for name, batches in others.items():
            for layer, gradient in _gradients(model, weights, batches).items():
                scale = own[layer].norm() * gradient.norm()
                found[str(layer)][name] = finite(float(own[layer] @ gradient / scale)) if scale != 0 else 0.0
    return found


def _gradients(
    model: nn.Module, weights: Mapping[int, list[nn.Parameter]], batches: Iterable[Mapping[str, Any]]
) -> dict[int, Tensor]:
    """By layer the gradient of the mean loss over all rows, in one vector."""
    matrices = [weight for found in weights.values() for weight in found]
    device, total, rows = matrices[0].device, [torch.zeros_like(weight) for weight in matrices], 0
    for batch in batches:
        inputs = send_to_device(batch, device)
        size = len(inputs["labels"])
        with torch.enable_grad():
            found = torch.autograd.grad(model(**inputs)["loss"], matrices)
        total = [before + gradient * size for before, gradient in zip(total, found, strict=True)]
        rows += size
    gradients, flat = iter(total), {}
    for layer, own in weights.items():
        flat[layer] = torch.cat([next(gradients).flatten() for _ in own]).double() / max(rows, 1)
    return flat
