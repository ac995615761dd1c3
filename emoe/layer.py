"""The routed FFN: a dense FFN whose activation module is replaced.

``act(z)`` becomes ``act(z) * weights``, with each expert's weight repeated over its block of
neurons. The projections, and with them LoRA, saving and sharding, stay as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from emoe.architectures import FFN, attribute_name, bias_of
from emoe.compiled.build import kernels_for
from emoe.config import EMoEConfig, GMoEConfig
from emoe.errors import ConversionError
from emoe.routers import Router, build_router, weights_loaded
from emoe.routing import (
    balance_loss,
    capacity_mask,
    choose_indices,
    choose_mask,
    expert_mask,
    expert_weights,
)
from emoe.tokens import PaddingMaskHook, do_nothing

# key in a pickled layer: the number that PyTorch would have given to the next hook
_NEXT_HOOK_ID = "_next_hook_id"


class _CallState:
    """The tensors that an FFN's modules pass to each other in one call, and the balance loss.

    ``T`` is the number of tokens, ``N`` the number of experts.

    Attributes:
        x: FFN input ``[..., h]``, which the in-projection's hook passes to the activation.
        weights: expert weights ``[T, N]``, which the activation passes to the out-projection's
            hook.
        loss: balance loss of the last call.
    """

    x: Tensor | None = None
    weights: Tensor | None = None
    loss: Tensor | None = None


class _ThreadState(_CallState, threading.local):
    """A call's tensors, separate for each thread, so that threads can share a model."""


