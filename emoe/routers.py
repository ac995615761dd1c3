"""Routers score the experts of a converted FFN: one class per router, registered by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoe.architectures import FFN, has_plain_weight
from emoe.config import ROUTERS, EMoEConfig, GMoEConfig, RegisteredRouter
from emoe.errors import ConversionError
from emoe.routing import block_means, expert_means, key_scores, neuron_means

_COSINE_DIM = 256
_MAX_LOG_SCALE = math.log(100.0)


class Router(nn.Module):
    """Score the experts of one FFN. Subclass it and call :func:`register_router` to add a router.

    Parameters and persistent buffers are saved with the model, beside the dense model's own state.

    Attributes:
        learned: the router has parameters that need the task's gradient, so its scores must weight the experts' outputs.
    """

    learned: ClassVar[bool] = True

    def __init__(self, ffn: FFN, config: EMoEConfig | GMoEConfig) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Score the experts.

        Args:
            x: FFN inputs ``[T, h]``.

        Returns:
            Scores ``[T, N]`` in float32; higher is better.
        """
        raise NotImplementedError

    def update_(self) -> None:
        """Update the router's state after an optimizer step; the default has none."""


def register_router(name: str, router: type[Router]) -> None:
    """Add or replace a router for ``EMoEConfig(router=name)``; ``docs/adding.md`` has a complete example.

    >>> class LinearRouter(emoe.Router):
    ...     def __init__(self, ffn, config):
    ...         super().__init__(ffn, config)
    ...         self.linear = torch.nn.Linear(ffn.h, config.num_experts)
    ...
    ...     def forward(self, x):
    ...         return self.linear(x).float()
    >>> emoe.register_router("linear", LinearRouter)
    >>> emoe.EMoEConfig(num_experts=8, top_k=2, router="linear", weighting="softmax").router
    'linear'

    Args:
        name: name in configurations and checkpoints. Loading such a checkpoint requires the same registration.
        router: subclass of :class:`Router`.

    Raises:
        ConversionError: the name is not an identifier, or the class is not a subclass of :class:`Router`.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ConversionError(f"register_router: {name!r} is not a name; write one like 'my_router'")
    if not (isinstance(router, type) and issubclass(router, Router)):
        raise ConversionError(f"register_router('{name}'): {router!r} is not a subclass of emoe.Router")
    ROUTERS[name] = RegisteredRouter(router.learned, lambda: router)


class _Float32Linear(nn.Linear):
    """Apply a linear map in float32, whatever the dtype of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class CosineRouter(Router):
    """Score experts by the scaled cosine of a projection and expert embeddings: the learned router of GMoE and EMoE-learn.

    Logits are ``exp(min(temperature, ln 100)) * cos(W x + b, s_i)``; the scale starts at 2 and the
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
            cosine = F.normalize(self.proj(x), dim=-1) @ F.normalize(self.expert_embeddings.float(), dim=0)
            return cosine * self.temperature.float().clamp(max=_MAX_LOG_SCALE).exp()


class AvgKRouter(Router):
    """Score an expert by the mean over its neurons: the paper's avg-k (Eq. 4), without parameters.

    ``keys`` scores come from the FFN's input and the mean keys of the present weights. If the weights are not plain (an
    adapter, quantised or offloaded weights), they come from the pre-activations, which is equal up to rounding.

    Attributes:
        ffn: FFN whose experts are scored.
        gate: running mean keys ``[N, h]`` in float32 with ``gate_momentum``, else None.
        frozen_keys: mean keys of frozen weights (:func:`emoe.for_inference_`), else None.
    """

    learned: ClassVar[bool] = False
    gate: Tensor | None

    def __init__(self, ffn: FFN, config: EMoEConfig | GMoEConfig) -> None:
        super().__init__(ffn, config)
        self.ffn = ffn
        self.config = cast(EMoEConfig, config)
        self._proj_in = (ffn.proj_in,)  # in a tuple, so that it does not become a child module
        self.frozen_keys: Tensor | None = None
        momentum = self.config.gate_momentum > 0
        self.register_buffer("gate", self.mean_keys().clone() if momentum else None)

    def linear_scores(self, x: Tensor) -> Tensor:
        """Compute scores ``[T, N]`` of inputs ``[T, h]`` from mean weights, before any neuron is computed."""
        config = self.config
        if config.score == "keys":
            gate = self.frozen_keys if self.gate is None else self.gate
            bias = self._mean_bias() if config.score_bias else None
            return key_scores(x, self.mean_keys() if gate is None else gate, bias)
        # the mean of an in-projection's outputs is the output of its mean weights
        weight, bias = self.ffn.blocks(config.num_experts)[0][config.score == "up"]
        return key_scores(x, neuron_means(weight), None if bias is None else neuron_means(bias))

    def scores(self, x: Tensor | None, z: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Compute scores ``[T, N]`` from an FFN's computed neurons.

        Args:
            x: FFN inputs ``[T, h]``, None if unknown.
            z: pre-activations ``[T, d]``.
            hidden: activated neurons ``[T, d]``, needed by the ``inter`` scores.
        """
        n = self.config.num_experts
        match self.config.score:
            case "gate":
                return block_means(z, n)
            case "up":
                return block_means(self._up(x), n)
            case "up_abs":
                return block_means(self._up(x).abs(), n)
            case "inter" | "inter_abs":
                inter = cast(Tensor, hidden)
                inter = inter * self._up(x) if self.ffn.gated else inter
                return block_means(inter.abs() if self.config.score == "inter_abs" else inter, n)
        if is_offloaded(self.ffn.proj_in):
            with weights_in_place(self.ffn.proj_in):
                return self._key_scores(x, z)
        return self._key_scores(x, z)

    def _key_scores(self, x: Tensor | None, z: Tensor) -> Tensor:
        return self.linear_scores(x) if x is not None and self._has_plain_keys() else self._scores_from_neurons(z)

    def _up(self, x: Tensor | None) -> Tensor:
        if x is None:
            raise missing_input_error(self.ffn)
        return self.ffn.up(x)

    def _has_plain_keys(self) -> bool:
        proj_in = self.ffn.proj_in
        projection = getattr(proj_in, "projection", proj_in)  # the sparse backend keeps the replaced projection
        is_original = projection is self._proj_in[0]  # not wrapped by an adapter
        return is_original and has_plain_weight(proj_in) and not cast(Tensor, proj_in.weight).is_meta

    def _scores_from_neurons(self, z: Tensor) -> Tensor:
        """Compute ``keys`` scores from pre-activations."""
        config, ffn = self.config, self.ffn
        if config.gate_momentum:
            raise ConversionError(
                f"{ffn.name}.{ffn.spec.proj_in} has an adapter or no plain weight, and gate_momentum needs its keys: "
                "merge the adapter, or adapt other modules"
            )
        scores = block_means(z, config.num_experts)
        # pre-activations include the bias, the paper's score does not
        bias = None if config.score_bias else self._mean_bias()
        return scores if bias is None else scores - bias.to(scores.device)

    def _mean_bias(self) -> Tensor | None:
        bias = self.ffn.key_bias()
        return None if bias is None else expert_means(unsharded(bias), self.config.num_experts)

    def mean_keys(self) -> Tensor:
        """Compute the mean keys ``[N, h]`` of the present weights, without gradient."""
        return expert_means(unsharded(self.ffn.keys()), self.config.num_experts)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; training discards the frozen mean keys."""
        if mode:
            self.frozen_keys = None
        return super().train(mode)

    @torch.no_grad()
    def update_(self) -> None:
        """Set ``gate = m * gate + (1 - m) * mean keys``; does nothing without a momentum."""
        if self.gate is not None:
            self.gate.lerp_(self.mean_keys(), 1 - self.config.gate_momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # a running gate moves with the model but stays in float32
        gate = self.gate
        super()._apply(fn, recurse)
        if gate is not None and self.gate is not None:
            self.gate = gate.to(self.gate.device)
        return self


class FixedRouter(Router):
    """Choose the same experts for every token, by how often they were used (:func:`emoe.fix_experts_`).

    Attributes:
        usage: number of times that each expert was used, ``[N]`` int64, which no cast of the model rounds.
    """

    learned: ClassVar[bool] = False
    usage: Tensor

    def __init__(self, ffn: FFN, config: EMoEConfig | GMoEConfig) -> None:
        super().__init__(ffn, config)
        device = cast(Tensor, ffn.proj_in.weight).device
        self.register_buffer("usage", torch.zeros(config.num_experts, dtype=torch.int64, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`Router.forward`. An expert's score is the number of experts that were used less."""
        usage = self.usage.to(x.device)
        return (usage.unsqueeze(1) > usage).sum(1).float().expand(x.shape[0], -1)


def is_offloaded(module: nn.Module) -> bool:
    """Check if accelerate keeps a module's weights elsewhere until its call."""
    return hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters(recurse=False))


@contextmanager
def weights_in_place(*modules: nn.Module) -> Iterator[None]:
    """Load the weights of offloaded modules for the duration of the block."""
    with ExitStack() as stack:
        for module in filter(is_offloaded, modules):
            from accelerate.utils import align_module_device

            stack.enter_context(align_module_device(module))
        yield


def unsharded(weight: Tensor) -> Tensor:
    """Detach a weight, and gather it if FSDP has sharded it (between forward passes)."""
    full = getattr(weight, "full_tensor", None)
    return (weight if full is None else full()).detach()


def missing_input_error(ffn: FFN) -> RuntimeError:
    """Return the error for an activation that ran without its in-projection."""
    return RuntimeError(
        f"{ffn.name}: the activation ran without its in-projection, or that was replaced (for PEFT's modules_to_save name the "
        "whole FFN or layer, not its projections)"
    )
