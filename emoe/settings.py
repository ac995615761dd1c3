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
from emoe.layer import RoutedActivation, check_distinct_numbers, routed_layers
from emoe.model_config import check_holds_described_experts, update_description_
from emoe.routers import FixedRouter
from emoe.sparse.module import NOT_CALLED, SparseFFN, check_supported, install_, probe_output

_INTEGER_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def set_top_k_(model: nn.Module, top_k: int) -> nn.Module:
    """Change the configuration's ``top_k`` in place, for evaluation and training.

    Args:
        model: converted model.
        top_k: number of experts.

    Returns:
        The same model.

    Raises:
        ConfigError: the number is out of range.
        ConversionError: the model is not converted, or is a part of a transformers model that has
            experts elsewhere.
    """
    layers = converted_layers(model, "set_top_k_")
    # the model's configuration has one `top_k` for all its experts
    check_holds_described_experts(model, "set_top_k_")
    _configure_(model, layers, top_k=top_k)
    return model


def set_backend_(model: nn.Module, backend: str) -> nn.Module:
    """Choose the implementation of a converted model's FFNs, in place.

    The results are equal up to rounding. ``masked`` (the default) computes all neurons and zeroes
    the neurons of other experts. It works with any code. ``sparse`` computes the chosen experts
    only, in forward passes where that should be faster (:func:`emoe.sparse.cost_model.pays_off`).
    For ``sparse``, modules are replaced (:mod:`emoe.sparse.module`). Parameters, their names, and
    optimizers stay the same. To compare both backends, four random rows pass through the FFNs.
    Until the next forward pass, :func:`emoe.aux_loss` is the loss of these rows, so call this
    function between training steps.

    Args:
        model: converted model.
        backend: ``masked`` or ``sparse``.

    Returns:
        The same model.

    Raises:
        ConfigError: there is no such backend.
        ConversionError: the model is not converted or cannot use the sparse backend (adapters,
            hooks, quantised or offloaded weights, scores that need every neuron, code between the
            projections). The model is unchanged.
    """
    if backend not in ("masked", "sparse"):
        raise ConfigError(f"set_backend_: backend is {backend!r}; choose 'masked' or 'sparse'")
    converted = converted_layers(model, "set_backend_")
    layers = [layer for layer in converted if layer.backend != backend]
    if backend == "masked":
        for layer in layers:
            layer.restore_projections_()
    else:
        _make_sparse_(layers)
    return model


def _make_sparse_(layers: list[RoutedActivation]) -> None:
    """Install the sparse backend in masked layers, and check that their outputs stay the same.

    Raises:
        ConversionError: a layer cannot use the sparse backend, or its output would change. All
            layers are masked again.
    """
    # all checks and masked outputs come before the first change of a layer
    for layer in layers:
        check_supported(layer)
    masked_outputs = [probe_output(layer) for layer in layers]
    for layer in layers:
        install_(layer)
    # Only CPUs use the compiled kernels. They are built now, so that the comparison uses them too.
    has_layer_on_cpu = any(_is_on_cpu(layer) for layer in layers)
    if has_layer_on_cpu:
        prepare_kernels()
    for layer, masked_output in zip(layers, masked_outputs, strict=True):
        # None means that the layer's code cannot be run alone, so outputs cannot be compared
        if masked_output is not None and not _matches_masked_output(layer, masked_output):
            for changed in layers:
                changed.restore_projections_()
            raise ConversionError(
                f"{layer.ffn.name}: its code changes the hidden neurons: keep it masked"
            )


def _is_on_cpu(layer: RoutedActivation) -> bool:
    """Check if a layer's weights are in the CPU's memory."""
    weight = cast(Tensor, layer.ffn.proj_in.weight)
    return weight.device.type == "cpu"