class RoutedActivation(nn.Module):
    """Activate the hidden neurons, and multiply each by the weight of its expert.

    The weight is 0 for experts that are not chosen.

    The constructor replaces the FFN's activation. A hook on the in-projection passes on the FFN's
    input, from which the router computes scores. A hook on the out-projection adds the experts' own
    output biases, if there are any.

    In the shapes, ``T`` is the number of tokens, ``N`` the number of experts, ``d`` the number of
    neurons and ``h`` the model's width.

    Attributes:
        activation: the FFN's own activation, a module or a function.
        ffn: the FFN that is routed.
        config: configuration of the experts.
        permutation: ``[d]`` order of the neurons, on the CPU, to undo the conversion. None if
            unknown.
        router: module that scores the experts.
        output_bias: output biases ``[N, h]`` of the experts, None if they share the
            out-projection's.
        output_bias_parts: number of expert biases that summed to the FFN's own bias at conversion.
            None if the experts share that bias.
        record: the layer's :class:`emoe.records.LayerRecord` during :func:`emoe.record_routing`,
            else None.
        padding_hook: hook that reads the padding mask, None if the configuration does not need it.
        replaced: modules that the sparse backend replaced, by path; empty for the masked backend.
        num_own_hooks: number of forward pre-hooks that the constructor registered on this module.
    """

    router: Router
    output_bias: nn.Parameter | None
    output_bias_parts: Tensor | None

    def __init__(
        self, ffn: FFN, config: EMoEConfig | GMoEConfig, permutation: Tensor | None
    ) -> None:
        super().__init__()
        self.activation = ffn.activation
        self.ffn = ffn
        self.config = config
        self.permutation = permutation
        self.router = build_router(ffn, config)
        self.output_bias = None
        self.register_buffer("output_bias_parts", None)
        self.record: Any = None
        self.padding_hook: PaddingMaskHook | None = None
        self.replaced: dict[str, nn.Module] = {}
        # Hooks pass tensors to this module in one of these states. Compiled code uses the second
        # one, because a compiler cannot follow thread-local state.
        self._eager = _ThreadState()
        self._traced = _CallState()
        # the router needs the FFN's input, which only the in-projection gets
        self._handles = [ffn.proj_in.register_forward_pre_hook(self._keep_input)]
        if config.output_bias != "shared":
            self._split_output_bias()

        path = ffn.spec.activation
        parent = ffn.parents[path]
        self.num_own_hooks = 0
        if isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            # a hook disables PyTorch's fused transformer layers, which would bypass this module
            self.register_forward_pre_hook(do_nothing)
            self.num_own_hooks = 1
        # put this module in the place of the activation, in the mode of the module around it
        self.train(parent.training)
        ffn.replace(path, self)
        # PyTorch keeps modules outside an object's __dict__. But a copy of its decoder layer
        # computes ReLU if the __dict__ has no activation, so set it there too.
        vars(parent)[attribute_name(path)] = self

    @property
    def backend(self) -> str:
        """``masked``, or ``sparse`` if the out-projection computes the whole FFN.

        :func:`emoe.set_backend_` sets it.
        """
        return "sparse" if self.replaced else "masked"

    def restore_projections_(self) -> None:
        """Put back the modules that the sparse backend replaced."""
        for path, module in self.replaced.items():
            is_training = self.ffn.module(path).training
            self.ffn.replace(path, module.train(is_training))
        self.replaced = {}

    @property
    def aux_loss(self) -> Tensor | None:
        """Balance loss of this thread's last call. In compiled code, of any thread's last call.

        It is None before the first call, and if the configuration has no balance loss.
        """
        # A later eager call would have set this one to None (_store_balance_loss). So if there is
        # a loss of compiled code, it is the newer one.
        if self._traced.loss is not None:
            return self._traced.loss
        return self._eager.loss

    @property
    def _call_state(self) -> _CallState:
        """The current call's tensors: this thread's, or one common state in compiled code."""
        return self._traced if torch.compiler.is_compiling() else self._eager

    def remove_(self) -> None:
        """Restore the FFN's own modules and its single output bias (:meth:`folded_output_bias`)."""
        self.restore_projections_()
        for handle in self._handles:
            handle.remove()
        self.ffn.replace(self.ffn.spec.activation, self.activation)
        if self.output_bias is not None:
            proj_out = _without_adapter(self.ffn.proj_out)
            is_trained = self.output_bias.requires_grad
            bias = nn.Parameter(self.folded_output_bias(), requires_grad=is_trained)
            # _split_output_bias registered a buffer of zeros under this name; delete it, because a
            # buffer cannot become a parameter
            del proj_out.bias
            proj_out.register_parameter("bias", bias)

    def _split_output_bias(self) -> None:
        """Replace the out-projection's bias, if it has one, by an output bias for each expert."""
        proj_out = self.ffn.proj_out
        bias = bias_of(proj_out)
        if bias is None:
            return
        # The biases of a token's experts sum to the dense bias. With "per_expert_whole", each
        # expert has the whole dense bias.
        num_parts = self.config.num_active_experts
        if self.config.output_bias == "per_expert_whole":
            num_parts = 1
        # an integer tensor, which a cast of the model to bfloat16 does not round
        self.output_bias_parts = torch.tensor(num_parts, device=bias.device)

        # a copy, because resize_parameter_ changes `bias` itself
        dense_bias = bias.detach().clone()
        expert_bias = dense_bias / num_parts
        expert_biases = expert_bias.repeat(self.config.num_experts, 1)  # [N, h]

        # An optimizer may hold the bias parameter. So the same object becomes the experts' biases:
        # it gets their shape and values, and moves from the projection to this module.
        resize_parameter_(proj_out, name="bias", values=expert_biases)
        self.output_bias = cast(nn.Parameter, proj_out.bias)
        del proj_out.bias

        # The projection gets a bias of zeros instead, because not every projection works without a
        # bias (GPT-2's Conv1D). A buffer is not trained.
        proj_out.register_buffer("bias", torch.zeros_like(dense_bias))
        # a hook adds the biases of the chosen experts to the projection's output
        self._handles.append(proj_out.register_forward_hook(self._output_bias_hook))

    def folded_output_bias(self) -> Tensor:
        """Return the output bias ``[h]`` of the dense FFN that the experts are folded into.

        It is the mean of the experts' biases times ``output_bias_parts``.
        """
        biases = cast(Tensor, self.output_bias).detach()
        parts = cast(Tensor, self.output_bias_parts)
        return biases.mean(0) * parts

    def _keep_input(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep the FFN's input for the activation. A pre-hook on the in-projection."""
        self._call_state.x = args[0]

    def _take_input(self) -> Tensor | None:
        """Return the input ``[T, h]`` that the in-projection received, and forget it.

        It is None if the in-projection's hook was not called.
        """
        call = self._call_state
        x = call.x
        call.x = None
        if x is None:
            return None
        return x.reshape(-1, x.shape[-1])

    def _output_bias_hook(self, _module: nn.Module, _args: Any, y: Tensor) -> Tensor:
        """Add the biases of the chosen experts to the FFN's output ``[..., h]``.

        This is a hook on the out-projection.
        """
        # take the weights that activate() stored, so that the next call cannot use them again
        call = self._call_state
        weights = call.weights
        call.weights = None
        if weights is None:
            raise RuntimeError(
                f"{self.ffn.name}: its activation did not run or was replaced "
                "(PEFT must train the whole FFN)"
            )
        with weights_loaded(self):
            return self.add_output_bias(y, weights)

    def add_output_bias(self, y: Tensor, weights: Tensor) -> Tensor:
        """Add the experts' biases, weighted by ``[T, N]``, to an output ``[..., h]``."""
        biases = cast(Tensor, self.output_bias)
        weighted_biases = weights.to(biases.dtype) @ biases  # [T, h]
        return y + weighted_biases.view_as(y).to(y.dtype)

    def forward(self, z: Tensor) -> Tensor:
        """Compute the activated neurons ``[..., d]``, times the weights of their experts.

        With the sparse backend, return the input as it is: the out-projection computes the FFN.

        Args:
            z: pre-activations ``[..., d]``, or with the sparse backend the FFN's input.
        """
        if self.replaced:
            return z  # the FFN's input, because the in-projection only passes it through
        return self.activate(z)

    def activate(self, z: Tensor) -> Tensor:
        """Compute the activated neurons ``[..., d]``, times the weights of their experts.

        Args:
            z: pre-activations ``[..., d]``, which the in-projection has just computed. Its hook has
                kept its input, from which the experts are chosen.
        """
        if z.is_nested:
            raise RuntimeError(
                f"{self.ffn.name}: nested tensors cannot be routed; set enable_nested_tensor=False"
            )
        x = self._take_input()
        if x is not None:
            masked = self._activate_with_kernel(x, z)
            if masked is not None:
                return masked

        # Without the kernel: compute scores and neurons, choose experts, and multiply. If `x` is
        # unknown, a router that needs it raises an error.
        config = self.config
        drops = self.training and config.expert_dropout > 0
        drops_before = drops and config.dropout_position == "before"
        drops_after = drops and config.dropout_position == "after"
        scores, hidden = self._score_and_activate(x, z, drops=drops_before)
        _kept, weights = self.route(scores)
        if self.output_bias is not None:
            # the out-projection's hook adds the biases with these weights
            self._check_hooked()
            self._call_state.weights = weights
        if drops_after:
            hidden = F.dropout(hidden, config.expert_dropout)
        return self._weighted(hidden, weights)

    def _score_and_activate(
        self, x: Tensor | None, z: Tensor, *, drops: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the experts' scores ``[T, N]``, and the activated neurons ``[..., d]``.

        Args:
            x: FFN inputs ``[T, h]``, None if unknown.
            z: pre-activations ``[..., d]``.
            drops: apply ``expert_dropout`` to the pre-activations before they are activated.
        """
        rows = z.reshape(-1, z.shape[-1])  # [T, d]
        needs_hidden = self.config.score.startswith("inter")
        scores = None
        if not needs_hidden:
            # score first, because the activation may overwrite its input
            scores = self._scores(x, rows)
        if drops:
            z = F.dropout(z, self.config.expert_dropout)
        hidden = self.activation(z)
        if scores is None:
            scores = self._scores(x, rows, hidden.reshape(rows.shape))
        return scores, hidden

    def _activate_with_kernel(self, x: Tensor, z: Tensor) -> Tensor | None:
        """Activate the neurons. Then choose experts and mask neurons with one compiled kernel.

        This is faster for a few tokens. There, the many small steps of :meth:`route` take longer
        than the FFN's matrix products.

        Args:
            x: FFN inputs ``[T, h]``.
            z: pre-activations ``[..., d]``.

        Returns:
            The activated neurons ``[..., d]``, 0 for experts that are not chosen. None if there are
            no kernels for this pass, or if :meth:`_choosing_keys` returns None.
        """
        kernels = kernels_for(x)
        if kernels is None:
            return None
        keys = self._choosing_keys()
        if keys is None:
            return None
        hidden = self.activation(z)
        config = self.config
        chooses_highest = config.selection == "top"
        return kernels.mask_neurons(hidden, x, keys, config.top_k, chooses_highest)

    def choose_mask_with_kernel(self, x: Tensor, kernels: ModuleType) -> Tensor | None:
        """Choose the experts of inputs ``[T, h]`` with one compiled kernel.

        Args:
            x: FFN inputs ``[T, h]``.
            kernels: compiled kernels, which this pass may use (:func:`kernels_for`).

        Returns:
            The mask ``[T, N]`` that :meth:`route` would choose. None if :meth:`_choosing_keys`
            returns None.
        """
        keys = self._choosing_keys()
        if keys is None:
            return None
        config = self.config
        chooses_highest = config.selection == "top"
        return kernels.route(x, keys, config.top_k, chooses_highest)

    def _choosing_keys(self) -> Tensor | None:
        """Return the experts' keys ``[N, h]`` if their products with the inputs are the scores.

        Then a kernel can choose the experts. Call this only in a pass that may use the kernels. The
        result is None if :meth:`route` must choose the experts:

        - the layer trains, or no earlier pass has kept keys;
        - the routing is recorded, or the experts have their own output biases;
        - autocast is enabled;
        - the configuration needs more than a mask of the highest or lowest scores.
        """
        # both need the results of route()
        if self.record is not None or self.output_bias is not None:
            return None
        config = self.config
        # the kernels return no scores
        if config.weighting != "binary" or config.counts_tokens:
            return None
        if config.selection not in ("top", "bottom"):
            return None
        if torch.is_autocast_enabled("cpu"):  # would round the kernels' product
            return None
        # The router keeps no keys in training. So the kernels need neither noise nor dropout.
        return self.router.kept_keys()

    def _weighted(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """Multiply the neurons ``[..., d]`` by the weights of their experts.

        Args:
            hidden: activated neurons ``[..., d]``.
            weights: expert weights ``[T, N]``, or a bool mask of the chosen experts.
        """
        kernels = kernels_for(hidden)
        if kernels is not None and hidden.dtype in (torch.float32, torch.bfloat16):
            return kernels.scale_blocks(hidden, weights)
        blocks = hidden.unflatten(-1, (self.config.num_experts, -1))  # [..., N, s]
        per_block = weights.view(*blocks.shape[:-1], 1)  # [..., N, 1]
        weighted = blocks * per_block.to(hidden.dtype)
        return weighted.flatten(-2)

    def _check_hooked(self) -> None:
        """Raise :class:`RuntimeError` if the hook that adds the experts' biases is lost."""
        module = _without_adapter(self.ffn.proj_out)
        proj_out = getattr(module, "projection", module)  # unwrap the sparse backend
        if not proj_out._forward_hooks:
            name = f"{self.ffn.name}.{self.ffn.spec.proj_out}"
            raise RuntimeError(
                f"{name} was replaced and lost the experts' biases: replace it before converting"
            )

    def _score_grad_context(self) -> AbstractContextManager[Any]:
        """Return a no-grad context if neither expert weights nor the balance loss need gradients.

        Else return a context that does nothing.
        """
        is_needed = self.config.weighting != "binary" or self.config.aux_loss_coefficient > 0
        if is_needed or not torch.is_grad_enabled():
            return nullcontext()
        return torch.no_grad()

    def _scores(self, x: Tensor | None, z: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Score the experts ``[T, N]`` during the forward pass.

        Args:
            x: FFN inputs ``[T, h]``, None if unknown.
            z: pre-activations ``[T, d]``.
            hidden: activated neurons ``[T, d]``, for scores that are computed from them.
        """
        with self._score_grad_context():
            return self.router.scores(x, z, hidden)

    def linear_scores(self, x: Tensor) -> Tensor:
        """Score the experts ``[T, N]`` for inputs ``[T, h]`` without computing neurons."""
        with self._score_grad_context():
            return self.router(x)

    def route(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Choose each token's experts by their scores, and store the balance loss.

        In training, the router's noise is added to the scores first.

        Args:
            clean: scores ``[T, N]`` without noise.

        Returns:
            Mask of the chosen experts that had capacity left, and their weights, both ``[T, N]``.
        """
        config = self.config
        if clean.shape[-1] != config.num_experts:
            router = type(self.router).__name__
            raise ConversionError(
                f"{router} returned {clean.shape[-1]} scores per token "
                f"for {config.num_experts} experts"
            )
        noise_std = config.router_noise / config.num_experts
        with self._score_grad_context():
            noisy = clean
            if noise_std and self.training:
                noisy = clean + torch.randn_like(clean) * noise_std
            token_mask = None
            if self.padding_hook is not None:
                token_mask = self.padding_hook.token_mask(len(clean), clean.device)

            chosen, kept = self._choose_masks(noisy, token_mask)
            weights = expert_weights(noisy, chosen, config.weighting, config.num_active_experts)
            # an expert without capacity left for a token gets the weight 0
            if config.capacity_factor is not None:
                weights = weights * kept

            if config.aux_loss_coefficient > 0:
                self._store_balance_loss(clean, noisy, chosen, token_mask)

        if self.record is not None:
            self.record.update(chosen, kept)
        return kept, weights

    def _store_balance_loss(
        self, clean: Tensor, noisy: Tensor, chosen: Tensor, token_mask: Tensor | None
    ) -> None:
        """Compute the balance loss, and store it for :attr:`aux_loss`.

        Args:
            clean: scores ``[T, N]`` without noise.
            noisy: the scores that the experts were chosen by.
            chosen: mask ``[T, N]`` of the chosen experts.
            token_mask: mask ``[T]`` that is false for padding, None if there is none.
        """
        config = self.config
        # There is noise only in training. But the authors' formula also divides by its standard
        # deviation in evaluation.
        divides_by_noise = self.training or config.balance_loss == "published"
        noise_std = 0.0
        if divides_by_noise:
            noise_std = config.router_noise / config.num_experts
        # aux_loss returns a loss of compiled code first: an earlier one must not hide this loss
        self._traced.loss = None
        self._call_state.loss = balance_loss(
            clean, noisy, chosen, noise_std, config.balance_loss, token_mask
        )

    def _choose_masks(self, scores: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Choose each token's experts by their scores ``[T, N]``, and apply the capacity.

        Returns:
            Two masks ``[T, N]``. The first has the chosen experts. The second has only the chosen
            experts that had capacity left for the token.
        """
        config = self.config
        if config.capacity_factor is None:
            chosen = choose_mask(scores.detach(), config.top_k, config.selection)
            return chosen, chosen

        # in the order of the choices, because first choices take the capacity first
        indices = choose_indices(scores, config.top_k, config.selection)  # [T, k]
        fits = capacity_mask(
            scores.detach(),
            indices,
            config.capacity_factor,
            config.num_active_experts,
            token_mask,
        )
        chosen = expert_mask(indices, config.num_experts)
        kept = expert_mask(indices, config.num_experts, fits)
        return chosen, kept

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            # a copy has no record and no tensors of a call
            "_eager": None,
            "_traced": None,
            "record": None,
            _NEXT_HOOK_ID: RemovableHandle.next_id,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        complete = {**state, "_eager": _ThreadState(), "_traced": _CallState()}
        # A new process numbers hooks from 0. So a new hook could get the number of one of the
        # model's hooks, and would replace it. Layers that emoe 0.1 pickled lack the number.
        next_hook_id = complete.pop(_NEXT_HOOK_ID, 0)
        RemovableHandle.next_id = max(RemovableHandle.next_id, next_hook_id)
        super().__setstate__(complete)

    def extra_repr(self) -> str:
        return f"{self.config.kind}, experts={self.config.num_experts}, top_k={self.config.top_k}"


def _without_adapter(projection: nn.Module) -> Any:
    """Return the projection that an adapter of PEFT wraps, or the projection itself."""
    return getattr(projection, "base_layer", projection)


def resize_parameter_(module: nn.Module, name: str, values: Tensor) -> None:
    """Set a module's parameter to values of another shape.

    The parameter stays the same object, unless an autograd graph refers to it.
    """
    parameter = cast(nn.Parameter, getattr(module, name))
    resized = nn.Parameter(values.detach(), requires_grad=parameter.requires_grad)
    try:
        # an optimizer then still has the parameter
        torch.utils.swap_tensors(parameter, resized)
    except RuntimeError:
        setattr(module, name, resized)


def routed_layers(model: nn.Module) -> list[RoutedActivation]:
    """Return the routed FFNs of a model in layer order; the list is empty for a dense model."""
    layers = []
    for name, module in model.named_modules():
        # PEFT keeps the unused original of a module that it trains
        is_unused = "original_module" in name.split(".")
        if isinstance(module, RoutedActivation) and not is_unused:
            layers.append(module)
    return sorted(layers, key=lambda layer: layer.ffn.index)


def check_one_conversion(layers: Sequence[RoutedActivation], caller: str) -> None:
    """Raise :class:`ConversionError` if parts of a model were converted separately.

    This is so if two layers have the same number, or if layers have different configurations.
    """
    check_distinct_numbers(layers, caller)
    configs = {layer.config for layer in layers}
    if len(configs) > 1:
        raise _separate_parts_error(caller)


def check_distinct_numbers(layers: Sequence[RoutedActivation], caller: str) -> None:
    """Raise :class:`ConversionError` if two layers have the same number.

    Then parts of the model were converted separately.
    """
    numbers = {layer.ffn.index for layer in layers}
    if len(numbers) < len(layers):
        raise _separate_parts_error(caller)


def _separate_parts_error(caller: str) -> ConversionError:
    """Return the error for a model whose parts were converted separately."""
    return ConversionError(
        f"{caller}: parts of the model were converted separately; handle each part by itself"
    )


def aux_loss(model: nn.Module) -> Tensor | float:
    """Return the sum of the layers' balance losses of the last forward pass.

    Each loss (:func:`emoe.routing.balance_loss`) is multiplied by ``aux_loss_coefficient``. Add the
    sum to the task loss of a training step, before the next forward pass. It is 0.0 if the
    configuration has no balance loss. A layer that the last pass skipped, as layer drop does, adds
    the loss of an earlier pass.

    Args:
        model: converted model.
    """
    losses = []
    for layer in routed_layers(model):
        loss = layer.aux_loss
        if loss is not None:
            losses.append(loss * layer.config.aux_loss_coefficient)
    if not losses:
        return 0.0
    # the layers of a model may be on several devices
    device = losses[0].device
    return torch.stack([loss.to(device) for loss in losses]).sum()


def update_gates_(model: nn.Module) -> nn.Module:
    """Update the running gates after an optimizer step.

    A running gate is the moving average of an expert's mean key. Only configurations with
    ``gate_momentum`` have it.

    Args:
        model: converted model.

    Returns:
        The same model.
    """
    for layer in routed_layers(model):
        layer.router.update_()
    return model
