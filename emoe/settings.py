"""Change how a converted model routes or computes, in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from emoe.config import EMoEConfig
from emoe.errors import ConversionError
from emoe.layer import RoutedActivation, routed_layers
from emoe.marks import no_experts, renew_mark_
from emoe.routers import FixedRouter

# what shapes avg-k's scores, as it is when there are none
_NO_SCORES: dict[str, Any] = {
    "router": "fixed",
    "score": "keys",
    "score_bias": False,
    "normalize_gate": False,
    "value_norm_weighted": False,
    "gate_momentum": 0.0,
}


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


def fix_experts_(model: nn.Module, usage: Mapping[int, Tensor]) -> None:
    """Give every token the experts that were used most, in place: static pruning to the same share of neurons, a control of routing by token.

    The configuration's ``router`` is ``fixed`` from then on; ``top_k`` and ``selection`` stay. The counts are saved with the model.

    >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> report = emoe.convert_(model, emoe.EMoEConfig(num_experts=4, top_k=1, layers="all"))
    >>> with emoe.record_routing(model) as record:
    ...     y = model(torch.randn(2, 5, 16))
    >>> emoe.fix_experts_(model, {number: layer.loads for number, layer in record.layers.items()})
    >>> with emoe.record_routing(model) as record:
    ...     y = model(torch.randn(2, 5, 16))
    >>> int(record.layers[0].loads.max())
    10

    Args:
        model: a model converted with an :class:`EMoEConfig` whose router is ``avg_k``.
        usage: layer number to counts ``[N]``, as :func:`emoe.record_routing` gives them on rows of the task. Equal counts are taken in the order of the experts.

    Raises:
        ConversionError: the model is not converted, or its router is learned; counts of a layer are missing, of another number of experts, negative, not
            whole, or all zero. The model is unchanged.
    """
    layers = _converted_layers(model, "fix_experts_")
    counts = [_counts(layer, usage) for layer in layers]
    for layer, count in zip(layers, counts, strict=True):
        router = FixedRouter(layer.ffn, layer.config)
        router.usage.copy_(count)
        layer.router = router
    _configure_(model, layers, **_NO_SCORES)


def _counts(layer: RoutedActivation, usage: Mapping[int, Tensor]) -> Tensor:
    config = layer.config
    if not isinstance(config, EMoEConfig) or config.router not in ("avg_k", "fixed"):
        raise ConversionError(
            f"fix_experts_: {layer.ffn_name} routes by '{config.router}', whose weights of experts are by its scores; convert with router='avg_k'"
        )
    found = usage.get(layer.ffn_index)
    if found is None:
        raise ConversionError(f"fix_experts_: usage has no layer {layer.ffn_index}; it has {sorted(usage)}")
    count = torch.as_tensor(found)
    if count.shape != (config.num_experts,):
        raise ConversionError(
            f"fix_experts_: usage of layer {layer.ffn_index} has the shape {list(count.shape)}, but there are {config.num_experts} experts"
        )
    if count.is_floating_point() or count.dtype == torch.bool or (count < 0).any() or not count.any():
        raise ConversionError(
            f"fix_experts_: usage of layer {layer.ffn_index} must be whole numbers from 0, and not 0 alone; record.layers[{layer.ffn_index}].loads has them"
        )
    return count


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
