"""The sparse backend: the out-projection computes its whole FFN, for the chosen experts only.

``emoe.set_backend_(model, "sparse")`` replaces the modules of each routed FFN: the in- and
up-projection by :class:`PassThrough`, dropouts behind the activation by ``nn.Identity``, and the
out-projection by :class:`SparseFFN`. The new modules share the old ones' parameters and buffers, so
parameter names, optimizers, saving and sharding do not change.
``emoe.set_backend_(model, "masked")`` puts the old modules back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoe.architectures import (
    FFN,
    FFNSpec,
    bias_of,
    has_float_matrix,
    is_local_tensor,
    weight_of,
)
from emoe.compiled.build import kernels_for
from emoe.config import LINEAR_SCORES
from emoe.errors import ConversionError
from emoe.layer import RoutedActivation
from emoe.modes import restored_modes
from emoe.routers import is_offloaded
from emoe.sparse.cost_model import dtype_of_products, pays_off
from emoe.sparse.serving import Layout, are_few, can_serve

_WAY_OUT = "call emoe.set_backend_(model, 'masked')"
NOT_CALLED = "not called yet"


class _Replacement(nn.Module):
    """A module that replaces a projection, with the same parameters and buffers.

    Their names stay the same too.
    """

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        # shared dictionaries: replacing a parameter in one module replaces it in the other
        self._parameters = projection._parameters
        self._buffers = projection._buffers
        self._projection = (projection,)  # in a tuple, so that it does not become a child module

    @property
    def projection(self) -> nn.Module:
        """The replaced projection."""
        return self._projection[0]

    def extra_repr(self) -> str:
        return f"replaces {self.projection}"


class PassThrough(_Replacement):
    """A replacement of an in- or up-projection, which has its parameters but does not use them.

    With its output, the FFN's own code passes the FFN's input to the out-projection.

    Args:
        projection: projection to replace.
        output: what the replacement returns: ``input`` for its input, or ``one`` for the number 1.
            The output of a fused projection has two halves: ``first`` or ``last`` names the half
            that is the input, and the other half is 1.
    """

    def __init__(self, projection: nn.Module, output: str) -> None:
        super().__init__(projection)
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        """Return the input, a 1, or the input beside ones, depending on ``output``.

        The FFN's own code combines them, so the sparse out-projection receives the input.
        """
        if self.output == "one":
            return x.new_ones(())
        if self.output == "input":
            return x
        # a fused projection has two halves, which the FFN's code multiplies: input * 1
        ones = torch.ones_like(x)
        if self.output == "first":
            return torch.cat([x, ones], -1)
        return torch.cat([ones, x], -1)


class SparseFFN(_Replacement):
    """A replacement of an out-projection that computes the whole FFN from its input.

    Attributes:
        serves: True after :func:`emoe.for_inference_`: few tokens without gradient use the layout
            of :mod:`emoe.sparse.serving`.
        always: use the sparse products even if they do not pay off.
        last_path: how the last forward pass computed the FFN: sparse, or masked with the reason.
    """

    def __init__(self, layer: RoutedActivation) -> None:
        super().__init__(layer.ffn.proj_out)
        self._layer = (layer,)  # in a tuple, so that it does not become a child module
        self._dropouts: list[nn.Dropout] = []
        for _, module in layer.ffn.between():
            if isinstance(module, nn.Dropout):
                self._dropouts.append(module)
        self._layout: Layout | None = None
        self.serves = False
        self.always = False
        self.last_path = NOT_CALLED
        # The dictionaries of hooks of the FFN's modules, and their sizes in the first forward pass.
        # Finding the dictionaries in every forward pass would take longer than counting the hooks.
        self._hook_counts: list[tuple[dict[int, Any], int]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Compute the FFN's output ``[..., h]`` from inputs ``[..., h]``."""
        self._check_hooks()
        # The kernels for few tokens are not used while gradients are enabled. If the user froze the
        # parameters, no gradient is needed, so gradients can be disabled here.
        if self.serves and torch.is_grad_enabled() and not self._needs_gradient(x):
            with torch.no_grad():
                return self._compute(x)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        """Compute the FFN's output in one of three ways, and name the way in ``last_path``.

        The ways are: few tokens with the layout for serving, all neurons with a mask, or the chosen
        experts only.
        """
        rows = x.reshape(-1, x.shape[-1])  # [T, h]
        layout = self._current_layout(rows)
        if layout is not None:
            self.last_path = "sparse, with the layout of for_inference_"
            return _in_shape_of(x, self._compute_few(rows, layout))

        reason = self._reason_for_all_neurons(rows)
        if reason is not None:
            self.last_path = f"masked: {reason}"
            return self._compute_masked(x)

        self.last_path = "sparse"
        return _in_shape_of(x, self._compute_sparse(rows))

    def _add_biases(self, y: Tensor, weights: Tensor | None) -> Tensor:
        """Add the output biases to the sum of the chosen experts' outputs.

        Args:
            y: sums ``[T, h]``.
            weights: expert weights ``[T, N]``. They may be None if the experts have no output
                biases of their own.
        """
        bias = bias_of(self)
        if bias is not None:
            y = y + bias.to(y.dtype)
        layer = self._layer[0]
        if layer.output_bias is not None:
            y = layer.add_output_bias(y, cast(Tensor, weights))
        return y

    def _check_hooks(self) -> None:
        """Check the hooks of the FFN's modules in the first forward pass and after a change.

        Raises:
            RuntimeError: a module has a hook that this library did not register.
        """
        layer = self._layer[0]
        if self._hook_counts is None:  # the first forward pass
            reject_hooks(layer)
            self._hook_counts = _count_hooks(layer)
        elif any(len(table) != count for table, count in self._hook_counts):
            reject_hooks(layer)

    def _needs_gradient(self, x: Tensor) -> bool:
        """Check if the FFN's input or one of its parameters needs a gradient."""
        if x.requires_grad:
            return True
        layer = self._layer[0]
        projections = [module for _, module in layer.ffn.projections()]
        for module in (layer, *projections):
            if any(parameter.requires_grad for parameter in module.parameters()):
                return True
        return False

    def _current_layout(self, rows: Tensor) -> Layout | None:
        """Return the layout of the current weights, None if this forward pass does not use one.

        If the weights have changed, a new layout is made.
        """
        if not self.serves:
            return None
        kernels = kernels_for(rows)
        if kernels is None or not are_few(rows):
            return None
        # the kernels compute in the dtype of the weights, but autocast asks for another dtype
        if torch.is_autocast_enabled("cpu"):
            return None
        # the kernels might choose other experts
        if self._rounds_scores(rows.dtype):
            return None
        layout = self._layout  # another thread may replace it
        if layout is not None and layout.is_current():
            return layout
        # there is no layout yet, or the weights have changed
        layer = self._layer[0]
        new_layout = None
        if can_serve(layer):
            new_layout = Layout(layer, kernels)
        self._layout = new_layout
        return new_layout

    def _rounds_scores(self, dtype: torch.dtype) -> bool:
        """Check if the masked products would round the neurons that the score averages.

        The sparse products do not round them, and might choose other experts.
        """
        averages_neurons = self._layer[0].config.score in ("gate", "up")
        return averages_neurons and dtype in (torch.bfloat16, torch.float16)

    def _compute_few(self, rows: Tensor, layout: Layout) -> Tensor:
        """Compute the FFN ``[T, h]`` for a few tokens ``[T, h]``, with the kernels of a layout."""
        layer = self._layer[0]
        # The kernel's choice. It is None unless all chosen experts have weight 1 and share one
        # output bias. Then no weights are needed.
        mask = layer.choose_mask_with_kernel(rows, layout.kernels)
        weights = None
        if mask is None:
            scores = layer.linear_scores(rows)
            mask, weights = layer.route(scores)
        # with binary weighting, all chosen experts have weight 1
        factors = None if layer.config.weighting == "binary" else weights
        sums = layout.compute(rows, mask, factors)
        return self._add_biases(sums.to(rows.dtype), weights)

    def _compute_sparse(self, rows: Tensor) -> Tensor:
        """Compute the FFN ``[T, h]`` for tokens ``[T, h]``, with products of the chosen experts."""
        # imported here, because the import of torch's operators takes a second
        from emoe.sparse.ffn import sparse_ffn

        layer = self._layer[0]
        _check_local_weights(layer.ffn)
        scores = layer.linear_scores(rows)
        mask, weights = layer.route(scores)
        # with binary weighting, all chosen experts have weight 1
        factors = None if layer.config.weighting == "binary" else weights
        blocks = layer.ffn.blocks(layer.config.num_experts)
        sums = sparse_ffn(
            rows,
            blocks,
            layer.activation,
            mask,
            factors,
            layer.config.num_active_experts,
        )
        return self._add_biases(sums, weights)

    def _pays_off(self, rows: Tensor) -> bool:
        """Check if the sparse products of inputs ``[T, h]`` should be faster, or are required."""
        if self.always:
            return True
        layer = self._layer[0]
        config = layer.config
        active_share = config.num_active_experts / config.num_experts
        expert_size = layer.ffn.d // config.num_experts
        return pays_off(rows, expert_size, active_share)

    def _reason_for_all_neurons(self, rows: Tensor) -> str | None:
        """Return why a pass of inputs ``[T, h]`` computes all neurons and masks them.

        None if it computes only the chosen experts.
        """
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            return "exported or traced"
        if torch.compiler.is_compiling():
            reason = self._reason_in_compiled_code(rows)
            if reason is not None:
                return reason
        if self.training and self._drops_neurons():
            return "dropout is active"
        dtype = dtype_of_products(rows)
        if self._rounds_scores(dtype):
            return f"{dtype} would round the neurons that the score averages"
        if not self._pays_off(rows):
            return self._reason_without_gain(rows)
        return None

    def _drops_neurons(self) -> bool:
        """Check if the FFN has a dropout with a probability above 0, which works in training."""
        if self._layer[0].config.expert_dropout > 0:
            return True
        return any(module.p > 0 for module in self._dropouts)

    def _reason_without_gain(self, rows: Tensor) -> str:
        """Return why the sparse products are not used for inputs ``[T, h]``.

        Either no gain is expected from them, or PyTorch has no such products for these inputs.
        """
        if torch.compiler.is_compiling():
            # With the number of tokens in the text, each number would be compiled separately.
            return "no gain is expected for so few tokens or so small experts"
        device_type = rows.device.type
        dtype = dtype_of_products(rows)
        if device_type != "cpu":
            width = rows.shape[-1]
            return (
                f"PyTorch has no grouped product for {dtype} and a width of {width} on "
                f"{device_type}"
            )
        layer = self._layer[0]
        config = layer.config
        size = layer.ffn.d // config.num_experts
        active = f"{config.num_active_experts} of {config.num_experts}"
        experts = f"{active} experts of {size} neurons, {dtype}"
        return f"no gain is expected for {len(rows)} tokens ({experts})"

    def _reason_in_compiled_code(self, rows: Tensor) -> str | None:
        """Return why compiled or exported code computes all neurons; None if there is no reason."""
        from emoe.sparse import constants

        # an exported program must run without this library, whose operators it would contain
        if constants.is_exporting():
            return "exported or traced"
        if self._layer[0].config.capacity_factor is not None:
            return "compiled, with a capacity, which makes the number of used experts unknown"
        # listing the pairs waits for the device, which a CUDA graph cannot record
        if rows.device.type != "cpu":
            return f"compiled for {rows.device.type}"
        return None

    def _compute_masked(self, x: Tensor) -> Tensor:
        """Compute all neurons with the replaced modules, as the masked backend does."""
        layer = self._layer[0]
        ffn = layer.ffn
        projected = layer.replaced[ffn.spec.proj_in](x)
        # `z` is activated, and `up` multiplies the result. Only gated FFNs have `up`.
        if ffn.spec.fused is not None:
            halves = ffn.split_fused(projected, dim=-1)
            z = halves.activated
            up = halves.up
        elif ffn.spec.proj_up:
            z = projected
            up = layer.replaced[ffn.spec.proj_up](x)
        else:
            z = projected
            up = None
        hidden = layer.activate(z)
        if up is not None:
            hidden = hidden * up
        for dropout in self._dropouts:
            hidden = F.dropout(hidden, dropout.p, self.training)
        return cast(Tensor, self.projection(hidden))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, last_path={self.last_path!r}"

    def train(self, mode: bool = True) -> Self:
        """Set the training or evaluation mode. Training undoes :func:`emoe.for_inference_`."""
        if mode:
            self.serves = False
            self._layout = None  # frees the memory of its copies
        return super().train(mode)

    def forget_layout_(self) -> None:
        """Discard the layout, so that the next forward pass that needs one makes it again."""
        self._layout = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.forget_layout_()  # it has the old device and dtype
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # a copy has its own weights
        return {**self.__dict__, "_layout": None}


