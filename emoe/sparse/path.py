"""The sparse path through an FFN whose projections and activation are called one by one by somebody else's code.

The in-projection computes the whole FFN, and hands out a tensor without content that the activation, the up-projection's product and the
out-projection recognise (:class:`emoe.tensors.DeferredTensor`). The masked path is taken instead, for this forward
pass, where the results would not be the same (:mod:`emoe.sparse.conditions`).

With ``backend="auto"`` it is also taken where the sparse path is not expected to be faster (:mod:`emoe.sparse.cost_model`): on few tokens, for small
experts, on accelerators. A few tokens at a time, without gradients, are decoded (:mod:`emoe.sparse.decode`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from emoe.architectures import FFN, bias_of
from emoe.config import LINEAR_SCORES, EMoEConfig, GMoEConfig
from emoe.decision_guard import Guard, look
from emoe.optimizer_steps import COUNT
from emoe.projections import RoutedFFN, leave_, stand_around_
from emoe.routers import AvgKRouter, Router
from emoe.rows import HALVES
from emoe.sparse.activations import activation_name
from emoe.sparse.build import compiled_kernels, prepare_kernels
from emoe.sparse.conditions import Conditions, Layer, Projections, is_plain, is_transformed, own_tensor
from emoe.sparse.cost_model import decodes_many, predicted_decode_ratio, predicted_time_ratio
from emoe.sparse.decode import DecodeCache, DecodeWeights, Decoding, Way, choose_by_gate, decode_ffn, decode_weights
from emoe.sparse.ffn import saved_tensors_have_hooks, sparse_ffn
from emoe.sparse.whole import whole_ffn
from emoe.tensors import Deferred, DeferredTensor, Part, versions
from emoe.tokens import is_recomputed

_logger = logging.getLogger(__name__)
_told: set[str] = set()  # reasons that were said in this process
_MANY_TOKENS = 4096
# that are decoded at once; beyond, larger products gain more
_FEW_TOKENS, _VERY_FEW_TOKENS = 64, 8


class RoutedLayer(Layer, Protocol):
    """What the path needs of a routed FFN's activation."""

    router: Router
    output_bias: nn.Parameter | None

    @property
    def only_chooses(self) -> bool: ...
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

    def __init__(self, ffn: FFN, layer: RoutedLayer, projections: Projections) -> None:
        self._ffn, self._layer = ffn, layer
        self._cache = DecodeCache()
        self._projections = tuple(module for _, module, _ in projections)
        self._conditions = Conditions(ffn, layer, projections)
        self._whole = whole_ffn(ffn)
        self._width, self._hidden = ffn.d, ffn.h
        first = getattr(self._projections[0], "weight", None)  # one that was replaced may have none
        on_cpu = isinstance(first, Tensor) and first.device.type == "cpu"
        if on_cpu and (layer.config.backend == "sparse" or self._predict(_MANY_TOKENS) < 1):
            prepare_kernels()
        if self._whole is not None:  # at last, for another thread may come by it at once
            stand_around_(self._whole.module, self.decode, RoutedFFN)

    def choose(self, x: Tensor) -> Way | None:
        """How the sparse path computes a forward pass with this input; None for the masked one."""
        if torch.is_grad_enabled():
            self._cache.clear()
        return self._choose(x) if self._takes(x) and not _is_inside_a_function(x) else None

    def _choose(self, x: Tensor) -> Way | None:
        as_usual = not (is_transformed() or torch.is_autocast_enabled(x.device.type))
        if as_usual and (last := self._cache.last(x)) is not None:
            return last
        wanted = self._wanted(x)
        if wanted is None:
            return None
        guard = Guard()
        tensors = self._conditions.tensors(guard)
        reason = self._conditions.fallback_reason(x, tensors, guard)
        if reason is not None:
            if reason not in _told:
                _told.add(reason)
                _logger.warning("emoe: %s takes the masked path: %s", self._ffn.name, reason)
            return None
        biases = own_tensor(cast(nn.Module, self._layer), "output_bias", guard)
        # changes of weights that were made under inference_mode cannot be seen
        seen = biases is self._layer.output_bias and not any(map(Tensor.is_inference, tensors))
        seen = seen and (biases is None or biases.device == x.device)
        if wanted == "sparse" or not seen:
            return Way(guard, None)
        way = Way(guard, self._decoding(tensors, biases, guard))
        self._cache.remember(x, way)
        return way

    def compute(self, x: Tensor, way: Way, pre_activations: Callable[[Tensor], Tensor]) -> Tensor:
        """The FFN's output for ``x [..., h]``, in the place of its pre-activations.

        Args:
            x: the FFN's input.
            way: what was chosen for it.
            pre_activations: computes them, should anybody look at them, given the experts' weights ``[T, N]``.
        """
        first, *between, last = self._projections
        later = _tensors(last, cast(nn.Module, self._layer))
        then = versions(later)

        def is_still() -> bool:
            return versions(later) == then and way.guard.holds()

        flat = x.reshape(-1, x.shape[-1])
        y, weights = self._sum_experts(flat) if way.decoding is None else self._decode(flat, way.decoding)
        spec = self._ffn.spec
        shape = (*x.shape[:-1], self._width * (2 if spec.fused else 1))
        output = y.view(*x.shape[:-1], -1)
        # no view, which whoever changes it in place could not have under FSDP2, or later with gradients
        output = output.clone() if y.requires_grad else output.data
        call = Deferred(
            self._layer,
            x,
            output,
            self._conditions.tell_of_a_look,
            read=(x, *_tensors(first)),
            tell_of_a_function=self._conditions.tell_of_a_function,
            read_by_up=versions((x, *_tensors(*between))),
            is_still=is_still,
            activated=HALVES.index(spec.fused) if spec.fused else 0,
            requires_grad=y.requires_grad,
        )
        part: Part = "both" if spec.fused else "in"
        return DeferredTensor.of(shape, y, lambda: pre_activations(weights()), call, part)

    def decode(self, x: Tensor) -> Tensor | None:
        """The FFN's output for a few tokens of a model at rest, for its module to give without running its own code; None where it has to."""
        if (
            self._whole is None
            or torch.is_grad_enabled()
            or not self._takes(x)
            or x.numel() > _FEW_TOKENS * self._hidden
        ):
            return None
        way = self._choose(x)
        if way is None or way.decoding is None or not way.decoding.whole:
            return None
        return self._decode(x, way.decoding)[0]

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

    def _decode(self, x: Tensor, decoding: Decoding) -> tuple[Tensor, Callable[[], Tensor]]:
        layer, kept = self._layer, decoding.weights
        n, scales = layer.config.num_experts, None
        if decoding.top_k is not None:
            experts = choose_by_gate(x, kept, decoding.top_k)
        else:
            scores = layer.linear_scores(x.reshape(-1, self._hidden), kept.gate)
            expected = (x.numel() // self._hidden, n)
            if scores.shape != expected:
                raise RuntimeError(
                    f"the router of {self._ffn.name} gave scores {list(scores.shape)}, not {list(expected)}"
                )
            experts, scales = layer.route_few(scores, kept.kernels)
        y = decode_ffn(x, decoding, experts, scales)

        def weights() -> Tensor:
            ones = torch.ones(experts.shape, device=x.device) if scales is None else scales
            return ones.new_zeros(len(ones), n).scatter(1, experts, ones)

        if (biases := decoding.output_biases) is not None:
            chosen = biases[experts]
            own = (chosen if scales is None else chosen * scales.unsqueeze(-1)).sum(1).to(y.dtype)
            return y + own.view(y.shape), weights
        return y if decoding.bias is None else y + decoding.bias, weights

    def may_defer(self, x: Tensor) -> bool:
        """Whether the up-projection's part can wait until somebody looks at it: nobody does, where the in-projection has the output already."""
        return self.choose(x) is not None

    def defer_up(self, x: Tensor, up: Callable[[], Tensor]) -> Tensor:
        """The up-projection's part, which nobody needs once the output is known."""
        read, tell = (x, *_tensors(*self._projections[1:-1])), self._conditions.tell_of_a_function
        call = Deferred(self._layer, x, x, read=read, tell_of_a_function=tell)
        return DeferredTensor.of((*x.shape[:-1], self._width), x, up, call, "up")

    def _decoding(self, tensors: Sequence[Tensor], output_biases: Tensor | None, guard: Guard) -> Decoding:
        """How a forward pass is decoded with the projections' weights and biases, and the experts' own, which are these."""
        layer, config = self._layer, self._layer.config
        n, by_neuron = config.num_experts, config.decode_cache
        by_keys = isinstance(config, EMoEConfig) and isinstance(layer.router, AvgKRouter) and config.score == "keys"

        def make() -> DecodeWeights:
            gate = layer.current_gate() if by_keys else None
            return decode_weights(self._ffn, n, gate, by_neuron=by_neuron)

        # the weights between are read where they lie, if that is by neuron
        first, *between, last = self._projections
        scattered = [
            module for module in between if not (isinstance(module, nn.Linear) and module.weight.is_contiguous())
        ]
        copied = [cast(Tensor, module.weight) for module in (first, *scattered, last)]
        steps = guard.item(COUNT, "steps")
        settings = (config, steps, len(copied), tuple(look(guard.tensor(tensor)) for tensor in tensors))
        weights = self._cache.get(copied, settings, guard, make)
        name = activation_name(layer.activation, guard)
        guard.item(vars(layer), "record")
        running_gate = own_tensor(layer.router, "gate", guard)
        by_gate = by_keys and running_gate is None and _chooses_by_gate(cast(EMoEConfig, config)) and layer.only_chooses
        whole = self._whole
        known = whole is not None and whole.is_as_known(guard) and whole.activation(guard) is layer
        top_k = config.top_k if by_gate and weights.kernels is not None else None
        return Decoding(weights, layer.activation, name, bias_of(last), output_biases, top_k, known)

    def _takes(self, x: Tensor) -> bool:
        """Whether it is an input that this path can read; of another the projection says what is wrong with it."""
        return is_plain(x) and x.ndim > 0 and x.size(-1) == self._hidden

    def _wanted(self, x: Tensor) -> Literal["decode", "sparse"] | None:
        """What was asked for, or is expected to be faster than the dense FFN: the mask never is."""
        config, compiled = self._layer.config, compiled_kernels() is not None
        tokens, n = x.numel() // self._hidden, config.num_experts
        in_place = compiled and config.decode_cache and x.device.type == "cpu"
        decodes = self._may_decode(x, tokens, in_place=in_place)
        if config.backend == "sparse":
            return "decode" if decodes else "sparse"
        if x.device.type != "cpu":
            return None
        if decodes and x.dtype != torch.float16:
            active, size = config.num_active_experts / n, self._width // n
            if predicted_decode_ratio(tokens, self._hidden, size, active, n, x.dtype, in_place=in_place) < 1:
                return "decode"
        return "sparse" if self._predict(tokens, x.dtype, compiled=compiled) < 1 else None

    def _may_decode(self, x: Tensor, tokens: int, *, in_place: bool) -> bool:
        """Whether these are few tokens of a model at rest, each with as many experts as the others."""
        layer, config = self._layer, self._layer.config
        return (
            tokens <= (_FEW_TOKENS if decodes_many(x.dtype, in_place=in_place) else _VERY_FEW_TOKENS)
            and not layer.training
            and not torch.is_grad_enabled()
            and config.score_threshold is None
            and config.capacity_factor is None
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _predict(self, tokens: int, dtype: torch.dtype = torch.float32, *, compiled: bool = True) -> float:
        """Expected time as a share of the dense FFN's; infinite for a dtype that it does not take."""
        config, threads = self._layer.config, torch.get_num_threads()
        n = config.num_experts
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else dtype
        size, active = self._width // n, config.num_active_experts / n
        ratio = predicted_time_ratio(tokens, self._hidden, size, active, dtype, threads, compiled=compiled)
        return math.inf if ratio is None else ratio


def _is_inside_a_function(x: Tensor) -> bool:
    """Whether an ``autograd.Function`` seems to call a part of the FFN, as reentrant checkpointing does: without gradients, and once more in a backward pass."""
    if not x.requires_grad or torch.is_inference_mode_enabled():
        return False
    if not torch.is_grad_enabled():
        return True
    # other checkpointing computes again under hooks, and as it was computed
    return x.is_leaf and is_recomputed() and not saved_tensors_have_hooks()


def _tensors(*modules: nn.Module) -> list[Tensor]:
    """Weights and biases of projections, and of experts."""
    names = ("weight", "bias", "output_bias")
    found = (getattr(module, name, None) for module in modules for name in names)
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _chooses_by_gate(config: EMoEConfig) -> bool:
    """Whether avg-k by keys takes the largest products of input and present mean keys."""
    return config.selection == "top" and not (config.score_bias or config.normalize_gate or config.gate_momentum)
