"""Change how a converted model routes or computes, in place."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from emoe.errors import ConversionError
from emoe.layer import RoutedActivation, routed_layers
from emoe.marks import no_experts, renew_mark_


def set_top_k_(model: nn.Module, top_k: int | None = None, *, score_threshold: float | None = None) -> None:
    """Change how many experts a converted model uses, in place. Exactly one of the two is given.

    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> report = emoe.convert_(model, emoe.EMoEConfig(num_experts=4, top_k=1, layers="all"))
    >>> emoe.set_top_k_(model, 2)
    >>> model.layers[0].activation.config.top_k
    2

    Args:
        model: a converted model.
        top_k: from now on this many for each token, in training too.
        score_threshold: in evaluation, each expert whose score is at least this, and the best one in any
            case. Scores are those of ``config.score``; :func:`emoe.record_routing` tells how many are then used.

    Raises:
        ConfigError: a value out of range.
        ConversionError: the model is not converted, or not exactly one of the two is given.
    """
    layers = _converted_layers(model, "set_top_k_")
    if (top_k is None) == (score_threshold is None):
        raise ConversionError("set_top_k_ takes either top_k or score_threshold")
    if top_k is None:
        _configure_(model, layers, score_threshold=score_threshold)
    else:
        _configure_(model, layers, top_k=top_k, score_threshold=None)


def set_backend_(model: nn.Module, backend: str) -> None:
    """Change which implementation a converted model's layers take, in place; what they compute stays the same.

    Args:
        model: a converted model.
        backend: ``auto``, ``masked`` or ``sparse``, as in the configuration.

    Raises:
        ConfigError: no such backend, or one that the configuration does not go with.
        ConversionError: the model is not converted.
    """
    _configure_(model, _converted_layers(model, "set_backend_"), backend=backend)


def _converted_layers(model: nn.Module, what: str) -> list[RoutedActivation]:
    layers = routed_layers(model)
    if not layers:
        raise no_experts(model, what, "convert it first")
    return layers


def _configure_(model: nn.Module, layers: list[RoutedActivation], **change: Any) -> None:
    # every configuration is checked before the first layer gets its own
    changed = [dataclasses.replace(layer.config, **change) for layer in layers]
    for layer, config in zip(layers, changed, strict=True):
        layer.configure_(config)
    renew_mark_(model)
