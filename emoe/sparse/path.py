"""The sparse path through an FFN whose projections and activation are called one by one by somebody else's code.

The in-projection computes the whole FFN, and hands out a tensor without content that the activation, the up-projection's product and the
out-projection recognise (:class:`emoe.tensors.DeferredTensor`). The masked path is taken instead, for this forward pass, where

- a projection carries an adapter, whose effect on a neuron is not known before all are computed;
- a weight is sharded, quantised, offloaded or of another dtype at that moment (FSDP must shard the layer, not its projections);
- dropout acts on the hidden neurons;
- experts are scored by their neurons (``gate``, ``up``) in half precision, to which the masked path rounds these; or autocast meets float64;
- the activation is none of the known ones that take each neuron for itself, or writes over its input;
- a projection is no plain linear layer;
- somebody else looks at a projection, the activation, or a module that holds a part of the FFN: a hook of any kind, also a global one, or a replaced ``forward``;
- the FFN's own code was seen to look at hidden neurons;
- the model is compiled, traced or transformed (``torch.func``), or forward-mode derivatives are taken.

With ``backend="auto"`` it is also taken where the sparse path is not expected to be faster (:mod:`emoe.sparse.cost_model`): on few tokens, for small
experts, on accelerators. A few tokens at a time, without gradients, are decoded (:mod:`emoe.sparse.decode`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from emoe.architectures import FFN, bias_of
from emoe.config import LINEAR_SCORES, EMoEConfig, GMoEConfig
from emoe.projections import RoutedFFN, is_routed_by, leave_, stand_around_
from emoe.sparse.build import compiled_kernels, prepare_kernels
from emoe.sparse.cost_model import predicted_decode_ratio, predicted_time_ratio
from emoe.sparse.decode import DecodeCache, DecodeWeights, chosen_rows, decode_ffn, decode_weights, rows
from emoe.sparse.ffn import sparse_ffn
from emoe.sparse.whole import whole_ffn
from emoe.tensors import Deferred, DeferredTensor, autocast_dtype
from emoe.tokens import is_own_hook

_logger = logging.getLogger(__name__)
_told: set[str] = set()  # reasons that were said in this process
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
_PLAIN = (Tensor, nn.Parameter)
Way = Literal["sparse"] | DecodeWeights
_MANY_TOKENS = 4096
_ELEMENTWISE = {
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.LogSigmoid),
    *(nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh, nn.Tanhshrink),
}
_ELEMENTWISE_MODULES = {"transformers.activations", "timm.layers.activations"}
_OF_NEURONS = ("gate", "up")
_HALF = (torch.bfloat16, torch.float16)
_FEW_TOKENS = 8  # beyond, decoding reads each weight more than once for nothing


class Layer(Protocol):
    """What the path needs of a routed FFN's activation."""

    activation: nn.Module
    output_bias: nn.Parameter | None
    training: bool

    @property
    def only_chooses(self) -> bool: ...
    @property
    def config(self) -> EMoEConfig | GMoEConfig: ...
    @property
    def weighting(self) -> str: ...
    def current_gate(self) -> Tensor: ...
    def linear_scores(self, x: Tensor, gate: Tensor | None = None) -> Tensor: ...
    def route(self, clean: Tensor) -> tuple[Tensor, Tensor]: ...
    def route_few(self, scores: Tensor, kernels: ModuleType | None = None) -> tuple[Tensor, Tensor | None]: ...
    def add_output_bias(self, y: Tensor, weights: Tensor) -> Tensor: ...


def may_take_sparse_path(config: EMoEConfig | GMoEConfig) -> bool:
    """Whether some forward pass may take it: not if an expert's score needs all neurons, or only the mask was asked for."""
    return config.backend != "masked" and (config.kind == "gmoe" or cast(EMoEConfig, config).score in LINEAR_SCORES)


