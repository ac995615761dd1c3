"""What the model was called with: where a pass begins, which of a layer's tokens are padding, and which labels the rows have."""

from __future__ import annotations

import inspect
import itertools
import sys
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from emoe.architectures import FFN

T = TypeVar("T")

# an FFN's tokens are those of the innermost part around it that is called with one of these
_TEXT = "input_ids"
_OTHER_INPUTS = ("inputs_embeds", "pixel_values", "input_features", "input_values")
_MASK = "attention_mask"
_KEY_PADDING = ("src_key_padding_mask", "tgt_key_padding_mask")


def is_recomputed() -> bool:
    """Whether this is a forward pass that activation checkpointing repeats within the backward pass."""
    # a compiled graph is recomputed by the compiler, which calls nothing here
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class PerThread(Generic[T]):
    """A value for each thread, so that threads that share a model do not see each other's. Copies start empty.

    A compiled graph has no threads: its value is every thread's that has none of its own.
    """

    def __init__(self) -> None:
        self._values: dict[int, T] = {}
        self._compiled: T | None = None

    def get(self) -> T | None:
        """This thread's value, or None."""
        return (
            self._compiled if torch.compiler.is_compiling() else self._values.get(threading.get_ident(), self._compiled)
        )

    def set(self, value: T) -> None:
        """Replace this thread's value."""
        if torch.compiler.is_compiling():
            self._compiled = value
        else:
            self._values[threading.get_ident()] = value

    def clear(self) -> None:
        """Forget this thread's value."""
        self._compiled = None
        if torch.compiler.is_compiling():
            self._values.clear()
        else:
            self._values.pop(threading.get_ident(), None)

    def __reduce__(self) -> tuple[Any, ...]:
        return PerThread, ()


