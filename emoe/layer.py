"""The routed FFN: the activation module, swapped.

Routing in front of the out-projection is all that separates an FFN of experts from the dense one:
``act(z)`` becomes ``act(z) * weights``, each expert's weight repeated over its block of neurons.
Everything else, from the projections to LoRA, saving and sharding, stays what it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoe.architectures import FFN
from emoe.config import EMoEConfig, GMoEConfig
from emoe.routing import CosineRouter, avg_k_scores, balance_loss, expert_weights, select_experts

if TYPE_CHECKING:
    from emoe.records import LayerRecord


class RoutedActivation(nn.Module):
    """Activation of a converted FFN: hidden neurons of experts that are not chosen become zero.

    It reads the FFN's input through a hook on the in-projection, because experts are scored by
    the input; the in-projection and the neurons themselves are not touched.

    Attributes:
        activation: the FFN's own activation.
        router: the learned router, or None for avg-k.
        ffn_name: qualified name of the layer.
        ffn_index: number of the layer.
        permutation: ``[d]`` on the CPU, kept for provenance and to undo the conversion.
        aux_loss: balance loss of the last forward pass, None before the first or where not asked for.
        record: where :func:`emoe.record_routing` collects; None when it does not.
    """

    def __init__(self, ffn: FFN, config: EMoEConfig | GMoEConfig, permutation: Tensor | None) -> None:
        super().__init__()
        keys = ffn.keys()
        self.activation = ffn.activation
        self.config = config
        self.ffn_name = ffn.name
        self.ffn_index = ffn.index
        self.permutation = permutation
        self.learned = isinstance(config, GMoEConfig) or config.router == "cosine"
        self.router = (
            CosineRouter(keys.shape[1], config.num_experts).to(keys.device, keys.dtype) if self.learned else None
        )
        self.aux_loss: Tensor | None = None
        self.record: LayerRecord | None = None
        self._input: Tensor | None = None
        self._path_in = ffn.spec.proj_in
        self._transposed = ffn.spec.transposed
        # In a tuple, so that the layer does not become a child of its own activation.
        self._layer = (ffn.layer,)
        self._hook = ffn.proj_in.register_forward_pre_hook(self._remember_input)

    def _remember_input(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._input = args[0]

    def remove_hook(self) -> None:
        """Stop listening to the in-projection."""
        self._hook.remove()

    def forward(self, z: Tensor) -> Tensor:
        """Activate and route.

        Args:
            z: pre-activations ``[..., d]``.
        """
        x = self._input
        if x is None:
            raise RuntimeError(f"{self.ffn_name}: the activation ran without its in-projection")
        self._input = None
        weights = self._route(x.flatten(0, -2), z.flatten(0, -2))
        hidden = self.activation(z)
        if self.config.expert_dropout:
            hidden = F.dropout(hidden, self.config.expert_dropout, self.training)
        blocks = hidden.unflatten(-1, (self.config.num_experts, -1))
        return (blocks * weights.view(*z.shape[:-1], -1, 1).to(z.dtype)).flatten(-2)

    def _route(self, x: Tensor, z: Tensor) -> Tensor:
        config = self.config
        weighting = config.weighting if isinstance(config, EMoEConfig) else "softmax"
        selection = config.selection if isinstance(config, EMoEConfig) else "top"
        needs_aux = config.aux_loss_coefficient > 0 and self.training
        # A binary mask passes no gradient to the scores, so none is recorded for them.
        with torch.set_grad_enabled(torch.is_grad_enabled() and (weighting != "binary" or needs_aux)):
            clean = self._scores(x, z)
            noise_std = config.router_noise / config.num_experts if self.training else 0.0
            noisy = clean + torch.randn_like(clean) * noise_std if noise_std else clean
            mask = select_experts(noisy, config.top_k, selection)
            weights = expert_weights(noisy, mask, weighting)
            self.aux_loss = balance_loss(clean, noisy, mask, noise_std) if needs_aux else None
        if self.record is not None:
            self.record.update(mask)
        return weights

    def _scores(self, x: Tensor, z: Tensor) -> Tensor:
        if self.router is not None:
            return cast(Tensor, self.router(x))
        score_bias = isinstance(self.config, EMoEConfig) and self.config.score_bias
        proj_in = self._layer[0].get_submodule(self._path_in)
        if hasattr(proj_in, "base_layer"):
            return self._adapted_scores(z, cast(nn.Module, proj_in.base_layer), score_bias)
        weight, bias = cast(Tensor, proj_in.weight), cast(Tensor | None, proj_in.bias)
        keys = weight.t() if self._transposed else weight
        return avg_k_scores(x, keys, self.config.num_experts, bias if score_bias else None)

    def _adapted_scores(self, z: Tensor, base: nn.Module, score_bias: bool) -> Tensor:
        """Scores when an adapter is added to the in-projection: the keys are then only known by their effect."""
        scores = z.float().unflatten(-1, (self.config.num_experts, -1)).mean(-1)
        bias = cast(Tensor | None, base.bias)
        if bias is not None and not score_bias:
            scores = scores - bias.float().unflatten(0, (self.config.num_experts, -1)).mean(-1)
        return scores

    def __getstate__(self) -> dict[str, Any]:
        """What copies take along: nothing of the last forward pass."""
        return {**self.__dict__, "aux_loss": None, "record": None, "_input": None}

    def extra_repr(self) -> str:
        return f"{self.config.kind}, experts={self.config.num_experts}, top_k={self.config.top_k}"


def routed_layers(model: nn.Module) -> list[RoutedActivation]:
    """The routed FFNs of a model in layer order; empty for a dense model."""
    found = [module for module in model.modules() if isinstance(module, RoutedActivation)]
    return sorted(found, key=lambda module: module.ffn_index)


def aux_loss(model: nn.Module) -> Tensor | float:
    """Balance loss of the last training forward pass, summed over layers, times its coefficient.

    Add it to the task loss. It is the number 0.0 where the configuration asks for none.
    """
    losses = [
        layer.aux_loss * layer.config.aux_loss_coefficient
        for layer in routed_layers(model)
        if layer.aux_loss is not None
    ]
    return torch.stack(losses).sum() if losses else 0.0
