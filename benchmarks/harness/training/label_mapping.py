"""How the classes of a model's head and those of a set are compared where their numbers differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from emoe.errors import EMoEError


@dataclass(frozen=True)
class LabelMapping:
    """The new number of each of the head's classes and of each of the set's; None keeps them."""

    predictions: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None

    @property
    def same(self) -> bool:
        """Whether head and set have the same classes, so that a loss means something."""
        return self.predictions is None and self.labels is None

    def read(self, predictions: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Predicted and gold classes in the common numbers."""
        return _renumber(predictions, self.predictions), _renumber(labels, self.labels)


def _renumber(classes: NDArray[Any], numbers: tuple[int, ...] | None) -> NDArray[Any]:
    return classes if numbers is None else np.asarray(numbers)[classes.astype(int)]


class Labelled(Protocol):
    """What is known of a task's classes."""

    @property
    def labels(self) -> Sequence[str]: ...

    @property
    def label_map(self) -> Mapping[str, Sequence[int]]: ...


def label_mapping(trained: Labelled, evaluated: Labelled, name: str) -> LabelMapping:
    """How a model that was trained on one task is read on another.

    Equal numbers of classes correspond by their order (``labels`` in ``tasks.yaml``). Where the set has fewer, the
    head's class is chosen first and then folded by the training task's ``label_map`` (three-way NLI on HANS: neutral
    and contradiction are no entailment); where it has more, its gold labels are folded by its own.

    Args:
        trained: the training task.
        evaluated: the other task.
        name: of the other task, for messages.

    Raises:
        EMoEError: one has classes and the other numbers, or the task with more classes does not say how to fold them.
    """
    head, classes = len(trained.labels), len(evaluated.labels)
    if bool(head) != bool(classes):
        raise EMoEError(
            f"'{name}' has {'classes' if classes else 'numbers'} as labels, the model {'classes' if head else 'numbers'}"
        )
    if head == classes:
        return LabelMapping()
    more = trained if head > classes else evaluated
    fewer, most = sorted((head, classes))
    numbers = tuple(more.label_map.get(str(fewer), ()))
    if len(numbers) != most or set(numbers) != set(range(fewer)):
        raise EMoEError(
            f"'{name}' has {classes} classes, the model {head}: the task with {most} needs 'label_map' with \"{fewer}\": "
            f"{most} numbers, each class from 0 to {fewer - 1} among them"
        )
    return LabelMapping(predictions=numbers) if more is trained else LabelMapping(labels=numbers)
