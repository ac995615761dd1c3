"""Change how a converted model routes or computes, in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from emoe.compiled.build import prepare_kernels
from emoe.convert import converted_layers
from emoe.errors import ConfigError, ConversionError
from emoe.layer import RoutedActivation, routed_layers
from emoe.model_config import update_description_
from emoe.routers import FixedRouter
from emoe.sparse.module import NOT_CALLED, SparseFFN, check_supported, install_, probe_output


def set_top_k_(model: nn.Module, top_k: int) -> nn.Module:
    """Change the number of experts that each token uses, in place, for training too.

    Args:
        model: converted model.
        top_k: number of experts.

    Returns:
        The same model.

    Raises:
        ConfigError: the number is out of range.
        ConversionError: the model is not converted.
    """
    _configure_(model, converted_layers(model, "set_top_k_"), top_k=top_k)
    return model


def set_backend_(model: nn.Module, backend: str) -> nn.Module:
    """Choose the implementation of a converted model's FFNs, in place. The results are equal up to rounding.

    ``masked`` (the default) computes all neurons and zeroes the neurons of other experts. It works with any code.
    ``sparse`` computes the chosen experts only, if that is faster (:func:`emoe.sparse.cost_model.pays_off`). It
    replaces modules (:mod:`emoe.sparse.module`); parameters, their names, and optimizers stay the same.

    Args:
        model: converted model.
        backend: ``masked`` or ``sparse``.

    Returns:
        The same model.

    Raises:
        ConfigError: there is no such backend.
        ConversionError: the model, which is unchanged, is not converted or cannot use the sparse backend (adapters,
            hooks, weights that are not plain, scores that need every neuron, code between the projections).
    """
    if backend not in ("masked", "sparse"):
        raise ConfigError(f"set_backend_: backend is {backend!r}; choose 'masked' or 'sparse'")
    layers = [
        layer for layer in converted_layers(model, "set_backend_") if layer.backend != backend
    ]
    if backend == "masked":
        for layer in layers:
            layer.restore_projections_()
        return model
    for layer in layers:
        check_supported(layer)
    outputs = [probe_output(layer) for layer in layers]
    for layer in layers:
        install_(layer)
    if any(cast(Tensor, layer.ffn.proj_in.weight).device.type == "cpu" for layer in layers):
        prepare_kernels()
    for layer, expected in zip(layers, outputs, strict=True):
        if expected is not None and not _matches_masked_output(layer, expected):
            for other in layers:
                other.restore_projections_()
            raise ConversionError(
                f"{layer.ffn.name}: its code changes the hidden neurons: keep it masked"
            )
    return model


def _matches_masked_output(layer: RoutedActivation, expected: Tensor) -> bool:
    """Check that a sparse FFN computes the masked FFN's output."""
    sparse = cast(SparseFFN, layer.ffn.proj_out)
    sparse.always = True
    output = probe_output(layer)
    sparse.always = False
    sparse.last_path = NOT_CALLED
    if output is None:
        return False
    is_half = expected.dtype in (torch.bfloat16, torch.float16)
    # in bfloat16 rounding alone changes the norm of small models' outputs by up to 0.006
    tolerance = 0.02 if is_half else 1e-3
    error = (output.float() - expected.float()).norm()
    return bool(error <= tolerance * expected.float().norm())


def for_inference_(model: nn.Module) -> nn.Module:
    """Prepare a converted model for serving, in place: few tokens read only the weights of their experts.

    Sets the sparse backend and evaluation mode. At the first forward pass of few tokens without gradient, each FFN
    copies its values by neuron, into as much memory as the out-projections take; it does so again after its weights
    changed. ``model.train()`` ends serving. Parameters are not frozen: PyTorch multiplies frozen bfloat16 weights more
    slowly on some processors.

    Args:
        model: converted model.

    Returns:
        The same model.

    Raises:
        ConversionError: as :func:`set_backend_`.
    """
    set_backend_(model, "sparse")
    model.eval()
    for layer in routed_layers(model):
        sparse = cast(SparseFFN, layer.ffn.proj_out)
        sparse.serves = True
        sparse.forget_layout_()
        layer.router.forget_kept_keys_()
    return model


def fix_experts_(model: nn.Module, usage: Mapping[int, Tensor]) -> nn.Module:
    """Give every token the experts that were used most, in place: a static control for token-wise routing.

    The configuration's ``router`` becomes ``fixed``, ``top_k`` and ``selection`` stay. The model saves the counts.

    Args:
        model: model converted with an :class:`EMoEConfig` whose router is ``avg_k``.
        usage: counts ``[N]`` by layer number, as from :func:`emoe.record_routing`. Ties go to the lower expert index.

    Returns:
        The same model.

    Raises:
        ConversionError: the model is not converted or has a learned router, or counts are not valid. It is unchanged.
    """
    layers = converted_layers(model, "fix_experts_")
    counts = []
    for layer in layers:
        name, config, number = f"fix_experts_: {layer.ffn.name}", layer.config, layer.ffn.index
        if config.router not in ("avg_k", "fixed"):
            raise ConversionError(
                f"{name} has the router '{config.router}': convert it with router='avg_k'"
            )
        count = torch.as_tensor(usage.get(number, ()))
        if count.shape != (config.num_experts,) or count.is_floating_point() or not count.any():
            wanted = (
                f"{config.num_experts} counts, not all 0, such as record.layers[{number}].loads"
            )
            raise ConversionError(f"{name}: usage[{number}] must be {wanted}")
        counts.append(count)
    for layer, count in zip(layers, counts, strict=True):
        router = FixedRouter(layer.ffn, layer.config)
        router.usage.copy_(count)
        layer.router = router
    _configure_(model, layers, router="fixed", score="keys", score_bias=False, gate_momentum=0.0)
    return model


def _configure_(model: nn.Module, layers: list[RoutedActivation], **changes: Any) -> None:
    # validate all configurations before the first layer changes
    configs = [dataclasses.replace(layer.config, **changes) for layer in layers]
    for layer, config in zip(layers, configs, strict=True):
        layer.config = layer.router.config = config
    update_description_(model)
