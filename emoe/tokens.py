"""Which of a layer's tokens are padding, and which labels the rows have."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from emoe.architectures import FFN

_MASK = "attention_mask"


class _Watch:
    """Reads one argument of a module before each of its forward passes."""

    def __init__(self, module: nn.Module, argument: str) -> None:
        parameters = list(inspect.signature(module.forward).parameters)
        self._place = parameters.index(argument) if argument in parameters else None
        self._argument = argument
        self._value: Tensor | None = None
        self._called = False
        self._hook = module.register_forward_pre_hook(self._read, with_kwargs=True)

    def _read(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._place is not None and self._place < len(args)
        value = args[self._place] if given else kwargs.get(self._argument)  # type: ignore[index]
        self._called = True
        self._value = value if isinstance(value, Tensor) and self._is_wanted(value) else None

    def _is_wanted(self, value: Tensor) -> bool:
        raise NotImplementedError

    def remove(self) -> None:
        """Stop reading."""
        self._hook.remove()


class PaddingWatch(_Watch):
    """Reads the attention mask (1 for a token, 0 for padding) of a model, or of a stack of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, _MASK)
        self._name = type(module).__name__

    def _is_wanted(self, value: Tensor) -> bool:
        return value.ndim == 2

    def real_tokens(self, tokens: int) -> Tensor | None:
        """Which of a layer's tokens ``[tokens]`` are no padding; None where there was no two-dimensional mask.

        With a key-value cache a layer sees only the newest tokens of each row, and so do we.

        Raises:
            RuntimeError: the module was not called through its hooks, or its mask is not of these tokens.
        """
        if not self._called:
            raise RuntimeError(
                f"the padding is not known: {self._name} was not called as a module (model(...), not model.forward(...))"
            )
        if self._value is None:
            return None
        rows, columns = self._value.shape
        if tokens % rows or tokens // rows > columns:
            raise RuntimeError(f"{_MASK} {[rows, columns]} does not fit the {tokens} tokens of a layer")
        return self._value[:, columns - tokens // rows :].reshape(-1).bool()


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
        """Labels ``[rows]`` of the present forward pass."""
        return self._value if self.given is None else self.given

    @property
    def num_labels(self) -> int:
        """One more than the highest label of the present pass; read from the device once."""
        if self._count is None:
            labels = self.labels
            self._count = 0 if labels is None or not labels.numel() else int(labels.max()) + 1
        return self._count


def watch_padding(model: nn.Module, ffns: Sequence[FFN]) -> dict[int, PaddingWatch]:
    """Watch the attention masks of these FFNs' tokens, by layer number.

    An FFN's mask is that of the innermost part of the model around it that is called with token ids (each
    stack of an encoder-decoder has its own), else that of the whole model. Image models have none.
    """
    modules = dict(model.named_modules())
    watches: dict[str, PaddingWatch | None] = {}
    found = {}
    for ffn in ffns:
        parts = ffn.name.split(".")
        around = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
        place = next((name for name in around if _takes(modules.get(name), "input_ids", _MASK)), "")
        if place not in watches:
            module = modules[place]
            watches[place] = PaddingWatch(module) if _takes(module, _MASK) else None
        watch = watches[place]
        if watch is not None:
            found[ffn.index] = watch
    return found


def _takes(module: nn.Module | None, *arguments: str) -> bool:
    return module is not None and set(arguments) <= set(inspect.signature(module.forward).parameters)
