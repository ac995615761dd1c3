"""The sparse path through an FFN whose projections and activation are called one by one by somebody else's code.

The in-projections hand out ones of width 1 instead of their outputs, the activation routes and passes them on, their product is
one, and the out-projection then computes the chosen experts from the FFN's input. The masked path is taken instead, for
this forward pass, where

- a projection carries an adapter, whose effect on a neuron is not known before all are computed;
- a weight is sharded or quantised at that moment (FSDP must shard the layer, not its projections);
- dropout acts on the hidden neurons;
- the activation is a function, or writes over its input;
- a hook looks at hidden neurons;
- the model is compiled: the compiler would unroll the experts, while it makes the mask cheap.

With ``backend="auto"`` it is also taken where the sparse path is not expected to be faster (:mod:`emoe.costs`): on few tokens, for small
experts, on accelerators, and where no compiler is found.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from emoe.architectures import FunctionActivation, bias_of
from emoe.config import LINEAR_SCORES, EMoEConfig, GMoEConfig
from emoe.costs import sparse_share
from emoe.kernels import compiled_kernels
from emoe.sparse import sparse_ffn

if TYPE_CHECKING:
    from emoe.layer import RoutedActivation

_logger = logging.getLogger(__name__)
_told: set[str] = set()  # reasons that were said in this process


def may_take_sparse_path(config: EMoEConfig | GMoEConfig) -> bool:
    """Whether some forward pass may take it: not if an expert's score needs all neurons, or only the mask was asked for."""
    return config.backend != "masked" and (config.kind == "gmoe" or cast(EMoEConfig, config).score in LINEAR_SCORES)


class SparsePath:
    """Takes the place of the forward methods of one FFN's projections; their weights stay theirs.

    Attributes:
        active: whether the forward pass that is under way takes the sparse path.
        routed: the FFN's input, mask and weights of the chosen experts, between activation and out-projection.
    """

    def __init__(self, layer: RoutedActivation) -> None:
        self._layer = layer
        self.active = False
        self.routed: tuple[Tensor, Tensor, Tensor | None] | None = None
        ffn = layer.ffn
        self._proj_in, self._proj_up, self._proj_out = ffn.proj_in, ffn.proj_up, ffn.proj_out
        self._proj_in.forward = self._in
        if self._proj_up is not None:
            self._proj_up.forward = self._up
        self._proj_out.forward = self._out

    def remove(self) -> None:
        """Give the projections their own forward methods back."""
        for module in filter(None, (self._proj_in, self._proj_up, self._proj_out)):
            del module.forward

    def _in(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = *args, *named.values()
        plain = not (torch.compiler.is_compiling() or x.is_nested)
        self.active = plain and self._pays(x) and self._is_possible()
        if not self.active:
            return _forward(self._proj_in, x)
        return x.new_ones(*x.shape[:-1], 2 if self._layer.ffn.spec.fused else 1)

    def _up(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = *args, *named.values()
        if not self.active:
            return _forward(cast(nn.Module, self._proj_up), x)
        return x.new_ones(*x.shape[:-1], 1)

    def _out(self, *args: Tensor, **named: Tensor) -> Tensor:
        (hidden,) = *args, *named.values()
        if self.routed is None:
            return _forward(self._proj_out, hidden)
        (x, mask, weights), self.routed, self.active = self.routed, None, False
        inputs, values = self._layer.ffn.blocks(self._layer.config.num_experts)
        y = sparse_ffn(x.flatten(0, -2), inputs, values, self._layer.activation, mask, weights)
        bias = bias_of(self._proj_out)
        y = y if bias is None else y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _pays(self, x: Tensor) -> bool:
        """Whether it was asked for, or is expected to be faster."""
        layer = self._layer
        if layer.config.backend == "sparse":
            return True
        if x.device.type != "cpu":
            return False
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        n = layer.config.num_experts
        active = layer.config.experts_in_use / n
        tokens, hidden = x.numel() // x.shape[-1], x.shape[-1]
        share = sparse_share(tokens, hidden, layer.ffn.d // n, active, dtype, torch.get_num_threads())
        return share is not None and share < 1 and compiled_kernels() is not None

    def _is_possible(self) -> bool:
        reason = self._hindrance()
        if reason is not None and reason not in _told:
            _told.add(reason)
            _logger.warning("emoe: %s takes the masked path: %s", self._layer.ffn_name, reason)
        return reason is None

    def _hindrance(self) -> str | None:
        """Why this forward pass cannot take the sparse path, or None."""
        layer, ffn = self._layer, self._layer.ffn
        now = (ffn.proj_in, ffn.proj_up, ffn.proj_out)
        own = (self._proj_in, self._proj_up, self._proj_out)
        if any(a is not b for a, b in zip(now, own, strict=True)):
            return "a projection carries an adapter"
        for module in filter(None, own):
            weight = cast(Tensor, module.weight)
            if type(weight.detach()) is not Tensor:
                return f"a weight is a {type(weight).__name__}"
        if layer.training and layer.config.expert_dropout:
            return "expert_dropout acts on hidden neurons"
        for path in ffn.spec.between:
            module = ffn.layer.get_submodule(path)
            if isinstance(module, nn.Dropout) and module.training and module.p:
                return f"{path} acts on hidden neurons"
        outputs = (self._proj_in._forward_hooks, self._proj_up._forward_hooks if self._proj_up else None)
        if any((*outputs, layer._forward_pre_hooks, layer._forward_hooks, self._proj_out._forward_pre_hooks)):
            return "a hook looks at hidden neurons"
        if isinstance(layer.activation, FunctionActivation) or getattr(layer.activation, "inplace", False):
            return "the activation is a function or writes over its input"
        return None


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    """The forward method of the module's class, which the instance's own one stands in front of."""
    return cast(Tensor, type(module).forward(module, x))