def _in_shape_of(x: Tensor, y: Tensor) -> Tensor:
    """View outputs ``[T, h]`` as ``[..., h]``, with the other dimensions of inputs ``x``."""
    return y.view(*x.shape[:-1], y.shape[-1])


def install_(layer: RoutedActivation) -> None:
    """Install the sparse backend in a routed FFN: replace the projections and the dropouts."""
    ffn = layer.ffn
    # made first, because it reads the dropouts and the out-projection, which are replaced below
    sparse = SparseFFN(layer)
    for path, module in ffn.in_projections():
        pass_through = PassThrough(module, _output_to_pass(ffn.spec, path))
        _replace_(layer, path, pass_through)
    _replace_(layer, ffn.spec.proj_out, sparse)
    # the dropouts between activation and out-projection
    for path, _ in ffn.between():
        _replace_(layer, path, nn.Identity())


def _output_to_pass(spec: FFNSpec, path: str) -> str:
    """Choose the ``output`` of the :class:`PassThrough` that replaces the in-projection at a path.

    The FFN's input must reach the out-projection unchanged.
    """
    # a gated FFN's code multiplies the input by this output
    if path == spec.proj_up:
        return "one"
    # the activated half of a fused in-projection is the input, and the other half is 1
    if spec.fused is not None:
        return spec.fused
    return "input"


