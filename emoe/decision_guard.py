"""What a decision was read from, to see in one go that it would be read the same again."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor

Look = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


class Guard:
    """Reads for somebody who decides, and remembers what it read.

    Example:
        >>> settings = {"mode": "eval"}
        >>> guard = Guard()
        >>> guard.item(settings, "mode")
        'eval'
        >>> guard.holds()
        True
        >>> settings["mode"] = "train"
        >>> guard.holds()
        False
    """

    def __init__(self) -> None:
        # columns of four tables side by side, to be compared without a loop in Python
        self._owners: list[dict[Any, Any]] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._objects: list[Any] = []
        self._names: list[str] = []
        self._attributes: list[Any] = []
        self._dicts: list[dict[Any, Any]] = []
        self._sizes: list[int] = []
        self._tensors: list[Tensor] = []
        self._looks: list[Look] = []
        self._checks: list[Callable[[], bool]] = []

    def item(self, owner: dict[Any, Any], key: Any) -> Any:
        """Read an item of a dictionary, None where there is none."""
        found = owner.get(key)
        self._owners.append(owner)
        self._keys.append(key)
        self._values.append(found)
        return found

    def attribute(self, owner: Any, name: str) -> Any:
        """Read an attribute that is the same object each time, as a class or a function of a class is; None where there is none."""
        found = getattr(owner, name, None)
        self._objects.append(owner)
        self._names.append(name)
        self._attributes.append(found)
        return found

    def items(self, owner: dict[Any, Any]) -> list[Any]:
        """Read all values of a dictionary."""
        self._dicts.append(owner)
        self._sizes.append(len(owner))
        return [self.item(owner, key) for key in list(owner)] if owner else []

    def tensor(self, tensor: Tensor) -> Tensor:
        """Read where a tensor's numbers lie."""
        self._tensors.append(tensor)
        self._looks.append(look(tensor))
        return tensor

    def check(self, check: Callable[[], bool]) -> None:
        """Have something else looked at, once all that was read is the same."""
        self._checks.append(check)

    def holds(self) -> bool:
        """Whether everything that was read still is the same object."""
        return (
            list(map(len, self._dicts)) == self._sizes
            and all(map(is_, map(dict.get, self._owners, self._keys), self._values))
            and all(map(is_, map(getattr, self._objects, self._names, repeat(None)), self._attributes))
            and list(map(look, self._tensors)) == self._looks
            and all(check() for check in self._checks)
        )


def look(tensor: Tensor) -> Look:
    """Where a tensor's numbers lie, and how."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
