"""Image sets of several environments, whatever they were read from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Union

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

Picture = Union[Image.Image, "Tensor"]


@dataclass(frozen=True)
class Environment:
    """One environment.

    Attributes:
        name: short, DomainBed's.
        labels: class number of every row.
        open: the picture of a row (an RGB image, or of MNIST a tensor ``[channels, 28, 28]`` in [0, 1]), and what it was made RGB from.
        places: what to call every row in messages; empty for rows that are made, not read.
        ignored: files that are there and not read, by their ending.
    """

    name: str
    labels: list[int]
    open: Callable[[int], tuple[Picture, str]]
    places: list[str] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def summary(self, rows: Iterable[int], classes: list[str]) -> dict[str, Any]:
        """Rows and their classes, as ``metrics.json`` keeps them."""
        counts = Counter(self.labels[row] for row in rows)
        return {"rows": counts.total(), "dropped": 0, "labels": {name: counts[i] for i, name in enumerate(classes)}}


@dataclass(frozen=True)
class ImageSet:
    """All environments of a set, in DomainBed's order.

    Attributes:
        environments: the environments.
        classes: names of the classes in the order of their numbers.
        source: where the images came from.
    """

    environments: list[Environment]
    classes: list[str]
    source: str
