"""Map the classes of a model's head to those of a set if their numbers differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def label_mapping(trained: Any, evaluated: Any, name: str) -> LabelMapping:
    """Map the classes of a model's training task to those of another task.

    Equal numbers of classes correspond by their order (``labels`` in ``tasks.yaml``). If the set has fewer, the head's
    prediction is folded by the training task's ``label_map`` (three-way NLI on HANS: neutral and contradiction are no
    entailment). If it has more, its gold labels are folded by its own ``label_map``.

    Args:
        trained: The training task, with ``labels`` and ``label_map``.
        evaluated: The other task.
        name: The name of the other task, for messages.

    Raises:
        EMoEError: The task with more classes has no such ``label_map``, or one task has classes and the other numbers.
    """
    head, classes = len(trained.labels), len(evaluated.labels)
    if head == classes:
        return LabelMapping()
    if not head or not classes:
        kinds = [("numbers", "classes")[bool(count)] for count in (classes, head)]
        raise EMoEError(f"'{name}' has {kinds[0]} as labels, the model {kinds[1]}")
    fewer, most = sorted((head, classes))
    numbers = tuple((trained if head > classes else evaluated).label_map.get(str(fewer), ()))
    if len(numbers) != most or set(numbers) != set(range(fewer)):
        raise EMoEError(
            f"'{name}' has {classes} classes, the model {head}: the task with {most} needs "
            f"'label_map' with \"{fewer}\": {most} numbers, each class from 0 to {fewer - 1} among them"
        )
    return LabelMapping(predictions=numbers) if head > classes else LabelMapping(labels=numbers)
