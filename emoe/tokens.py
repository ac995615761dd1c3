"""Hooks that read a model's padding mask and labels.

Routed layers learn from them which of their tokens count.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from emoe.architectures import FFN
from emoe.errors import ConversionError

# names of arguments of a model's forward method
_TEXT_INPUT = "input_ids"
_OTHER_INPUTS = ("inputs_embeds", "pixel_values", "input_features", "input_values")
_TRANSFORMERS_MASK = "attention_mask"
_TORCH_MASKS = ("src_key_padding_mask", "tgt_key_padding_mask")


def is_recomputed() -> bool:
    """Check if activation checkpointing is repeating a forward pass within the backward pass."""
    # PyTorch has no public function for this. The number is -1 outside of a backward pass.
    # A compiled graph is recomputed without calling Python, so compiled code needs no check.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def do_nothing(_module: nn.Module, _args: tuple[Any, ...]) -> None:
    """Do nothing.

    Registered as a forward pre-hook, it stops torch's fused layers from bypassing the module.
    """


class _Call(NamedTuple):
    """One call of a watched module.

    Attributes:
        value: the argument that is read. None if it was not a tensor of the expected dimensions.
        is_running: true until the call ends.
        has_other_form: true if the argument was given, but not as such a tensor.
    """

    value: Tensor | None
    is_running: bool
    has_other_form: bool = False


class _ArgumentHook:
    """A hook that reads one argument of a module in each forward pass.

    It reads only tensors of ``ndim`` dimensions. Any other argument counts as None.
    """

    def __init__(self, module: nn.Module, argument: str, ndim: int) -> None:
        self._argument = argument
        self._ndim = ndim
        # position among the arguments, because the argument may be passed without its name
        names = _argument_names(module)
        self._position = names.index(argument) if argument in names else None
        # the last call of each thread
        self._thread = threading.local()
        # The last call of any thread, for compiled graphs and for checkpointing, which may run in
        # another thread.
        self._latest = _Call(None, is_running=False)
        self._latest_was_compiled = False
        begin = module.register_forward_pre_hook(self._begin, with_kwargs=True)
        end = module.register_forward_hook(self._end, always_call=True)
        self._handles = [begin, end]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copy of one layer still needs the arguments of the whole model

    def __getstate__(self) -> dict[str, Any]:
        # thread-local objects and handles cannot be pickled, and a copy is not in a call
        no_call = _Call(None, is_running=False)
        return {**self.__dict__, "_thread": None, "_latest": no_call, "_handles": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _thread=threading.local())

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Store the argument, which is given by position or by name."""
        if self._position is not None and self._position < len(args):
            value = args[self._position]
        else:
            value = kwargs.get(self._argument)
        is_usable = isinstance(value, Tensor) and value.ndim == self._ndim
        has_other_form = value is not None and not is_usable
        if not is_usable:
            value = None
        self._store(_Call(value, is_running=True, has_other_form=has_other_form))

    def _end(self, _module: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        """Store that the call has ended. The argument is kept, for the backward pass."""
        call = self._current_call()
        self._store(_Call(call.value, is_running=False, has_other_form=call.has_other_form))

    def _store(self, call: _Call) -> None:
        """Store a call as the latest of all threads and, outside compiled code, of this thread."""
        self._latest = call
        self._latest_was_compiled = torch.compiler.is_compiling()
        if not self._latest_was_compiled:
            self._thread.call = call

    def _current_call(self) -> _Call:
        """Return this thread's current call, or its last one if none is running.

        In compiled code, after a compiled call, and in a forward pass that activation checkpointing
        repeats in another thread, the argument is that of the latest call of all threads.
        """
        # compiled code cannot read thread-local attributes
        if torch.compiler.is_compiling():
            return self._latest
        # A compiled call is not stored for its thread. A layer may still run eagerly in it, if the
        # compiler leaves the layer out. This thread's own call would be an older one.
        if self._latest_was_compiled:
            return self._latest
        no_call = _Call(None, is_running=False)
        call: _Call = getattr(self._thread, "call", no_call)
        # Checkpointing may repeat a forward pass in a thread of the backward pass, which has not
        # called the model and so has no value. The value of the latest call is used instead.
        if call.value is None and is_recomputed():
            latest = self._latest
            return _Call(
                latest.value, is_running=call.is_running, has_other_form=latest.has_other_form
            )
        return call

    def remove(self) -> None:
        """Remove the hook from the module."""
        for handle in self._handles:
            handle.remove()


class PaddingMaskHook(_ArgumentHook):
    """A hook that reads the padding mask of a model, or of its encoder or decoder.

    Args:
        module: the module that is called with the mask.
        argument: ``attention_mask`` (1 for a token) or torch's ``…_key_padding_mask`` (True or -inf
            for padding).
        cached: true if layers may get only the newest tokens of each row, because the model may
            have a key-value cache.
        rows_first: true if layers get ``[rows, tokens, h]``, false with torch's
            ``batch_first=False``.
    """

    def __init__(
        self, module: nn.Module, argument: str, *, cached: bool, rows_first: bool = True
    ) -> None:
        super().__init__(module, argument, ndim=2)
        self._name = type(module).__name__
        self._cached = cached
        self._rows_first = rows_first

    def token_mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """Return a mask ``[tokens]`` that is true for a layer's tokens and false for padding.

        Args:
            tokens: number of tokens that the layer got, with padding.
            device: device of the layer. The layers of a model may be on several devices.

        Returns:
            The mask, on this device. None if the model got no 2-D mask. If it got another mask, as
            from ``generate`` with a static cache, there is a warning.

        Raises:
            RuntimeError: the module was called without its hooks, or its mask does not fit the
                tokens.
        """
        call = self._current_call()
        if not call.is_running and not is_recomputed():
            raise RuntimeError(
                f"padding unknown: {self._name} was not called as a module; "
                "call model(...), or set count_padding=True"
            )
        # an error would stop every generation with a static cache, also of rows without padding
        if call.has_other_form and not torch.compiler.is_compiling():
            warnings.warn(
                f"padding is counted: {self._name} got an {self._argument} that is not a 2-D "
                "tensor, as generate() with a static cache passes it",
                stacklevel=2,
            )
        if call.value is None:
            return None

        # With a key-value cache, the layer gets only the newest tokens of each row, but the mask
        # has a column for all.
        rows, columns = call.value.shape
        tokens_per_row = columns
        if self._cached and rows > 0:
            tokens_per_row = tokens // rows
        fits = rows * tokens_per_row == tokens and tokens_per_row <= columns
        if not fits:
            raise RuntimeError(
                f"{self._argument} {[rows, columns]} does not fit the {tokens} tokens of a layer"
            )
        newest_columns = call.value[:, columns - tokens_per_row :]
        mask = self._true_for_tokens(newest_columns)
        if not self._rows_first:
            mask = mask.t()
        return mask.reshape(-1).to(device, torch.bool)

    def _true_for_tokens(self, mask: Tensor) -> Tensor:
        """Return a mask that is true for tokens. In torch's own masks, True or -inf is padding."""
        if self._argument == _TRANSFORMERS_MASK:
            return mask
        if mask.dtype == torch.bool:
            return mask.logical_not()
        return mask == 0


class LabelHook(_ArgumentHook):
    """A hook that reads the labels of a model's rows, if each row has one integer label.

    Attributes:
        given: labels to use instead of the model's argument.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "labels", ndim=1)
        self.given: Tensor | None = None

    @property
    def labels(self) -> Tensor | None:
        """Labels ``[rows]`` of the current forward pass, or None.

        Negative labels mean unlabelled rows.
        """
        labels = self.given
        if labels is None:
            labels = self._current_call().value
        if labels is None or labels.is_floating_point():
            return None
        return labels


def check_unchunked(model: nn.Module) -> None:
    """Raise :class:`ConversionError` if a model passes the tokens to an FFN in several calls.

    Transformers' option ``chunk_size_feed_forward`` does so. Then a layer cannot know which tokens
    of the padding mask it gets, and capacity and balance loss would be those of a chunk.
    """
    for module in model.modules():
        size = getattr(module, "chunk_size_feed_forward", 0)
        if size:
            raise ConversionError(
                f"{type(model).__name__} passes its tokens in chunks (chunk_size_feed_forward is "
                f"{size}), so they cannot be counted: build it with chunk_size_feed_forward=0"
            )


def watch_padding(model: nn.Module, ffns: Sequence[FFN]) -> dict[int, PaddingMaskHook]:
    """Register hooks that read the padding masks of FFNs.

    The mask is an argument of the innermost module around an FFN that takes token ids or another
    input of a model. So encoder and decoder have separate masks. If there is no such module, the
    mask is an argument of the whole model.

    Returns:
        The hooks by layer number. A layer without a padding mask, as in image and sound models, has
        no entry.

    Raises:
        ConversionError: the model passes its tokens in chunks (:func:`check_unchunked`).
    """
    check_unchunked(model)
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    hooks: dict[str, PaddingMaskHook | None] = {}  # by the name of the watched module
    by_layer = {}
    for ffn in ffns:
        name = _module_with_mask(ffn, names, modules)
        if name not in hooks:
            hooks[name] = _hook_padding_mask(modules[name], rows_first=ffn.rows_first)
        hook = hooks[name]
        if hook is not None:
            by_layer[ffn.index] = hook
    return by_layer


def _module_with_mask(
    ffn: FFN, names: Mapping[nn.Module, str], modules: Mapping[str, nn.Module]
) -> str:
    """Return the name of the innermost module around an FFN's layer that takes a model's inputs.

    Such inputs are token ids, pixels or torch's padding masks. Without such a module, return
    ``""``, the name of the whole model.
    """
    # Find the layer's name. `ffn.name` may not fit: it is the name in the converted model, and this
    # model may be a wrapper around it. So go up from the module that holds the activation, one step
    # for each dot of the activation's path. If the path is "mlp.act", "blocks.0.mlp" holds the
    # activation, and one step up is the layer "blocks.0".
    activation_path = ffn.spec.activation
    layer_name = names[ffn.parents[activation_path]]
    for _ in range(activation_path.count(".")):
        layer_name = _parent_name(layer_name)

    # the search begins above the layer, because torch's own layers also take a padding mask
    name = _parent_name(layer_name)
    input_names = {_TEXT_INPUT, *_OTHER_INPUTS, *_TORCH_MASKS}
    while name != "":
        arguments = _argument_names(modules[name])
        if any(argument in input_names for argument in arguments):
            return name
        name = _parent_name(name)
    return ""


def _parent_name(name: str) -> str:
    """Return the name of the module that contains a module, ``""`` for the whole model."""
    parent, _, _ = name.rpartition(".")
    return parent


def _hook_padding_mask(module: nn.Module, *, rows_first: bool) -> PaddingMaskHook | None:
    """Register a hook that reads the padding mask of a module.

    Return None if the module takes no mask. Also return None if it has transformers' mask but takes
    no token ids: this mask may cover pixels or sound.
    """
    arguments = _argument_names(module)
    # torch's own mask, if there is one
    for mask_name in _TORCH_MASKS:
        if mask_name in arguments:
            return PaddingMaskHook(module, mask_name, cached=False, rows_first=rows_first)
    if _TRANSFORMERS_MASK not in arguments:
        return None

    takes_text = _TEXT_INPUT in arguments
    takes_other_input = not set(_OTHER_INPUTS).isdisjoint(arguments)
    if takes_other_input and not takes_text:
        return None  # a mask of pixels or sound does not fit the layers' tokens
    # the mask of a text model also covers the tokens in a key-value cache
    return PaddingMaskHook(module, _TRANSFORMERS_MASK, cached=takes_text, rows_first=rows_first)


def _argument_names(module: nn.Module) -> list[str]:
    """Return the names of the arguments of a module's ``forward``."""
    return list(inspect.signature(module.forward).parameters)


def remove_argument_hooks(model: nn.Module) -> None:
    """Remove the hooks that read arguments from a model, which may be a deep copy."""
    # search for the hooks, because a copy does not have their handles
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), _ArgumentHook):
                    del hooks[key]