class SparsePath:
    """Computes one FFN's output from its input, where that gives the masked path's results.

    Args:
        ffn: the FFN.
        layer: its routed activation.
        projections: path, module and the handler that its calls go through, of each of the FFN's projections, the out-projection last.
    """

    def __init__(
        self, ffn: FFN, layer: Layer, projections: Sequence[tuple[str, nn.Module, Callable[..., Any]]]
    ) -> None:
        self._ffn, self._layer = ffn, layer
        self._cache = DecodeCache()
        self._projections = tuple(module for _, module, _ in projections)
        self._handlers = tuple((module, handler) for _, module, handler in projections)
        # where each projection stands, to see that it still does
        self._places = tuple(_place(ffn.layer, path) for path, _, _ in projections)
        between = [ffn.layer.get_submodule(path) for path in ffn.spec.between]
        self._dropouts = tuple(module for module in between if isinstance(module, nn.Dropout))
        self._others = (cast(nn.Module, layer), *self._projections, *between, *_holders(ffn))
        self._watch_activation()
        self._is_looked_at_inside = False
        self._whole = whole_ffn(ffn)
        if self._whole is not None:
            stand_around_(self._whole.module, self.decode, RoutedFFN)
        self._width, self._hidden = ffn.d, ffn.h
        first = getattr(self._projections[0], "weight", None)  # one that was replaced may have none
        on_cpu = isinstance(first, Tensor) and first.device.type == "cpu"
        if on_cpu and (layer.config.backend == "sparse" or self._predict(_MANY_TOKENS) < 1):
            prepare_kernels()

    def _watch_activation(self) -> None:
        self._activation = self._layer.activation
        self._watched = (*self._others, *self._activation.modules())

    def choose(self, x: Tensor) -> Way | None:
        """How a forward pass with this input is computed: decoded with these weights, by the sparse path, or None for the masked one."""
        if torch.is_grad_enabled():
            self._cache.clear()
        if not self._takes(x):
            return None
        decodes = self._may_decode(x)
        if not self._is_profitable(x, decodes=decodes):
            return None
        tensors = [tensor for module in self._projections for tensor in _tensors(module)]
        reason = self._fallback_reason(x, tensors)
        if reason is not None:
            if reason not in _told:
                _told.add(reason)
                _logger.warning("emoe: %s takes the masked path: %s", self._ffn.name, reason)
            return None
        # changes of weights that were made under inference_mode cannot be seen
        return "sparse" if not decodes or any(map(Tensor.is_inference, tensors)) else self._decode_weights(tensors)

    def compute(self, x: Tensor, way: Way, pre_activations: Callable[[Tensor], Tensor]) -> Tensor:
        """The FFN's output for ``x [..., h]``, in the place of its pre-activations.

        Args:
            x: the FFN's input.
            way: what was chosen for it.
            pre_activations: computes them, should anybody look at them, given the experts' weights ``[T, N]``.
        """
        flat = x.reshape(-1, x.shape[-1])
        y, weights = self._sum_experts(flat) if way == "sparse" else self._decode(flat, way)
        shape = (*x.shape[:-1], self._width * (2 if self._ffn.spec.fused else 1))
        output = y.view(*x.shape[:-1], -1)
        # no view, which whoever changes it in place could not have under FSDP2, or later with gradients
        output = output.clone() if y.requires_grad else output.data
        weight = cast(Tensor, self._projections[0].weight)
        read = () if x.is_inference() or weight.is_inference() else (x, weight)  # which count no changes
        call = Deferred(self._layer, x, output, self._tell_of_a_look, read, y.requires_grad)
        return DeferredTensor.of(shape, y, lambda: pre_activations(weights()), call)

    def decode(self, x: Tensor) -> Tensor | None:
        """The FFN's output for a few tokens of a model at rest, for its module to give without running its own code; None where it has to."""
        whole = self._whole
        if torch.is_grad_enabled() or whole is None or not self._takes(x) or x.numel() > _FEW_TOKENS * self._hidden:
            return None
        if not whole.is_as_known() or whole.activation is not self._layer:
            return None
        way = self.choose(x)
        if way is None or way == "sparse":
            return None
        return self._decode(x.reshape(-1, self._hidden), way)[0].view(x.shape).data  # no view, as above

    def _tell_of_a_look(self) -> None:
        self._is_looked_at_inside = True

    def leave_(self) -> None:
        """Let the FFN's module run its own code again."""
        if self._whole is not None:
            leave_(self._whole.module)

    def forget(self) -> None:
        """Drop what decoding keeps of the weights."""
        self._cache.clear()

    def _sum_experts(self, x: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        layer, ffn = self._layer, self._ffn
        mask, weights = layer.route(layer.linear_scores(x))
        inputs, values = ffn.blocks(layer.config.num_experts)
        y = sparse_ffn(x, inputs, values, layer.activation, mask, None if layer.weighting == "binary" else weights)
        bias = bias_of(self._projections[-1])
        return layer.add_output_bias(y if bias is None else y + bias.to(y.dtype), weights), lambda: weights

    def _decode(self, x: Tensor, kept: DecodeWeights) -> tuple[Tensor, Callable[[], Tensor]]:
        layer = self._layer
        n, scales = layer.config.num_experts, None
        if kept.chosen_by_gate and layer.only_chooses:
            experts, pre = chosen_rows(x, kept, layer.config.top_k)
        else:
            scores = layer.linear_scores(x, kept.gate)
            if scores.shape != (len(x), n):
                raise RuntimeError(
                    f"the router of {self._ffn.name} gave scores {list(scores.shape)}, not {[len(x), n]}"
                )
            experts, scales = layer.route_few(scores, kept.kernels)
            pre = rows(x, kept, experts)
        y = decode_ffn(pre, kept, layer.activation, experts, scales)

        def weights() -> Tensor:
            ones = torch.ones(experts.shape, device=x.device) if scales is None else scales
            return ones.new_zeros(len(x), n).scatter(1, experts, ones)

        if (biases := layer.output_bias) is not None:
            chosen = biases[experts]
            return y + (chosen if scales is None else chosen * scales.unsqueeze(-1)).sum(1).to(y.dtype), weights
        bias = bias_of(self._projections[-1])
        return y if bias is None else y + bias, weights

    def may_defer(self, x: Tensor) -> bool:
        """Whether the up-projection's part can wait until somebody looks at it: nobody does, where the in-projection has the output already."""
        return self._takes(x) and not _is_transformed() and self._is_profitable(x, decodes=self._may_decode(x))

    def defer_up(self, x: Tensor, up: Callable[[], Tensor]) -> Tensor:
        """The up-projection's part, which nobody needs once the output is known."""
        return DeferredTensor.of((*x.shape[:-1], self._width), x, up, Deferred(self._layer, x, x))

    def _decode_weights(self, tensors: Sequence[Tensor]) -> DecodeWeights:
        """What decoding keeps of the projections' weights and biases, which are these."""
        layer, config = self._layer, self._layer.config
        n, by_neuron = config.num_experts, config.decode_cache
        by_keys = isinstance(config, EMoEConfig) and config.router == "avg_k" and config.score == "keys"

        def make() -> DecodeWeights:
            gate = layer.current_gate() if by_keys else None
            plain = by_keys and _chooses_by_gate(cast(EMoEConfig, config))
            return decode_weights(self._ffn, n, gate, by_neuron=by_neuron, chosen_by_gate=plain)

        # the weights between are read where they lie, if that is by neuron
        first, *between, last = self._projections
        scattered = [
            module for module in between if not (isinstance(module, nn.Linear) and module.weight.is_contiguous())
        ]
        copied = [cast(Tensor, module.weight) for module in (first, *scattered, last)]
        return self._cache.get(copied, (config, len(copied), tuple(map(Tensor.data_ptr, tensors))), make)

    def _takes(self, x: Tensor) -> bool:
        """Whether it is an input that this path can read; of another the projection says what is wrong with it."""
        return _is_plain(x) and x.ndim > 0 and x.size(-1) == self._hidden

    def _may_decode(self, x: Tensor) -> bool:
        """Whether these are few tokens of a model at rest, each with as many experts as the others."""
        layer = self._layer
        return (
            x.numel() <= _FEW_TOKENS * self._hidden
            and not layer.training
            and not torch.is_grad_enabled()
            and layer.config.score_threshold is None
            and layer.config.capacity_factor is None
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _is_profitable(self, x: Tensor, *, decodes: bool) -> bool:
        """Whether it was asked for, or is expected to be faster."""
        config = self._layer.config
        if config.backend == "sparse":
            return True
        if x.device.type != "cpu":
            return False
        tokens, n = x.numel() // x.shape[-1], config.num_experts
        if decodes:
            active, size = config.num_active_experts / n, self._width // n
            return x.dtype != torch.float16 and predicted_decode_ratio(tokens, self._hidden, size, active, n) < 1
        return self._predict(tokens, x.dtype, compiled=compiled_kernels() is not None) < 1

    def _predict(self, tokens: int, dtype: torch.dtype = torch.float32, *, compiled: bool = True) -> float:
        """Expected time as a share of the dense FFN's; infinite for a dtype that it does not take."""
        config, threads = self._layer.config, torch.get_num_threads()
        n = config.num_experts
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else dtype
        size, active = self._width // n, config.num_active_experts / n
        ratio = predicted_time_ratio(tokens, self._hidden, size, active, dtype, threads, compiled=compiled)
        return math.inf if ratio is None else ratio

    def _fallback_reason(self, x: Tensor, tensors: Sequence[Tensor]) -> str | None:
        """Why this forward pass cannot take the sparse path with these weights, or None."""
        layer = self._layer
        if _is_transformed():
            return "torch.func or forward-mode derivatives transform it"
        for (modules, name), own in zip(self._places, self._projections, strict=True):
            if modules.get(name) is not own:
                return "a projection carries an adapter or was replaced"
        for module, handler in self._handlers:
            if _own(module, "weight") is None or not is_routed_by(module, handler, alone=True):
                return "a projection's class was replaced, or its weight is computed"
        device, dtype = x.device, x.dtype
        autocast = autocast_dtype(device.type)
        if autocast is not None and torch.float64 in (dtype, tensors[0].dtype):
            return "autocast leaves float64 as it is"
        config = layer.config
        if isinstance(config, EMoEConfig) and config.score in _OF_NEURONS and (autocast or dtype) in _HALF:
            return "scores of neurons are rounded like them in half precision"
        for tensor in tensors:
            if type(tensor) not in _PLAIN:
                return f"a weight is a {type(tensor).__name__}"
            if not tensor.is_contiguous() and 0 in tensor.stride():
                return "numbers of a weight lie in one place"
            if tensor.device != device:
                return f"a weight is on {tensor.device}, the input on {device}"
            if tensor.dtype != dtype and (tensor.dtype != tensors[0].dtype or autocast is None):
                return "weights and input are of several dtypes"
        if layer.training:
            if layer.config.expert_dropout:
                return "expert_dropout acts on hidden neurons"
            if any(module.training and module.p for module in self._dropouts):
                return "dropout acts on hidden neurons"
        if not _is_elementwise(layer.activation):
            return "the activation is not known to take each neuron for itself, is random, or writes over its input"
        if layer.activation is not self._activation:
            self._watch_activation()
        if self._is_looked_at_inside:
            return "the FFN's own code looks at hidden neurons"
        if any(map(_is_looked_at, self._watched)) or _has_global_hook():
            return "a hook or a replaced forward looks at the FFN"
        return None


def _chooses_by_gate(config: EMoEConfig) -> bool:
    """Whether avg-k by keys takes the largest products of input and present mean keys."""
    return config.selection == "top" and not (config.score_bias or config.normalize_gate or config.gate_momentum)


def _is_plain(x: Tensor) -> bool:
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return type(x) in _PLAIN and not (x.is_nested or x.is_meta or tracing) and x.numel() > 0


def _is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _is_elementwise(activation: nn.Module) -> bool:
    """Whether an activation is one of those that take each neuron for itself, always give the same and leave their input as it is."""
    kind = type(activation)
    known = kind in _ELEMENTWISE or kind.__module__ in _ELEMENTWISE_MODULES
    return known and not activation.__dict__.get("inplace", False)


def _holders(ffn: FFN) -> list[nn.Module]:
    """Modules of the layer that hold a part of the FFN: hidden neurons go in or out of them."""
    spec = ffn.spec
    paths = [path for path in (spec.proj_in, spec.proj_up, spec.proj_out, spec.activation, *spec.between) if path]
    holders = {path[:end] for path in paths for end, sign in enumerate(path) if sign == "."}
    return [
        ffn.layer.get_submodule(holder)
        for holder in sorted(holders)
        if not all(path.startswith(f"{holder}.") for path in paths)
    ]


def _place(layer: nn.Module, path: str) -> tuple[dict[str, nn.Module | None], str]:
    prefix, _, name = path.rpartition(".")
    return layer.get_submodule(prefix)._modules, name


def _tensors(module: nn.Module) -> list[Tensor]:
    """Weight and bias of a projection, where they are its own and not computed."""
    return [found for name in ("weight", "bias") if (found := _own(module, name)) is not None]


def _own(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer that a module holds itself."""
    found = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found


def _is_looked_at(module: nn.Module) -> bool:
    """Whether a hook that is not ours, or a replaced ``forward``, sees what a module computes."""
    state = module.__dict__
    for name in _HOOKS:
        if (hooks := state[name]) and not all(map(is_own_hook, hooks.values())):
            return True
    return "forward" in state


def _has_global_hook() -> bool:
    state = vars(nn_module)
    return any(state[name] for name in _GLOBAL_HOOKS)
