"""Hooks that read a model's padding mask and labels, so that routed layers know which of their tokens count."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from emoe.architectures import FFN

_TEXT = "input_ids"
_OTHER_INPUTS = ("inputs_embeds", "pixel_values", "input_features", "input_values")
_MASK = "attention_mask"
_KEY_PADDING = ("src_key_padding_mask", "tgt_key_padding_mask")


def is_recomputed() -> bool:
    """Check if activation checkpointing is repeating a forward pass within the backward pass."""
    # PyTorch has no public function for this. A compiled graph is recomputed without calling Python.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def do_nothing(_module: nn.Module, _args: tuple[Any, ...]) -> None:
    """Do nothing. As a forward pre-hook, stop torch's fused layers from bypassing a module."""


class _ArgumentHook:
    """Read one argument of a module in each forward pass, if it is a tensor of ``ndim`` dimensions."""

    def __init__(self, module: nn.Module, argument: str, ndim: int) -> None:
        names = _arguments(module)
        self._argument, self._ndim = argument, ndim
        self._position = names.index(argument) if argument in names else None
        # Each thread's last call: the argument, and True while the call is in progress.
        self._thread = threading.local()
        # The last call of any thread, for compiled graphs and for checkpointing, which may run in another thread.
        self._latest: tuple[Tensor | None, bool] = (None, False)
        self._is_compiled = False
        begin = module.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._handles = [begin, module.register_forward_hook(self._end, always_call=True)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copy of one layer still needs the arguments of the whole model

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thread": None, "_latest": (None, False), "_handles": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _thread=threading.local())

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._position is not None and self._position < len(args):
            value = args[self._position]
        else:
            value = kwargs.get(self._argument)
        self._keep(
            value if isinstance(value, Tensor) and value.ndim == self._ndim else None,
            is_running=True,
        )

    def _end(self, _module: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        self._keep(self._call()[0], is_running=False)

    def _keep(self, value: Tensor | None, *, is_running: bool) -> None:
        """Store the argument of the current call, for this thread and as the latest of all threads."""
        self._latest, self._is_compiled = (value, is_running), torch.compiler.is_compiling()
        if not self._is_compiled:
            self._thread.call = self._latest

    def _call(self) -> tuple[Tensor | None, bool]:
        if torch.compiler.is_compiling() or self._is_compiled:
            return self._latest
        value, is_running = getattr(self._thread, "call", (None, False))
        return (self._latest[0] if value is None and is_recomputed() else value), is_running

    def remove(self) -> None:
        """Remove the hook from the module."""
        for handle in self._handles:
            handle.remove()


class PaddingMaskHook(_ArgumentHook):
    """Read the padding mask of a model or of one of its stacks.

    Args:
        module: the module that is called with the mask.
        argument: ``attention_mask`` (1 for a token) or torch's ``…_key_padding_mask`` (True or -inf for padding).
        cached: true if layers get only the newest tokens of each row (with a key-value cache).
        rows_first: layers get ``[rows, tokens, h]``; false for torch's ``batch_first=False``.
    """

    def __init__(
        self, module: nn.Module, argument: str, *, cached: bool, rows_first: bool = True
    ) -> None:
        super().__init__(module, argument, ndim=2)
        self._name, self._cached, self._rows_first = type(module).__name__, cached, rows_first

    def token_mask(self, tokens: int) -> Tensor | None:
        """Return a mask ``[tokens]`` of a layer's tokens without the padding; None if the model got no 2-D mask.

        Raises:
            RuntimeError: the module was called without its hooks, or its mask does not fit the tokens.
        """
        value, is_running = self._call()
        if not is_running and not is_recomputed():
            way_out = "call model(...), or set count_padding=True"
            raise RuntimeError(
                f"padding unknown: {self._name} was not called as a module; {way_out}"
            )
        if value is None:
            return None
        rows, columns = value.shape
        newest = tokens // rows if self._cached and rows else columns
        if rows * newest != tokens or newest > columns:
            raise RuntimeError(
                f"{self._argument} {[rows, columns]} does not fit the {tokens} tokens of a layer"
            )
        mask = value[:, columns - newest :]
        if self._argument != _MASK:
            mask = mask.logical_not() if mask.dtype == torch.bool else mask == 0
        return (mask if self._rows_first else mask.t()).reshape(-1).bool()


class LabelHook(_ArgumentHook):
    """Read the labels of a model's rows, if each row has one integer label.

    Attributes:
        given: labels to use instead of the model's argument.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "labels", ndim=1)
        self.given: Tensor | None = None

    @property
    def labels(self) -> Tensor | None:
        """Labels ``[rows]`` of the current forward pass, or None. Negative labels mean unlabelled rows."""
        labels = self._call()[0] if self.given is None else self.given
        return None if labels is None or labels.is_floating_point() else labels


def watch_padding(model: nn.Module, ffns: Sequence[FFN]) -> dict[int, PaddingMaskHook]:
    """Watch the padding masks of FFNs. Return the hooks by layer number.

    The mask belongs to the innermost module around an FFN that takes token ids, so encoder and decoder have separate
    masks. Image and sound models have none. If no module takes token ids, the mask is an argument of the model.
    """
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    inputs = {_TEXT, *_OTHER_INPUTS, *_KEY_PADDING}
    hooks: dict[str, PaddingMaskHook | None] = {}
    by_layer = {}
    for ffn in ffns:
        path = ffn.spec.activation
        # stop above the layer: torch's layers get their own mask
        parents = names[ffn.parents[path]].split(".")[: -1 - path.count(".")]
        ancestors = (".".join(parents[:length]) for length in range(len(parents), -1, -1))
        name = next(
            (name for name in ancestors if inputs.intersection(_arguments(modules[name]))), ""
        )
        if name not in hooks:
            hooks[name] = _watch(modules[name], rows_first=ffn.rows_first)
        by_layer[ffn.index] = hooks[name]
    return {index: hook for index, hook in by_layer.items() if hook is not None}


def _watch(module: nn.Module, *, rows_first: bool) -> PaddingMaskHook | None:
    """Watch the padding mask of a module. Return None if it has no mask, or one for pixels or sound."""
    arguments = _arguments(module)
    name = next((name for name in (*_KEY_PADDING, _MASK) if name in arguments), None)
    takes_text = _TEXT in arguments
    if name is None or (
        name == _MASK and not takes_text and set(_OTHER_INPUTS).intersection(arguments)
    ):
        return None
    return PaddingMaskHook(module, name, cached=name == _MASK and takes_text, rows_first=rows_first)


def _arguments(module: nn.Module) -> list[str]:
    """Return the names of a module's arguments."""
    return list(inspect.signature(module.forward).parameters)


def remove_argument_hooks(model: nn.Module) -> None:
    """Remove the hooks that read arguments, also from a deep copy of the hooked model."""
    for module in model.modules():
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
        ):  # a copy has no handles to remove
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), _ArgumentHook):
                    del hooks[key]
