"""The routed FFN: the activation module, swapped.

Routing in front of the out-projection is all that separates an FFN of experts from the dense one:
``act(z)`` becomes ``act(z) * weights``, each expert's weight repeated over its block of neurons.
Everything else, from the projections to LoRA, saving and sharding, stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoe.architectures import FFN, bias_of
from emoe.backends import SparsePath, may_take_sparse_path
from emoe.config import EMoEConfig, GMoEConfig, Weighting
from emoe.errors import ConversionError
from emoe.routing import (
    CosineRouter,
    balance_loss,
    block_means,
    expert_means,
    expert_weights,
    key_scores,
    places_within_capacity,
    select_experts,
    slot_mask,
    slots_above,
)
from emoe.tokens import PaddingWatch, is_recomputed

if TYPE_CHECKING:
    from emoe.guards import LoadGuard
    from emoe.records import LayerRecord


class RoutedActivation(nn.Module):
    """Activation of a converted FFN: hidden neurons of experts that are not chosen become zero.

    It reads the FFN's input through a hook on the in-projection, because experts are scored by
    the input; the in-projection and the neurons themselves are not touched.

    Attributes:
        activation: the FFN's own activation.
        ffn: the FFN that it stands in.
        config: how it routes.
        permutation: ``[d]`` on the CPU, kept for provenance and to undo the conversion; None where it is not known.
        guard: looks at state dicts before they are loaded.
        router: the learned router, or None for avg-k.
        gate: running mean keys ``[N, h]``, float32, where ``gate_momentum`` asks for them, or None.
        output_bias: ``[N, h]``, where the configuration says ``per_expert`` and the FFN has a bias, or None;
            the out-projection's own bias is then zero and stays so.
        output_bias_parts: how many experts' biases made up the FFN's own when it was divided, or None.
        aux_loss: balance loss of the last forward pass, None before the first or where not asked for.
        record: where :func:`emoe.record_routing` collects; None when it does not.
        padding: tells which tokens are padding, for a configuration that has to know; None otherwise.
        start: forgets balance losses at the start of a pass, for a configuration that has them; None otherwise.
    """

    router: CosineRouter | None
    gate: Tensor | None
    output_bias: nn.Parameter | None
    output_bias_parts: Tensor | None
    guard: LoadGuard | None = None

    def __init__(
        self, ffn: FFN, config: EMoEConfig | GMoEConfig, permutation: Tensor | None, padding: PaddingWatch | None = None
    ) -> None:
        super().__init__()
        keys = ffn.keys()
        self.activation = ffn.activation
        self.config = config
        self.permutation = permutation
        self.padding = padding
        self.start: ForwardStart | None = None
        # In a tuple, so that the FFN's layer does not become a child of its own activation.
        self._ffn = (ffn,)
        learned = isinstance(config, GMoEConfig) or config.router == "cosine"
        self.router = CosineRouter(keys.shape[1], config.num_experts).to(keys.device, keys.dtype) if learned else None
        momentum = isinstance(config, EMoEConfig) and config.gate_momentum > 0
        self.register_buffer("gate", self.present_gate().detach().clone() if momentum else None)
        self.output_bias = None
        self.register_buffer("output_bias_parts", None)
        self.aux_loss: Tensor | None = None
        self.record: LayerRecord | None = None
        self._input: Tensor | None = None
        self._weights: Tensor | None = None
        self.sparse: SparsePath | None = None
        self._choose_path()
        self._hooks = [ffn.proj_in.register_forward_pre_hook(self._remember_input, with_kwargs=True)]
        if config.output_bias == "per_expert":
            self._divide_output_bias()

    def configure_(self, config: EMoEConfig | GMoEConfig) -> None:
        """Route by another configuration of the same experts from now on."""
        self.config = config
        self._choose_path()

    def _choose_path(self) -> None:
        """Stand in front of the projections where the configuration may take the sparse path, and only there."""
        wanted = may_take_sparse_path(self.config)
        if self.sparse is not None and not wanted:
            self.sparse.remove()
            self.sparse = None
        elif self.sparse is None and wanted:
            self.sparse = SparsePath(self)

    @property
    def ffn(self) -> FFN:
        return self._ffn[0]

    @property
    def ffn_name(self) -> str:
        return self.ffn.name

    @property
    def ffn_index(self) -> int:
        return self.ffn.index

    def remove_(self) -> None:
        """Give the FFN back its activation and its one output bias: ``(k / N) * sum of the experts'`` biases."""
        for hook in self._hooks:
            hook.remove()
        for watch in (self.padding, self.start, self.sparse):
            if watch is not None:
                watch.remove()
        self.ffn.replace(self.ffn.spec.activation, self.activation)
        if self.output_bias is not None:
            proj_out = _without_adapter(self.ffn.proj_out)
            bias = nn.Parameter(self.mean_output_bias(), requires_grad=self.output_bias.requires_grad)
            delattr(proj_out, "bias")
            proj_out.register_parameter("bias", bias)

    def _divide_output_bias(self) -> None:
        proj_out = self.ffn.proj_out
        bias = bias_of(proj_out)
        if bias is None:
            return
        # a whole number, which no cast of the model rounds
        self.output_bias_parts = torch.tensor(self.config.experts_in_use, device=bias.device)
        share = bias.detach() / self.config.experts_in_use
        self.output_bias = nn.Parameter(share.repeat(self.config.num_experts, 1), requires_grad=bias.requires_grad)
        # a buffer of zeros, because not every projection works without a bias (GPT-2's Conv1D)
        delattr(proj_out, "bias")
        proj_out.register_buffer("bias", torch.zeros_like(share))
        self._hooks.append(proj_out.register_forward_hook(self._add_output_bias))

    def mean_output_bias(self) -> Tensor:
        """The one bias ``[h]`` that stands for the experts' own in a dense FFN, equal to it at the conversion."""
        return cast(Tensor, self.output_bias).detach().mean(0) * cast(Tensor, self.output_bias_parts)

    def _remember_input(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._input = args[0] if args else next(iter(kwargs.values()))

    def _add_output_bias(self, _module: nn.Module, _args: tuple[Any, ...], y: Tensor) -> Tensor:
        weights, self._weights = self._weights, None
        biases = cast(Tensor, self.output_bias)
        return y + (cast(Tensor, weights).to(biases.dtype) @ biases).view_as(y).to(y.dtype)

    def forward(self, z: Tensor) -> Tensor:
        """Activate and route.

        Args:
            z: pre-activations ``[..., d]``.
        """
        if self.sparse is not None and self.sparse.active:
            return self._forward_sparse(z)
        config, x = self.config, self._present_input(z)
        before = config.expert_dropout if config.dropout_position == "before" else 0.0
        after = config.expert_dropout if config.dropout_position == "after" else 0.0
        # scored before the activation runs, which may be one that writes over its input
        by_product = isinstance(config, EMoEConfig) and config.score.startswith("inter")
        scores = None if by_product else self._scores(x, z)
        hidden = self.activation(F.dropout(z, before, self.training) if before else z)
        _, weights = self._route(self._product_scores(x, hidden) if scores is None else scores)
        self._input = None
        if self.output_bias is not None:
            self._weights = weights
        if after:
            hidden = F.dropout(hidden, after, self.training)
        blocks = hidden.unflatten(-1, (config.num_experts, -1))
        return (blocks * weights.view(*z.shape[:-1], config.num_experts, 1).to(hidden.dtype)).flatten(-2)

    def _forward_sparse(self, z: Tensor) -> Tensor:
        """Route; what is computed of the neurons is computed in the place of the out-projection."""
        x, sparse = cast(Tensor, self._input), cast(SparsePath, self.sparse)
        self._input = None
        mask, weights = self._route(self._scores(x, None))
        if self.output_bias is not None:
            self._weights = weights
        plain = self._weighting == "binary"
        sparse.routed = (x, mask, None if plain else weights)
        return z

    def _present_input(self, z: Tensor) -> Tensor:
        """The FFN's input, once it is clear that this call is one of the FFN's."""
        x = self._input
        if x is None:
            raise RuntimeError(
                f"{self.ffn_name}: the activation ran without its in-projection, or that was replaced by a copy (for PEFT's "
                "modules_to_save name the whole FFN or layer, not its projections)"
            )
        if z.is_nested:
            raise RuntimeError(
                f"{self.ffn_name}: nested tensors cannot be routed; build nn.TransformerEncoder with enable_nested_tensor=False"
            )
        if z.shape[-1] != self.ffn.d:
            raise RuntimeError(
                f"{self.ffn_name}: the activation was called with {z.shape[-1]} values a token, but the FFN has {self.ffn.d} neurons; "
                "does it stand between the projections that its row names?"
            )
        return x

    @property
    def _weighting(self) -> Weighting:
        return self.config.weighting if isinstance(self.config, EMoEConfig) else "softmax"

    def _with_gradient(self) -> torch.set_grad_enabled:
        """A binary mask passes no gradient to the scores, so none is recorded for them unless the balance loss needs it."""
        needed = self._weighting != "binary" or self.config.aux_loss_coefficient > 0
        return torch.set_grad_enabled(torch.is_grad_enabled() and needed)

    def _route(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Mask and weights ``[T, N]`` of the experts in use from their scores; also the balance loss and the record."""
        config = self.config
        selection = config.selection if isinstance(config, EMoEConfig) else "top"
        noise_std = config.router_noise / config.num_experts
        with self._with_gradient():
            noisy = clean + torch.randn_like(clean) * noise_std if noise_std and self.training else clean
            threshold = None if self.training else config.score_threshold
            slots = select_experts(noisy, config.num_experts if threshold is not None else config.top_k, selection)
            used = None if threshold is None else slots_above(noisy, slots, threshold)
            mask = slot_mask(slots, config.num_experts, used)
            weights = expert_weights(noisy, mask, self._weighting, config.top_k)
            counted = self.padding.real_tokens(len(clean)) if self.padding is not None else None
            kept = mask
            if config.capacity_factor is not None:
                placed = places_within_capacity(
                    noisy.detach(), slots, config.capacity_factor, config.experts_in_use, counted, used
                )
                kept = slot_mask(slots, config.num_experts, placed if used is None else placed & used)
                weights = weights * kept
            if config.aux_loss_coefficient > 0:
                # their formula divides by the noise in evaluation too
                std = noise_std if self.training or config.balance_loss == "published" else 0.0
                loss = balance_loss(clean, noisy, mask, std, config.balance_loss, counted)
                if not is_recomputed():
                    self.aux_loss = loss if self.aux_loss is None else self.aux_loss + loss
        if self.record is not None:
            self.record.update(mask, kept)
        return kept, weights

    def _scores(self, x: Tensor, z: Tensor | None) -> Tensor:
        """``[T, N]`` float32; by the pre-activations ``z``, or where they are not computed by mean weights."""
        with self._with_gradient():
            if self.router is not None:
                return cast(Tensor, self.router(x)).flatten(0, -2)
            n = self.config.num_experts
            match cast(EMoEConfig, self.config).score:
                case "gate" | "up" as kind if z is None:
                    scores = self._mean_scores(x, up=kind == "up")
                case "gate":
                    scores = block_means(cast(Tensor, z), n)
                case "up":
                    scores = block_means(self.ffn.up(x), n)
                case "up_abs":
                    scores = block_means(self.ffn.up(x).abs(), n)
                case _:
                    scores = self._key_scores(x, z)
            return scores.flatten(0, -2)

    def _mean_scores(self, x: Tensor, *, up: bool) -> Tensor:
        """Means of what an in-projection gives, from the means of its weights: the same, because it is linear."""
        weight, bias = self.ffn.blocks(self.config.num_experts)[0][up]
        return key_scores(x, weight.float().mean(1), None if bias is None else bias.float().mean(1))

    def _product_scores(self, x: Tensor, hidden: Tensor) -> Tensor:
        """``[T, N]`` float32, by what goes into the out-projection."""
        with self._with_gradient():
            inter = hidden * self.ffn.up(x) if self.ffn.gated else hidden
            absolute = cast(EMoEConfig, self.config).score == "inter_abs"
            return block_means(inter.abs() if absolute else inter, self.config.num_experts).flatten(0, -2)

    def _key_scores(self, x: Tensor, z: Tensor | None) -> Tensor:
        config = cast(EMoEConfig, self.config)
        adapted = z is not None and hasattr(self.ffn.proj_in, "base_layer")
        # pre-activations come with the bias, products with mean keys without it
        bias = self.ffn.key_bias() if config.score_bias != adapted else None
        mean_bias = None
        if bias is not None:
            mean_bias = expert_means(bias.detach(), config.num_experts, self._value_norms())
        if adapted:
            if config.normalize_gate or config.value_norm_weighted or config.gate_momentum:
                raise ConversionError(
                    f"{self.ffn_name}.{self.ffn.spec.proj_in} carries an adapter, and normalize_gate, value_norm_weighted and "
                    "gate_momentum need its keys: merge the adapter, or adapt other modules"
                )
            # an adapter's part of the keys is known only by its effect
            scores = block_means(cast(Tensor, z), config.num_experts)
            return scores if mean_bias is None else scores - mean_bias
        gate = self.present_gate() if self.gate is None else self.gate
        return key_scores(x, gate, mean_bias, unit_length=config.normalize_gate)

    def _value_norms(self) -> Tensor | None:
        config = self.config
        if not (isinstance(config, EMoEConfig) and config.value_norm_weighted):
            return None
        return _whole(self.ffn.values()).float().norm(dim=0)

    def present_gate(self) -> Tensor:
        """Mean keys ``[N, h]`` of the present weights. They are derived, so no gradient reaches the keys through them."""
        means = expert_means(_whole(self.ffn.keys()), self.config.num_experts, self._value_norms())
        unit_length = isinstance(self.config, EMoEConfig) and self.config.normalize_gate
        return F.normalize(means, dim=-1) if unit_length else means

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casts and moves, but a running gate stays in float32."""
        gate = self.gate
        super()._apply(fn, recurse)
        if gate is not None and self.gate is not None:
            self.gate = gate.to(self.gate.device)
        return self

    @torch.no_grad()
    def retie_gate_(self) -> None:
        """``gate = m * gate + (1 - m) * mean keys``; nothing without a momentum."""
        if self.gate is not None:
            self.gate.lerp_(self.present_gate(), 1 - cast(EMoEConfig, self.config).gate_momentum)

    def __getstate__(self) -> dict[str, Any]:
        """What copies take along: nothing of the last forward pass."""
        return {**self.__dict__, "aux_loss": None, "record": None, "_input": None, "_weights": None}

    def extra_repr(self) -> str:
        return f"{self.config.kind}, experts={self.config.num_experts}, top_k={self.config.top_k}"


def _whole(weight: Tensor) -> Tensor:
    """A weight without its history, and in one piece where FSDP has it sharded (which it has between forward passes)."""
    full = getattr(weight, "full_tensor", None)
    return (weight if full is None else full()).detach()


def _without_adapter(module: nn.Module) -> nn.Module:
    return cast(nn.Module, getattr(module, "base_layer", module))


def routed_layers(model: nn.Module) -> list[RoutedActivation]:
    """The routed FFNs of a model in layer order; empty for a dense model."""
    found = [module for module in model.modules() if isinstance(module, RoutedActivation)]
    return sorted(found, key=lambda module: module.ffn_index)


class ForwardStart:
    """Forgets the balance losses of the last forward pass when the next one begins.

    Layers add to them, because a layer may be called several times in a pass, or be skipped.

    Args:
        model: the model that is called.
        layers: routed layers of it.
    """

    def __init__(self, model: nn.Module, layers: Sequence[RoutedActivation]) -> None:
        self._layers = layers
        self._hook = model.register_forward_pre_hook(self._forget)

    def _forget(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        for layer in self._layers:
            layer.aux_loss = None

    def remove(self) -> None:
        """Stop listening."""
        self._hook.remove()


def check_one_conversion(layers: Sequence[RoutedActivation], what: str) -> None:
    """Refuse a model whose parts were converted apart (:class:`ConversionError`): their layer numbers collide."""
    if len({layer.ffn_index for layer in layers}) < len(layers) or len({layer.config for layer in layers}) > 1:
        raise ConversionError(f"{what}: parts of the model were converted apart; take each part for itself")


def aux_loss(model: nn.Module) -> Tensor | float:
    """Balance loss of the last forward pass, summed over layers, times its coefficient.

    Add it to the task loss of a training step. It is the number 0.0 where the configuration asks for none.
    """
    losses = [
        layer.aux_loss * layer.config.aux_loss_coefficient
        for layer in routed_layers(model)
        if layer.aux_loss is not None
    ]
    return torch.stack(losses).sum() if losses else 0.0


def retie_gates_(model: nn.Module) -> None:
    """Move running gates towards the present mean keys; call it after each optimiser step.

    Only a configuration with ``gate_momentum`` has running gates. Without it gates are computed from the weights
    in every forward pass, and this does nothing.
    """
    for layer in routed_layers(model):
        layer.retie_gate_()
