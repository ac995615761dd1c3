"""Map the classes of a model's head to those of a set if their numbers differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from emoe.errors import EMoEError


@dataclass(frozen=True)
class LabelMapping:
    """Hold the new numbers of the head's and of the set's classes; None keeps the numbers."""

    predictions: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None

    @property
    def same(self) -> bool:
        """Return True if head and set have the same classes, so that a loss is defined."""
        return self.predictions is None and self.labels is None


class Labelled(Protocol):
    """Describe a task with classes."""

    @property
    def labels(self) -> Sequence[str]: ...

    @property
    def label_map(self) -> Mapping[str, Sequence[int]]: ...


def label_mapping(trained: Labelled, evaluated: Labelled, name: str) -> LabelMapping:
    """Map the classes of a model's training task to those of another task.

    Equal numbers of classes correspond by their order (``labels`` in ``tasks.yaml``). If the set has fewer, the head's
    prediction is folded by the training task's ``label_map`` (three-way NLI on HANS: neutral and contradiction are no
    entailment). If it has more, its gold labels are folded by its own ``label_map``.

    Args:
        trained: The training task.
        evaluated: The other task.
        name: The name of the other task, for messages.

    Raises:
        EMoEError: One task has classes and the other numbers, or the task with more classes has no such ``label_map``.
    """
    head, classes = len(trained.labels), len(evaluated.labels)
    if bool(head) != bool(classes):
        kinds = ("numbers", "classes")
        raise EMoEError(f"'{name}' has {kinds[bool(classes)]} as labels, the model {kinds[bool(head)]}")
    if head == classes:
        return LabelMapping()
    fewer, most = sorted((head, classes))
    numbers = tuple((trained if head > classes else evaluated).label_map.get(str(fewer), ()))
    if len(numbers) != most or set(numbers) != set(range(fewer)):
        raise EMoEError(
            f"'{name}' has {classes} classes, the model {head}: the task with {most} needs 'label_map' with "
            f'"{fewer}": {most} numbers, each class from 0 to {fewer - 1} among them'
        )
    return LabelMapping(predictions=numbers) if head > classes else LabelMapping(labels=numbers)