def _matches_masked_output(layer: RoutedActivation, expected: Tensor) -> bool:
    """Check that a sparse FFN computes the masked FFN's output, up to rounding.

    Args:
        layer: routed FFN with the sparse backend.
        expected: output of :func:`probe_output` with the masked backend.
    """
    sparse = cast(SparseFFN, layer.ffn.proj_out)
    # for the few rows of the probe, the sparse products would not pay off
    sparse.always = True
    output = probe_output(layer)
    # undo what the probe changed
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
    """Prepare a converted model for serving, in place.

    Sets the sparse backend and evaluation mode. On a CPU, a forward pass of few tokens then reads
    only the weights of their experts.

    For this, the weights of each neuron must lie together in memory. The out-projection (in GPT-2,
    the in-projection) stores them apart. So the first such pass without gradient copies this
    projection in another order. The copy needs as much memory as the projection. It is made again
    after the weights change. ``model.train()`` ends serving.

    Parameters are not frozen, because PyTorch multiplies frozen bfloat16 weights more slowly on
    some processors.

    Args:
        model: converted model.

    Returns:
        The same model.

    Raises:
        ConversionError: the model is not converted, or cannot use the sparse backend (see
            :func:`set_backend_`). The model is unchanged.
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
    """Give every token the experts that were used most, in place.

    This is a static control for token-wise routing. The configuration's ``router`` becomes
    ``fixed``, and the settings of the old scores are reset. The counts are saved with the model.

    ``top_k`` and ``selection`` stay. The router's noise stays: in training it mostly reorders
    experts with equal counts. The capacity stays: some tokens may get fewer experts.

    Args:
        model: model converted with an :class:`EMoEConfig` whose router is ``avg_k`` or ``fixed``.
        usage: how often each expert was used, ``[N]`` by layer number, as from
            :func:`emoe.record_routing`. Ties go to the lower expert index.

    Returns:
        The same model.

    Raises:
        ConversionError: the model is not converted, has another router, or is a part of a
            transformers model that has experts elsewhere; two of its layers have the same number
            because its parts were converted separately; or counts are not valid. The model is
            unchanged.
    """
    layers = converted_layers(model, "fix_experts_")
    # the model's configuration has one router for all its experts
    check_holds_described_experts(model, "fix_experts_")
    # one layer's counts would be used for all layers with its number
    check_distinct_numbers(layers, "fix_experts_")
    # check all counts before the first layer changes
    counts = [_read_usage(layer, usage) for layer in layers]
    for layer, count in zip(layers, counts, strict=True):
        router = FixedRouter(layer.ffn, layer.config)
        # the weights of an offloaded FFN are on the device meta, where a tensor has no values
        device = torch.device("cpu") if router.usage.is_meta else router.usage.device
        # a copy, so that later changes of the caller's tensor do not change the router
        router.usage = count.to(device, torch.int64, copy=True)
        layer.router = router
    # the other scores and running gates belong to avg-k
    _configure_(model, layers, router="fixed", score="keys", score_bias=False, gate_momentum=0.0)
    return model


def _read_usage(layer: RoutedActivation, usage: Mapping[int, Tensor]) -> Tensor:
    """Return the counts ``[N]`` of a layer from ``usage``, after checking them.

    Raises:
        ConversionError: the layer has another router than ``avg_k`` or ``fixed``, or its counts are
            missing, have another shape, are not integers, are negative or are all 0.
    """
    name = f"fix_experts_: {layer.ffn.name}"
    config = layer.config
    if config.router not in ("avg_k", "fixed"):
        raise ConversionError(
            f"{name} has the router '{config.router}': convert it with router='avg_k'"
        )
    number = layer.ffn.index
    given = usage.get(number)
    if given is not None:
        counts = torch.as_tensor(given)
        if _are_counts(counts, config.num_experts):
            return counts
    raise ConversionError(
        f"{name}: usage[{number}] must be {config.num_experts} counts, not all 0, "
        f"such as record.layers[{number}].loads"
    )


def _are_counts(tensor: Tensor, num_experts: int) -> bool:
    """Check if a tensor has an integer of at least 0 for each expert, and they are not all 0."""
    if tensor.shape != (num_experts,) or tensor.dtype not in _INTEGER_TYPES:
        return False
    return bool((tensor >= 0).all() and tensor.any())


def _configure_(model: nn.Module, layers: list[RoutedActivation], **changes: Any) -> None:
    """Change fields of the layers' configurations, and update the model's description of them.

    ``changes`` are fields of :class:`emoe.EMoEConfig`.
    """
    # validate all configurations before the first layer changes
    configs = [dataclasses.replace(layer.config, **changes) for layer in layers]
    for layer, config in zip(layers, configs, strict=True):
        layer.config = config
        layer.router.config = config
    update_description_(model)