def _replace_(layer: RoutedActivation, path: str, replacement: nn.Module) -> None:
    """Put a module at a path of a routed FFN, and keep the old one in ``layer.replaced``."""
    old = layer.ffn.module(path)
    layer.replaced[path] = old
    replacement.train(old.training)
    layer.ffn.replace(path, replacement)


def check_supported(layer: RoutedActivation) -> None:
    """Raise :class:`ConversionError` if a routed FFN cannot use the sparse backend.

    In the messages, "keep it masked" means: do not change the default backend, ``masked``.
    """
    ffn = layer.ffn
    config = layer.config
    if config.score not in LINEAR_SCORES:
        raise ConversionError(
            f"{ffn.name}: score='{config.score}' needs every neuron: keep it masked"
        )
    # the sparse products are not tested with an activation that writes over its input
    if getattr(layer.activation, "inplace", False):
        raise ConversionError(
            f"{ffn.name}.{ffn.spec.activation} writes over its input: build it with inplace=False"
        )
    for path, module in ffn.projections():
        _check_supported_weight(ffn, path, module)
        _check_dtype(ffn, path, module)
    reject_hooks(layer, error=ConversionError)


def _check_supported_weight(ffn: FFN, path: str, projection: nn.Module) -> None:
    """Check that a projection multiplies by a floating-point matrix that it holds as a parameter.

    The sparse products read this weight, and do not call the projection.

    Raises:
        ConversionError: the weight is something else, so results would differ or fail.
    """
    # a parametrisation computes the weight from other parameters
    is_computed = "weight" not in dict(projection.named_parameters())
    if is_offloaded(projection) or not has_float_matrix(projection) or is_computed:
        raise ConversionError(
            f"{ffn.name}.{path} is adapted, quantised, offloaded or computed: keep it masked"
        )


