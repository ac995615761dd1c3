"""The sparse backend: the out-projection computes its whole FFN, for the chosen experts only.

``emoe.set_backend_(model, "sparse")`` replaces the modules of each routed FFN: the in- and up-projection by
:class:`PassThrough`, dropouts behind the activation by ``nn.Identity``, and the out-projection by :class:`SparseFFN`.
The new modules share the old ones' parameters and buffers, so parameter names, optimizers, saving and sharding do not
change. ``emoe.set_backend_(model, "masked")`` puts the old modules back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoe.architectures import FFN, bias_of, has_plain_weight, is_plain_tensor
from emoe.compiled.build import is_recorded, kernels_for
from emoe.config import LINEAR_SCORES
from emoe.errors import ConversionError
from emoe.layer import RoutedActivation
from emoe.routers import is_offloaded
from emoe.sparse.cost_model import pays_off
from emoe.sparse.ffn import sparse_ffn
from emoe.sparse.serving import Layout, are_few, can_serve

_WAY_OUT = "call emoe.set_backend_(model, 'masked')"
NOT_CALLED = "not called yet"


class _Replacement(nn.Module):
    """Replace a projection by a module with the same parameters and buffers under the same names."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        # shared dictionaries: replacing a parameter in one module replaces it in the other
        self._parameters, self._buffers = projection._parameters, projection._buffers
        self._projection = (projection,)  # in a tuple, so that it does not become a child module

    @property
    def projection(self) -> nn.Module:
        """The replaced projection."""
        return self._projection[0]

    def extra_repr(self) -> str:
        return f"replaces {self.projection}"


class PassThrough(_Replacement):
    """Replace an in- or up-projection and compute nothing, so that the out-projection gets the FFN's input.

    Args:
        projection: projection to replace.
        output: ``input``, ``one``, or the input's half (``first``, ``last``) of a fused projection; the other is 1.
    """

    def __init__(self, projection: nn.Module, output: str) -> None:
        super().__init__(projection)
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        """Return what the sparse out-projection needs here: the input, a 1, or the input beside ones."""
        if self.output == "one":
            return x.new_ones(())
        if self.output == "input":
            return x
        ones = torch.ones_like(x)
        return torch.cat([x, ones] if self.output == "first" else [ones, x], -1)


