"""What a decision was read from, to see in one go that it would be read the same again."""

from __future__ import annotations

from itertools import repeat
from operator import is_
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

Look = tuple[type[Tensor], int, bool, torch.dtype, torch.Size, tuple[int, ...]]
_SAMPLED = 16
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Sampled:
    """A weight's numbers as they were when something was made of them: a few of them, and how often PyTorch saw them change."""

    def __init__(self, weight: Tensor) -> None:
        self.version = weight._version
        flat = weight.detach().as_strided((weight.numel(),), (1,))
        # along the diagonal: every sixteenth of the rows and of the columns has one
        step = (weight.numel() + max(weight.stride())) // _SAMPLED
        # some who write do not count it (fused optimisers, ``weight.data``), but hardly one leaves all of these places as they were;
        # a view, which keeps the memory, so that no other weight gets its address
        self.numbers = flat[:: max(min(step, (weight.numel() - 1) // (_SAMPLED - 1)), 1)][:_SAMPLED]
        self.values = self.numbers.clone()

    def is_still(self, weight: Tensor) -> bool:
        """Whether a weight that lies where this one did is unchanged as far as can be seen."""
        return weight._version == self.version and torch.equal(_bits(self.numbers), _bits(self.values))


def _bits(numbers: Tensor) -> Tensor:
    """Numbers as whole ones, of which each equals itself."""
    return numbers.view(_WHOLE[numbers.element_size()])


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
        self._sampled: list[tuple[Tensor, Sampled]] = []
        self._facts: Any = None

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

    def numbers(self, weight: Tensor, sampled: Sampled) -> None:
        """Read a weight's numbers, where :meth:`tensor` has read where they lie; as they were when they were sampled."""
        self._sampled.append((weight, sampled))

    def compare_by(self, kernels: ModuleType) -> None:
        """Have the compiled kernels compare what was read until now."""
        facts = kernels.Facts(
            list(zip(self._owners, self._keys, self._values, strict=True)),
            list(zip(self._dicts, self._sizes, strict=True)),
            list(zip(self._objects, self._names, self._attributes, strict=True)),
            self._tensors,
            [(weight, kept.version, kept.numbers, kept.values) for weight, kept in self._sampled],
        )
        if self.holds():  # which another thread may have changed before these were made
            self._facts = facts

    def holds(self) -> bool:
        """Whether everything that was read still is the same object."""
        if self._facts is not None:
            return cast(bool, self._facts.hold())
        return (
            list(map(len, self._dicts)) == self._sizes
            and all(map(is_, map(dict.get, self._owners, self._keys), self._values))
            and all(map(is_, map(getattr, self._objects, self._names, repeat(None)), self._attributes))
            and list(map(look, self._tensors)) == self._looks
            and all(sampled.is_still(weight) for weight, sampled in self._sampled)
        )


def look(tensor: Tensor) -> Look:
    """Where a tensor's numbers lie, and how."""
    return type(tensor), tensor.data_ptr(), tensor.is_neg(), tensor.dtype, tensor.shape, tensor.stride()
