"""Routers score the experts of a converted FFN: one class per router, registered by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoe.architectures import FFN, has_plain_weight, weight_of
from emoe.compiled.build import is_in_memory, is_recorded
from emoe.config import ROUTERS, EMoEConfig, GMoEConfig
from emoe.errors import ConversionError

_COSINE_DIM = 256
_MAX_LOG_SCALE = math.log(100.0)
_CHUNK = 1 << 19  # elements
_COMPARED = 32  # elements of a weight


def neuron_means(blocks: Tensor) -> Tensor:
    """Average over the neurons of each expert in float32, ``[N, s, ...]`` to ``[N, ...]``."""
    if (
        blocks.dtype == torch.float32
        or blocks.device.type != "cpu"
        or torch.compiler.is_compiling()
    ):
        return blocks.float().mean(1)
    # a few experts at a time: allocating a float32 copy of a large layer takes longer than computing the means
    experts = max(_CHUNK // max(blocks[:1].numel(), 1), 1)
    return torch.cat([chunk.float().mean(1) for chunk in blocks.split(experts)])


def expert_means(rows: Tensor, num_experts: int) -> Tensor:
    """Average over each expert's neurons in float32, ``[d, ...]`` to ``[N, ...]``."""
    return neuron_means(rows.unflatten(0, (num_experts, -1)))


