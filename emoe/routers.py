"""What scores the experts of a converted FFN: one class per router, by name in a registry."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoe.architectures import FFN, has_plain_weight
from emoe.config import EMoEConfig, GMoEConfig
from emoe.errors import ConversionError
from emoe.registry import ROUTERS, RegisteredRouter
from emoe.routing import block_means, expert_means, key_scores, neuron_means

_COSINE_DIM = 256
_MAX_LOG_SCALE = math.log(100.0)


class Router(nn.Module):
    """Score the experts of one FFN. Make a subclass and :func:`register_router` it to add one.

    Parameters and persistent buffers are saved with the model, beside the dense model's own state.

    Attributes:
        learned: it has parameters that the task's gradient has to reach, so that experts' outputs must be weighted by its scores.
    """

    learned: ClassVar[bool] = True

    def __init__(self, ffn: FFN, config: EMoEConfig | GMoEConfig) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Score the experts.

        Args:
            x: the FFN's input ``[T, h]``.

        Returns:
            ``[T, N]`` in float32; higher is better.
        """
        raise NotImplementedError

    def update_(self) -> None:
        """Follow the weights after an optimiser step, where that is not done in every forward pass."""


def register_router(name: str, router: type[Router]) -> None:
    """Add or replace a router, so that ``EMoEConfig(router=name)`` takes it (``docs/adding.md`` has a whole one).

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
        name: in configurations and checkpoints. A checkpoint that names it loads where it is registered.
        router: a subclass of :class:`Router`.

    Raises:
        ConversionError: no name, or no subclass of :class:`Router`.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ConversionError(f"register_router: {name!r} is no name; write one like 'my_router'")
    if not (isinstance(router, type) and issubclass(router, Router)):
        raise ConversionError(f"register_router('{name}'): {router!r} is no subclass of emoe.Router")
    ROUTERS[name] = RegisteredRouter(router.learned, lambda: router)


class _ScoreLinear(nn.Linear):
    """A linear map in float32, whatever the weights and autocast are."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class CosineRouter(Router):
    """Learned router of GMoE and EMoE-learn: scaled cosine of a projection with expert embeddings.

    Logits are ``exp(min(temperature, ln 100)) * cos(W x + b, s_i)``; the scale starts at 2 and the
    embeddings at N(0, 0.01²) (the authors' ``gates/cosine_top.py``).
    """

    def __init__(self, ffn: FFN, config: EMoEConfig | GMoEConfig) -> None:
        super().__init__(ffn, config)
        self.proj = _ScoreLinear(ffn.h, _COSINE_DIM)
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
    """The paper's avg-k: an expert's score is the mean over its neurons (Eq. 4). It has no parameters.

    Its ``keys`` scores come from the FFN's input and the mean keys of the present weights; where the weights at work are not plain (an adapter,
    quantised or offloaded ones), from the pre-activations, which is the same but for rounding.

    Attributes:
        gate: running mean keys ``[N, h]``, float32, where ``gate_momentum`` asks for them, or None.
    """

    learned: ClassVar[bool] = False
    gate: Tensor | None

    def __init__(self, ffn: FFN, config: EMoEConfig | GMoEConfig) -> None:
        super().__init__(ffn, config)
        # in a tuple, so that the FFN's layer does not become a child of its own router
        self._ffn = (ffn,)
        self._proj_in = (ffn.proj_in,)
        self.config = cast(EMoEConfig, config)
        momentum = self.config.gate_momentum > 0
        self.register_buffer("gate", self.current_gate().detach().clone() if momentum else None)

    @property
    def ffn(self) -> FFN:
        """The FFN whose experts are scored."""
        return self._ffn[0]

    @property
    def needs_hidden(self) -> bool:
        """Whether scores are of what goes into the out-projection."""
        return self.config.score.startswith("inter")

    def linear_scores(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Scores ``[T, N]`` from mean weights alone, before any neuron is computed.

        Args:
            x: ``[T, h]``.
            gate: mean keys that the caller has at hand (:meth:`current_gate`).
        """
        config = self.config
        if config.score == "keys":
            bias = self._mean_bias() if config.score_bias else None
            gate = self.gate if self.gate is not None else gate
            return key_scores(x, self.current_gate() if gate is None else gate, bias, unit_length=config.normalize_gate)
        # means of what an in-projection gives, from the means of its weights: the same, because it is linear
        weight, bias = self.ffn.blocks(config.num_experts)[0][config.score == "up"]
        return key_scores(x, neuron_means(weight), None if bias is None else neuron_means(bias))

    def scores(self, x: Tensor | None, z: Tensor) -> Tensor:
        """Scores ``[T, N]`` from the FFN's input ``[T, h]`` (None where it is not known) and pre-activations ``[T, d]``."""
        n = self.config.num_experts
        match self.config.score:
            case "gate":
                return block_means(z, n)
            case "up":
                return block_means(self._up(x), n)
            case "up_abs":
                return block_means(self._up(x).abs(), n)
        needed = (self.ffn.proj_in, self.ffn.proj_out) if self.config.value_norm_weighted else (self.ffn.proj_in,)
        if not any(is_offloaded(module) for module in needed):
            return self._key_scores(x, z)
        with in_place(*needed):
            return self._key_scores(x, z)

    def _key_scores(self, x: Tensor | None, z: Tensor) -> Tensor:
        return self.linear_scores(x) if x is not None and self._has_plain_keys() else self._scores_by_effect(z)

    def product_scores(self, x: Tensor | None, hidden: Tensor) -> Tensor:
        """Scores ``[T, N]`` by what goes into the out-projection, from activated neurons ``[T, d]``."""
        inter = hidden * self._up(x) if self.ffn.gated else hidden
        return block_means(inter.abs() if self.config.score == "inter_abs" else inter, self.config.num_experts)

    def _up(self, x: Tensor | None) -> Tensor:
        if x is None:
            raise lost_input(self.ffn)
        return self.ffn.up(x)

    def _has_plain_keys(self) -> bool:
        proj_in = self.ffn.proj_in
        return proj_in is self._proj_in[0] and has_plain_weight(proj_in) and not cast(Tensor, proj_in.weight).is_meta

    def _scores_by_effect(self, z: Tensor) -> Tensor:
        """Scores by pre-activations, for keys that are known only by what they do."""
        config, ffn = self.config, self.ffn
        if config.normalize_gate or config.value_norm_weighted or config.gate_momentum:
            raise ConversionError(
                f"{ffn.name}.{ffn.spec.proj_in} carries an adapter or has no plain weight, and normalize_gate, value_norm_weighted and "
                "gate_momentum need its keys: merge the adapter, or adapt other modules"
            )
        scores = block_means(z, config.num_experts)
        # pre-activations come with the bias, products with mean keys without it
        bias = None if config.score_bias else self._mean_bias()
        return scores if bias is None else scores - bias.to(scores.device)

    def _mean_bias(self) -> Tensor | None:
        bias = self.ffn.key_bias()
        return None if bias is None else expert_means(whole(bias), self.config.num_experts, self._value_norms())

    def _value_norms(self) -> Tensor | None:
        return whole(self.ffn.values()).float().norm(dim=0) if self.config.value_norm_weighted else None

    def current_gate(self) -> Tensor:
        """Mean keys ``[N, h]`` of the present weights. They are derived, so no gradient reaches the keys through them."""
        means = expert_means(whole(self.ffn.keys()), self.config.num_experts, self._value_norms())
        return F.normalize(means, dim=-1) if self.config.normalize_gate else means

    @torch.no_grad()
    def update_(self) -> None:
        """``gate = m * gate + (1 - m) * mean keys``; nothing without a momentum."""
        if self.gate is not None:
            self.gate.lerp_(self.current_gate(), 1 - self.config.gate_momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casts and moves, but a running gate stays in float32."""
        gate = self.gate
        super()._apply(fn, recurse)
        if gate is not None and self.gate is not None:
            self.gate = gate.to(self.gate.device)
        return self


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate holds a module's weights elsewhere until it is called."""
    return hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters(recurse=False))


@contextmanager
def in_place(*modules: nn.Module) -> Iterator[None]:
    """Have the weights of modules that are offloaded in place for as long as the block lasts."""
    with ExitStack() as stack:
        for module in filter(is_offloaded, modules):
            from accelerate.utils import align_module_device  # it is there, since it holds the weights

            stack.enter_context(align_module_device(module))
        yield


def whole(weight: Tensor) -> Tensor:
    """A weight without its history, and in one piece where FSDP has it sharded (which it has between forward passes)."""
    full = getattr(weight, "full_tensor", None)
    return (weight if full is None else full()).detach()


def lost_input(ffn: FFN) -> RuntimeError:
    """The error of an activation that cannot know its FFN's input."""
    return RuntimeError(
        f"{ffn.name}: the activation ran without its in-projection, or that was replaced (for PEFT's modules_to_save name the "
        "whole FFN or layer, not its projections)"
    )


class FixedRouter(Router):
    """The same experts for every token: those that were used most (:func:`emoe.fix_experts_`), which prunes the FFN to them.

    Attributes:
        usage: how often each expert was used, ``[N]`` int64, which no cast of the model rounds.
    """

    learned: ClassVar[bool] = False
    usage: Tensor

    def __init__(self, ffn: FFN, config: EMoEConfig | GMoEConfig) -> None:
        super().__init__(ffn, config)
        device = cast(Tensor, ffn.proj_in.weight).device
        self.register_buffer("usage", torch.zeros(config.num_experts, dtype=torch.int64, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`Router.forward`."""
        return self.usage.to(x.device).float().expand(x.shape[0], -1)