class SparseFFN(_Replacement):
    """Replace an out-projection and compute the whole FFN from its input.

    Attributes:
        serves: few tokens without gradient use the layout of :mod:`emoe.sparse.serving` (:func:`emoe.for_inference_`).
        always: use the sparse products even if they do not pay off.
        last_path: products of the last forward pass; if they were the masked ones, also the reason.
    """

    def __init__(self, layer: RoutedActivation) -> None:
        super().__init__(layer.ffn.proj_out)
        self._layer = (layer,)  # in a tuple, so that it does not become a child module
        self._dropouts = [
            module for _, module in layer.ffn.between() if isinstance(module, nn.Dropout)
        ]
        self._layout: Layout | None = None
        self.serves = False
        self.always = False
        self.last_path = NOT_CALLED
        self._hooks: list[tuple[dict[int, Any], int]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Compute the FFN's output ``[..., h]`` from inputs ``[..., h]``."""
        layer = self._layer[0]
        if self._has_new_hooks():
            reject_hooks(layer)
        if self.serves and torch.is_grad_enabled() and not self._needs_gradient(x):
            with torch.no_grad():
                return self.forward(x)
        rows = x.reshape(-1, x.shape[-1])
        layout = self._current_layout(rows)
        if layout is not None:
            self.last_path = "sparse, with the layout of for_inference_"
            y, weights = self._serve(rows, layout)
        else:
            reason = self._reason_for_mask(rows)
            if reason is not None:
                self.last_path = f"masked: {reason}"
                return self._compute_masked(x)
            self.last_path = "sparse"
            y, weights = self._compute_sparse(rows)
        bias = bias_of(self)
        if bias is not None:
            y = y + bias.to(y.dtype)
        if layer.output_bias is not None:
            y = layer.add_output_bias(y, cast(Tensor, weights))
        return y.view(*x.shape[:-1], y.shape[-1])

    def _has_new_hooks(self) -> bool:
        """Check if the number of hooks on the FFN's modules has changed since the first forward pass.

        The first forward pass raises the errors of :func:`reject_hooks`.
        """
        if self._hooks is None:
            reject_hooks(self._layer[0])
            ffn = self._layer[0].ffn
            modules = [*ffn.projections(), *ffn.between(), (ffn.spec.activation, self._layer[0])]
            tables = [table for _, module in modules for table in hook_tables(module)]
            self._hooks = [(table, len(table)) for table in tables]
        return any(len(table) != number for table, number in self._hooks)

    def _needs_gradient(self, x: Tensor) -> bool:
        """Check if the FFN's input or a parameter needs a gradient. A user may have frozen them."""
        modules = [self._layer[0], *(module for _, module in self._layer[0].ffn.projections())]
        return x.requires_grad or any(
            p.requires_grad for module in modules for p in module.parameters()
        )

    def _current_layout(self, rows: Tensor) -> Layout | None:
        """Return the layout of the present weights; None if this forward pass does not use it."""
        kernels = kernels_for(rows) if self.serves else None
        if kernels is None or not are_few(rows):
            return None
        if torch.is_autocast_enabled("cpu") or self._rounds_scores(rows.dtype):
            return None
        layout = self._layout  # another thread may replace it
        if layout is None or not layout.is_current():
            layer = self._layer[0]
            layout = Layout(layer, kernels) if can_serve(layer) else None
            self._layout = layout
        return layout

    def _rounds_scores(self, dtype: torch.dtype) -> bool:
        """Check if the masked products round the neurons that the score averages, so that other experts may win."""
        return dtype in (torch.bfloat16, torch.float16) and self._layer[0].config.score in (
            "gate",
            "up",
        )

    def _serve(self, rows: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """Return the outputs ``[T, h]`` and, if the configuration has any, the expert weights ``[T, N]``."""
        layer = self._layer[0]
        mask, weights = layer.choose_quickly(rows), None
        if mask is None:
            mask, weights = layer.route(layer.linear_scores(rows))
        per_expert = None if layer.config.weighting == "binary" else weights
        return layout.compute(rows, mask, per_expert).to(rows.dtype), weights

    def _compute_sparse(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs ``[T, h]`` and the expert weights ``[T, N]``, by the products of the chosen experts."""
        layer = self._layer[0]
        _check_weights(layer.ffn)
        mask, weights = layer.route(layer.linear_scores(rows))
        inputs, values = layer.ffn.blocks(layer.config.num_experts)
        per_expert = None if layer.config.weighting == "binary" else weights
        return sparse_ffn(rows, inputs, values, layer.activation, mask, per_expert), weights

    def _pays_off(self, rows: Tensor) -> bool:
        layer = self._layer[0]
        config = layer.config
        active = config.num_active_experts / config.num_experts
        return self.always or pays_off(rows, layer.ffn.d // config.num_experts, active)

    def _reason_for_mask(self, rows: Tensor) -> str | None:
        """Return why this forward pass computes the masked products, None if it does not."""
        layer = self._layer[0]
        config = layer.config
        if is_recorded():
            return "compiled, exported or traced"
        drops_neurons = config.expert_dropout > 0 or any(module.p > 0 for module in self._dropouts)
        if self.training and drops_neurons:
            return "dropout is active"
        dtype = rows.dtype
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
        if self._rounds_scores(dtype):
            return f"{dtype} would round the neurons that the score averages"
        if self._pays_off(rows):
            return None
        if rows.device.type != "cpu":
            return f"PyTorch has no grouped product for {dtype} on {rows.device.type}"
        size = layer.ffn.d // config.num_experts
        experts = f"{config.num_active_experts} of {config.num_experts} experts of {size} neurons, {dtype}"
        return f"no gain is expected for {len(rows)} tokens ({experts})"

    def _compute_masked(self, x: Tensor) -> Tensor:
        """Compute all neurons with the replaced modules, as the masked backend does."""
        layer, spec = self._layer[0], self._layer[0].ffn.spec
        z = layer.replaced[spec.proj_in](x)
        up = layer.replaced[spec.proj_up](x) if spec.proj_up else None
        if spec.fused:
            first, last = z.chunk(2, -1)
            z, up = (first, last) if spec.fused == "first" else (last, first)
        hidden = layer.activate(z)
        if up is not None:
            hidden = hidden * up
        for dropout in self._dropouts:
            hidden = F.dropout(hidden, dropout.p, self.training)
        return cast(Tensor, self.projection(hidden))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, last_path={self.last_path!r}"

    def train(self, mode: bool = True) -> Self:
        """Set the mode; training ends serving (:func:`emoe.for_inference_`)."""
        if mode:
            self.serves, self._layout = False, None
        return super().train(mode)

    def forget_layout_(self) -> None:
        """Have the next forward pass lay out the weights anew."""
        self._layout = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.forget_layout_()  # it has the old device and dtype
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layout": None}  # a copy has its own weights


def install_(layer: RoutedActivation) -> None:
    """Replace the modules of a routed FFN by sparse ones."""
    ffn, spec = layer.ffn, layer.ffn.spec
    layer.replaced = dict([*ffn.projections(), *ffn.between()])
    replacements: dict[str, nn.Module] = {path: nn.Identity() for path in spec.between}
    replacements[spec.proj_out] = SparseFFN(layer)
    for (path, module), output in zip(
        ffn.in_projections(), (spec.fused or "input", "one"), strict=False
    ):
        replacements[path] = PassThrough(module, output)
    for path, module in replacements.items():
        ffn.replace(path, module.train(layer.replaced[path].training))


def check_supported(layer: RoutedActivation) -> None:
    """Raise :class:`ConversionError` if a routed FFN cannot use the sparse backend."""
    ffn, config = layer.ffn, layer.config
    if config.score not in LINEAR_SCORES:
        raise ConversionError(
            f"{ffn.name}: score='{config.score}' needs every neuron: keep it masked"
        )
    if getattr(layer.activation, "inplace", False):
        raise ConversionError(
            f"{ffn.name}.{ffn.spec.activation} writes over its input: build it with inplace=False"
        )
    for path, module in ffn.projections():
        if (
            is_offloaded(module)
            or not has_plain_weight(module)
            or "weight" not in dict(module.named_parameters())
        ):
            raise ConversionError(
                f"{ffn.name}.{path} is adapted, quantised, offloaded or computed: keep it masked"
            )
        # transformers loads T5 in float16 with an out-projection in float32
        dtype = cast(Tensor, module.weight).dtype
        dtype_in = ffn.keys().dtype
        if dtype != dtype_in:
            dtypes = f"{ffn.name}.{path} is {dtype} and {ffn.spec.proj_in} is {dtype_in}"
            raise ConversionError(f"{dtypes}: cast the model to one dtype, or keep it masked")
    reject_hooks(layer, ConversionError)


def reject_hooks(layer: RoutedActivation, error: type[Exception] = RuntimeError) -> None:
    """Raise an error if a module of a routed FFN has a hook that this library did not register."""
    ffn, spec = layer.ffn, layer.ffn.spec
    expected = {spec.activation: layer.num_own_hooks}
    if not layer.replaced:
        expected |= {spec.proj_in: 1, spec.proj_out: int(layer.output_bias is not None)}
    for path, module in [*ffn.projections(), *ffn.between(), (spec.activation, layer)]:
        forward_hooks, forward_pre_hooks, *backward_hooks = hook_tables(module)
        forward = len(forward_hooks) + len(forward_pre_hooks)
        if forward > expected.get(path, 0) or any(backward_hooks):
            hidden = "has a hook, which cannot see the neurons of a sparse FFN"
            raise error(f"{ffn.name}.{path} {hidden}: remove it, or {_WAY_OUT}")


def hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    """Return a module's tables of hooks: forward, forward pre-, backward and backward pre-hooks."""
    forward = [module._forward_hooks, module._forward_pre_hooks]
    return [*forward, module._backward_hooks, module._backward_pre_hooks]


def probe_output(layer: RoutedActivation) -> Tensor | None:
    """Run the module that contains an FFN on a few random rows, to compare both backends.

    The comparison detects code between the projections, which the sparse backend would skip.

    Returns:
        Output ``[1, 4, h]``. None if the module needs more than one input, contains only part of the FFN, chooses
        experts at random, reads a padding mask, or fails.
    """
    ffn = layer.ffn
    module, weight = ffn.parents[ffn.spec.proj_in], cast(Tensor, ffn.proj_in.weight)
    parameters = inspect.signature(module.forward).parameters.values()
    takes_one = sum(parameter.default is parameter.empty for parameter in parameters) == 1
    is_whole = all(parent is module for parent in ffn.parents.values())
    draws_experts = layer.config.selection == "random"  # differently in each call
    if not (takes_one and is_whole) or draws_experts or layer.padding is not None:
        return None
    if not is_plain_tensor(weight):
        return None
    x = torch.randn(1, 4, ffn.h, generator=torch.Generator().manual_seed(0)).to(weight)
    modes, record, layer.record = (
        {child: child.training for child in module.modules()},
        layer.record,
        None,
    )
    try:
        with torch.no_grad():
            output = module.eval()(x)
    except (IndexError, RuntimeError, TypeError, ValueError):  # raised by the module's own code
        return None
    finally:
        layer.record = record
        for child, mode in modes.items():
            child.training = mode
    return output if isinstance(output, Tensor) else None


def _check_weights(ffn: FFN) -> None:
    """Raise :class:`RuntimeError` if a weight is not a plain tensor in this forward pass."""
    for path, module in ffn.projections():
        if not is_plain_tensor(module.weight):
            raise RuntimeError(
                f"{ffn.name}.{path}: the weight is sharded, quantised or offloaded: {_WAY_OUT}"
            )