def key_scores(x: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """Score the experts ``[T, N]`` by their mean keys: the mean pre-activations of their neurons (paper Eq. 4).

    The scores are computed in float32 without autocast: bf16 would change the experts of several percent of tokens.

    Args:
        x: FFN inputs ``[T, h]``.
        gate: mean keys ``[N, h]`` in float32 (:func:`expert_means`).
        bias: mean biases ``[N]``, None to leave them out (the paper's score).
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        return F.linear(x.float(), gate, bias)


def block_means(values: Tensor, num_experts: int) -> Tensor:
    """Average over each expert's neurons in float32, ``[..., d]`` to ``[..., N]``."""
    return values.float().unflatten(-1, (num_experts, -1)).mean(-1)


class Router(nn.Module):
    """Score the experts of one FFN. Subclass it and call :func:`register_router` to add a router.

    Parameters and persistent buffers are saved with the model, beside the dense model's own state.

    Attributes:
        learned: the router has parameters that need a gradient, so its scores must weight the experts' outputs.
        ffn: FFN whose experts are scored.
        config: configuration of the experts.
    """

    learned: ClassVar[bool] = True

    def __init__(self, ffn: FFN, config: EMoEConfig | GMoEConfig) -> None:
        super().__init__()
        self.ffn, self.config = ffn, config

    def forward(self, x: Tensor) -> Tensor:
        """Compute scores ``[T, N]`` in float32 from FFN inputs ``[T, h]``; higher is better."""
        raise NotImplementedError

    def scores(self, x: Tensor | None, z: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Compute scores ``[T, N]`` from inputs ``[T, h]`` (None if unknown) and pre-activations ``[T, d]``.

        Only avg-k reads the pre-activations and, for its ``inter`` scores, the activated neurons ``hidden`` ``[T, d]``.
        """
        return self(require_input(self.ffn, x).to(z.device))

    def kept_keys(self) -> Tensor | None:
        """Return vectors ``[N, h]`` in float32 whose products with the input are the scores, if no gradient is recorded.

        None if the scores are computed in another way, or the vectors are not at hand.
        """
        return None

    def forget_kept_keys_(self) -> None:
        """Compute :meth:`kept_keys` anew in the next forward pass."""

    def update_(self) -> None:
        """Update the router's state after an optimizer step; the default has none."""


def register_router(name: str, router: type[Router]) -> None:
    """Add or replace a router for ``EMoEConfig(router=name)``; ``docs/adding.md`` has a complete example.

    Args:
        name: identifier in configurations and checkpoints. Loading such a checkpoint requires the same registration.
        router: subclass of :class:`Router`.
    """
    ROUTERS[name], _CLASSES[name] = router.learned, router


class _Float32Linear(nn.Linear):
    """Apply a linear map in float32, whatever the dtype of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class CosineRouter(Router):
    """Score experts by the cosine of a projection and expert embeddings: the learned router of GMoE and EMoE-learn.

    Scores are ``exp(min(temperature, ln 100)) * cos(W x + b, s_i)``; the scale starts at 2 and the
    embeddings at N(0, 0.01²) (the authors' ``gates/cosine_top.py``).
    """

    def __init__(self, ffn: FFN, config: EMoEConfig | GMoEConfig) -> None:
        super().__init__(ffn, config)
        self.proj = _Float32Linear(ffn.h, _COSINE_DIM)
        self.expert_embeddings = nn.Parameter(torch.randn(_COSINE_DIM, config.num_experts) * 0.01)
        self.temperature = nn.Parameter(torch.tensor([math.log(1 / 0.5)]))
        weight = cast(Tensor, ffn.proj_in.weight)
        self.to(weight.device, weight.dtype if weight.is_floating_point() else None)

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`Router.forward`."""
        with torch.autocast(x.device.type, enabled=False):
            cosine = F.normalize(self.proj(x), dim=-1) @ F.normalize(
                self.expert_embeddings.float(), dim=0
            )
            return cosine * self.temperature.float().clamp(max=_MAX_LOG_SCALE).exp()


class Stamp:
    """Detects changes of a projection's weight by its identity, version, address and some elements.

    PyTorch does not count changes through ``weight.data``, by which PEFT merges adapters. Those of a whole matrix
    change the compared elements.

    Args:
        projection: module with a plain weight in the CPU's memory.
        has_copy: false if only views of the weight are in use, which show changes of its elements.
    """

    def __init__(self, projection: nn.Module, *, has_copy: bool = True) -> None:
        weight = weight_of(projection)
        self._projection, self._weight = projection, weight
        self._version, self._address = _version(weight), weight.data_ptr()
        elements = weight.detach().view(-1) if has_copy else weight.new_empty(0)
        step = max(len(elements) // _COMPARED, 1) | 1  # odd, so that not all are of one column
        self._elements = elements[::step]  # a view: it shows later changes
        self._stored = self._elements.clone()

    def is_of(self, projection: nn.Module) -> bool:
        """Check if a projection is the stamped one, and its weight unchanged."""
        weight = self._weight
        if projection is not self._projection or projection.weight is not weight:
            return False
        if weight.data_ptr() != self._address or _version(weight) != self._version:
            return False
        return len(self._stored) == 0 or torch.equal(self._elements, self._stored)


def _version(weight: Tensor) -> int | None:
    """Return the number of changes that PyTorch counted. None for tensors of inference mode, which have none."""
    return None if weight.is_inference() else weight._version


class AvgKRouter(Router):
    """Score an expert by the mean score of its neurons: the paper's avg-k (Eq. 4). It has no parameters.

    ``keys`` scores are products of the FFN's input and the mean keys. If the weights are adapted or quantised, they are
    means of the pre-activations, which are equal up to rounding.

    In evaluation mode the mean keys are kept until the weights change.

    Attributes:
        gate: running mean keys ``[N, h]`` in float32 with ``gate_momentum``, else None.
    """

    learned: ClassVar[bool] = False
    config: EMoEConfig
    gate: Tensor | None

    def __init__(self, ffn: FFN, config: EMoEConfig | GMoEConfig) -> None:
        super().__init__(ffn, config)
        self._kept: tuple[Stamp, Tensor] | None = None
        self.register_buffer("gate", self.mean_keys() if self.config.gate_momentum else None)

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`Router.forward`. Multiply inputs by mean weights, if scores are linear in the input."""
        weight = self.gate
        if weight is None:
            weight = self._kept_mean_weight()
        if weight is None:
            weight = self._mean_weight()
            self._keep(weight)
        return key_scores(x, weight, self._score_bias())

    def _projection(self) -> nn.Module:
        """Return the projection whose outputs the score averages; a fused one holds both halves."""
        projection = self.ffn.proj_up if self.config.score == "up" else None
        return projection or self.ffn.proj_in

    def kept_keys(self) -> Tensor | None:
        """See :meth:`Router.kept_keys`."""
        scores_are_products = (
            self.config.score == "keys" and not self.config.score_bias and self.gate is None
        )
        # a subclass or a hook may change the scores
        is_changed = type(self) is not AvgKRouter or self._forward_hooks or self._forward_pre_hooks
        return self._kept_mean_weight() if scores_are_products and not is_changed else None

    def forget_kept_keys_(self) -> None:
        """See :meth:`Router.forget_kept_keys_`."""
        self._kept = None

    def _may_keep(self) -> bool:
        return not (self.training or torch.is_grad_enabled() or is_recorded())

    def _kept_mean_weight(self) -> Tensor | None:
        """Return the mean weights ``[N, h]`` of an earlier call; None if there are none or the weights changed."""
        if not self._may_keep():
            return None
        kept = self._kept  # another thread may replace it
        if kept is None or not kept[0].is_of(self._projection()):
            return None
        return kept[1]

    def _keep(self, mean_weight: Tensor) -> None:
        """Keep mean weights for the next call in evaluation mode."""
        if not self._may_keep():
            return
        projection = self._projection()
        weight = weight_of(projection)
        # not on a GPU, which would have to wait for the comparison of elements
        if is_in_memory(weight) and weight.is_contiguous():
            self._kept = Stamp(projection), mean_weight

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # a copy has its own weights

    def _mean_weight(self) -> Tensor:
        """Compute the mean weights ``[N, h]`` of the score's projection."""
        if self.config.score == "keys":
            return self.mean_keys()
        # the mean of a projection's outputs is the output of its mean weights
        weight, _ = self.ffn.blocks(self.config.num_experts)[0][self.config.score == "up"]
        return neuron_means(weight)

    def _score_bias(self) -> Tensor | None:
        """Return the mean biases ``[N]`` that are part of the score, None if there are none."""
        if self.config.score == "keys":
            return self._mean_bias() if self.config.score_bias else None
        _, bias = self.ffn.blocks(self.config.num_experts)[0][self.config.score == "up"]
        return None if bias is None else neuron_means(bias)

    def scores(self, x: Tensor | None, z: Tensor, hidden: Tensor | None = None) -> Tensor:
        """See :meth:`Router.scores`."""
        ffn, score = self.ffn, self.config.score
        if score == "keys":
            with weights_in_place(ffn.proj_in):
                is_adapted = hasattr(ffn.proj_in, "base_layer")
                if (
                    x is None
                    or is_adapted
                    or not has_plain_weight(ffn.proj_in)
                    or ffn.proj_in.weight.is_meta
                ):
                    return self._scores_from_neurons(z)
                return self(x)
        neurons = z
        if score.startswith("inter"):
            neurons = cast(Tensor, hidden)
            if ffn.gated:
                neurons = neurons * ffn.up(require_input(ffn, x))
        elif score.startswith("up"):
            neurons = ffn.up(require_input(ffn, x))
        return block_means(
            neurons.abs() if score.endswith("_abs") else neurons, self.config.num_experts
        )

    def _scores_from_neurons(self, z: Tensor) -> Tensor:
        """Compute ``keys`` scores from pre-activations."""
        if self.gate is not None:
            name = f"{self.ffn.name}.{self.ffn.spec.proj_in}"
            reason = "has no plain weight, which gate_momentum needs"
            way_out = "merge or remove its adapter, or do not quantise it"
            raise ConversionError(f"{name} {reason}: {way_out}")
        scores = block_means(z, self.config.num_experts)
        # pre-activations include the bias, the paper's score does not
        bias = None if self.config.score_bias else self._mean_bias()
        return scores if bias is None else scores - bias.to(scores.device)

    def _mean_bias(self) -> Tensor | None:
        bias = self.ffn.key_bias()
        return None if bias is None else expert_means(unsharded(bias), self.config.num_experts)

    def mean_keys(self) -> Tensor:
        """Compute the mean keys ``[N, h]`` of the current weights, without gradient."""
        return expert_means(unsharded(self.ffn.keys()), self.config.num_experts)

    @torch.no_grad()
    def update_(self) -> None:
        """Set ``gate = m * gate + (1 - m) * mean keys``; does nothing without a momentum."""
        if self.gate is not None:
            self.gate.lerp_(self.mean_keys(), 1 - self.config.gate_momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.forget_kept_keys_()  # they refer to the old weights
        # a running gate moves with the model but stays in float32
        gate = self.gate
        super()._apply(fn, recurse)
        if gate is not None and self.gate is not None:
            self.gate = gate.to(self.gate.device)
        return self


class FixedRouter(Router):
    """Score the experts by their usage, so that every token uses the same experts (:func:`emoe.fix_experts_`).

    Attributes:
        usage: number of times that each expert was used, ``[N]`` int64, which no cast of the model rounds.
    """

    learned: ClassVar[bool] = False
    usage: Tensor

    def __init__(self, ffn: FFN, config: EMoEConfig | GMoEConfig) -> None:
        super().__init__(ffn, config)
        device = ffn.keys().device
        self.register_buffer(
            "usage", torch.zeros(config.num_experts, dtype=torch.int64, device=device)
        )

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`Router.forward`. An expert's score is the number of less used experts."""
        usage = self.usage.to(x.device)
        return (usage.unsqueeze(1) > usage).sum(1).float().expand(x.shape[0], -1)


_CLASSES: dict[str, type[Router]] = {
    "avg_k": AvgKRouter,
    "cosine": CosineRouter,
    "fixed": FixedRouter,
}


def build_router(ffn: FFN, config: EMoEConfig | GMoEConfig) -> Router:
    """Build the router that a configuration names."""
    return _CLASSES[config.router](ffn, config)


def is_offloaded(module: nn.Module) -> bool:
    """Check if accelerate has offloaded a module's weights until the module is called."""
    return hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters(recurse=False))


def weights_in_place(*modules: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which the weights of offloaded modules are loaded."""
    offloaded = [module for module in modules if is_offloaded(module)]
    if not offloaded:
        return nullcontext()  # torch.compile cannot trace hooks
    from accelerate.utils import align_module_device

    stack = ExitStack()
    for module in offloaded:
        stack.enter_context(align_module_device(module))
    return stack


def unsharded(weight: Tensor) -> Tensor:
    """Detach a weight, and gather it if FSDP has sharded it (between forward passes)."""
    return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach()


def require_input(ffn: FFN, passed: Tensor | None) -> Tensor:
    """Return the tensor that an FFN's in-projection passed on. Raise :class:`RuntimeError` if there is none."""
    if passed is None:
        raise RuntimeError(
            f"{ffn.name}: its in-projection did not run or was replaced (PEFT must train the whole FFN)"
        )
    return passed