def _check_dtype(ffn: FFN, path: str, projection: nn.Module) -> None:
    """Raise :class:`ConversionError` if a projection's dtype is not that of the in-projection."""
    # transformers loads T5 in float16 with an out-projection in float32
    dtype = weight_of(projection).dtype
    dtype_in = weight_of(ffn.proj_in).dtype
    if dtype != dtype_in:
        dtypes = f"{ffn.name}.{path} is {dtype} and {ffn.spec.proj_in} is {dtype_in}"
        raise ConversionError(f"{dtypes}: cast the model to one dtype, or keep it masked")


def reject_hooks(layer: RoutedActivation, error: type[Exception] = RuntimeError) -> None:
    """Raise an error if a module of a routed FFN has a hook that this library did not register.

    Args:
        layer: routed FFN, with either backend.
        error: class of the error.
    """
    for path, module in _modules_of(layer):
        tables = _hook_tables(module)
        num_forward_hooks = len(tables.forward) + len(tables.forward_pre)
        num_backward_hooks = len(tables.backward) + len(tables.backward_pre)
        has_foreign_forward_hook = num_forward_hooks > _num_own_forward_hooks(layer, path)
        # this library registers no backward hooks
        if has_foreign_forward_hook or num_backward_hooks > 0:
            raise error(
                f"{layer.ffn.name}.{path} has a hook, which cannot see the neurons of a sparse "
                f"FFN: remove it, or {_WAY_OUT}"
            )