def watch_passes(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Have the layers' balance losses forgotten where a forward pass begins: at the outermost call of a module that holds some of them.

    Each such module is watched, because wrappers call the parts of a model and not always the model itself.

    Args:
        model: the model that is called.
        layers: layers of it that keep a loss (their ``pass_loss.forget`` takes a number that grows with each pass), by name.
    """
    parts = {".".join(name.split(".")[:length]) for name in layers for length in range(1, name.count(".") + 1)}
    model.register_forward_pre_hook(_begin_model)
    for part in sorted(parts):
        model.get_submodule(part).register_forward_pre_hook(_begin_part)


def _begin_model(module: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling():
        _forget_losses(module)
    else:
        _begin_part(module, args)


def _begin_part(module: nn.Module, _args: tuple[Any, ...]) -> None:
    # what runs is read off the stack, where an interrupted call is gone
    if not torch.compiler.is_compiling() and not _is_within_a_pass(module):
        _forget_losses(module)


_numbers = itertools.count(1)


def _forget_losses(module: nn.Module) -> None:
    number = 0 if torch.compiler.is_compiling() else next(_numbers)
    for part in module.modules():
        if (loss := getattr(part, "pass_loss", None)) is not None:
            loss.forget(number)


def _is_within_a_pass(module: nn.Module) -> bool:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals["self"] is not module:
            hooks = frame.f_locals["self"]._forward_pre_hooks.values()
            if _begin_part in hooks or _begin_model in hooks:
                return True
        frame = frame.f_back
    return False


_CALL = nn.Module._call_impl.__code__


def do_nothing(_module: nn.Module, _args: tuple[Any, ...]) -> None:
    """Be a hook: torch's fused layers, which pass a module by, are not taken where it has one."""


def is_own_hook(hook: object) -> bool:
    """Whether a hook is one of ours, which look at no neuron."""
    return hook is do_nothing or _watches(hook)


def remove_hooks(model: nn.Module) -> None:
    """Take away what :func:`watch_passes` and :func:`watch_padding` have put on a model, or on one that it is a copy of."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if _watches(hook):
                    del hooks[key]


def _watches(hook: object) -> bool:
    return hook in (_begin_model, _begin_part) or isinstance(getattr(hook, "__self__", None), _ArgumentHook)


class _ArgumentHook:
    """Reads one argument of a module in each of its forward passes."""

    def __init__(self, module: nn.Module, argument: str) -> None:
        parameters = list(inspect.signature(module.forward).parameters)
        self._place = parameters.index(argument) if argument in parameters else None
        self._argument = argument
        self._values: PerThread[Tensor] = PerThread()
        self._running: PerThread[bool] = PerThread()
        # of the pass before, in whatever thread the backward pass repeats a part of it
        self._latest: Tensor | None = None
        self._handles = [
            module.register_forward_pre_hook(self._read, with_kwargs=True),
            module.register_forward_hook(self._finish, always_call=True),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # a copy of a part of the model goes on reading what the model is called with
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": []}

    def _read(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = self._place is not None and self._place < len(args)
        value = args[self._place] if given else kwargs.get(self._argument)  # type: ignore[index]
        self._running.set(True)
        self._latest = value if isinstance(value, Tensor) and self._is_wanted(value) else None
        self._values.clear()
        if self._latest is not None:
            self._values.set(self._latest)

    def _finish(self, _module: nn.Module, _args: tuple[Any, ...], _result: object) -> None:
        self._running.set(False)

    def _value(self) -> Tensor | None:
        """What the present forward pass was given, or the one that is repeated."""
        value = self._values.get()
        return self._latest if value is None and is_recomputed() else value

    def _is_wanted(self, value: Tensor) -> bool:
        raise NotImplementedError

    def remove(self) -> None:
        """Stop reading."""
        for handle in self._handles:
            handle.remove()


class PaddingMaskHook(_ArgumentHook):
    """Reads the padding mask of a model, or of a stack of it.

    Args:
        module: what is called with the mask.
        argument: ``attention_mask`` (1 for a token) or one of torch's ``…_key_padding_mask`` (True, or
            -inf, for padding).
        cached: with a key-value cache a layer sees only the newest tokens of each row.
        rows_first: tokens of a row follow each other (false for torch's ``batch_first=False``).
    """

    def __init__(self, module: nn.Module, argument: str, *, cached: bool, rows_first: bool = True) -> None:
        super().__init__(module, argument)
        self._name, self._cached, self._rows_first = type(module).__name__, cached, rows_first

    def _is_wanted(self, value: Tensor) -> bool:
        return value.ndim == 2

    def token_mask(self, tokens: int) -> Tensor | None:
        """Which of a layer's tokens ``[tokens]`` are no padding; None where there was no two-dimensional mask.

        Raises:
            RuntimeError: the module is not being called through its hooks, or its mask is not of these tokens.
        """
        if not self._running.get() and not is_recomputed():
            raise RuntimeError(
                f"the padding is not known: {self._name} was not called as a module (model(...), not model.forward(...), as PEFT "
                "calls the model that it wraps): convert a model with a head, or set count_padding=True"
            )
        value = self._value()
        if value is None:
            return None
        rows, columns = value.shape
        newest = tokens // rows if self._cached and rows else columns
        if rows * newest != tokens or newest > columns:
            raise RuntimeError(f"{self._argument} {[rows, columns]} does not fit the {tokens} tokens of a layer")
        mask = value[:, columns - newest :]
        if self._argument != _MASK:
            mask = mask.logical_not() if mask.dtype == torch.bool else mask == 0
        return (mask if self._rows_first else mask.t()).reshape(-1).bool()


class LabelHook(_ArgumentHook):
    """Reads the labels of a model's rows, where there is one whole number a row.

    Attributes:
        given: labels to take instead of those that the model is called with.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "labels")
        self.given: Tensor | None = None
        self._counted: tuple[Tensor, int] | None = None

    def _is_wanted(self, value: Tensor) -> bool:
        return value.ndim == 1 and not value.is_floating_point()

    @property
    def labels(self) -> Tensor | None:
        """Labels ``[rows]`` of the present forward pass; negative ones stand for none."""
        return self._values.get() if self.given is None else self.given

    def num_labels(self, labels: Tensor) -> int:
        """One more than the highest of these labels; read from the device once a pass, not once a layer."""
        if self._counted is None or self._counted[0] is not labels:
            self._counted = (labels, int(labels.max()) + 1 if labels.numel() else 0)
        return self._counted[1]


def watch_padding(model: nn.Module, ffns: Sequence[FFN]) -> dict[int, PaddingMaskHook]:
    """Watch the padding masks of these FFNs' tokens, by layer number.

    An FFN's mask is that of the innermost part of the model around it that is called with token ids (each
    stack of an encoder-decoder has its own). Parts that are called with images or sound have none. A module without
    such arguments has the mask that itself is called with.
    """
    names = {id(module): name for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    watches: dict[str, PaddingMaskHook | None] = {}
    found = {}
    for ffn in ffns:
        parts = names[id(ffn.layer)].split(".")[:-1] if id(ffn.layer) in names else []
        around = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
        place = next(
            (name for name in around if _takes_any(modules.get(name), _TEXT, *_OTHER_INPUTS, *_KEY_PADDING)), ""
        )
        if place not in watches:
            watches[place] = _watch(modules[place], ffn)
        watch = watches[place]
        if watch is not None:
            found[ffn.index] = watch
    return found


def _watch(module: nn.Module, ffn: FFN) -> PaddingMaskHook | None:
    for argument in _KEY_PADDING:
        if _takes_any(module, argument):
            return PaddingMaskHook(module, argument, cached=False, rows_first=ffn.rows_first)
    text = _takes_any(module, _TEXT)
    if _takes_any(module, _MASK) and (text or not _takes_any(module, *_OTHER_INPUTS)):
        return PaddingMaskHook(module, _MASK, cached=text, rows_first=ffn.rows_first)
    return None


def _takes_any(module: nn.Module | None, *arguments: str) -> bool:
    return module is not None and not set(arguments).isdisjoint(inspect.signature(module.forward).parameters)
