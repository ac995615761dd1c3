"""The routed FFN: the activation module, swapped.

Routing in front of the out-projection is all that separates an FFN of experts from the dense one:
``act(z)`` becomes ``act(z) * weights``, each expert's weight repeated over its block of neurons.
Everything else, from the projections to LoRA, saving and sharding, stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoe.architectures import FFN, bias_of
from emoe.config import EMoEConfig, GMoEConfig, Weighting
from emoe.losses import PassLoss
from emoe.projections import is_routed_by, leave_, stand_around_, with_values, without_adapter
from emoe.registry import ROUTERS
from emoe.routers import AvgKRouter, Router, in_place, is_offloaded, lost_input
from emoe.routing import (
    balance_loss,
    capacity_mask,
    expert_mask,
    expert_weights,
    mask_above,
    select_experts,
)
from emoe.sparse.path import SparsePath, may_take_sparse_path
from emoe.tensors import DeferredTensor, RoutedCall, carried, carry
from emoe.tokens import PaddingMaskHook, do_nothing, is_recomputed


class Recorder(Protocol):
    """Collects which experts are used."""

    def update(self, chosen: Tensor, kept: Tensor) -> None:
        """Take the experts ``[T, N]`` that were chosen in a forward pass, and those of them that found a place."""


class RoutedActivation(nn.Module):
    """Activation of a converted FFN: hidden neurons of experts that are not chosen become zero.

    Experts are scored by the FFN's input, which travels with the pre-activations (:mod:`emoe.tensors`); the
    in-projection and the neurons themselves are not touched, and nothing of a forward pass stays here but its balance loss.

    Attributes:
        activation: the FFN's own activation.
        ffn: the FFN that it stands in.
        config: how it routes.
        permutation: ``[d]`` on the CPU, kept for provenance and to undo the conversion; None where it is not known.
        router: what scores the experts.
        output_bias: ``[N, h]``, where the configuration does not say ``shared`` and the FFN has a bias, or None;
            the out-projection's own bias is then zero and stays so.
        output_bias_parts: how many experts' biases made up the FFN's own when it was divided, or None.
        pass_loss: the balance loss of the last forward pass.
        record: where :func:`emoe.record_routing` collects; None when it does not.
        padding: tells which tokens are padding, for a configuration that has to know; None otherwise.
    """

    router: Router
    output_bias: nn.Parameter | None
    output_bias_parts: Tensor | None

    def __init__(
        self,
        ffn: FFN,
        config: EMoEConfig | GMoEConfig,
        permutation: Tensor | None,
        padding: PaddingMaskHook | None = None,
    ) -> None:
        super().__init__()
        self.activation = ffn.activation
        self.config = config
        self.permutation = permutation
        self.padding = padding
        # In a tuple, so that the FFN's layer does not become a child of its own activation.
        self._ffn = (ffn,)
        self.router = ROUTERS[config.router].load()(ffn, config)
        self._needs_gradient = self._scores_need_gradient()
        self.output_bias = None
        self.register_buffer("output_bias_parts", None)
        self.record: Recorder | None = None
        self.pass_loss = PassLoss()
        # a compiler follows plain attributes better than tensors with something on them; both are empty between its calls
        self._traced_input: Tensor | None = None
        self._traced_weights: Tensor | None = None
        self._width, self._gated = ffn.d, ffn.gated
        self.sparse: SparsePath | None = None
        if config.output_bias != "shared":
            self._divide_output_bias()
        self._stand_around_projections()
        self.register_forward_pre_hook(do_nothing)  # so that torch's fused layers do not pass this module by
        self._choose_path()

    def configure_(self, config: EMoEConfig | GMoEConfig) -> None:
        """Route by another configuration of the same experts from now on."""
        self.config = config
        self._needs_gradient = self._scores_need_gradient()
        if isinstance(self.router, AvgKRouter):
            self.router.config = cast(EMoEConfig, config)
        self._choose_path()

    def _choose_path(self) -> None:
        if self.sparse is not None:
            self.sparse.leave_()
        wanted = may_take_sparse_path(self.config)
        self.sparse = SparsePath(self.ffn, self, self._handlers()) if wanted else None

    def _handlers(self) -> list[tuple[str, nn.Module, Callable[..., Any]]]:
        ffn = self.ffn
        handlers: list[tuple[str, nn.Module, Callable[..., Any]]] = [
            (ffn.spec.proj_in, ffn.proj_in, self._call_proj_in)
        ]
        if ffn.spec.proj_up and ffn.proj_up is not None:
            handlers.append((ffn.spec.proj_up, ffn.proj_up, self._call_proj_up))
        return [*handlers, (ffn.spec.proj_out, ffn.proj_out, self._call_proj_out)]

    def _stand_around_projections(self) -> None:
        for _, projection, handler in self._handlers():
            stand_around_(projection, handler)

    @property
    def ffn(self) -> FFN:
        return self._ffn[0]

    @property
    def ffn_name(self) -> str:
        return self.ffn.name

    @property
    def ffn_index(self) -> int:
        return self.ffn.index

    @property
    def aux_loss(self) -> Tensor | None:
        """Balance loss of the last forward pass (of this thread), None before the first or where not asked for."""
        return self.pass_loss.value

    @property
    def gate(self) -> Tensor | None:
        """Running mean keys ``[N, h]``, where ``gate_momentum`` asks for them, or None."""
        return getattr(self.router, "gate", None)

    def current_gate(self) -> Tensor:
        """Mean keys ``[N, h]`` of the present weights, of a layer with avg-k."""
        return cast(AvgKRouter, self.router).current_gate()

    def remove_(self) -> None:
        """Give the FFN back its activation and its one output bias: ``(k / N) * sum of the experts'`` biases."""
        for projection in filter(None, (self.ffn.proj_in, self.ffn.proj_up, self.ffn.proj_out)):
            leave_(without_adapter(projection))
        if self.sparse is not None:
            self.sparse.leave_()
        self.ffn.replace(self.ffn.spec.activation, self.activation)
        if self.output_bias is not None:
            proj_out = without_adapter(self.ffn.proj_out)
            bias = nn.Parameter(self.mean_output_bias(), requires_grad=self.output_bias.requires_grad)
            delattr(proj_out, "bias")
            proj_out.register_parameter("bias", bias)

    def _divide_output_bias(self) -> None:
        proj_out = self.ffn.proj_out
        bias = bias_of(proj_out)
        if bias is None:
            return
        parts = 1 if self.config.output_bias == "per_expert_whole" else self.config.num_active_experts
        # a whole number, which no cast of the model rounds
        self.output_bias_parts = torch.tensor(parts, device=bias.device)
        share = bias.detach() / parts
        delattr(proj_out, "bias")
        self.output_bias = with_values(cast(nn.Parameter, bias), share.repeat(self.config.num_experts, 1))
        # a buffer of zeros, because not every projection works without a bias (GPT-2's Conv1D)
        proj_out.register_buffer("bias", torch.zeros_like(share))

    def mean_output_bias(self) -> Tensor:
        """The one bias ``[h]`` that stands for the experts' own in a dense FFN, equal to it at the conversion."""
        return cast(Tensor, self.output_bias).detach().mean(0) * cast(Tensor, self.output_bias_parts)

    def _call_proj_in(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        if torch.compiler.is_compiling():
            self._traced_input = x
            return call(*args, **kwargs)
        sparse = self.sparse  # another thread may change the backend
        if sparse is None or (way := sparse.choose(x)) is None:
            return carry(call(*args, **kwargs), RoutedCall(x, self))
        return sparse.compute(
            x, way, lambda weights: carry(call(*args, **kwargs), RoutedCall(x, self, weights, is_routed=True))
        )

    def _call_proj_up(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        x, sparse = args[0] if args else next(iter(kwargs.values())), self.sparse
        if sparse is None or torch.compiler.is_compiling() or not sparse.may_defer(x):
            return call(*args, **kwargs)
        return sparse.defer_up(x, lambda: call(*args, **kwargs))

    def _call_proj_out(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        name = None if args else next(iter(kwargs))
        hidden = args[0] if name is None else kwargs[name]
        if isinstance(hidden, DeferredTensor):
            is_ours = hidden.is_whole and hidden.call.layer is self
            if is_ours and (output := hidden.call.take()) is not None:
                return output
            hidden = hidden.value()
        hidden, this = carried(hidden)
        weights, self._traced_weights = self._traced_weights, None
        y = call(hidden, *args[1:], **kwargs) if name is None else call(**{**kwargs, name: hidden})
        if self.output_bias is None:
            return y
        weights = weights if this is None else this.weights
        if weights is None or (this is not None and this.layer not in (self, None)):  # a copy of a half of the FFN
            raise lost_input(self.ffn)
        return self.add_output_bias(y, weights)

    def add_output_bias(self, y: Tensor, weights: Tensor) -> Tensor:
        """Add the biases of the chosen experts, with their weights ``[T, N]``, to an output ``[..., h]``; y as it is where they share one."""
        with in_place(self) if is_offloaded(self) else nullcontext():  # accelerate has taken them away again by now
            biases = self.output_bias
            return y if biases is None else y + (weights.to(biases.dtype) @ biases).view_as(y).to(y.dtype)

    def __call__(self, z: Tensor) -> Tensor:
        """Activate and route: pre-activations ``[..., d]`` to hidden neurons ``[..., d]``."""
        if torch.compiler.is_compiling():
            return super().__call__(z)
        if isinstance(z, DeferredTensor):
            if z.call.layer is self and z.part == "in" and not z.is_routed:
                return z.then(self, z.sizes, is_routed=True, is_whole=not self._gated)
            z = z.value()
        plain, call = carried(z)
        call = RoutedCall(None) if call is None else call
        hidden = super().__call__(plain, call=call)
        return hidden if self.output_bias is None else carry(hidden, call)

    def forward(self, z: Tensor, call: RoutedCall | None = None) -> Tensor:
        """Activate and route pre-activations ``[..., d]`` of one call of the FFN, or of the one that is being compiled."""
        if call is None:
            call, self._traced_input = RoutedCall(self._traced_input), None
        hidden = self._forward(z, call)
        if self.output_bias is not None and torch.compiler.is_compiling():
            self._traced_weights = call.weights
        return hidden

    def _forward(self, z: Tensor, call: RoutedCall) -> Tensor:
        self._check_call(z)
        config = self.config
        rows = z.reshape(-1, z.shape[-1])
        x = None if call.x is None else call.x.reshape(-1, call.x.shape[-1])
        before = config.expert_dropout if config.dropout_position == "before" else 0.0
        after = config.expert_dropout if config.dropout_position == "after" else 0.0
        # scored before the activation runs, which may be one that writes over its input
        by_product = isinstance(self.router, AvgKRouter) and self.router.needs_hidden
        scores = None if by_product or call.is_routed else self._scores(x, rows)
        hidden = self.activation(F.dropout(z, before, self.training) if before else z)
        if by_product:
            with self._with_gradient():
                scores = cast(AvgKRouter, self.router).product_scores(x, hidden.reshape(rows.shape))
        if scores is not None:
            _, call.weights = self.route(scores)
        weights = cast(Tensor, call.weights)
        if after:
            hidden = F.dropout(hidden, after, self.training)
        blocks = hidden.unflatten(-1, (config.num_experts, -1))
        return (blocks * weights.view(*z.shape[:-1], config.num_experts, 1).to(hidden.dtype)).flatten(-2)

    def _check_call(self, z: Tensor) -> None:
        """Refuse what is not one of the FFN's calls."""
        if z.is_nested:
            raise RuntimeError(
                f"{self.ffn_name}: nested tensors cannot be routed; build nn.TransformerEncoder with enable_nested_tensor=False"
            )
        if z.shape[-1] != self._width:
            raise RuntimeError(
                f"{self.ffn_name}: the activation was called with {z.shape[-1]} values a token, but the FFN has {self._width} neurons; "
                "does it stand between the projections that its row names?"
            )
        if self.output_bias is None or torch.compiler.is_compiling():
            return
        if not is_routed_by(without_adapter(self.ffn.proj_out), self._call_proj_out):
            raise RuntimeError(
                f"{self.ffn_name}.{self.ffn.spec.proj_out} was replaced after the conversion, and with it what adds the experts' own "
                "biases: set output_bias='shared', or replace it before converting"
            )

    @property
    def weighting(self) -> Weighting:
        """How the chosen experts' outputs are weighted."""
        return self.config.weighting if isinstance(self.config, EMoEConfig) else "softmax"

    @property
    def only_chooses(self) -> bool:
        """Whether scores choose experts and serve nothing else: no weights, no balance loss, no record."""
        return self.weighting == "binary" and self.record is None and not self.config.aux_loss_coefficient

    def _scores_need_gradient(self) -> bool:
        """A binary mask passes no gradient to the scores, so none is recorded for them unless the balance loss needs it."""
        return self.weighting != "binary" or self.config.aux_loss_coefficient > 0

    def _with_gradient(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._needs_gradient or not torch.is_grad_enabled() else torch.no_grad()

    def _scores(self, x: Tensor | None, z: Tensor) -> Tensor:
        """``[T, N]`` float32, before any neuron is activated."""
        with self._with_gradient():
            if isinstance(self.router, AvgKRouter):
                return self.router.scores(x, z)
            if x is None:
                raise lost_input(self.ffn)
            return cast(Tensor, self.router(x.to(z.device)))

    def linear_scores(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Scores ``[T, N]`` of inputs ``[T, h]`` without any neuron; ``gate`` are mean keys that the caller has at hand."""
        with self._with_gradient():
            if isinstance(self.router, AvgKRouter):
                return self.router.linear_scores(x, gate)
            return cast(Tensor, self.router(x))

    def route(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Mask and weights ``[T, N]`` of the experts in use from their scores; also the balance loss and the record."""
        config = self.config
        selection = config.selection if isinstance(config, EMoEConfig) else "top"
        noise_std = config.router_noise / config.num_experts
        with self._with_gradient():
            noisy = clean + torch.randn_like(clean) * noise_std if noise_std and self.training else clean
            threshold = None if self.training else config.score_threshold
            chosen = select_experts(noisy, config.num_experts if threshold is not None else config.top_k, selection)
            used = None if threshold is None else mask_above(noisy, chosen, threshold)
            mask = expert_mask(chosen, config.num_experts, used)
            weights = expert_weights(noisy, mask, self.weighting, config.top_k)
            token_mask = self.padding.token_mask(len(clean)) if self.padding is not None else None
            kept = mask
            if config.capacity_factor is not None:
                placed = capacity_mask(
                    noisy.detach(), chosen, config.capacity_factor, config.num_active_experts, token_mask, used
                )
                kept = expert_mask(chosen, config.num_experts, placed if used is None else placed & used)
                weights = weights * kept
            if config.aux_loss_coefficient > 0:
                # their formula divides by the noise in evaluation too
                std = noise_std if self.training or config.balance_loss == "published" else 0.0
                loss = balance_loss(clean, noisy, mask, std, config.balance_loss, token_mask)
                if not is_recomputed():
                    self.pass_loss.add(loss)
        if self.record is not None:
            self.record.update(mask, kept)
        return kept, weights

    def route_few(self, scores: Tensor, kernels: ModuleType | None = None) -> tuple[Tensor, Tensor | None]:
        """Experts ``[T, k]`` of a few tokens at rest, which all use as many, from their scores; and their weights where not all are 1.

        Args:
            scores: ``[T, N]`` float32.
            kernels: the compiled ones, where they can be used: PyTorch's sort takes longer than the choice.
        """
        config = self.config
        if self.only_chooses:
            selection = cast(EMoEConfig, config).selection
            if selection == "top" and kernels is not None and scores.dtype == torch.float32:
                return kernels.largest(scores, config.top_k), None
            return select_experts(scores, config.top_k, selection), None
        mask, weights = self.route(scores)
        chosen = mask.nonzero()[:, 1].view(len(scores), -1)
        return chosen, None if self.weighting == "binary" else weights.gather(1, chosen)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and drop what decoding keeps of the weights when training begins."""
        if mode and self.sparse is not None:
            self.sparse.forget()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """What copies take along: nothing of the last forward pass."""
        return {**self.__dict__, "record": None}

    def extra_repr(self) -> str:
        return f"{self.config.kind}, experts={self.config.num_experts}, top_k={self.config.top_k}"


def routed_layers(model: nn.Module) -> list[RoutedActivation]:
    """The routed FFNs of a model in layer order; empty for a dense model."""
    # PEFT keeps an unused original beside a module that it trains as a whole
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, RoutedActivation) and "original_module" not in name.split(".")
    ]
    return sorted(found, key=lambda module: module.ffn_index)