def _num_own_forward_hooks(layer: RoutedActivation, path: str) -> int:
    """Count the forward hooks and pre-hooks of this library on the module at a path of an FFN."""
    spec = layer.ffn.spec
    if path == spec.activation:
        return layer.num_own_hooks
    # the sparse backend's modules pass the tensors to each other without hooks
    if layer.backend == "sparse":
        return 0
    # this hook reads the FFN's input
    if path == spec.proj_in:
        return 1
    # this hook adds the experts' output biases
    if path == spec.proj_out and layer.output_bias is not None:
        return 1
    return 0


def _modules_of(layer: RoutedActivation) -> list[tuple[str, nn.Module]]:
    """Return all modules of a routed FFN with their paths."""
    ffn = layer.ffn
    return [*ffn.projections(), *ffn.between(), (ffn.spec.activation, layer)]


class _HookTables(NamedTuple):
    """A module's dictionaries of hooks, which PyTorch changes when a hook is added or removed."""

    forward: dict[int, Any]
    forward_pre: dict[int, Any]
    backward: dict[int, Any]
    backward_pre: dict[int, Any]


def _hook_tables(module: nn.Module) -> _HookTables:
    """Return a module's dictionaries of hooks."""
    return _HookTables(
        forward=module._forward_hooks,
        forward_pre=module._forward_pre_hooks,
        backward=module._backward_hooks,
        backward_pre=module._backward_pre_hooks,
    )


def _count_hooks(layer: RoutedActivation) -> list[tuple[dict[int, Any], int]]:
    """Return each dictionary of hooks of a routed FFN's modules, and its number of hooks."""
    counts = []
    for _, module in _modules_of(layer):
        for table in _hook_tables(module):
            counts.append((table, len(table)))
    return counts


def probe_output(layer: RoutedActivation) -> Tensor | None:
    """Run the module that contains an FFN on a few random rows, to compare both backends.

    The comparison detects code between the projections, which the sparse backend would skip.

    Returns:
        Output ``[1, 4, h]``. None if :func:`_can_probe` rejects the module, if the call fails, or
        if the output is not a tensor.
    """
    if not _can_probe(layer):
        return None
    ffn = layer.ffn
    module = ffn.parents[ffn.spec.proj_in]
    weight = cast(Tensor, ffn.proj_in.weight)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, ffn.h, generator=generator).to(weight)
    # restored below: the record must not count these rows
    record = layer.record
    layer.record = None
    try:
        with torch.no_grad(), restored_modes(module):
            output = module.eval()(x)
    except (  # raised by the module's own code
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ):
        return None
    finally:
        layer.record = record
    return output if isinstance(output, Tensor) else None


def _can_probe(layer: RoutedActivation) -> bool:
    """Check if the module that contains an FFN can be called alone, with the same result each time.

    If so, :func:`probe_output` calls it.
    """
    ffn = layer.ffn
    module = ffn.parents[ffn.spec.proj_in]
    # A probe has only the FFN's input. The module might need others, such as a residual.
    # For a call without these, bind() raises TypeError; it does not look at the argument itself.
    try:
        inspect.signature(module.forward).bind(None)
    except TypeError:
        return False
    # The module must contain the whole FFN. The out-projection may belong to the module above.
    if any(parent is not module for parent in ffn.parents.values()):
        return False
    # the two backends would choose different experts
    if layer.config.selection == "random":
        return False
    # the padding mask belongs to other rows than those of a probe
    if layer.padding_hook is not None:
        return False
    # the probe is an ordinary tensor, which cannot be multiplied by a sharded weight, for instance
    return is_local_tensor(ffn.proj_in.weight)


def _check_local_weights(ffn: FFN) -> None:
    """Raise :class:`RuntimeError` if this process does not hold a weight in this forward pass."""
    for path, module in ffn.projections():
        if not is_local_tensor(module.weight):
            raise RuntimeError(
                f"{ffn.name}.{path}: the weight is sharded, quantised or offloaded: {_WAY_OUT}"
            )
