"""Hooks that read a model's padding mask and labels.

Routed layers learn from them which of their tokens count.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from emoe.architectures import FFN

_TEXT = "input_ids"
_OTHER_INPUTS = ("inputs_embeds", "pixel_values", "input_features", "input_values")
_MASK = "attention_mask"
_KEY_PADDING = ("src_key_padding_mask", "tgt_key_padding_mask")


def is_recomputed() -> bool:
    """Check if activation checkpointing is repeating a forward pass within the backward pass."""
    # PyTorch has no public function for this. Recomputing a compiled graph does not call Python.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def do_nothing(_module: nn.Module, _args: tuple[Any, ...]) -> None:
    """Do nothing. As a forward pre-hook, stop torch's fused layers from bypassing a module."""


class _Call(NamedTuple):
    """One call of a module: the argument (None if not a fitting tensor), and True until it ends."""

    value: Tensor | None
    is_running: bool


class _ArgumentHook:
    """A hook that reads one argument of a module in each forward pass.

    It reads only tensors of ``ndim`` dimensions. Any other argument counts as None.
    """

    def __init__(self, module: nn.Module, argument: str, ndim: int) -> None:
        self._argument = argument
        self._ndim = ndim
        # place among the positional arguments
        names = _arguments(module)
        self._position = names.index(argument) if argument in names else None
        # the last call of each thread
        self._thread = threading.local()
        # The last call of any thread, for compiled graphs and for checkpointing, which may run in
        # another thread.
        self._latest = _Call(None, is_running=False)
        self._is_compiled = False
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
        if not isinstance(value, Tensor) or value.ndim != self._ndim:
            value = None
        self._keep(_Call(value, is_running=True))

    def _end(self, _module: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        """Store that the call has ended. The argument is kept, for the backward pass."""
        call = self._call()
        self._keep(_Call(call.value, is_running=False))

    def _keep(self, call: _Call) -> None:
        """Store the current call, for this thread and as the latest of all threads."""
        self._latest = call
        self._is_compiled = torch.compiler.is_compiling()
        if not self._is_compiled:
            self._thread.call = call

    def _call(self) -> _Call:
        """Return the current call of this thread, or the last one if none is in progress."""
        # a compiled graph does not see what is stored by thread
        if torch.compiler.is_compiling() or self._is_compiled:
            return self._latest
        call: _Call = getattr(self._thread, "call", _Call(None, is_running=False))
        # checkpointing may recompute in a thread that did not make the call
        if call.value is None and is_recomputed():
            return _Call(self._latest.value, call.is_running)
        return call

    def remove(self) -> None:
        """Remove the hook from the module."""
        for handle in self._handles:
            handle.remove()


class PaddingMaskHook(_ArgumentHook):
    """A hook that reads the padding mask of a model or of one of its stacks.

    Args:
        module: the module that is called with the mask.
        argument: ``attention_mask`` (1 for a token) or torch's ``…_key_padding_mask`` (True or -inf
            for padding).
        cached: true if layers get only the newest tokens of each row (with a key-value cache).
        rows_first: layers get ``[rows, tokens, h]``; false for torch's ``batch_first=False``.
    """

    def __init__(
        self, module: nn.Module, argument: str, *, cached: bool, rows_first: bool = True
    ) -> None:
        super().__init__(module, argument, ndim=2)
        self._name = type(module).__name__
        self._cached = cached
        self._rows_first = rows_first

    def token_mask(self, tokens: int) -> Tensor | None:
        """Return a mask ``[tokens]`` that is true for a layer's tokens and false for padding.

        It is None if the model got no 2-D mask.

        Raises:
            RuntimeError: the module was called without its hooks, or its mask does not fit the
                tokens.
        """
        call = self._call()
        if not call.is_running and not is_recomputed():
            raise RuntimeError(
                f"padding unknown: {self._name} was not called as a module; "
                "call model(...), or set count_padding=True"
            )
        if call.value is None:
            return None

        # With a key-value cache, the layer gets only the newest tokens of each row, but the mask
        # covers all.
        rows, columns = call.value.shape
        newest = columns
        if self._cached and rows:
            newest = tokens // rows
        if rows * newest != tokens or newest > columns:
            raise RuntimeError(
                f"{self._argument} {[rows, columns]} does not fit the {tokens} tokens of a layer"
            )
        newest_columns = call.value[:, columns - newest :]
        mask = self._true_for_tokens(newest_columns)
        if not self._rows_first:
            mask = mask.t()
        return mask.reshape(-1).bool()

    def _true_for_tokens(self, mask: Tensor) -> Tensor:
        """Return a mask that is true for tokens. Torch's own masks are true or -inf for padding."""
        if self._argument == _MASK:
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
            labels = self._call().value
        if labels is None or labels.is_floating_point():
            return None
        return labels


def watch_padding(model: nn.Module, ffns: Sequence[FFN]) -> dict[int, PaddingMaskHook]:
    """Watch the padding masks of FFNs. Return the hooks by layer number.

    The mask belongs to the innermost module around an FFN that takes token ids, so encoder and
    decoder have separate masks. Image and sound models have none. If no module takes token ids, the
    mask is an argument of the model.
    """
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    hooks: dict[str, PaddingMaskHook | None] = {}  # by the name of the watched module
    by_layer = {}
    for ffn in ffns:
        name = _module_with_mask(ffn, names, modules)
        if name not in hooks:
            hooks[name] = _watch(modules[name], rows_first=ffn.rows_first)
        hook = hooks[name]
        if hook is not None:
            by_layer[ffn.index] = hook
    return by_layer


def _module_with_mask(
    ffn: FFN, names: Mapping[nn.Module, str], modules: Mapping[str, nn.Module]
) -> str:
    """Return the name of the innermost module above an FFN's layer that takes inputs of a model.

    It is ``""``, the whole model, if there is none.
    """
    path = ffn.spec.activation
    # Start with the module that contains the layer, because torch's layers get a mask of their own.
    # From the activation's parent, it is one step up for each dot of the path, and one more.
    name = names[ffn.parents[path]]
    steps = path.count(".") + 1
    for _ in range(steps):
        name, _, _ = name.rpartition(".")
    inputs = {_TEXT, *_OTHER_INPUTS, *_KEY_PADDING}
    while name and inputs.isdisjoint(_arguments(modules[name])):
        name, _, _ = name.rpartition(".")
    return name


def _watch(module: nn.Module, *, rows_first: bool) -> PaddingMaskHook | None:
    """Watch the padding mask of a module.

    Return None if it has no mask, or one for pixels or sound.
    """
    arguments = _arguments(module)
    masks = [name for name in (*_KEY_PADDING, _MASK) if name in arguments]
    if not masks:
        return None
    name = masks[0]
    takes_text = _TEXT in arguments
    takes_other_input = not set(_OTHER_INPUTS).isdisjoint(arguments)
    if name == _MASK and takes_other_input and not takes_text:
        return None
    # the mask of a text model also covers the tokens in a key-value cache
    cached = name == _MASK and takes_text
    return PaddingMaskHook(module, name, cached=cached, rows_first=rows_first)


def _arguments(module: nn.Module) -> list[str]:
    """Return the names of a module's arguments."""
    return list(inspect.signature(module.forward).parameters)


def remove_argument_hooks(model: nn.Module) -> None:
    """Remove the hooks that read arguments, also from a deep copy of the hooked model."""
    # not by their handles, which a copy does not have
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), _ArgumentHook):
                    del hooks[key]
