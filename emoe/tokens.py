"""What the model was called with: which of a layer's tokens are padding, and which labels the rows have."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emoe.architectures import FFN

# an FFN's tokens are those of the innermost part around it that is called with one of these
_TEXT = "input_ids"
_OTHER_INPUTS = ("inputs_embeds", "pixel_values", "input_features", "input_values")
_MASK = "attention_mask"
_KEY_PADDING = ("src_key_padding_mask", "tgt_key_padding_mask")


def is_recomputed() -> bool:
    """Whether this is a forward pass that activation checkpointing repeats within the backward pass."""
    # a compiled graph is recomputed by the compiler, which calls nothing here
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Watch:
    """Reads one argument of a module in each of its forward passes."""

    def __init__(self, module: nn.Module, argument: str) -> None:
        parameters = list(inspect.signature(module.forward).parameters)
        self._place = parameters.index(argument) if argument in parameters else None
        self._argument = argument
        self._value: Tensor | None = None
        self._running = False
        self._hooks = [
            module.register_forward_pre_hook(self._read, with_kwargs=True),
            module.register_forward_hook(self._finish, always_call=True),
        ]

    def _read(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._place is not None and self._place < len(args)
        value = args[self._place] if given else kwargs.get(self._argument)  # type: ignore[index]
        self._running = True
        self._value = value if isinstance(value, Tensor) and self._is_wanted(value) else None

    def _finish(self, _module: nn.Module, _args: tuple[Any, ...], _result: object) -> None:
        self._running = False

    def _is_wanted(self, value: Tensor) -> bool:
        raise NotImplementedError

    def remove(self) -> None:
        """Stop reading."""
        for hook in self._hooks:
            hook.remove()


class PaddingWatch(_Watch):
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

    def real_tokens(self, tokens: int) -> Tensor | None:
        """Which of a layer's tokens ``[tokens]`` are no padding; None where there was no two-dimensional mask.

        Raises:
            RuntimeError: the module is not being called through its hooks, or its mask is not of these tokens.
        """
        if not self._running and not is_recomputed():
            raise RuntimeError(
                f"the padding is not known: {self._name} was not called as a module (model(...), not model.forward(...))"
            )
        if self._value is None:
            return None
        rows, columns = self._value.shape
        newest = tokens // rows if self._cached and rows else columns
        if rows * newest != tokens or newest > columns:
            raise RuntimeError(f"{self._argument} {[rows, columns]} does not fit the {tokens} tokens of a layer")
        mask = self._value[:, columns - newest :]
        if self._argument != _MASK:
            mask = mask.logical_not() if mask.dtype == torch.bool else mask == 0
        return (mask if self._rows_first else mask.t()).reshape(-1).bool()


class LabelWatch(_Watch):
    """Reads the labels of a model's rows, where there is one whole number a row.

    Attributes:
        given: labels to take instead of those that the model is called with.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "labels")
        self.given: Tensor | None = None
        self._count: int | None = None

    def _read(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._read(_module, args, kwargs)
        self._count = None

    def _is_wanted(self, value: Tensor) -> bool:
        return value.ndim == 1 and not value.is_floating_point()

    @property
    def labels(self) -> Tensor | None:
        """Labels ``[rows]`` of the present forward pass; negative ones stand for none."""
        return self._value if self.given is None else self.given

    @property
    def num_labels(self) -> int:
        """One more than the highest label of the present pass; read from the device once."""
        if self._count is None:
            labels = self.labels
            self._count = 0 if labels is None or not labels.numel() else int(labels.max()) + 1
        return self._count


def watch_padding(model: nn.Module, ffns: Sequence[FFN]) -> dict[int, PaddingWatch]:
    """Watch the padding masks of these FFNs' tokens, by layer number.

    An FFN's mask is that of the innermost part of the model around it that is called with token ids (each
    stack of an encoder-decoder has its own). Parts that are called with images or sound have none. A module without
    such arguments has the mask that itself is called with.
    """
    names = {id(module): name for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    watches: dict[str, PaddingWatch | None] = {}
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


def _watch(module: nn.Module, ffn: FFN) -> PaddingWatch | None:
    for argument in _KEY_PADDING:
        if _takes_any(module, argument):
            rows_first = bool(getattr(getattr(ffn.layer, "self_attn", None), "batch_first", True))
            return PaddingWatch(module, argument, cached=False, rows_first=rows_first)
    text = _takes_any(module, _TEXT)
    if _takes_any(module, _MASK) and (text or not _takes_any(module, *_OTHER_INPUTS)):
        return PaddingWatch(module, _MASK, cached=text)
    return None


def _takes_any(module: nn.Module | None, *arguments: str) -> bool:
    return module is not None and not set(arguments).isdisjoint(inspect.signature(module.forward).parameters)
