"""Routers score the experts of a converted FFN: one class per router, registered by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoe.architectures import FFN, InBlocks, has_float_matrix, weight_of
from emoe.compiled.build import is_in_memory, is_traced
from emoe.config import ROUTERS, EMoEConfig, GMoEConfig
from emoe.errors import ConversionError

# width of the cosine router's projection
_COSINE_DIM = 256
# The cosine router multiplies its scores by a learned factor. As in the authors' code, the factor
# starts at 2 and is at most 100. The expert embeddings start with the standard deviation 0.01.
_MAX_LOG_SCALE = math.log(100.0)
_INITIAL_SCALE = 2.0
_EMBEDDING_DEVIATION = 0.01
# elements of a weight that are averaged together on a CPU
_CHUNK_ELEMENTS = 1 << 19
# At least this many elements of a weight are compared to detect changes, and fewer than twice as
# many. A weight with fewer rows has one for each row.
_COMPARED_ELEMENTS = 512


def means_of_blocks(blocks: Tensor) -> Tensor:
    """Average blocks ``[N, s, ...]`` over each expert's neurons in float32: ``[N, ...]``."""
    is_on_cpu = blocks.device.type == "cpu"
    if blocks.dtype == torch.float32 or not is_on_cpu or torch.compiler.is_compiling():
        return blocks.float().mean(1)
    # A few experts at a time. For a large layer, allocating a float32 copy takes longer than
    # computing the means.
    elements_per_expert = max(blocks[:1].numel(), 1)
    experts_per_chunk = max(_CHUNK_ELEMENTS // elements_per_expert, 1)
    means = [chunk.float().mean(1) for chunk in blocks.split(experts_per_chunk)]
    return torch.cat(means)


def means_of_rows(rows: Tensor, num_experts: int) -> Tensor:
    """Average rows ``[d, ...]`` over each expert's neurons in float32: ``[N, ...]``."""
    return means_of_blocks(rows.unflatten(0, (num_experts, -1)))


def _scores_from_mean_weight(x: Tensor, mean_weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute linear scores ``[T, N]`` of the experts from their mean weights.

    A score is the product of an input and an expert's mean weight, plus the mean bias. It equals
    the mean of a projection's outputs over the expert's neurons. For the in-projection, the mean
    weights are the mean keys (paper Eq. 4). A score is computed in float32 without autocast,
    because bf16 would change the experts of several percent of tokens.

    Args:
        x: FFN inputs ``[T, h]``.
        mean_weight: mean weights ``[N, h]`` in float32.
        bias: mean biases ``[N]``, None to leave them out (the paper's score).
    """
    context: AbstractContextManager[Any] = nullcontext()
    if torch.is_autocast_enabled(x.device.type):
        context = torch.autocast(x.device.type, enabled=False)
    with context:
        return F.linear(x.float(), mean_weight, bias)


def means_of_columns(values: Tensor, num_experts: int) -> Tensor:
    """Average columns ``[..., d]`` over each expert's neurons in float32: ``[..., N]``."""
    return values.float().unflatten(-1, (num_experts, -1)).mean(-1)


class Router(nn.Module):
    """Base class of routers, which score the experts of one FFN.

    To add a router, write a subclass and call :func:`register_router`.

    Parameters and persistent buffers are saved with the model, beside the dense model's own state.

    Attributes:
        learned: true if the router has parameters that need a gradient. They get it only if its
            scores weight the experts' outputs.
        ffn: FFN whose experts are scored.
        config: configuration of the experts.
    """

    learned: ClassVar[bool] = True

    def __init__(self, ffn: FFN, config: EMoEConfig | GMoEConfig) -> None:
        super().__init__()
        self.ffn = ffn
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        """Compute scores ``[T, N]`` in float32 from FFN inputs ``[T, h]``; higher is better."""
        raise NotImplementedError

    def scores(self, x: Tensor | None, z: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Compute scores ``[T, N]`` during the FFN's forward pass.

        Args:
            x: FFN inputs ``[T, h]``, None if unknown.
            z: pre-activations ``[T, d]``. Only avg-k reads them.
            hidden: activated neurons ``[T, d]``, for avg-k's ``inter`` scores.
        """
        inputs = require_input(self.ffn, x)
        return self(inputs.to(z.device))

    def kept_keys(self) -> Tensor | None:
        """Return vectors ``[N, h]`` in float32 whose products with the input are the scores.

        An earlier forward pass, in evaluation mode and without gradients, has kept them. None if no
        pass has kept vectors of the current weights, if the router trains, and for a router that
        computes scores differently.

        Call it only in a pass that may use the compiled kernels
        (:func:`emoe.compiled.build.kernels_for`): it does not check again that the pass records no
        gradient and is not traced.
        """
        return None

    def forget_kept_keys_(self) -> None:
        """Discard :meth:`kept_keys`, so that a later forward pass computes them again."""

    def update_(self) -> None:
        """Update the router's state after an optimizer step. The base class has no state."""


def register_router(name: str, router: type[Router]) -> None:
    """Add or replace a router for ``EMoEConfig(router=name)``. ``docs/adding.md`` has an example.

    Args:
        name: identifier in configurations and checkpoints. Loading such a checkpoint requires the
            same registration.
        router: subclass of :class:`Router`.
    """
    ROUTERS[name] = router.learned
    _CLASSES[name] = router


class _Float32Linear(nn.Linear):
    """A linear map that computes in float32, whatever the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class CosineRouter(Router):
    """The learned router of GMoE and EMoE-learn: cosines of a projection and expert embeddings.

    The score of expert i with embedding s_i is
    ``exp(min(temperature, ln 100)) * cos(W x + b, s_i)``. The factor ``exp(…)`` starts at 2, and
    the embeddings at N(0, 0.01²) (the authors' ``gates/cosine_top.py``).
    """

    def __init__(self, ffn: FFN, config: EMoEConfig | GMoEConfig) -> None:
        super().__init__(ffn, config)
        self.proj = _Float32Linear(ffn.h, _COSINE_DIM)
        embeddings = torch.randn(_COSINE_DIM, config.num_experts) * _EMBEDDING_DEVIATION
        self.expert_embeddings = nn.Parameter(embeddings)
        self.temperature = nn.Parameter(torch.tensor([math.log(_INITIAL_SCALE)]))
        weight = cast(Tensor, ffn.proj_in.weight)
        # quantised weights are integers: the router stays in float32
        dtype = weight.dtype if weight.is_floating_point() else None
        self.to(weight.device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute scores ``[T, N]`` in float32 from FFN inputs ``[T, h]``."""
        with torch.autocast(x.device.type, enabled=False):
            projected = F.normalize(self.proj(x), dim=-1)  # [T, 256]
            embeddings = F.normalize(self.expert_embeddings.float(), dim=0)  # [256, N]
            cosine = projected @ embeddings
            scale = self.temperature.float().clamp(max=_MAX_LOG_SCALE).exp()
            return cosine * scale


class Stamp:
    """The state of a projection's weight at one time, to detect later changes.

    A change shows in the weight's identity, version, address, or some of its elements. The elements
    are compared because PyTorch counts no versions for changes through ``weight.data``, which PEFT
    uses to merge adapters. Such a merge changes the whole matrix, and so the compared elements. A
    change of a few neurons through ``weight.data`` may not show.

    Args:
        projection: module with an ordinary floating-point weight in the CPU's memory.
        has_copy: true if the caller uses a copy made from the weight, so elements are compared. A
            view needs no comparison, because it shows changes of the elements.
    """

    def __init__(self, projection: nn.Module, *, has_copy: bool = True) -> None:
        weight = weight_of(projection)
        self._projection = projection
        self._weight = weight
        self._version = _version(weight)
        self._address = weight.data_ptr()
        self._current_elements: Tensor | None = None
        self._old_elements: Tensor | None = None
        if has_copy:
            # a view of the weight, which shows later changes, and a copy, which does not
            self._current_elements = _compared_elements(weight)
            self._old_elements = self._current_elements.clone()

    def still_matches(self, projection: nn.Module) -> bool:
        """Check if a projection is the stamped one, and its weight unchanged."""
        if projection is not self._projection:
            return False
        weight = self._weight
        if projection.weight is not weight:
            return False
        if weight.data_ptr() != self._address:
            return False
        if _version(weight) != self._version:
            return False
        # no elements are compared if the caller has no copy of the weight
        if self._current_elements is None or self._old_elements is None:
            return True
        return torch.equal(self._current_elements, self._old_elements)


def _compared_elements(weight: Tensor) -> Tensor:
    """Return a view of some elements of a contiguous matrix, from rows and columns all over it."""
    rows, columns = weight.shape
    num_compared = min(rows, _COMPARED_ELEMENTS)
    # The elements lie on diagonals: from each to the next, some rows down and some columns along.
    # So each of up to 512 experts has some, whether neurons are rows or, as in GPT-2's Conv1D,
    # columns.
    rows_down = rows // num_compared
    columns_along = max(columns // num_compared, 1)
    # in the flat matrix, the next row is `columns` elements further, and the next column is one
    step = rows_down * columns + columns_along
    flat = weight.detach().view(-1)
    return flat[::step]


def _version(weight: Tensor) -> int | None:
    """Return the number of in-place changes of a weight that PyTorch has counted.

    None for a tensor of inference mode, whose changes are not counted.
    """
    # PyTorch raises an error for the version of such a tensor
    if weight.is_inference():
        return None
    return weight._version


class _KeptMean(NamedTuple):
    """The mean weights of the experts, and the state of the weight that they were computed from.

    Attributes:
        stamp: state of the projection's weight.
        mean_weight: mean weights ``[N, h]`` in float32.
    """

    stamp: Stamp
    mean_weight: Tensor


class AvgKRouter(Router):
    """The paper's avg-k (Eq. 4): an expert's score is the mean score of its neurons.

    The router has no parameters. ``keys`` scores are products of the FFN's input and the mean keys.
    If the weights are adapted or quantised, these scores are computed from the pre-activations
    instead, with the same result up to rounding. :class:`emoe.EMoEConfig` describes the others.

    In evaluation mode the mean keys are kept until the weights change.

    Attributes:
        gate: running mean keys ``[N, h]`` in float32 with ``gate_momentum``, else None.
    """

    learned: ClassVar[bool] = False
    config: EMoEConfig
    gate: Tensor | None

    def __init__(self, ffn: FFN, config: EMoEConfig | GMoEConfig) -> None:
        super().__init__(ffn, config)
        self._kept: _KeptMean | None = None
        gate = self.mean_keys() if self.config.gate_momentum else None
        self.register_buffer("gate", gate)

    def forward(self, x: Tensor) -> Tensor:
        """Compute scores ``[T, N]`` in float32 from FFN inputs ``[T, h]``.

        Only for scores that are linear in the input.
        """
        # the running mean, else the mean that an earlier call kept, else the current mean
        mean_weight = self.gate
        if mean_weight is None:
            mean_weight = self._kept_mean_weight()
        if mean_weight is None:
            mean_weight = self._mean_weight()
            self._keep(mean_weight)
        return _scores_from_mean_weight(x, mean_weight, self._score_bias())

    def _projection(self) -> nn.Module:
        """Return the projection whose outputs the score averages."""
        if self.config.score == "up":
            return self.ffn.up_module()
        return self.ffn.proj_in

    def kept_keys(self) -> Tensor | None:
        """Return the mean keys ``[N, h]`` that an earlier call kept (:meth:`Router.kept_keys`).

        None if no keys are kept, if the weights have changed since, or if the scores are not the
        products of these keys and the input.
        """
        if self.training:
            return None
        if self.config.score != "keys":
            return None
        # the scores use the running mean keys instead, or add a bias
        if self.gate is not None or self.config.score_bias:
            return None
        # a subclass or a hook may change the scores
        is_subclass = type(self) is not AvgKRouter
        if is_subclass or self._forward_hooks or self._forward_pre_hooks:
            return None
        return self._unchanged_mean_weight()

    def forget_kept_keys_(self) -> None:
        """Discard the kept mean weights, so that a later forward pass computes them again."""
        self._kept = None

    def train(self, mode: bool = True) -> Self:
        """Set the training or evaluation mode. Training discards the kept mean weights."""
        if mode:
            self.forget_kept_keys_()
        return super().train(mode)

    def _may_keep(self) -> bool:
        """Check if this forward pass may keep mean weights, or use kept ones.

        It must be in evaluation mode, and record neither a gradient nor a graph.
        """
        # training changes the weights in every step
        if self.training:
            return False
        # kept mean weights have no gradient
        if torch.is_grad_enabled():
            return False
        # a graph would contain them as constants
        return not is_traced()

    def _kept_mean_weight(self) -> Tensor | None:
        """Return the mean weights ``[N, h]`` that an earlier call kept.

        None if there are none, the weights have changed, or this pass may not use them
        (:meth:`_may_keep`).
        """
        if not self._may_keep():
            return None
        return self._unchanged_mean_weight()

    def _unchanged_mean_weight(self) -> Tensor | None:
        """Return the kept mean weights ``[N, h]``, None if the weights have changed since.

        Also None if none are kept.
        """
        kept = self._kept  # another thread may replace it
        if kept is None or not kept.stamp.still_matches(self._projection()):
            return None
        return kept.mean_weight

    def _keep(self, mean_weight: Tensor) -> None:
        """Keep mean weights for later calls, if this pass may keep them (:meth:`_may_keep`).

        They are only kept for a contiguous weight in the CPU's memory.
        """
        if not self._may_keep():
            return
        projection = self._projection()
        weight = weight_of(projection)
        # Later calls compare elements of the weight with the stamp. On a GPU, the CPU would have to
        # wait for each comparison.
        if not is_in_memory(weight):
            return
        # the stamp needs a view of the weight as one long vector
        if not weight.is_contiguous():
            return
        self._kept = _KeptMean(stamp=Stamp(projection), mean_weight=mean_weight)

    def __getstate__(self) -> dict[str, Any]:
        # a copy has its own weights
        return {**self.__dict__, "_kept": None}

    def _mean_weight(self) -> Tensor:
        """Average the weights of each expert's neurons: ``[N, h]`` in float32.

        The score is the mean output of one projection over an expert's neurons. The averaged
        weights are those of this projection.
        """
        if self.config.score == "keys":
            return self.mean_keys()  # detached: the score gives the weights no gradient
        # The mean of a projection's outputs is the output of its mean weights. They are not
        # detached, because the scores of the masked backend give the weights a gradient too.
        return means_of_blocks(self._scored_blocks().weight)

    def _score_bias(self) -> Tensor | None:
        """Return the mean biases ``[N]`` that are part of the score, None if there are none."""
        if self.config.score == "keys":
            return self._mean_bias() if self.config.score_bias else None
        bias = self._scored_blocks().bias
        if bias is None:
            return None
        return means_of_blocks(bias)

    def _scored_blocks(self) -> InBlocks:
        """Return weight and bias, by expert, of the projection whose outputs the score averages."""
        blocks = self.ffn.blocks(self.config.num_experts)
        if self.config.score == "up":
            return cast(InBlocks, blocks.up)  # the score needs a gated FFN
        return blocks.activated

    def scores(self, x: Tensor | None, z: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Compute scores ``[T, N]`` during the FFN's forward pass.

        Args:
            x: FFN inputs ``[T, h]``, None if unknown.
            z: pre-activations ``[T, d]``.
            hidden: activated neurons ``[T, d]``, only needed for the ``inter`` scores.
        """
        score = self.config.score
        if score == "keys":
            return self._scores_from_keys(x, z)
        neurons = self._scored_neurons(x, z, hidden)
        if score.endswith("_abs"):
            neurons = neurons.abs()
        return means_of_columns(neurons, self.config.num_experts)

    def _scored_neurons(self, x: Tensor | None, z: Tensor, hidden: Tensor | None) -> Tensor:
        """Return the values ``[T, d]`` that the score averages, before absolute values are taken.

        The arguments are those of :meth:`scores`.
        """
        ffn = self.ffn
        score = self.config.score
        if score.startswith("inter"):
            # the input of the out-projection
            neurons = cast(Tensor, hidden)
            if ffn.gated:
                neurons = neurons * ffn.up(require_input(ffn, x))
            return neurons
        if score.startswith("up"):
            return ffn.up(require_input(ffn, x))
        # the score "gate"
        return z

    def _scores_from_keys(self, x: Tensor | None, z: Tensor) -> Tensor:
        """Compute ``keys`` scores from the mean keys, or from the pre-activations ``z``.

        The mean keys need the FFN's input, and an in-projection whose weight is a floating-point
        matrix without an adapter.
        """
        proj_in = self.ffn.proj_in
        # offloaded weights have values only in this context
        with weights_loaded(proj_in):
            # an adapter adds to the outputs, so the weight alone does not give the score
            is_adapted = hasattr(proj_in, "base_layer")
            if x is None or is_adapted:
                return self._scores_from_neurons(z)
            # a quantised weight, or one without values even in this context
            if not has_float_matrix(proj_in) or proj_in.weight.is_meta:
                return self._scores_from_neurons(z)
            return self(x)

    def _scores_from_neurons(self, z: Tensor) -> Tensor:
        """Compute ``keys`` scores ``[T, N]`` from pre-activations ``[T, d]``.

        Raises:
            ConversionError: the configuration has a running gate, which needs the weight itself.
        """
        if self.gate is not None:
            raise ConversionError(
                f"{self.ffn.name}.{self.ffn.spec.proj_in}.weight is not an ordinary floating-point "
                "parameter, which gate_momentum needs: "
                "merge or remove its adapter, or do not quantise it"
            )
        scores = means_of_columns(z, self.config.num_experts)
        if self.config.score_bias:
            return scores
        # pre-activations include the bias, the paper's score does not
        bias = self._mean_bias()
        if bias is None:
            return scores
        return scores - bias.to(scores.device)

    def _mean_bias(self) -> Tensor | None:
        """Compute the mean biases ``[N]`` of the experts' pre-activations. None without biases."""
        bias = self.ffn.key_bias()
        if bias is None:
            return None
        return means_of_rows(unsharded(bias), self.config.num_experts)

    def mean_keys(self) -> Tensor:
        """Compute the mean keys ``[N, h]`` of the current weights, without gradient."""
        return means_of_rows(unsharded(self.ffn.keys()), self.config.num_experts)

    @torch.no_grad()
    def update_(self) -> None:
        """Set ``gate = m * gate + (1 - m) * mean keys``. Does nothing without a momentum."""
        if self.gate is not None:
            self.gate.lerp_(self.mean_keys(), 1 - self.config.gate_momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.forget_kept_keys_()  # they refer to the old weights
        old_gate = self.gate
        super()._apply(fn, recurse)
        moved_gate = self.gate
        if old_gate is None or moved_gate is None:
            return self
        # A running gate moves with the model but stays in float32. `fn` may have rounded it to the
        # model's dtype, so the values are taken from the old gate. If the old gate was on the meta
        # device, it had no values.
        values = moved_gate if old_gate.is_meta else old_gate
        self.gate = values.to(moved_gate.device, torch.float32)
        return self


class FixedRouter(Router):
    """A router whose scores follow the experts' usage: every token uses the same experts.

    :func:`emoe.fix_experts_` installs it.

    Attributes:
        usage: number of times that each expert was used, ``[N]`` int64. A cast of the model, such
            as ``model.half()``, would round floats, but not integers.
    """

    learned: ClassVar[bool] = False
    usage: Tensor

    def __init__(self, ffn: FFN, config: EMoEConfig | GMoEConfig) -> None:
        super().__init__(ffn, config)
        usage = torch.zeros(config.num_experts, dtype=torch.int64, device=ffn.keys().device)
        self.register_buffer("usage", usage)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores ``[T, N]``, the same for each token of ``x``.

        An expert's score is the number of experts that were used less than it.
        """
        usage = self.usage.to(x.device)
        # is_more_used[a, b]: expert a was used more than expert b
        is_more_used = usage.unsqueeze(1) > usage
        scores = is_more_used.sum(1).float()
        num_tokens = x.shape[0]
        return scores.expand(num_tokens, -1)


_CLASSES: dict[str, type[Router]] = {
    "avg_k": AvgKRouter,
    "cosine": CosineRouter,
    "fixed": FixedRouter,
}


def build_router(ffn: FFN, config: EMoEConfig | GMoEConfig) -> Router:
    """Build the router that a configuration names."""
    return _CLASSES[config.router](ffn, config)


def is_offloaded(module: nn.Module) -> bool:
    """Check if accelerate has offloaded a module's weights. It loads them for each call."""
    if not hasattr(module, "_hf_hook"):
        return False
    return any(parameter.is_meta for parameter in module.parameters(recurse=False))


def weights_loaded(*modules: nn.Module) -> AbstractContextManager[Any]:
    """Load the weights of offloaded modules. The returned context offloads them at its end."""
    offloaded = [module for module in modules if is_offloaded(module)]
    if not offloaded:
        # torch.compile can trace this context, but not the hooks of the other one
        return nullcontext()
    from accelerate.utils import align_module_device

    stack = ExitStack()
    for module in offloaded:
        stack.enter_context(align_module_device(module))
    return stack


def unsharded(weight: Tensor) -> Tensor:
    """Return a weight without its graph. If FSDP has sharded it, gather all of it."""
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    return weight.detach()


def require_input(ffn: FFN, passed: Tensor | None) -> Tensor:
    """Return ``passed``, the input that an FFN's in-projection passed on, after a check for None.

    Raises:
        RuntimeError: it is None, because the in-projection did not run.
    """
    if passed is None:
        raise RuntimeError(
            f"{ffn.name}: its in-projection did not run or was replaced "
            "(PEFT must train the whole FFN)"
        )
    return passed
